"""Operations of compiled programs by kind: FLOPs of known products, scopes, fusions, kernels of libraries."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from efficientllm import sharding
from efficientllm.cost import jaxpr_flops
from efficientllm.ops import dot_product_attention
from efficientllm.plan import hlo_cost, hlo_text, operation_table, operations

pytestmark = pytest.mark.quick
PEAKS = operations.Peaks(1e9, 1e9)


def rows(text, peaks=PEAKS, seconds=None):
    """`{kind: KindTotal}` of a program's text."""
    return {row.kind: row for row in operations.by_kind(operations.of_program(hlo_text.Program(text)), peaks, seconds)}


def compile_text(fn, *shapes, **options):
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(fn, **options).lower(*args).compile().as_text()


B, T, D, F, H = 2, 64, 32, 128, 4


def step(x_BTD, up_DF, down_FD):
    """A gradient step of a layer of attention and an ffn."""

    def loss(weights):
        up, down = weights
        heads = x_BTD.reshape(B, T, H, D // H)
        with jax.named_scope("attention"):
            y = dot_product_attention.dot_product_attention(heads, heads, heads, None, None, 1.0).reshape(B, T, D)
        hidden = jnp.tanh(y @ up) @ down
        with jax.named_scope("loss"):
            return jnp.mean(jax.nn.logsumexp(hidden, -1))

    grads = jax.grad(loss)((up_DF, down_FD))
    with jax.named_scope("optimizer"):
        return [
            weight - 0.1 * grad / jnp.sqrt(1 + grad**2) for weight, grad in zip((up_DF, down_FD), grads, strict=True)
        ]


SHAPES = (B, T, D), (D, F), (F, D)


def test_kinds_of_a_step_and_the_flops_of_each():
    text = compile_text(step, *SHAPES)
    by_kind = rows(text)
    linear = 2 * B * T * D * F
    assert by_kind["products"].flops == 5 * linear  # forward 2, to the hidden 1, of weights 2
    assert by_kind["attention"].flops == 2 * 2 * B * T * T * D
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in SHAPES]
    assert sum(row.flops for row in by_kind.values()) == jaxpr_flops.count_needed_flops(step, *arrays)
    assert {"products", "attention", "loss", "optimizer"} <= by_kind.keys()
    assert by_kind["optimizer"].bytes >= 3 * 4 * D * F
    program = hlo_text.Program(text)
    assert sum(row.bytes for row in by_kind.values()) == hlo_cost.moved_bytes(program)
    assert sum(row.kernels for row in by_kind.values()) == hlo_cost.launches(program)


def test_products_in_a_loop_count_its_turns():
    def repeated(x, w):
        return jax.lax.fori_loop(0, 7, lambda _, x: jnp.tanh(x @ w), x)

    assert rows(compile_text(repeated, (T, D), (D, D)))["products"].flops == 7 * 2 * T * D * D


def test_convolutions_count_as_their_jaxpr_does():
    convolve = functools.partial(jax.lax.conv_general_dilated, window_strides=(2, 2), padding="SAME")
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, 8, 16, 16), (4, 8, 3, 3))]
    text = jax.jit(convolve).lower(*arrays).compile().as_text()
    assert rows(text)["products"].flops == jaxpr_flops.count_matmul_flops(convolve, *arrays)


def test_collectives_and_what_moves_data_alone():
    mesh = sharding.make_mesh("fsdp=4", jax.devices()[:4])
    split, whole = NamedSharding(mesh, P("fsdp")), NamedSharding(mesh, P())
    text = compile_text(lambda x: jnp.sin(x), (64, 8), in_shardings=split, out_shardings=whole)
    assert rows(text)["collectives"].bytes > 0
    assert rows(compile_text(lambda x: jnp.transpose(x, (1, 0, 2)), (16, 32, 8))).keys() == {"copies"}


