"""Writes checkpoints that transformers loads: config.json, safetensors, and the tokenizer's files."""

import collections
import functools
import json
import math
import pathlib
import re
import shutil
import typing
from collections.abc import Callable

import flax.traverse_util
import jax
import numpy as np

from efficientllm.architecture import from_config
from efficientllm.convert import denoiser_source
from efficientllm.convert.files.new_folder import new_folder
from efficientllm.convert.files.safetensors_file import INDEX_SUFFIX
from efficientllm.convert.hf_config import denoisers, families, rope_parameters, text_encoders, to_hf
from efficientllm.convert.hf_config.canonical import canonical, differences
from efficientllm.convert.source import Source, is_run
from efficientllm.convert.tensors import parameter_map
from efficientllm.cost import available_memory as room
from efficientllm.errors import UserError, did_you_mean
from efficientllm.model import Backbone
from efficientllm.typing import PathLike, PyTree

SHARD = 2 * 2**30  # bytes of a shard file; one is in memory while it is written
Change = Callable[[str, Callable[..., np.ndarray]], np.ndarray]  # `change(name, read)` returns the tensor to write
# fmt: off
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json",
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
)
# fmt: on

# Keys of a source's config.json that are not copied: rewritten ones, and remote code.
_DROPPED_KEYS = ("torch_dtype", "quantization_config", "auto_map")


def export(
    lm: Backbone,
    params: PyTree,
    folder: PathLike,
    like: Source | str,
    tokenizer: typing.Any = None,
    dtype: np.typing.DTypeLike | None = None,
    max_positions: int | None = None,
    shard: int = SHARD,
) -> None:
    """Writes `params` of `lm` as a checkpoint to a new folder.

    Args:
      like: the Source that the parameters came from, or the name of a family (`families.FAMILIES`).
      tokenizer: a fitted tokenizer (`data.tokenizers.FastTokenizer`); None takes the Source's.
      dtype: of the tensors; None keeps each parameter's dtype.
      max_positions: context length in config.json; None is the Source's. Required with the name of a family that has
        positions.
      shard: bytes of a shard file; more than one get an index.

    Raises UserError if the folder is not empty, or the family cannot describe the model.
    """
    flat = flax.traverse_util.flatten_dict(params, sep="/")

    def get(path, position, dtype):
        return np.asarray(_at(flat[path], position) if position else flat[path]).astype(dtype, copy=False)

    config = _config(lm, like, max_positions)

    def dtype_of(path):
        return np.dtype(dtype or flat[path].dtype)

    with new_folder(folder) as new:
        place = denoiser_source.write_pipeline(like, new)
        write_model(lm, place, config, get, dtype_of, shard, unread=_unread(like))
        write_tokenizer(new, like, tokenizer)


def convert(
    source: Source,
    folder: PathLike,
    dtype: np.typing.DTypeLike | None = None,
    shard: int = SHARD,
    change: Change = lambda name, read: read(),
) -> None:
    """Writes the checkpoint `source` to a new folder, with one shard file in memory at a time.

    `change(name, read)` returns the tensor to write under a name; `read(dtype)` reads the source's, `read()` in the
    dtype that is written.
    """
    lm = source.lm()
    leaves = source.bind(lm)
    dtype = np.dtype(dtype or source.stored_dtype)
    get = functools.partial(_get, leaves, source.tensors)
    with new_folder(folder) as new:
        place = denoiser_source.write_pipeline(source, new)
        write_model(lm, place, _config(lm, source, None), get, lambda path: dtype, shard, change, _unread(source))
        write_tokenizer(new, source, None)


def _unread(like):
    """`{name: function that reads it}` of a source's tensors that its model does not read and its class has."""
    if not isinstance(like, Source) or like.tensors is None or not like.config or is_run(like.config):
        return {}
    unread = re.compile("|".join(like.family.kept_patterns(like.config)) or "(?!)")  # (?!) matches nothing
    return {name: functools.partial(like.tensors.read, name) for name in filter(unread.search, like.tensors.shapes)}


