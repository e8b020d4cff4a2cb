"""Calibrated quantization of a model: GPTQ or AWQ of its layers in order, on the activations of calibration text."""

import functools
import typing
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from efficientllm import model as models
from efficientllm.embeds.tokens import LM, embed
from efficientllm.errors import UserError
from efficientllm.ops.attention import Context
from efficientllm.quant import apply as quant_tree
from efficientllm.quant.awq import awq
from efficientllm.quant.base import rounds
from efficientllm.quant.gptq import gptq
from efficientllm.runtime.log import Countdown
from efficientllm.typing import Params
from efficientllm.weights import Weight, path_of

ROWS = 4  # sequences in a forward pass of a layer


def quantize(lm: LM, params: Params, spec: str, tokens_BT: jax.Array, rules: quant_tree.Rules = ()) -> Params:
    """Quantize a model to a calibrated form, as `apply.quantize` does, on the activations of `tokens_BT`.

    Every layer is calibrated on the activations of the quantized layers before it. The kernels of one group of layers
    are calibrated together, on activations of the group's unquantized kernels. `params` are unboxed, and stacked where
    `lm.scan` is set.
    """
    choose = quant_tree.chooser(spec, rules)
    unrolled_lm, unrolled_params = models.unroll(lm, params) if lm.scan else (lm, params)
    inputs = [
        _first_input(unrolled_lm, unrolled_params, tokens_BT[i : i + ROWS]) for i in range(0, len(tokens_BT), ROWS)
    ]
    leaves: dict[str, typing.Any] = {}
    countdown = Countdown(f"calibrating {spec}", unrolled_lm.num_groups)
    for i in range(unrolled_lm.num_groups):
        name, stack = f"group_{i}", lm.stacks.of_group(i)
        moments = None
        for carry in inputs:
            batch_moments = _moments(unrolled_lm, stack, unrolled_params[name], carry)
            moments = batch_moments if moments is None else jax.tree.map(jnp.add, moments, batch_moments)
        quantized = _quantize_kernels(unrolled_params[name], moments, lambda path, name=name: choose(f"{name}/{path}"))
        inputs = [_forward(unrolled_lm, stack, quantized, carry) for carry in inputs]
        leaves |= {f"{name}/{path}": leaf for path, leaf in _kernels(quantized)}
        countdown.add()
    return quant_tree.quantize(params, spec, rules, functools.partial(_pick, leaves, lm))


class InputMoments(typing.NamedTuple):
    """Sums over the rows of a kernel's input: outer products, absolute values, and the number of rows."""

    outer_kk: jax.Array
    sizes_k: jax.Array
    rows: jax.Array


@flax.struct.dataclass
class _RecordingWeight(Weight):
    """Kernel that calls `record` with each input it multiplies."""

    kernel: jax.Array
    record: Callable[[jax.Array], None] = flax.struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.kernel.shape

    @property
    def ndim(self) -> int:
        return self.kernel.ndim

    def apply(self, x: jax.Array, product: Callable[..., jax.Array], of_rows: Callable[..., jax.Array]) -> jax.Array:
        self.record(x)
        return product(x, self.kernel)

    def dense(self) -> jax.Array:
        return self.kernel


@functools.partial(jax.jit, static_argnums=(0, 1))
def _moments(lm, stack, params, inputs):
    """Moments of one group's kernels by path; the experts of a layer share the moments of all their rows."""
    moments = {}

    def watch(keys, leaf):
        path = path_of(keys)
        return _RecordingWeight(leaf, functools.partial(record, path)) if quant_tree.KERNEL.search(path) else leaf

    def record(path, x):
        x_mk = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        outer_kk = jnp.matmul(x_mk.T, x_mk, precision="highest")
        moments[path] = InputMoments(outer_kk, jnp.sum(jnp.abs(x_mk), 0), jnp.float32(len(x_mk)))

    models.apply_group(lm, stack, jax.tree_util.tree_map_with_path(watch, params), *inputs)
    return moments


@functools.partial(jax.jit, static_argnums=(0, 1))
def _forward(lm, stack, params, inputs):
    carry, ctx = inputs
    return models.apply_group(lm, stack, params, carry, ctx), ctx


def _first_input(lm, params, tokens_BT):
    """The inputs of the first group of layers, `(carry, ctx)`."""
    ctx = Context.packed(jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape))
    return jax.jit(embed, static_argnums=0)(lm, params, tokens_BT, ctx), ctx


def _quantize_kernels(params, moments, choose):
    def quantize_kernel(keys, leaf):
        path = path_of(keys)
        form = choose(path)
        if path not in moments or not rounds(form):
            return leaf
        if not form.calibrated:
            return quant_tree.leaf(form, False, leaf)
        return _calibrated(form, leaf, moments[path])

    return jax.tree_util.tree_map_with_path(quantize_kernel, params)


def _calibrated(form, kernel, moments):
    """The leaf of a kernel `[..., in, out]` by GPTQ or AWQ."""
    # One leaf for each kernel of the stack: [..., in, out] -> [E, r, k] -> leaves of [r, k] -> [..., r, k].
    *stack, inputs, outputs = kernel.shape
    rows_Erk = jnp.swapaxes(kernel, -1, -2).astype(jnp.float32).reshape(-1, outputs, inputs)
    hessian_kk, mean_k = moments.outer_kk / moments.rows, moments.sizes_k / moments.rows
    leaves = [_CALIBRATED[form.method](form, rows_rk, hessian_kk, mean_k) for rows_rk in rows_Erk]
    return jax.tree.map(lambda *arrays: jnp.stack(arrays).reshape(*stack, *arrays[0].shape), *leaves)


def _gptq(form, rows_rk, hessian_kk, mean_k):
    return form.make(*gptq(rows_rk, hessian_kk, form.group, form.symmetric), rows_rk.shape[1])


def _awq(form, rows_rk, hessian_kk, mean_k):
    s_k = awq(rows_rk, hessian_kk, mean_k, form.group, form.symmetric)
    return quant_tree.leaf(form, False, (rows_rk * s_k).T).replace(x_scale=(1 / s_k).astype(jnp.float16)[None])


_CALIBRATED = {"gptq": _gptq, "awq": _awq}


def _kernels(params):
    flat = jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda leaf: isinstance(leaf, Weight))
    return [(path_of(keys), leaf) for keys, leaf in flat[0]]


def _pick(leaves, lm, path, form):
    """The leaf at `path`, or the stack of those of all groups where layers are stacked."""
    if not path.startswith("group"):
        raise UserError(f"{path} is not in a layer: only kernels of layers are calibrated; give it another form")
    paths = lm.stacks.unrolled_paths(path)
    return leaves[path] if paths == [path] else jax.tree.map(lambda *arrays: jnp.stack(arrays), *map(leaves.get, paths))
