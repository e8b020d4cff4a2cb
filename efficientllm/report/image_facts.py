"""Facts of rows of pictures that must be equal before their losses, distances and times are compared."""

import typing

from efficientllm.errors import UserError
from efficientllm.registry import parse_spec
from efficientllm.report import columns
from efficientllm.report.rows import Row, spec_name

# Fields that change how a model is trained, and not the held-out loss that measures it (see `objectives`).
_TRAINED_BY = {
    "flow": ("shift", "mean", "std", "weight", "density", "label_dropout"),
    "ddpm": ("label_dropout",),
}
_SAMPLED_BY = ("infer.solver", "infer.guidance", "infer.guidance_channels")


def batch(row: Row) -> str:
    """The effective batch and what is learnt from it: `32 pictures of 32 px a step, flow of pixels`."""
    side, rows = picture_side(row), row.config.get("infer.batch_size" if row.kind == "infer" else "train.batch_size")
    size = "" if side is None else f" of {side} px"
    return f"{rows} pictures{size} a step, {spec_name(row.objective)} of {autoencoder(row)}"


def picture_side(row: Row) -> int | str | None:
    """The side of a row's pictures in pixels, or None where neither its data nor their spec say it.

    Of pictures of a size of their own (`config.infer.size`) all sides, `512 x 768`.
    """
    if size := row.config.get("infer.size"):
        return " x ".join(map(str, size))
    described = (row.record["provenance"].get("data") or {}).get("size")
    return described if described is not None else _fields(row.config.get("data")).get("size")


def autoencoder(row: Row) -> str:
    """The spec of the autoencoder whose latents are learnt, `pixels` without one."""
    return str(row.config.get("autoencoder") or "pixels")


def objective(row: Row, key: str) -> str | None:
    """What of a row's objective a metric depends on: all of it for the training loss, else what it measures."""
    spec, name = row.objective, spec_name(row.objective)
    if key == "loss" or name not in _TRAINED_BY:
        return spec
    measured = {field: value for field, value in _fields(spec).items() if field not in _TRAINED_BY[name]}
    return f"{name}({', '.join(f'{field}={value!r}' for field, value in sorted(measured.items()))})"


def training_facts(both: typing.Sequence[Row], key: str) -> dict[str, tuple[typing.Any, ...]]:
    """`{fact: (of the row, of the reference)}` of pictures, beside those that text has too."""
    facts = {
        "kind of data": tuple(row.reads for row in both),
        "objective": tuple(objective(row, key) for row in both),
        "autoencoder": tuple(map(autoencoder, both)),
        "side of the pictures": tuple(map(picture_side, both)),
        "number of pictures": tuple(map(_pictures, both)),
    }
    if columns.is_of_samples(key):
        facts |= sample_facts(both)
    return facts


def sample_facts(both: typing.Sequence[Row]) -> dict[str, tuple[typing.Any, ...]]:
    """Facts on which a distance of samples depends: their number, how they were drawn, what measured them."""
    facts = {name: tuple(row.config.get(name) for row in both) for name in _SAMPLED_BY}
    drawn = [row.record["provenance"].get("samples") or {} for row in both]
    names = {"extractor of features": "sha256", "number of samples": "count", "compared pictures": "compared_sha256"}
    for fact, name in names.items():
        facts[fact] = tuple(sample.get(name) for sample in drawn)
    return facts


def _pictures(row):
    sizes = [row.config.get(f"train.{key}") for key in ("steps", "batch_size")]
    return sizes[0] * sizes[1] if row.kind != "infer" and all(isinstance(size, int) for size in sizes) else None


def _fields(spec):
    """The fields that a spec string sets; none where it is no spec."""
    try:
        return parse_spec(spec)[1]
    except UserError:
        return {}
