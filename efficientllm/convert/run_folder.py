"""Training runs as checkpoints: their newest parameters, merged with the checkpoint that they were tuned from."""

import dataclasses
import functools
import logging
import pathlib
import typing
import zlib
from collections.abc import Callable

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from efficientllm import base_config
from efficientllm import model as models
from efficientllm.adapters.base import tuned
from efficientllm.architecture import from_config
from efficientllm.convert.files import own_quantized
from efficientllm.convert.source import Source, is_run
from efficientllm.errors import UserError
from efficientllm.record import checkpoint_checksums
from efficientllm.registry import build
from efficientllm.typing import Config, PathLike
from efficientllm.untrusted import files, json_text
from efficientllm.weights import Weight, box, path_of

TASKS = ("pretrain", "tune")
TOKENIZER = "tokenizer"  # a folder in the run's folder, written when the run starts
_DESCRIBES = ("size", "mixer", "ffn", "pattern", "residual", "position", "norm", "tied", "embed_norm")
log = logging.getLogger("efficientllm")


@dataclasses.dataclass(frozen=True)
class RunSource(Source):
    """Source of a run's parameters, under our paths. `run` is its config, `base` the Source it started from or None."""

    run: Config | None = None
    base: Source | None = None

    @property
    def tokenizer_path(self) -> pathlib.Path:
        """The tokenizer folder of the run; without one, that of the checkpoint it started from."""
        folder = self.path / TOKENIZER
        return folder if folder.is_dir() or self.base is None else self.base.tokenizer_path

    def tokenizer(self) -> str:
        """A spec for `config.tokenizer`: the one saved in the run's folder, else the one its config names."""
        if (self.path / TOKENIZER).is_dir():
            return f"hf(path={str(self.path / TOKENIZER)!r})"
        if self.run.tokenizer == "pretrained":
            return self.base.tokenizer()
        return self.run.tokenizer

    @property
    def trained_on_conversations(self) -> bool:
        """Whether the run was trained on conversations."""
        return getattr(build("data", self.run.data, where="config.data"), "records", False)

    def chat_template(self) -> str | None:
        """The chat template of the checkpoint that the run started from, or None."""
        return self.base.chat_template() if self.base else None


def newest_run(path: pathlib.Path) -> pathlib.Path:
    """Resolves a folder of runs, such as `runs/NAME`, to its newest run, and `runs/NAME/adapter` to that run's adapter.

    Returns any other path unchanged.
    """
    folder = path.parent if path.name == "adapter" and not files.is_there(path) else path
    if (
        not files.is_there(folder)
        or not folder.is_dir()
        or any((folder / name).exists() for name in ("config.json", "adapter_config.json"))
    ):
        return path
    config_files = [file for file in folder.glob("*/config.json") if _is_run_file(file)]
    if not config_files:
        return path
    run = max(config_files, key=lambda file: file.stat().st_mtime).parent
    return run / "adapter" if folder is not path else run


def _is_run_file(file):
    try:
        config = json_text.read(file)
        return is_run(config) and config["task"] in TASKS
    except UserError:
        return False


def open_run(
    path: pathlib.Path, config: dict[str, typing.Any], weights: bool, open_source: Callable[[str, bool], Source]
) -> Source:
    """Opens a run's folder with this config.json; a run of which only the adapter is left is an AdaptedSource.

    Raises UserError if it is not a training run, or the checkpoint it started from cannot be opened.
    """
    where = f"config.model.pretrained = {str(path)!r}"
    run = _config(config, where)
    if run.task not in TASKS:
        raise UserError(f"{where}: a run of {run.task!r} holds no model; name one of pretrain or tune")
    if weights and not _steps(path / "checkpoints") and (path / "adapter" / "adapter_config.json").is_file():
        from efficientllm.convert import adapter_folder  # no checkpoint is left: only the adapter

        return adapter_folder.open_adapter(path / "adapter", where, weights, open_source)
    from efficientllm.registry.plugins import import_plugins  # registers the techniques of config.imports

    import_plugins(run.imports)
    try:
        base = open_source(run.model.pretrained, weights) if run.model.pretrained else None
    except UserError as error:
        raise UserError(f"{where}: the checkpoint that the run started from cannot be opened: {error}") from None
    model = dict(base.model) if base else {key: run.model[key] for key in _DESCRIBES}
    source = RunSource(
        path,
        dict(base.config) if base else {},
        model,
        base.max_positions if base else None,
        None,
        {},
        run=run,
        base=base,
    )
    if base is None:  # its widths are in the size
        model["parameters_of"] = ""
        model["size"] = _with_vocabulary(run, source)
    tensors = RunParameters(source) if weights else None
    return dataclasses.replace(source, tensors=tensors)


