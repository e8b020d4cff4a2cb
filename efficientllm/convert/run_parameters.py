"""A training run's parameters: those of its newest checkpoint, merged with the frozen ones around them."""

import functools
import logging
import pathlib
import re
import typing
import zlib

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from efficientllm import model as models
from efficientllm.adapters.base import bias_path, tuned
from efficientllm.architecture import from_config
from efficientllm.convert.files import own_quantized
from efficientllm.convert.tensors.tensor_reader import TensorReader
from efficientllm.errors import UserError
from efficientllm.record import checkpoint_checksums
from efficientllm.registry import build
from efficientllm.typing import PathLike
from efficientllm.weights import Weight, box, path_of

if typing.TYPE_CHECKING:
    from efficientllm.convert.run_folder import RunSource

AVERAGE = "ema"  # of a state (`train.step.AveragedState`), its moving average
log = logging.getLogger("efficientllm")


class RunParameters(TensorReader):
    """Reads a run's parameters one at a time, under unrolled paths, in float32, like `OwnQuantizedFolder`."""

    has_own_paths = True

    def __init__(self, source: "RunSource"):
        self.where, self._run, self._base = source.path, source.run, source.base
        self._trained = newest_parameters(source.path / "checkpoints")
        self._method = build("adapter", self._run.adapter, where="config.adapter")
        is_stacked = any(path.startswith("groups/") for path in self._names)
        self._lm = source.lm(scan=is_stacked, precision=self._run.model.precision)
        self._boxes = flax.traverse_util.flatten_dict(models.abstract_params(self._lm), sep="/")
        self._check()
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path, boxed in self._boxes.items():
            shape, names = boxed.unbox().shape, self._lm.stacks.unrolled_paths(path)
            self.shapes |= dict.fromkeys(names, tuple(shape[names != [path] :]))

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

    def finite_leaf(self, name: str) -> np.ndarray:
        """Reads a parameter; a run's checkpoint has no quantized leaves."""
        return self.read(name)

    def read(self, name: str) -> np.ndarray:
        """Reads the parameter at an unrolled path."""
        if name in self._boxes:
            return self._value(name, ())
        return self._value(*self._lm.stacks.stacked_path(name))

    def bind(self, lm: models.Backbone) -> dict[str, own_quantized.Leaf]:
        """`{path: Leaf}` of all parameters of `lm`. Raises UserError as `own_quantized.bind_parameters` does."""
        return own_quantized.bind_parameters(self, lm)

    def _value(self, path, layer):
        """The parameter at `path`, of one `layer` where layers are stacked, with its adapter merged."""
        if path in self._trained:
            return self._trained[path][layer]
        kernel_path = re.sub("bias$", "kernel", path)
        if self._method.adapts_bias and kernel_path != path and self._factors(kernel_path, layer):
            return np.asarray(self._leaf(kernel_path, layer).adapted_bias(self._before(path, layer)), np.float32)
        leaf = self._leaf(path, layer)
        return np.asarray(leaf.dense() if isinstance(leaf, Weight) else leaf, np.float32)

    def _leaf(self, path, layer):
        """The parameter at `path` as the model holds it: quantized, with an adapter around it."""
        from efficientllm.quant import apply as quant

        leaf = quant.rounder(self._run.quant, quant.UNROUNDED)(path, jnp.asarray(self._before(path, layer)))
        arrays = self._factors(path, layer)
        return self._wrapped(path, self._boxes[path].names[len(layer) :], leaf, arrays) if arrays else leaf

    def _factors(self, path, layer):
        """The trained arrays of the adapter around the kernel at `path`, by their names in its leaf."""
        start = len(path) + 1
        return {name[start:]: array[layer] for name, array in self._trained.items() if name.startswith(f"{path}/")}

    def _wrapped(self, path, names, frozen, arrays):
        """The method's leaf around the frozen kernel, with the trained arrays of the checkpoint."""
        boxed = box(frozen, names)
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(self._run.seed), 1), zlib.crc32(path.encode()))
        wrap = self._method.wrap_biased if bias_path(path) in self._boxes else self._method.wrap
        leaf = nn.unbox(wrap(boxed, names, key))
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
        # What a run adds to its checkpoint's model is trained, all of it.
        is_extended = from_config.adds_images(self._run.model.embed, self._base.model)
        return self._base.bind(self._lm.language_model() if is_extended else self._lm)

    @functools.cached_property
    def _drawn(self):
        init = jax.jit(lambda key: nn.unbox(models.init_params(self._lm, key, self._run.train.length)))
        return flax.traverse_util.flatten_dict(init(jax.random.key(self._run.seed)), sep="/")


def trainable_shapes(lm: models.Backbone, method: typing.Any, form: str) -> dict[str, tuple[int, ...]]:
    """`{path: shape}` of the trainable parameters of `lm` with the adapter `method`: what a run's checkpoint holds."""

    def trainable():
        key = jax.random.key(0)
        boxed = models.init_params(lm, key, 8)
        return nn.unbox(tuned(method, lm, boxed, boxed, key, form)[0])

    leaves = jax.tree_util.tree_leaves_with_path(jax.eval_shape(trainable))
    return {path_of(keys): leaf.shape for keys, leaf in leaves}


def checkpoint_steps(folder: PathLike) -> list[int]:
    """Steps of the checkpoints in a run's checkpoint folder, newest first."""
    return sorted((int(path.name) for path in pathlib.Path(folder).glob("*") if path.name.isdecimal()), reverse=True)


def newest_parameters(folder: PathLike) -> dict[str, np.ndarray]:
    """`{path: array}` of the trainable parameters in the newest readable checkpoint of a run's checkpoint folder.

    They are the moving average (`config.train.ema`) where the run has one, as in its evaluation and samples. Writes
    nothing: the run may still be training. Raises UserError if no checkpoint can be read.
    """
    steps = checkpoint_steps(folder)
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
    tree = handler.metadata(folder).tree
    name = AVERAGE if tree.get(AVERAGE) else "params"
    stored = {
        path: metadata
        for path, metadata in flax.traverse_util.flatten_dict(tree[name], sep="/").items()
        if metadata is not None
    }
    item = {path: jax.ShapeDtypeStruct(metadata.shape, metadata.dtype) for path, metadata in stored.items()}
    item = {name: flax.traverse_util.unflatten_dict(item, sep="/")}
    restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
    restored = handler.restore(
        folder, args=ocp.args.PyTreeRestore(item=item, restore_args=restore_args, partial_restore=True)
    )
    return flax.traverse_util.flatten_dict(restored[name], sep="/")
