"""Our parameters as a folder that transformers loads: config.json, safetensors, and the tokenizer's files."""

import collections
import functools
import json
import math
import shutil

import flax.traverse_util
import jax
import numpy as np

from efficientllm.architecture import from_config
from efficientllm.convert.files.new_folder import new_folder
from efficientllm.convert.files.safetensors_file import INDEX, SINGLE
from efficientllm.convert.hf_config import families, rope_parameters, to_hf
from efficientllm.convert.hf_config.canonical import canonical, differences
from efficientllm.convert.source import Source
from efficientllm.convert.tensors import parameter_map
from efficientllm.cost import available_memory as room
from efficientllm.errors import UserError, did_you_mean

SHARD = 2 * 2**30  # bytes of a file; one is held in memory while it is written
# fmt: off
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json",
)
# fmt: on


# Of a source's config.json: what is said anew, and code that is not copied.
_LEFT = ("torch_dtype", "quantization_config", "auto_map")


def export(lm, params, folder, like, tokenizer=None, dtype=None, max_positions=None, shard=SHARD):
    """Writes `params` of `lm` to a new folder.

    Args:
      like: the Source that they came from, or the name of a family (`families.FAMILIES`).
      tokenizer: a fitted tokenizer (`data.tokenizers.FastTokenizer`); None takes the Source's.
      dtype: of the tensors; None is each parameter's own.
      max_positions: what config.json shall say; None is the Source's. A family needs one where it rotates.
      shard: bytes of a file, of which there are several, with an index, where one is not enough.

    Raises UserError if the folder holds something, or the family cannot say what the model is.
    """
    flat = flax.traverse_util.flatten_dict(params, sep="/")

    def get(path, position, dtype):
        return np.asarray(_at(flat[path], position) if position else flat[path]).astype(dtype, copy=False)

    config = _config(lm, like, max_positions)
    with new_folder(folder) as new:
        write_model(lm, new, config, get, lambda path: np.dtype(dtype or flat[path].dtype), shard)
        write_tokenizer(new, like, tokenizer)


def convert(source, folder, dtype=None, shard=SHARD, change=lambda name, read: read()):
    """Writes what `source` holds to a new folder, one file of it in memory at a time.

    `change(name, read)` gives the tensor to write under a name; `read(dtype)` is the one that is there, `read()` in
    the dtype that is written.
    """
    lm = source.lm()
    leaves = source.bind(lm)
    dtype = np.dtype(dtype or source.stored_dtype)
    get = functools.partial(_get, leaves, source.tensors)
    with new_folder(folder) as new:
        write_model(lm, new, _config(lm, source, None), get, lambda path: dtype, shard, change)
        write_tokenizer(new, source, None)


def _get(leaves, tensors, path, position, dtype):
    leaf = leaves[path]
    index = [slice(i, i + 1) for i in position] + [slice(None)] * (len(leaf.shape) - len(position))
    return leaf.read(tensors, tuple(index), dtype)[(0,) * len(position)]


@jax.jit
def _at(leaf, position):
    return leaf[tuple(position)]


