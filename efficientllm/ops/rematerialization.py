"""Rematerialization policies for `jax.checkpoint`, the unrolling of a scan over layers, and XLA's schedule on CPUs."""

import math
import re
import typing

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

from efficientllm import sharding
from efficientllm.errors import FieldError, did_you_mean
from efficientllm.matrix_product import ROUNDED_KERNEL
from efficientllm.runtime import kernel_choice
from efficientllm.typing import Mesh

EVERYTHING = "everything"
SAVEABLE = "everything_saveable"
_HOLDS_RESULTS = jax.__version_info__ < (0, 11)


def residual_policy(name: str, layers: typing.Iterable, decoding: bool, is_loop: bool) -> typing.Any:
    """Returns the `jax.checkpoint` policy called `name`, or `EVERYTHING` for no checkpoint; `is_loop` of the layers.

    A loop over layers stores, copies and fetches the residuals. Recomputing the elementwise work of attention and dense
    ffns (`recompute_elementwise` of `layers`) takes less time on CPUs and moves fewer bytes on GPUs, and a Llama's
    residuals fall to less than half the bytes. Where layers are recurrent, one GPU saves products and states alone
    (`saves_products`). A mesh would repeat the collectives, so everything is saved there.
    """
    if name == SAVEABLE:
        return EVERYTHING
    if name != "none":
        return policy(name)
    if decoding or kernel_choice.platform() not in ("cpu", "gpu") or not sharding.is_alone():
        return EVERYTHING
    layers = [layer for layer in layers if layer is not None]
    if kernel_choice.platform() == "gpu" and all(layer.saves_products for layer in layers):
        return save_products
    if not all(layer.recompute_elementwise for layer in layers):
        return EVERYTHING
    return _not_cheap_in_loop if is_loop else _not_cheap


RECURRENCE = "recurrence"  # the name of states and outputs that `call_recurrent` saves
RESIDUAL_STREAM = "residual_stream"
MASK = "mask"  # the name of attention's mask where a kernel reads it from memory
WIDENED = 16  # Mamba's steps are 32 times as wide as their rank
LONG = 1024  # tokens of a row from which `call_recurrent` recomputes on CPUs


def name_recurrence(x: jax.Array) -> jax.Array:
    """Names a state at the edge of a chunk, or the output of a recurrence, for `call_recurrent` to save."""
    return checkpoint_name(x, RECURRENCE)


def call_recurrent(mixer: nn.Module, x_BTD: jax.Array, *context: typing.Any) -> typing.Any:
    """Calls a recurrent mixer in training, saving only its products with kernels and what `name_recurrence` names.

    A recurrence has a dozen elementwise operations around it, in float32 and as wide as its channels. Saved, their
    results take several times the memory of attention's. On CPUs rows of up to `LONG` tokens save everything. Within a
    checkpoint that saves the same (`save_products`) it would recompute twice: `Context.recomputes_recurrence`.
    """
    if kernel_choice.platform() == "cpu" and x_BTD.shape[1] <= LONG:
        return mixer(x_BTD, *context)

    def call(mixer, *inputs):
        return mixer(*inputs)

    return nn.remat(call, policy=save_products)(mixer, x_BTD, *context)


def name_attention_input(x: jax.Array) -> jax.Array:
    """Names queries, keys or values on GPUs, for `residual_policy` to save them.

    Attention's gradient reads them. That of their rotation reads neither them nor the products that they come from.
    """
    return checkpoint_name(x, "attention_input") if kernel_choice.platform() == "gpu" else x


def name_residual_stream(x: jax.Array) -> jax.Array:
    """Names the residual stream within a block on GPUs, for `residual_policy` to save the sum, not what is added."""
    return checkpoint_name(x, RESIDUAL_STREAM) if kernel_choice.platform() == "gpu" else x


def name_mask(x: jax.Array) -> jax.Array:
    """Names a mask of attention, which is the same in all layers, for `residual_policy` to save it once for all."""
    return checkpoint_name(x, MASK)


def policy(name: str) -> typing.Callable | None:
    """Returns the policy of `jax.checkpoint` called `name`; None, which saves nothing, for `full`. Raises UserError."""
    if name == "full":
        return None
    policies = [policy for policy in dir(jax.checkpoint_policies) if policy.endswith("saveable")]  # the rest take names
    if name not in policies:
        hint = f"{', '.join(policies)}{did_you_mean(name, ['none', 'full', *policies])}"
        raise FieldError("remat", f"no such policy; known: none, full, {hint}", name)
    return getattr(jax.checkpoint_policies, name)


GPU_UNROLL = 32  # groups of layers


