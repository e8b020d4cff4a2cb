"""The folder of a run of ours as a checkpoint: its newest parameters, merged with what they were tuned around."""

import dataclasses
import functools
import logging
import pathlib
import zlib

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
from efficientllm.untrusted import files, json_text
from efficientllm.weights import Weight, box, path_of

TASKS = ("pretrain", "tune")
TOKENIZER = "tokenizer"  # a folder of the run's, written when it starts
_DESCRIBES = ("size", "mixer", "ffn", "pattern", "residual", "position", "norm", "tied", "embed_norm")
log = logging.getLogger("efficientllm")


@dataclasses.dataclass(frozen=True)
class RunSource(Source):
    """A run's parameters under our own paths. `run` is its config, `base` the Source that it began from, or None."""

    run: object = None
    base: object = None

    @property
    def tokenizer_path(self):
        """The run's own folder of one, else where the checkpoint that it began from has its."""
        own = self.path / TOKENIZER
        return own if own.is_dir() or self.base is None else self.base.tokenizer_path

    def tokenizer(self):
        """A spec for `config.tokenizer`: of the tokenizer that the run keeps; of one without, the one it names."""
        if (self.path / TOKENIZER).is_dir():
            return f"hf(path={str(self.path / TOKENIZER)!r})"
        if self.run.tokenizer == "pretrained":
            return self.base.tokenizer()
        return self.run.tokenizer

    @property
    def learnt_records(self):
        """Whether the run was trained on conversations."""
        return getattr(build("data", self.run.data, where="config.data"), "records", False)

    def chat_template(self):
        """The template of the checkpoint that the run began from, or None."""
        return self.base.chat_template() if self.base else None


def newest_run(path):
    """The newest run in a folder of runs, such as `runs/NAME`, and of `runs/NAME/adapter` that run's; else the path."""
    folder = path.parent if path.name == "adapter" and not files.is_there(path) else path
    if (
        not files.is_there(folder)
        or not folder.is_dir()
        or any((folder / name).exists() for name in ("config.json", "adapter_config.json"))
    ):
        return path
    found = [file for file in folder.glob("*/config.json") if _is_run_file(file)]
    if not found:
        return path
    run = max(found, key=lambda file: file.stat().st_mtime).parent
    return run / "adapter" if folder is not path else run


def _is_run_file(file):
    try:
        config = json_text.read(file)
        return is_run(config) and config["task"] in TASKS
    except UserError:
        return False


def open_run(path, config, weights, open_source):
    """The RunSource of the folder `path` with the config.json `config`. Raises UserError."""
    where = f"config.model.pretrained = {str(path)!r}"
    run = _config(config, where)
    if run.task not in TASKS:
        raise UserError(f"{where}: a run of {run.task!r} holds no model; name one of pretrain or tune")
    if weights and not _steps(path / "checkpoints") and (path / "adapter" / "adapter_config.json").is_file():
        from efficientllm.convert import adapter_folder  # all that is left of what was tuned

        return adapter_folder.open_adapter(path / "adapter", where, weights, open_source)
    from efficientllm.registry.plugins import import_plugins  # techniques of one's own, as the run had them

    import_plugins(run.imports)
    try:
        base = open_source(run.model.pretrained, weights) if run.model.pretrained else None
    except UserError as error:
        raise UserError(f"{where}: what the run began from cannot be opened: {error}") from None
    model = dict(base.model) if base else {key: run.model[key] for key in _DESCRIBES}
    source = RunSource(
        path, dict(base.config) if base else {}, model, base and base.max_positions, None, {}, run=run, base=base
    )
    if base is None:  # its widths are in the size
        model["parameters_of"] = ""
        model["size"] = _with_vocabulary(run, source)
    tensors = RunParameters(source) if weights else None
    return dataclasses.replace(source, tensors=tensors)


def _config(found, where):
    """The run's config over the defaults of today; keys that are no longer there have no meaning."""
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
        update(config, found)
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{where}: its config.json is none of a run ({error})") from None
    return config


def _tuples(value):
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _with_vocabulary(run, source):
    """The spec of the run's size with all that a tokenizer and `parameters_of` have decided."""
    size = build("size", run.model.size, where="config.model.size")
    count = size.vocab_size
    if count is None:
        from efficientllm import data

        count = data.build_tokenizer(source.tokenizer(), run.data).vocab_size
    size = from_config.sized(run.model, count)
    fields = dataclasses.asdict(size) | {"vocab_size": count}
    return f"custom({', '.join(f'{key}={value!r}' for key, value in fields.items() if value is not None)})"


