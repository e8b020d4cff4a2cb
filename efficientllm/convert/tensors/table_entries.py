"""Entries that tensor name tables are made of (`name_tables`, `denoiser_names`): linear maps, norms, plain tensors."""

Table = dict[str, tuple[tuple[str, ...], str]]  # {name in the file: (our parameters in it, layout)}


def linear(disk: str, *paths: str, layout: str = "rows") -> Table:
    """A linear map: weight and, if the model has it, bias."""
    return {
        f"{disk}.weight": (tuple(f"{path}/kernel" for path in paths), layout),
        f"{disk}.bias": (tuple(f"{path}/bias" for path in paths), layout),
    }


def patches(disk: str, path: str) -> Table:
    """A linear map of patches, stored as a convolution."""
    return {f"{disk}.weight": ((f"{path}/kernel",), "patch"), f"{disk}.bias": ((f"{path}/bias",), "same")}


def norm(disk: str, path: str) -> Table:
    """A norm: scale and, if the model has it, bias."""
    return {f"{disk}.weight": ((f"{path}/scale",), "same"), f"{disk}.bias": ((f"{path}/bias",), "same")}


def plain(disk: str, path: str) -> Table:
    """A tensor as it is."""
    return {disk: ((path,), "same")}


def within(prefix: str, *tables: Table) -> Table:
    """The tables' entries with `prefix` before their names in the file."""
    return {f"{prefix}{disk}": entry for table in tables for disk, entry in table.items()}


def swiglu(prefix: str, path: str, names: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")) -> Table:
    """The three linear maps of a gated ffn."""
    pairs = zip(names, ("gate", "up", "down"), strict=True)
    return {
        disk: entry for name, kernel in pairs for disk, entry in linear(f"{prefix}{name}", f"{path}/{kernel}").items()
    }