def _get(leaves, tensors, path, position, dtype):
    leaf = leaves[path]
    index = [slice(i, i + 1) for i in position] + [slice(None)] * (len(leaf.shape) - len(position))
    return leaf.read(tensors, tuple(index), dtype)[(0,) * len(position)]


@jax.jit
def _at(leaf, position):
    return leaf[tuple(position)]


def write_model(
    lm: Backbone,
    folder: pathlib.Path,
    config: dict[str, typing.Any],
    get: Callable[..., np.ndarray],
    dtype_of: Callable[[str], np.dtype],
    shard: int,
    change: Change = lambda name, read: read(),
    unread: dict[str, Callable[[], np.ndarray]] | None = None,
) -> None:
    """Writes config.json and the tensors of `get(path, position, dtype)`, in `dtype_of(path)`, each `change`d.

    `unread` are further tensors by name, each read by a function.
    """
    from safetensors.numpy import save_file

    family = families.find_family(config)
    tensors = parameter_map.disk_tensors(parameter_map.bind_parameters(lm, family.table))
    constants = {name: make(lm) for name, make in family.constants.items() if family.writes_constants}
    constants |= {name: read() for name, read in (unread or {}).items()}
    dtypes = {name: dtype_of(tensor.parts[0][0]) for name, tensor in tensors.items()}
    common = collections.Counter(dtypes.values()).most_common(1)[0][0]
    constants = {name: array.astype(common) for name, array in constants.items()}
    sizes = {name: math.prod(tensor.shape) * dtypes[name].itemsize for name, tensor in tensors.items()}
    sizes |= {name: array.nbytes for name, array in constants.items()}
    files = files_of(sizes, shard, family.stem)
    largest = max(math.prod(tensor.shape) for tensor in tensors.values())
    peak_bytes = max(sum(sizes[name] for name in names) for names in files.values()) + 4 * largest  # + one in float32
    room.check_conversion(peak_bytes, "a file of tensors")
    for file, names in files.items():
        arrays = {name: constants[name] for name in names if name in constants}
        arrays |= {name: _tensor(name, tensors[name], get, dtypes[name], change) for name in names if name in tensors}
        save_file(arrays, folder / file, metadata={"format": "pt"})
        del arrays  # before the next file's tensors are made
    if len(files) > 1:
        weight_map = {name: file for file, names in files.items() for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / f"{family.stem}{INDEX_SUFFIX}").write_text(json.dumps(index, indent=2))
    if "model_type" in config:
        config = config | {"dtype": common.name}
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def _tensor(name, tensor, get, dtype, change):
    def read(kind=dtype):
        return tensor.join([get(path, position, kind) for path, _, position in tensor.parts])

    with np.errstate(over="ignore"):
        whole = change(name, read)
        cast = np.ascontiguousarray(whole.astype(dtype, copy=False))
    if not np.isfinite(cast).all():
        _check_range(name, whole if whole.dtype != dtype else read(np.float64), cast)
    return cast


def _check_range(name, whole, cast):
    """Raises UserError if a finite value of the tensor overflows in the dtype that is written."""
    overflows = np.isfinite(whole) & ~np.isfinite(cast)
    if overflows.any():
        largest = np.abs(np.where(overflows, whole, 0)).max()
        raise UserError(
            f"tensor {name!r} holds {largest:g}, which {cast.dtype.name} cannot hold; write bfloat16 or float32"
        )


def files_of(sizes: dict[str, int], shard: int, stem: str = "model") -> dict[str, list[str]]:
    """`{file: tensor names}`: splits tensors, with their sizes in bytes, into shard files of at most `shard` bytes."""
    groups: list[list[str]] = [[]]
    room = shard
    for name, size in sizes.items():
        if size > room and groups[-1]:
            groups.append([])
            room = shard
        groups[-1].append(name)
        room -= size
    if len(groups) == 1:
        return {f"{stem}.safetensors": groups[0]}
    return {f"{stem}-{i:05}-of-{len(groups):05}.safetensors": names for i, names in enumerate(groups, 1)}


def config_of_family(lm: Backbone, name: str) -> dict[str, typing.Any]:
    """The config.json (a dict) by which family `name` describes a model. Raises UserError where it cannot."""
    return _config(lm, name, None)


