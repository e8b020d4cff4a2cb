"""GPTQ and AWQ over a model: its layers one after the other, on the activations of some text."""

import functools
import typing

import flax.struct
import jax
import jax.numpy as jnp

from efficientllm import model as models
from efficientllm.errors import UserError
from efficientllm.ops.attention import Context
from efficientllm.quant import apply as tree
from efficientllm.quant.awq import awq
from efficientllm.quant.base import rounds
from efficientllm.quant.gptq import gptq
from efficientllm.runtime.log import Countdown
from efficientllm.weights import Weight, path_of

ROWS = 4  # rows of tokens that go through a layer at once


def quantize(lm, params, spec, tokens_BT, rules=()):
    """`tree.quantize` for a calibrated form, on the rows of tokens `[B, T]`.

    Every layer is calibrated on what reaches it through those before, already compressed, and so is its mixer beside
    its ffn. `params` are unboxed, and stacked or not as `lm` has them.
    """
    choose = tree.chooser(spec, rules)
    lm_apart, apart = models.unroll(lm, params) if lm.scan else (lm, params)
    inputs = [_first_input(lm_apart, apart, tokens_BT[i : i + ROWS]) for i in range(0, len(tokens_BT), ROWS)]
    found, countdown = {}, Countdown(f"calibrating {spec}", lm_apart.num_groups)
    for i in range(lm_apart.num_groups):
        name = f"group_{i}"
        moments = None
        for carry in inputs:
            new = _moments(lm_apart, apart[name], carry)
            moments = new if moments is None else jax.tree.map(jnp.add, moments, new)
        compressed = _compress(apart[name], moments, lambda path, name=name: choose(f"{name}/{path}"))
        inputs = [_forward(lm_apart, compressed, carry) for carry in inputs]
        found |= {f"{name}/{path}": leaf for path, leaf in _kernels(compressed)}
        countdown.add()
    return tree.quantize(params, spec, rules, functools.partial(_pick, found, lm.num_groups))


class Moments(typing.NamedTuple):
    """Sums over the rows of a kernel's input: of outer products, of sizes, and how many rows there are."""

    outer_KK: jax.Array
    sizes_K: jax.Array
    rows: jax.Array


@flax.struct.dataclass
class _RecordingWeight(Weight):
    """A kernel that calls `record` with each input it multiplies."""

    kernel: typing.Any
    record: typing.Callable = flax.struct.field(pytree_node=False)

    @property
    def shape(self):
        return self.kernel.shape

    @property
    def ndim(self):
        return self.kernel.ndim

    def apply(self, x, product, of_rows):
        self.record(x)
        return product(x, self.kernel)

    def dense(self):
        return self.kernel


@functools.partial(jax.jit, static_argnums=0)
def _moments(lm, params, inputs):
    """Moments by path, of one group's kernels; the experts of a layer share those of all rows they get."""
    found = {}

    def watch(keys, leaf):
        path = path_of(keys)
        return _RecordingWeight(leaf, functools.partial(record, path)) if tree.KERNEL.search(path) else leaf

    def record(path, x):
        x_MK = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        outer_KK = jnp.matmul(x_MK.T, x_MK, precision="highest")
        found[path] = Moments(outer_KK, jnp.sum(jnp.abs(x_MK), 0), jnp.float32(len(x_MK)))

    models.apply_group(lm, jax.tree_util.tree_map_with_path(watch, params), *inputs)
    return found


@functools.partial(jax.jit, static_argnums=0)
def _forward(lm, params, inputs):
    carry, ctx = inputs
    return models.apply_group(lm, params, carry, ctx), ctx


def _first_input(lm, params, tokens_BT):
    """What the first group is called with, `(carry, ctx)`."""
    ctx = Context.packed(jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape))
    return jax.jit(models.embed, static_argnums=0)(lm, params, tokens_BT, ctx), ctx


def _compress(params, moments, choose):
    def compress(keys, leaf):
        path = path_of(keys)
        form = choose(path)
        if path not in moments or not rounds(form):
            return leaf
        if not form.calibrated:
            return tree.leaf(form, False, leaf)
        return _calibrated(form, leaf, moments[path])

    return jax.tree_util.tree_map_with_path(compress, params)


def _calibrated(form, kernel, moments):
    """The leaf of a kernel `[..., in, out]` by GPTQ or AWQ."""
    *stack, K, R = kernel.shape
    rows_ERK = jnp.swapaxes(kernel, -1, -2).astype(jnp.float32).reshape(-1, R, K)
    hessian_KK, mean_K = moments.outer_KK / moments.rows, moments.sizes_K / moments.rows
    leaves = [_CALIBRATED[form.method](form, rows_RK, hessian_KK, mean_K) for rows_RK in rows_ERK]
    return jax.tree.map(lambda *arrays: jnp.stack(arrays).reshape(*stack, *arrays[0].shape), *leaves)


def _gptq(form, rows_RK, hessian_KK, mean_K):
    return form.make(*gptq(rows_RK, hessian_KK, form.group, form.symmetric), rows_RK.shape[1])


def _awq(form, rows_RK, hessian_KK, mean_K):
    s_K = awq(rows_RK, hessian_KK, mean_K, form.group, form.symmetric)
    return tree.leaf(form, False, (rows_RK * s_K).T).replace(x_scale=(1 / s_K).astype(jnp.float16)[None])


_CALIBRATED = {"gptq": _gptq, "awq": _awq}


def _kernels(params):
    flat = jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda leaf: isinstance(leaf, Weight))
    return [(path_of(keys), leaf) for keys, leaf in flat[0]]


def _pick(leaves, groups, path, form):
    """The leaf at `path`, or the stack of those of all groups where layers are stacked."""
    if not path.startswith("group"):
        raise UserError(f"{path} is not in a layer: only kernels of layers are calibrated; give it another form")
    if path.startswith("groups/"):
        layers = [leaves[f"group_{i}/{path.removeprefix('groups/')}"] for i in range(groups)]
        return jax.tree.map(lambda *arrays: jnp.stack(arrays), *layers)
    return leaves[path]