WRITTEN = """HloModule jit_step, is_scheduled=true
ENTRY %main (x: f32[8,16,32]) -> f32[8,16,64] {
  %x = f32[8,16,32]{2,1,0} parameter(0)
  %w = f32[8,32,64]{2,1,0} parameter(1)
  ROOT %y = f32[8,16,64]{2,1,0} INSTRUCTION
}
"""
BATCHED = (
    "convolution(%x, %w), window={size=8 stride=7 lhs_dilate=8}, dim_labels=0bf_0io->0bf",
    'custom-call(%x, %w), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":'
    '{"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"],"lhs_batch_dimensions":["0"]}}}',
    "dot(%x, %w), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}, rhs_contracting_dims={1}",
)


@pytest.mark.parametrize("instruction", BATCHED, ids=("TPU", "GPU", "CPU"))
def test_a_batched_product_as_each_compiler_writes_it(instruction):
    by_kind = rows(WRITTEN.replace("INSTRUCTION", instruction))
    assert by_kind.keys() == {"products"} and by_kind["products"].flops == 2 * 8 * 16 * 32 * 64


def test_a_kernel_that_hides_its_products_has_unknown_flops():
    fused = 'custom-call(%x, %w), custom_call_target="__cudnn$fmhaSoftmax", metadata={op_name="jit(step)/attention/x"}'
    row = rows(WRITTEN.replace("INSTRUCTION", fused))["attention"]
    assert row.flops is None and row.bytes > 0
    assert "?" in operation_table.lines([row])[1]
    assert rows(WRITTEN.replace("INSTRUCTION", 'custom-call(%x), custom_call_target="TopK"'))["other"].flops == 0


def test_measured_times_give_shares_of_the_peak_that_binds():
    text = WRITTEN.replace("INSTRUCTION", BATCHED[2])
    flops = 2 * 8 * 16 * 32 * 64
    row = rows(text, operations.Peaks(flops, 1e9, shared_by=2), {"y": 4.0})["products"]
    assert (row.seconds, row.bound, row.of_peak) == (4.0, "FLOP/s", 0.5)  # two devices share the peak
    least = rows(text, operations.Peaks(flops, 1e9))["products"]
    assert (least.seconds, least.bound, least.of_peak) == (1.0, "FLOP/s", None)
    assert rows(text, operations.Peaks(None, 1e9))["products"].seconds is None
    heading, line, idle = operation_table.lines([row], step_s=5.0)
    assert line.split()[:3] == ["products", "4,000", "80%"] and "50% of FLOP/s" in line
    assert idle.split() == ["idle", "1,000", "20%"] and heading.split()[0] == "ms"


def test_a_program_without_names_still_has_its_products():
    """As one that a cache may hold."""
    text = compile_text(step, *SHAPES)
    nameless = "\n".join(line.partition(", metadata=")[0] for line in text.splitlines())
    assert {row.kind for row in rows(nameless).values()} <= {"products", "copies", "other"}
    assert sum(row.flops for row in rows(nameless).values()) == sum(row.flops for row in rows(text).values())


def test_a_product_whose_name_xla_dropped_is_that_of_what_it_is_beside():
    """Of heads: attention. Of two matrices: the linear map before it."""
    text = """
ENTRY %main (x: f32[8,16,32]) -> f32[8,16,64] {
  %x = f32[8,16,32]{2,1,0} parameter(0)
  %w = f32[8,32,64]{2,1,0} parameter(1)
  %v = f32[16,16]{1,0} parameter(2)
  %scores = f32[8,16,64]{2,1,0} BATCHED
  %linear = f32[16,16]{1,0} dot(%v, %v), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %flat = f32[256]{0} bitcast(%linear)
  ROOT %y = f32[8,16,64]{2,1,0} add(%scores, %flat), metadata={op_name="jit(step)/mixer/attention/exp"}
}
""".replace("BATCHED", BATCHED[2])
    kinds = {operation.name: operation for operation in operations.of_program(hlo_text.Program(text))}
    assert (kinds["scores"].kind, kinds["scores"].label) == ("attention", "mixer/attention")
    assert (kinds["linear"].kind, kinds["linear"].label) == ("products", "mixer")
