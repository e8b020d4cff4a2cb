"""What every tuning method is, and the tree maps that apply one to a model."""

import re
import typing
import zlib

import jax

from efficientllm.errors import UserError
from efficientllm.quant.apply import KEEP_TABLES, quantize
from efficientllm.untrusted import patterns
from efficientllm.weights import Weight, is_box, path_of

KERNEL = re.compile(r"block_\d+/(?!.*\brouter/).*\bkernel$")  # of mixers and ffns; never routers, never the head


class PeftFormat(typing.NamedTuple):
    """How PEFT saves the adapters of a method.

    Args:
      kind: `peft_type` of adapter_config.json, which says the tensors' names and shapes.
      options: keys and values of adapter_config.json that tell the method from others of its kind.
      experts, parts: whether PEFT's method is the same function for an expert's kernel, and for one of several kernels
        that share a tensor.
      fallback: the method whose format holds the adapters where it is not; None where nothing does.
    """

    kind: str
    options: dict = {}
    experts: bool = True
    parts: bool = True
    fallback: str | None = None


class Method:
    """A tuning method; subclasses are frozen dataclasses, and those with `learnt` have a field `target`, a regex."""

    # Names of the leaf's arrays that are trained; empty where no leaf is made.
    learnt: typing.ClassVar[tuple[str, ...]] = ()
    # The class of the leaf that `wrap` makes, by which adapters are found in a model's parameters.
    leaf_type: typing.ClassVar[type[Weight] | None] = None
    # (regex, factor) pairs of learning rates, which come before `config.train.rates`.
    rates: typing.ClassVar[tuple[tuple[str, float], ...]] = ()
    # Whether layers must be apart, not stacked.
    unrolled: typing.ClassVar[bool] = False
    # Whether the frozen kernel is not the checkpoint's, but what `frozen` leaves of it.
    splits_kernel: typing.ClassVar[bool] = False
    # Whether every parameter of the model is trained.
    trains_all: typing.ClassVar[bool] = False
    # How PEFT saves its adapters; None where PEFT has no format for them.
    peft: typing.ClassVar[PeftFormat | None] = None

    def wrap(self, held, names, key):
        """The leaf in the place of `held`, a boxed array or a `Weight` of boxed arrays, `[..., in, out]`.

        `names` are the kernel's logical axes, `key` is a random key of its own. The new arrays are boxed.
        """
        raise NotImplementedError(type(self).__name__)

    def frozen(self, kernel):
        """The part of a kernel, a numpy matrix, that stays frozen beside the adapter."""
        return kernel

    def trains(self, path, lm):
        """Whether the parameter at `path` learns."""
        return bool(self.learnt) and re.search(rf"/kernel/({'|'.join(self.learnt)})$", path) is not None

    def targets(self, path):
        """Whether the method puts a leaf around the kernel at `path`."""
        return bool(self.learnt and KERNEL.search(path) and _pattern(self.target).search(path))

    def step_flops(self, shape, rows):
        """FLOPs that a leaf around a kernel of `shape` adds to a training step in which it multiplies `rows` rows."""
        raise NotImplementedError(type(self).__name__)

    def check(self, lm):
        """Raises UserError where the method cannot be applied to `lm`."""


def attach(method, boxed, held, key):
    """The parameters `held` with the method's leaves around the kernels it targets, boxed.

    `boxed` is the plain model's tree, abstract will do: its boxes name the axes. `held` has a boxed array or a `Weight`
    of boxed arrays for each of them. Raises UserError for a target that is no regex or finds no kernel.
    """
    if not method.learnt:
        return held
    paths = [path_of(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(boxed, is_leaf=is_box)]
    if not any(map(method.targets, paths)):
        kernels = ", ".join(filter(KERNEL.search, paths))
        raise UserError(f"config.adapter: target = {method.target!r} finds none of the kernels {kernels}")

    def wrap_kernel(keys, box, leaf):
        path = path_of(keys)
        if not method.targets(path):
            return leaf
        return method.wrap(leaf, box.names, jax.random.fold_in(key, zlib.crc32(path.encode())))

    return jax.tree_util.tree_map_with_path(wrap_kernel, boxed, held, is_leaf=is_box)


def tuned(method, lm, boxed, held, key, form="float32"):
    """`(trainable, frozen)` parameters of a tuning of `held`: its kernels in the quantised `form`, and the method's
    leaves around those that it targets. Arguments as of `attach`."""
    return split(method, lm, attach(method, boxed, quantize(held, form, KEEP_TABLES), key))


def split(method, lm, params):
    """`(learnt, frozen)`: the tree twice, with None in the place of what is in the other. Boxed trees will do."""

    def select(trainable):
        return jax.tree_util.tree_map_with_path(
            lambda keys, leaf: leaf if method.trains(path_of(keys), lm) == trainable else None, params, is_leaf=is_box
        )

    return select(True), select(False)


def join(learnt, frozen):
    """The tree that `split` divided."""
    return jax.tree.map(lambda a, b: b if a is None else a, learnt, frozen, is_leaf=lambda leaf: leaf is None)


def merge(params):
    """The plain parameters: every leaf as one float32 array."""
    return jax.tree.map(
        lambda leaf: leaf.dense() if isinstance(leaf, Weight) else leaf,
        params,
        is_leaf=lambda leaf: isinstance(leaf, Weight),
    )


def _pattern(target):
    return patterns.compile(target, "config.adapter: target")
