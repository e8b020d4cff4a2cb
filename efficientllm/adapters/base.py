"""Base class of tuning methods, and the tree maps that attach, split and merge adapters."""

import re
import typing
import zlib
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from efficientllm.errors import FieldError, UserError
from efficientllm.quant.apply import UNROUNDED, quantize
from efficientllm.typing import Params, PyTree
from efficientllm.untrusted import patterns
from efficientllm.weights import Weight, adapted_bias, dense, is_box, path_of

if typing.TYPE_CHECKING:
    from efficientllm.model import Backbone

KERNEL = re.compile(r"block_\d+/(?!.*\brouter/).*\bkernel$")  # of blocks; never routers, never the head
# The default `target`: not the modulation of diffusion models, a third of their parameters; nor a vision tower, which
# tools for vision-language models leave frozen.
MIXERS_AND_FFNS = r"^(?!vision/).*/(mixer|ffn)\w*/(?!\w*modulation/)"


class PeftFormat(typing.NamedTuple):
    """PEFT's file format for the adapters of a method.

    Args:
      kind: `peft_type` of adapter_config.json, which determines the tensors' names and shapes.
      options: keys and values of adapter_config.json that distinguish the method from others of its kind.
      experts: whether PEFT's method computes the same function for an expert's kernel.
      parts: whether PEFT's method computes the same function for one of several kernels that share a tensor.
      fallback: the method whose format holds the adapters that this format cannot; None where no format does.
    """

    kind: str
    options: dict = {}
    experts: bool = True
    parts: bool = True
    fallback: str | None = None


class Method:
    """Tuning method; subclasses are frozen dataclasses.

    A subclass with `learnt` has a field `target`, a regex over parameter paths. It is not declared here: the registry
    reads every annotation as a parameter of the spec.
    """

    # Names of the leaf's trainable arrays; empty where the method makes no leaf.
    learnt: typing.ClassVar[tuple[str, ...]] = ()
    # The class of the leaf that `wrap` makes, by which adapters are found in a model's parameters.
    leaf_type: typing.ClassVar[type[Weight] | None] = None
    # (regex, factor) pairs that multiply learning rates, ahead of `config.train.rates`.
    rates: typing.ClassVar[tuple[tuple[str, float], ...]] = ()
    # Whether the method needs layers unrolled, not stacked.
    unrolled: typing.ClassVar[bool] = False
    # Whether the frozen kernel differs from the checkpoint's: it is then the result of `frozen`.
    splits_kernel: typing.ClassVar[bool] = False
    # The probability with which an adapter drops its inputs; a field of the methods that can.
    dropout = 0.0
    # Whether the leaf around the kernel of a layer with a bias changes the bias too (`Weight.adapted_bias`).
    adapts_bias: typing.ClassVar[bool] = False
    # Whether every parameter of the model is trainable.
    trains_all: typing.ClassVar[bool] = False
    # PEFT's format for the adapters; None where PEFT has none.
    peft: typing.ClassVar[PeftFormat | None] = None

    def wrap(self, kernel: PyTree, names: Sequence[str | None], key: jax.Array) -> PyTree:
        """Make the leaf that replaces a kernel, with its new arrays boxed.

        Args:
          kernel: a boxed array or a `Weight` of boxed arrays, `[..., in, out]`.
          names: the kernel's logical axes.
          key: a random key for this kernel alone.
        """
        raise NotImplementedError(type(self).__name__)

    def wrap_biased(self, kernel: PyTree, names: Sequence[str | None], key: jax.Array) -> PyTree:
        """Make the leaf for the kernel of a layer with a bias; the arguments are those of `wrap`."""
        return self.wrap(kernel, names, key)

    def frozen(self, kernel: np.ndarray) -> np.ndarray:
        """Return the part of a kernel `[in, out]` that stays frozen beside the adapter."""
        return kernel

    def trains(self, path: str, lm: "Backbone") -> bool:
        """Whether the parameter at `path` is trainable."""
        return bool(self.learnt) and re.search(rf"/kernel/({'|'.join(self.learnt)})$", path) is not None

    def targets(self, path: str) -> bool:
        """Whether the method wraps the kernel at `path`."""
        if not (self.learnt and KERNEL.search(path)):
            return False
        try:
            return bool(patterns.compile(self.target, "target").search(path))  # type: ignore[attr-defined]
        except UserError as error:  # no regex, or one that takes too long
            raise FieldError("adapter", str(error)) from None

    def step_flops(self, shape: Sequence[int], rows: int) -> float:
        """Count the FLOPs that the leaf around a kernel of `shape` adds to a training step over `rows` rows."""
        raise NotImplementedError(type(self).__name__)

    def check(self, lm: "Backbone") -> None:
        """Raise UserError where the method cannot be applied to `lm`."""