class RunParameters:
    """What reads a run's parameters, one at a time, as float32 arrays of layers apart (`rounded.Folder` likewise)."""

    def __init__(self, source):
        self.where, self._run, self._base = source.path, source.run, source.base
        self._learnt = newest_parameters(source.path / "checkpoints")
        self._method = build("adapter", self._run.adapter, where="config.adapter")
        is_stacked = any(path.startswith("groups/") for path in self._names)
        self._lm = source.lm(scan=is_stacked, precision=self._run.model.precision)
        self._boxes = flax.traverse_util.flatten_dict(models.abstract_params(self._lm), sep="/")
        self._check()
        self.shapes = {}
        for path, boxed in self._boxes.items():
            shape, rest = boxed.unbox().shape, path.removeprefix("groups/")
            names = [path] if rest == path else [f"group_{i}/{rest}" for i in range(self._lm.num_groups)]
            self.shapes |= dict.fromkeys(names, tuple(shape[len(names) > 1 or rest != path :]))

    def _check(self):
        """Refuses a checkpoint whose parameters are not those that the run's config describes to this version."""
        expected = trainable_shapes(self._lm, self._method, self._run.quant)
        stored = {path: array.shape for path, array in self._learnt.items()}
        for path in sorted(expected.keys() | stored.keys()):
            if expected.get(path) != stored.get(path):
                holds, asks = (f"{list(shapes[path])}" if path in shapes else "none" for shapes in (stored, expected))
                raise UserError(
                    f"{self.where}: the checkpoint's parameter {path!r} has shape {holds}, the run's model asks for "
                    f"{asks}; serve the run with the version of efficientllm that wrote it"
                )

    @property
    def _names(self):
        return self._learnt.keys()

    def dtype(self, name):
        """float32: what is trained."""
        return np.dtype(np.float32)

    def leaf(self, name):
        """The array of a parameter; nothing is rounded."""
        return self.read(name)

    def read(self, name):
        """The array of a parameter of layers apart."""
        if name in self._boxes:
            return self._value(name, ())
        group, _, rest = name.partition("/")
        return self._value(f"groups/{rest}", (int(group.removeprefix("group_")),))

    def bind(self, lm):
        """`{path: Leaf}` of all parameters of `lm`. Raises UserError as `rounded.Folder` does."""
        return own_quantized.bind_parameters(self, lm)

    def _value(self, path, layer):
        """What the run has at `path` of its own layout, of one `layer` of a stack, with its adapter added."""
        if path in self._learnt:
            return self._learnt[path][layer]
        from efficientllm.quant import apply as quant

        held = quant.rounder(self._run.quant, quant.KEEP_TABLES)(path, jnp.asarray(self._before(path, layer)))
        start = len(path) + 1
        arrays = {name[start:]: array[layer] for name, array in self._learnt.items() if name.startswith(f"{path}/")}
        if arrays:
            held = self._wrapped(path, self._boxes[path].names[len(layer) :], held, arrays)
        return np.asarray(held.dense() if isinstance(held, Weight) else held, np.float32)

    def _wrapped(self, path, names, held, arrays):
        """The method's leaf around what it was put around, with the arrays that have been learnt."""
        boxed = box(held, names)
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(self._run.seed), 1), zlib.crc32(path.encode()))
        leaf = nn.unbox(self._method.wrap(boxed, names, key))
        return leaf.replace(**{name: jnp.asarray(array) for name, array in arrays.items()})

    def _before(self, path, layer):
        """The parameter that the run began with: the checkpoint's, or the one it drew."""
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


def trainable_shapes(lm, method, form):
    """`{path: shape}` of the parameters that a run's checkpoint holds: those of `lm` that learn, by `method`."""

    def trainable():
        key = jax.random.key(0)
        boxed = models.init_params(lm, key, 8)
        return nn.unbox(tuned(method, lm, boxed, boxed, key, form)[0])

    leaves = jax.tree_util.tree_leaves_with_path(jax.eval_shape(trainable))
    return {path_of(keys): leaf.shape for keys, leaf in leaves}


def _steps(folder):
    """The steps of the checkpoints in a run's folder of them, the newest first."""
    return sorted((int(each.name) for each in pathlib.Path(folder).glob("*") if each.name.isdecimal()), reverse=True)


def newest_parameters(folder):
    """`{path: array}` of what learns, of the newest checkpoint in a run's folder that can be read; nothing is changed
    there, where a run may be under way. Raises UserError where there is none."""
    steps = _steps(folder)
    for step in steps:
        if damage := checkpoint_checksums.damage(pathlib.Path(folder) / str(step)):
            log.warning("checkpoint %d cannot be read (damaged: %s); trying the one before", step, damage)
            continue
        try:
            return _restored(pathlib.Path(folder) / str(step) / "state")
        except Exception as error:  # orbax raises whatever its storage backends raise
            said = str(error).strip().splitlines()
            log.warning("checkpoint %d cannot be read (%s); trying the one before", step, said[0] if said else error)
    if steps:
        raise UserError(f"{folder}: none of the {len(steps)} checkpoints can be read")
    raise UserError(
        f"{folder}: no checkpoint; a run has one after config.checkpoint.every steps, and keeps none with "
        "config.checkpoint.keep = 0"
    )


def _restored(folder):
    import orbax.checkpoint as ocp

    handler = ocp.PyTreeCheckpointHandler()
    tree = handler.metadata(folder).tree["params"]
    known = {path: each for path, each in flax.traverse_util.flatten_dict(tree, sep="/").items() if each is not None}
    item = {path: jax.ShapeDtypeStruct(each.shape, each.dtype) for path, each in known.items()}
    item = {"params": flax.traverse_util.unflatten_dict(item, sep="/")}
    how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
    found = handler.restore(folder, args=ocp.args.PyTreeRestore(item=item, restore_args=how, partial_restore=True))
    return flax.traverse_util.flatten_dict(found["params"], sep="/")