def _config(stored, where):
    """The run's config over today's defaults; keys that no longer exist are dropped."""
    config = base_config.get_config()

    def update(into, values):
        for key, value in values.items():
            if key not in into:
                continue
            if isinstance(value, dict):
                update(into[key], value)
            else:
                into[key] = _tuples(value)

    try:
        update(config, stored)
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{where}: its config.json is not that of a run ({error})") from None
    return config


def _tuples(value):
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _with_vocabulary(run, source):
    """The run's size as a spec, with the vocabulary size and the widths that `parameters_of` gives."""
    size = build("size", run.model.size, where="config.model.size")
    count = size.vocab_size
    if count is None:
        from efficientllm import data

        count = data.build_tokenizer(source.tokenizer(), run.data).vocab_size
    size = from_config.sized(run.model, count)
    fields = dataclasses.asdict(size) | {"vocab_size": count}
    return f"custom({', '.join(f'{key}={value!r}' for key, value in fields.items() if value is not None)})"


class RunParameters:
    """Reads a run's parameters one at a time, under unrolled paths, in float32, like `OwnQuantizedFolder`."""

    def __init__(self, source: RunSource):
        self.where, self._run, self._base = source.path, source.run, source.base
        self._trained = newest_parameters(source.path / "checkpoints")
        self._method = build("adapter", self._run.adapter, where="config.adapter")
        is_stacked = any(path.startswith("groups/") for path in self._names)
        self._lm = source.lm(scan=is_stacked, precision=self._run.model.precision)
        self._boxes = flax.traverse_util.flatten_dict(models.abstract_params(self._lm), sep="/")
        self._check()
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path, boxed in self._boxes.items():
            shape, rest = boxed.unbox().shape, path.removeprefix("groups/")
            names = [path] if rest == path else [f"group_{i}/{rest}" for i in range(self._lm.num_groups)]
            self.shapes |= dict.fromkeys(names, tuple(shape[len(names) > 1 or rest != path :]))

    def _check(self):
        """Raises UserError if the checkpoint's parameters are not those of the model that the config describes."""
        expected = trainable_shapes(self._lm, self._method, self._run.quant)
        stored = {path: array.shape for path, array in self._trained.items()}
        for path in sorted(expected.keys() | stored.keys()):
            if expected.get(path) != stored.get(path):
                holds, asks = (f"{list(shapes[path])}" if path in shapes else "none" for shapes in (stored, expected))
                raise UserError(
                    f"{self.where}: the checkpoint's parameter {path!r} has shape {holds}, the run's model asks for "
                    f"{asks}; serve the run with the version of efficientllm that wrote it"
                )

    @property
    def _names(self):
        return self._trained.keys()

    def dtype(self, name: str) -> np.dtype:
        """float32, the dtype of trained parameters."""
        return np.dtype(np.float32)

    def leaf(self, name: str) -> np.ndarray:
        """Reads a parameter; a run's checkpoint has no quantized leaves."""
        return self.read(name)

    def read(self, name: str) -> np.ndarray:
        """Reads the parameter at an unrolled path."""
        if name in self._boxes:
            return self._value(name, ())
        group, _, rest = name.partition("/")
        return self._value(f"groups/{rest}", (int(group.removeprefix("group_")),))

    def bind(self, lm: models.LM) -> dict[str, own_quantized.Leaf]:
        """`{path: Leaf}` of all parameters of `lm`. Raises UserError as `own_quantized.bind_parameters` does."""
        return own_quantized.bind_parameters(self, lm)

    def _value(self, path, layer):
        """The parameter at `path`, of one `layer` where layers are stacked, with its adapter merged."""
        if path in self._trained:
            return self._trained[path][layer]
        from efficientllm.quant import apply as quant

        leaf = quant.rounder(self._run.quant, quant.KEEP_TABLES)(path, jnp.asarray(self._before(path, layer)))
        start = len(path) + 1
        arrays = {name[start:]: array[layer] for name, array in self._trained.items() if name.startswith(f"{path}/")}
        if arrays:
            leaf = self._wrapped(path, self._boxes[path].names[len(layer) :], leaf, arrays)
        return np.asarray(leaf.dense() if isinstance(leaf, Weight) else leaf, np.float32)

    def _wrapped(self, path, names, frozen, arrays):
        """The method's leaf around the frozen kernel, with the trained arrays of the checkpoint."""
        boxed = box(frozen, names)
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(self._run.seed), 1), zlib.crc32(path.encode()))
        leaf = nn.unbox(self._method.wrap(boxed, names, key))
        return leaf.replace(**{name: jnp.asarray(array) for name, array in arrays.items()})

    def _before(self, path, layer):
        """The parameter at step 0: from the checkpoint that the run started from, or as initialized."""
        if self._base is None:
            return self._drawn[path][layer]
        leaf = self._bound[path]
        index = [slice(i, i + 1) for i in layer] + [slice(None)] * (len(leaf.shape) - len(layer))
        return leaf.read(self._base.tensors, tuple(index), np.float32)[(0,) * len(layer)]

    @functools.cached_property
    def _bound(self):
        return self._base.bind(self._lm)

    @functools.cached_property
    def _drawn(self):
        init = jax.jit(lambda key: nn.unbox(models.init_params(self._lm, key, self._run.train.length)))
        return flax.traverse_util.flatten_dict(init(jax.random.key(self._run.seed)), sep="/")