def _config(lm, like, max_positions):
    """The config.json to write; checked by reading it back and comparing the models."""
    description = canonical(lm)
    if isinstance(like, Source) and not like.config:  # a run from scratch names no family
        return _of_any_family(lm, like)
    if isinstance(like, Source):
        config = {key: value for key, value in like.config.items() if key not in _DROPPED_KEYS}
        config |= (
            {"max_position_embeddings": rope_parameters.named_positions(lm.position, max_positions)}
            if max_positions
            else {}
        )
    else:
        config = _of_family(lm, description, like, max_positions)
    if config.get("model_type") in families.FAMILIES:
        config["architectures"] = [families.FAMILIES[config["model_type"]].architecture]
        config |= rope_parameters.older_keys(config)
    name = families.family_name(config)
    try:
        described = families.describe_config(config, "config.json")
        read_back = canonical(from_config.from_config(_model_config(described.model, lm)))
    except UserError as error:
        raise UserError(f"{name} checkpoints cannot hold this model: {error}") from None
    if messages := differences(description, read_back):
        raise UserError(f"{name} checkpoints cannot hold this model: {messages[0]}")
    return config


def _of_any_family(lm, source):
    """The config.json of the first family that can describe a run's model; its context length is that of training."""
    for name in families.OF_MODALITY[lm.reads]:
        try:
            return _config(lm, name, source.run.train.length)
        except (UserError, KeyError):  # the family cannot describe the model
            continue
    raise UserError(f"{source.path}: no family of checkpoints can hold this model; tasks take the run as it is")


def _of_family(lm, description, name, max_positions):
    names = families.OF_MODALITY[lm.reads]
    if name not in names:
        raise UserError(f"no family {name!r} of checkpoints; known: {', '.join(names)}{did_you_mean(str(name), names)}")
    if lm.reads in ("images", "prompts"):
        describe = denoisers.config_of if lm.reads == "images" else text_encoders.config_of
        return describe(name, lm, description)
    if lm.reads == "text and images":
        raise UserError(f"a {name} checkpoint is written like the one that it was read from; give its Source")
    if max_positions is None and not lm.position.startswith("none"):
        raise UserError(f"a {name} checkpoint states its context length: give max_positions")
    return to_hf.config_of(name, lm, description, max_positions)


def _model_config(model, lm):
    from ml_collections import ConfigDict

    plain = {"attention_kernel": "auto", "kv_cache": "activation", "remat": "none", "scan": True, "unroll": 12}
    return ConfigDict(model | plain | {"precision": lm.precision})


def written_config(folder: PathLike) -> dict[str, typing.Any]:
    """The config.json of a folder that `convert` or `export` wrote."""
    path, _ = denoiser_source.find_part(pathlib.Path(folder))
    return json.loads((path / "config.json").read_text())


def write_tokenizer(folder: pathlib.Path, like: Source | str | None, tokenizer: typing.Any) -> None:
    """Writes a fitted tokenizer; without one, copies the tokenizer of the Source `like`, if it is of text."""
    if isinstance(like, denoiser_source.DenoiserSource):
        return
    if tokenizer is not None:
        _save_fast(tokenizer, folder)
    elif isinstance(like, Source) and (where := like.tokenizer_path).is_dir():
        for name in _TOKENIZER_FILES:
            if (where / name).is_file():
                shutil.copyfile(where / name, folder / name)
    elif isinstance(like, Source) and where.is_file():
        import transformers

        loaded = transformers.AutoTokenizer.from_pretrained(where.parent, gguf_file=where.name, trust_remote_code=False)
        loaded.save_pretrained(folder)


def _save_fast(tokenizer, folder):
    """Writes a fitted tokenizer in transformers' format; an eos id past its vocabulary becomes a token."""
    import transformers

    backend = getattr(tokenizer, "backend", None)
    if backend is None:
        raise UserError(f"tokenizer {tokenizer.fingerprint!r} cannot be written for transformers")
    eos = backend.id_to_token(tokenizer.eos_id) or "<|endoftext|>"
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos)
    fast.save_pretrained(folder)