def attach(method: Method, boxed: Params, params: Params, key: jax.Array) -> Params:
    """Wrap the kernels that a method targets in adapters.

    Args:
      boxed: the plain model's boxed parameters, whose boxes name the logical axes; they may be abstract.
      params: a boxed array, or a `Weight` of boxed arrays, for each box of `boxed`.
      key: a random key, which each wrapped kernel folds its path into.

    Returns `params` with the leaves in their places, boxed. Raises UserError for a target that is no regex, and for one
    that matches no kernel.
    """
    if not method.learnt:
        return params
    paths = dict.fromkeys(path_of(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(boxed, is_leaf=is_box))
    if not any(map(method.targets, paths)):
        kernels = ", ".join(filter(KERNEL.search, paths))
        target: str = method.target  # type: ignore[attr-defined]
        raise FieldError("adapter", f"target = {target!r} finds none of the kernels; they are {kernels}")

    def wrap_kernel(keys, box, leaf):
        path = path_of(keys)
        if not method.targets(path):
            return leaf
        wrap = method.wrap_biased if bias_path(path) in paths else method.wrap
        return wrap(leaf, box.names, jax.random.fold_in(key, zlib.crc32(path.encode())))

    return jax.tree_util.tree_map_with_path(wrap_kernel, boxed, params, is_leaf=is_box)


def tuned(
    method: Method, lm: "Backbone", boxed: Params, params: Params, key: jax.Array, form: str = "float32"
) -> tuple[Params, Params]:
    """Quantize the kernels to `form`, attach the adapters, and return `(trainable, frozen)` parameters.

    The other arguments are those of `attach`.
    """
    return split(method, lm, attach(method, boxed, quantize(params, form, UNROUNDED), key))


def split(method: Method, lm: "Backbone", params: Params) -> tuple[Params, Params]:
    """Split parameters into `(trainable, frozen)`: each is the whole tree, with None for the leaves of the other.

    Trees may be boxed.
    """

    def select(trainable):
        return jax.tree_util.tree_map_with_path(
            lambda keys, leaf: leaf if method.trains(path_of(keys), lm) == trainable else None, params, is_leaf=is_box
        )

    return select(True), select(False)


def join(trainable: Params, frozen: Params) -> Params:
    """Join the two trees of `split` into one."""
    return jax.tree.map(lambda a, b: b if a is None else a, trainable, frozen, is_leaf=lambda leaf: leaf is None)


def bias_path(kernel_path: str) -> str:
    """Return the path at which a layer has its bias, if it has one, for the path of its kernel."""
    return f"{kernel_path.removesuffix('kernel')}bias"


def merge(params: Params) -> Params:
    """Merge adapters into kernels and biases: the plain parameters, every `Weight` as one float32 array."""

    def merge_layer(layer):
        merged = {name: merge_layer(leaf) if isinstance(leaf, Mapping) else dense(leaf) for name, leaf in layer.items()}
        if "kernel" in layer and "bias" in layer:
            merged["bias"] = adapted_bias(layer["kernel"], layer["bias"])
        return merged

    return merge_layer(params)