def trainable_shapes(lm: models.LM, method: typing.Any, form: str) -> dict[str, tuple[int, ...]]:
    """`{path: shape}` of the trainable parameters of `lm` with the adapter `method`: what a run's checkpoint holds."""

    def trainable():
        key = jax.random.key(0)
        boxed = models.init_params(lm, key, 8)
        return nn.unbox(tuned(method, lm, boxed, boxed, key, form)[0])

    leaves = jax.tree_util.tree_leaves_with_path(jax.eval_shape(trainable))
    return {path_of(keys): leaf.shape for keys, leaf in leaves}


def _steps(folder):
    """Steps of the checkpoints in a run's checkpoint folder, newest first."""
    return sorted((int(path.name) for path in pathlib.Path(folder).glob("*") if path.name.isdecimal()), reverse=True)


def newest_parameters(folder: PathLike) -> dict[str, np.ndarray]:
    """`{path: array}` of the trainable parameters in the newest readable checkpoint of a run's checkpoint folder.

    Writes nothing: the run may still be training. Raises UserError if no checkpoint can be read.
    """
    steps = _steps(folder)
    for step in steps:
        if damage := checkpoint_checksums.damage(pathlib.Path(folder) / str(step)):
            log.warning("checkpoint %d cannot be read (damaged: %s); trying the one before", step, damage)
            continue
        try:
            return _restored(pathlib.Path(folder) / str(step) / "state")
        except Exception as error:  # orbax raises whatever its storage backends raise
            lines = str(error).strip().splitlines()
            log.warning("checkpoint %d cannot be read (%s); trying the one before", step, lines[0] if lines else error)
    if steps:
        raise UserError(f"{folder}: none of the {len(steps)} checkpoints can be read")
    raise UserError(
        f"{folder}: no checkpoint; a run has one after config.checkpoint.every steps, and none with "
        "config.checkpoint.keep = 0"
    )


def _restored(folder):
    import orbax.checkpoint as ocp

    handler = ocp.PyTreeCheckpointHandler()
    tree = handler.metadata(folder).tree["params"]
    stored = {
        path: metadata
        for path, metadata in flax.traverse_util.flatten_dict(tree, sep="/").items()
        if metadata is not None
    }
    item = {path: jax.ShapeDtypeStruct(metadata.shape, metadata.dtype) for path, metadata in stored.items()}
    item = {"params": flax.traverse_util.unflatten_dict(item, sep="/")}
    restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
    restored = handler.restore(
        folder, args=ocp.args.PyTreeRestore(item=item, restore_args=restore_args, partial_restore=True)
    )
    return flax.traverse_util.flatten_dict(restored["params"], sep="/")