def write_model(lm, folder, config, get, dtype_of, shard, change=lambda name, read: read()):
    """config.json and the tensors of `get(path, leading position)` in `dtype_of(path)`, each of them `change`d."""
    from safetensors.numpy import save_file

    tensors = parameter_map.disk_tensors(
        parameter_map.bind_parameters(lm, families.FAMILIES[config["model_type"]].table)
    )
    dtypes = {name: dtype_of(tensor.parts[0][0]) for name, tensor in tensors.items()}
    sizes = {name: math.prod(tensor.shape) * dtypes[name].itemsize for name, tensor in tensors.items()}
    files = files_of(sizes, shard)
    largest = max(math.prod(tensor.shape) for tensor in tensors.values())
    most = max(sum(sizes[name] for name in names) for names in files.values()) + 4 * largest  # one in float32 besides
    room.check_conversion(most, "a file of tensors")
    for file, names in files.items():
        held = {name: _tensor(name, tensors[name], get, dtypes[name], change) for name in names}
        save_file(held, folder / file, metadata={"format": "pt"})
        del held  # before the next file's tensors are made
    if len(files) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}}
        index["weight_map"] = {name: file for file, names in files.items() for name in names}
        (folder / INDEX).write_text(json.dumps(index, indent=2))
    common = collections.Counter(dtype.name for dtype in dtypes.values())
    config = config | {"dtype": common.most_common(1)[0][0]}
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
    """Raises UserError for a number of the tensor that the dtype which is written cannot hold."""
    lost = np.isfinite(whole) & ~np.isfinite(cast)
    if lost.any():
        largest = np.abs(np.where(lost, whole, 0)).max()
        raise UserError(
            f"tensor {name!r} holds {largest:g}, which {cast.dtype.name} cannot hold; write bfloat16 or float32"
        )


def files_of(sizes, shard):
    """`{file: names of its tensors}`, of each one's bytes."""
    groups, room = [[]], shard
    for name, size in sizes.items():
        if size > room and groups[-1]:
            groups.append([])
            room = shard
        groups[-1].append(name)
        room -= size
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": names for i, names in enumerate(groups, 1)}


def _config(lm, like, max_positions):
    """The config.json to write, read back and compared with the model."""
    ours = canonical(lm)
    if isinstance(like, Source) and not like.config:  # a run from scratch, of no family but perhaps what one can say
        return _of_any_family(lm, like)
    if isinstance(like, Source):
        config = {key: value for key, value in like.config.items() if key not in _LEFT}
        config |= (
            {"max_position_embeddings": rope_parameters.named_positions(lm.position, max_positions)}
            if max_positions
            else {}
        )
    else:
        config = _of_family(lm, ours, like, max_positions)
    config["architectures"] = [families.FAMILIES[config["model_type"]].architecture]
    config |= rope_parameters.older_keys(config)
    try:
        described = families.describe_config(config, "config.json")
        theirs = canonical(from_config.from_config(_model_config(described.model, lm)))
    except UserError as error:
        raise UserError(f"{config['model_type']} checkpoints cannot hold this model: {error}") from None
    if different := differences(ours, theirs):
        raise UserError(f"{config['model_type']} checkpoints cannot hold this model: {different[0]}")
    return config


def _of_any_family(lm, source):
    """The config.json of the first family that can hold a run's model; it has the positions it was trained on."""
    for name in families.FAMILIES:
        try:
            return _config(lm, name, source.run.train.length)
        except (UserError, KeyError):  # a family has no words for some of it
            continue
    raise UserError(f"{source.path}: no family of transformers can hold this model; infer and chat take it as it is")


def _of_family(lm, ours, name, max_positions):
    if name not in families.FAMILIES:
        known = ", ".join(families.FAMILIES)
        raise UserError(
            f"no family {name!r} of checkpoints; known: {known}{did_you_mean(str(name), families.FAMILIES)}"
        )
    if max_positions is None and not lm.position.startswith("none"):
        raise UserError(f"a {name} checkpoint says how many positions it has: give max_positions")
    return to_hf.config_of(name, lm, ours, max_positions)


def _model_config(model, lm):
    from ml_collections import ConfigDict

    plain = {"attention_kernel": "auto", "kv_cache": "activation", "remat": "none", "scan": True, "unroll": 12}
    return ConfigDict(model | plain | {"precision": lm.precision})


def write_tokenizer(folder, like, tokenizer):
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
    """A fitted tokenizer of ours as files of transformers; an eos behind its vocabulary becomes a token there."""
    import transformers

    backend = getattr(tokenizer, "backend", None)
    if backend is None:
        raise UserError(f"tokenizer {tokenizer.fingerprint!r} has no form that transformers reads")
    eos = backend.id_to_token(tokenizer.eos_id) or "<|endoftext|>"
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos)
    fast.save_pretrained(folder)