def scan_unroll(num_groups: int, most: int) -> int:
    """Returns the `unroll` of a scan over groups of layers: all of them if they are few enough, else 1.

    CPUs unroll at most `most` of them, and one GPU `GPU_UNROLL` unless `most` is 0. Measured on CPUs: a loop costs 8 to
    20 % of a step, because it copies all residuals. Compiling 8 unrolled layers takes no longer. On GPUs XLA writes
    zeros for all residuals of a loop first, copies each to its place, and does not fuse the optimizer with what makes
    the gradients: a step of 0.5b on 4 x 2,048 tokens moves 125 GB with a loop and 99 without, by its programs for an
    H100 (XLA of jax 0.10.2). Its 24 layers compile in 23 instead of 10 s on a CPU core.
    """
    platform = kernel_choice.platform()
    if platform == "gpu" and most and sharding.is_alone():
        most = max(most, GPU_UNROLL)
    return num_groups if platform != "tpu" and num_groups <= most else 1


def compiler_options(mesh: Mesh | None, is_recurrent: bool = False) -> dict[str, str] | None:
    """Returns the `compiler_options` of `jax.jit` for a program of a whole model on `mesh`, None for one device.

    On CPUs XLA of jax 0.10 begins each operation as early as it can, for threads that would be idle, and holds its
    result until it is read. Here each operation has all cores, and they are put in the order that needs the least
    memory; the results are the same bits. A step that tunes Stable Diffusion's transformer (75 million parameters) with
    LoRA has 0.60 instead of 0.81 GB of scratch memory; unrolled and with `full`, 0.15 instead of 0.62. With jax 0.12
    XLA's own schedule needs 0.60 and 0.14 GB. Of several devices each would wait for another's collectives, which have
    an order only in XLA's own schedule. The many small operations of a recurrence (`is_recurrent`) do not have all
    cores: in this order a step of configs/mixers.py:mamba took 0.64 instead of 0.44 s, of mamba2 0.37 instead of 0.34.
    XLA's own takes more memory: 188 instead of 149, and 277 instead of 171 MB of scratch memory, with a vocabulary of
    bytes (AMD EPYC, Zen 4, 2 cores, 2026-11-30).
    """
    if is_recurrent:
        return None
    if kernel_choice.platform() != "cpu" or (mesh is not None and mesh.size > 1) or not _HOLDS_RESULTS:
        return None
    return {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


CHEAP = re.compile(
    r"add|and|broadcast_in_dim|concatenate|convert_element_type|copy|cos|div|eq|erf|exp|ge|gt|integer_pow|iota|le|log|"
    r"logistic|lt|max|min|mul|ne|neg|not|optimization_barrier|or|pad|pow|reshape|rsqrt|select_n|sharding_constraint|"
    r"sign|sin|slice|sqrt|square|squeeze|stop_gradient|sub|tanh|transpose"
)


def _not_cheap(primitive, *operands, **parameters):
    """Saves the results of all but elementwise operations, moves and scores of attention.

    Scores are a product within a batch whose result is larger than its operands: `[B, H, T, S]` of many more bytes than
    the queries and keys that give it. It may have a gradient of its own.
    """
    if "call_jaxpr" in parameters:  # of jax.custom_vjp
        return not any(_gives_scores(equation) for equation in parameters["call_jaxpr"].eqns)
    if primitive.name == "dot_general":
        return not _is_larger(operands, parameters["dimension_numbers"])
    return not CHEAP.fullmatch(primitive.name)


def _not_cheap_in_loop(primitive, *operands, **parameters):
    """Saves what `_not_cheap` does but for rounded kernels and masks: a loop would store one for each layer."""
    return parameters.get("name") not in (ROUNDED_KERNEL, MASK) and _not_cheap(primitive, *operands, **parameters)


def save_products(primitive: typing.Any, *operands: typing.Any, **parameters: typing.Any) -> bool:
    """Saves products with kernels, what `name_recurrence` names and, within a block, the residual stream."""
    if "call_jaxpr" in parameters:  # of jax.custom_vjp
        equations = parameters["call_jaxpr"].eqns
        return any(_is_of_kernel(x.primitive, *(operand.aval for operand in x.invars), **x.params) for x in equations)
    return _is_of_kernel(primitive, *operands, **parameters) or parameters.get("name") in (RECURRENCE, RESIDUAL_STREAM)


def _is_of_kernel(primitive, *operands, **parameters):
    """Whether it is a product with a kernel, which has no batch dimension.

    One that makes an array more than `WIDENED` times as wide, as Mamba's from a step's rank to its channels, is cheaper
    to repeat than its result is to keep.
    """
    if primitive.name != "dot_general" or parameters["dimension_numbers"][1][0]:
        return False
    (contracted, _), _ = parameters["dimension_numbers"]
    read = math.prod(operands[0].shape[axis] for axis in contracted)
    return operands[1].size <= WIDENED * read**2


def _gives_scores(equation):
    is_product = equation.primitive.name == "dot_general"
    return is_product and _is_larger([x.aval for x in equation.invars], equation.params["dimension_numbers"])


def _is_larger(operands, dimension_numbers):
    """Whether the result of a product within a batch is larger than its operands."""
    (contracted, _), (batch, _) = dimension_numbers
    left, right = operands
    summed, rows = (math.prod(left.shape[axis] for axis in axes) for axes in (contracted, batch))
    return bool(batch) and left.size // summed * (right.size // summed) // rows > left.size + right.size
