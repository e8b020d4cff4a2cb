"""HLO text parsing and costs, on programs whose costs are known by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from efficientllm import sharding
from efficientllm.plan import hlo_cost, hlo_text

pytestmark = pytest.mark.quick


def read(fn, *shapes, **options):
    """The Program of `fn` for float32 arrays of these shapes."""
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return hlo_text.Program(jax.jit(fn, **options).lower(*args).compile().as_text())


@pytest.mark.parametrize(
    "written, groups",
    [
        ("replica_groups={{0,2},{1,3}}, dimensions={0}", [(0, 2), (1, 3)]),
        ("replica_groups=[2,4]<=[8], use_global_device_ids=true", [(0, 1, 2, 3), (4, 5, 6, 7)]),
        ("replica_groups=[4,2]<=[4,2]T(1,0), dimensions={2}", [(0, 2), (4, 6), (1, 3), (5, 7)]),
        ("replica_groups=[4,2]<=[2,2,2]T(1,0,2), x", [(0, 1), (4, 5), (2, 3), (6, 7)]),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}, x", [(0, 1), (2, 3)]),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([2,2,2]T(1,0,2)) {'a'}", [(0, 2), (1, 3), (4, 6), (5, 7)]),
        ("source_target_pairs={{0,1},{1,0}}", [(0, 1), (1, 0)]),
        ("dimensions={0}", [(0, 1, 2, 3)]),
    ],
)
def test_groups_of_devices_in_every_way_they_are_written(written, groups):
    assert hlo_text.groups(f"%x = f32[8]{{0}} all-gather(%y), channel_id=1, {written}", 4) == groups


def test_sizes_of_arrays():
    text = "(bf16[2,3]{1,0:T(8,128)S(1)}, s4[5]{0}, f8e4m3fn[7]{0}, pred[], f32[4]{0})"
    assert [array.bytes for array in hlo_text.arrays(text)] == [12, 2.5, 7, 1, 16]
    assert [array.scratch for array in hlo_text.arrays(text)] == [True, False, False, False, False]


def test_what_is_read_and_written_is_counted_once():
    n = 1 << 16
    assert hlo_cost.moved_bytes(read(lambda x, y: x + y, (n,), (n,))) == 3 * 4 * n


def test_the_body_of_a_loop_counts_its_turns_and_its_slices():
    def summed(xs):
        return jax.lax.scan(lambda total, x: (total + jnp.sin(x), None), jnp.zeros(xs.shape[1:]), xs)[0]

    turns, n = 12, 1 << 14
    moved = read(summed, (turns, n))
    assert turns in {times for times, _ in moved.runs.values()}
    least = 4 * n * (3 * turns)  # of each turn: a slice, and the sum read and written
    assert least <= hlo_cost.moved_bytes(moved) <= 2 * least  # and not the whole of xs each turn, 13 times more


def test_a_slice_of_a_converted_array_reads_what_it_takes_as_it_is_stored():
    """As a layer's kernel of a stack, rounded for its products."""
    text = """HloModule m
%fused (stack: f32[24,8,16]) -> bf16[8,16] {
  %stack = f32[24,8,16]{2,1,0} parameter(0)
  %low = bf16[24,8,16]{2,1,0} convert(%stack)
  %layer = bf16[1,8,16]{2,1,0} slice(%low), slice={[2:3], [0:8], [0:16]}
  ROOT %kernel = bf16[8,16]{1,0} bitcast(%layer)
}
ENTRY %main (s: f32[24,8,16]) -> bf16[8,16] {
  %s = f32[24,8,16]{2,1,0} parameter(0)
  ROOT %f = bf16[8,16]{1,0} fusion(%s), kind=kLoop, calls=%fused
}
"""
    assert hlo_cost.moved_bytes(hlo_text.Program(text)) == (4 + 2) * 8 * 16
    read_too = text.replace("%layer =", "%all = bf16[24,8,16]{2,1,0} negate(%low)\n  %layer =")
    assert hlo_cost.moved_bytes(hlo_text.Program(read_too)) == 4 * 24 * 8 * 16 + 2 * 8 * 16


SCATTERED = """HloModule m
%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}
%fused (table: f32[1000,16], rows: s32[4,1], half: bf16[4,16]) -> f32[1000,16] {
  %table = f32[1000,16]{1,0} parameter(0)
  %rows = s32[4,1]{1,0} parameter(1)
  %half = bf16[4,16]{1,0} parameter(2)
  %updates = f32[4,16]{1,0} convert(%half)
  ROOT %new = f32[1000,16]{1,0} scatter(%table, %rows, %updates), update_window_dims={1}, to_apply=%add
}
ENTRY %main (t: f32[1000,16], r: s32[4,1], u: bf16[4,16]) -> f32[1000,16] {
  %t = f32[1000,16]{1,0} parameter(0)
  %r = s32[4,1]{1,0} parameter(1)
  %u = bf16[4,16]{1,0} parameter(2)
  ROOT %f = f32[1000,16]{1,0} fusion(%t, %r, %u), kind=kInput, calls=%fused
}
"""


def test_a_fused_scatter_moves_the_rows_that_it_adds_to():
    """And not the table, which it has in place, as an embedding's gradient is added to a head's."""
    updates, rows = 4 * 16, 4
    assert hlo_cost.moved_bytes(hlo_text.Program(SCATTERED)) == 2 * updates + 4 * rows + 2 * 4 * updates
    read_too = SCATTERED.replace("scatter(%table", "scatter(%twice").replace(
        "  %updates =", "  %twice = f32[1000,16]{1,0} add(%table, %table)\n  %updates ="
    )
    assert hlo_cost.moved_bytes(hlo_text.Program(read_too)) > 4 * 1000 * 16


def test_what_starts_a_kernel_counts_each_turn():
    text = """HloModule m
%fused (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %a = f32[8]{0} add(%p, %p)
  ROOT %b = f32[8]{0} multiply(%a, %a)
}
%body (s: (s32[], f32[8])) -> (s32[], f32[8]) {
  %s = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = f32[8]{0} get-tuple-element(%s), index=1
  %f = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused
  %c = f32[8]{0} custom-call(%f), custom_call_target="ours"
  ROOT %t = (s32[], f32[8]{0}) tuple(%i, %c)
}
%condition (s.1: (s32[], f32[8])) -> pred[] {
  %s.1 = (s32[], f32[8]{0}) parameter(0)
  ROOT %less = pred[] constant(true)
}
ENTRY %main (x.1: f32[8]) -> f32[8] {
  %x.1 = f32[8]{0} parameter(0)
  %zero = s32[] constant(0)
  %first = f32[8]{0} copy(%x.1)
  %begin = (s32[], f32[8]{0}) tuple(%zero, %first)
  %loop = (s32[], f32[8]) while(%begin), condition=%condition, body=%body, backend={"known_trip_count":{"n":"5"}}
  ROOT %y = f32[8]{0} get-tuple-element(%loop), index=1
}
"""
    assert hlo_cost.launches(hlo_text.Program(text)) == 1 + 5 * 2


def test_the_collectives_of_a_product_over_devices():
    mesh = sharding.make_mesh("fsdp=4", jax.devices()[:4])
    split, whole = NamedSharding(mesh, P("fsdp")), NamedSharding(mesh, P())
    gathered = read(lambda x: x * 2, (64, 8), in_shardings=split, out_shardings=whole)
    (collective,) = hlo_cost.collectives(gathered, 4)
    assert (collective.kind, collective.times, collective.bytes, collective.groups) == (
        "all-gather",
        1,
        64 * 8 * 4,
        ((0, 1, 2, 3),),
    )
    assert collective.wire_bytes == 64 * 8 * 4 * 3 / 4
    summed = read(lambda x: jnp.sum(x, 0), (64, 8), in_shardings=split, out_shardings=whole)
    assert hlo_cost.by_kind(hlo_cost.collectives(summed, 4)) == {
        "all-reduce": {"count": 1, "bytes": 8 * 4, "wire_bytes": 2 * 8 * 4 * 3 // 4}
    }


def test_a_loop_s_collectives_count_its_turns_and_one_channel_once():
    text = """
cond (p: s32[]) -> pred[] {
  %p = s32[] parameter(0)
  %bound = s32[] constant(28)
  ROOT %less = pred[] compare(%p, %bound), direction=LT
}
part (x: f32[4]) -> f32[8] {
  %x = f32[4]{0:T(128)} parameter(0)
  ROOT %again = f32[8]{0:T(128)} all-gather(%x), channel_id=7, replica_groups={{0,1}}, dimensions={0}
}
body (p: s32[]) -> s32[] {
  %p = s32[] parameter(0)
  %y = f32[4]{0:T(128)} iota()
  %one = f32[8]{0:T(128)} all-gather(%y), channel_id=7, replica_groups={{0,1}}, dimensions={0}
  %two = f32[8]{0:T(128)} fusion(%y), kind=kCustom, calls=%part
  ROOT %next = s32[] add(%p, %p)
}
ENTRY main (p: s32[]) -> s32[] {
  %p = s32[] parameter(0)
  ROOT %loop = s32[] while(%p), condition=%cond, body=%body
}"""
    collectives = hlo_cost.collectives(hlo_text.Program(text), 2)
    assert hlo_cost.by_kind(collectives) == {"all-gather": {"count": 28, "bytes": 28 * 32, "wire_bytes": 28 * 16}}


def test_a_sum_and_a_slice_in_one_fusion_are_a_tpu_s_reduce_scatter():
    text = """
all-reduce-scatter.7 (input.7: f32[64]) -> f32[32] {
  %input.7 = f32[64]{0:T(128)} parameter(0)
  %all-reduce.82 = f32[64]{0:T(128)} all-reduce(%input.7), channel_id=5, replica_groups={{0,1}}, to_apply=%add
  %zero = u32[] constant(0)
  ROOT %dynamic-slice.1 = f32[32]{0:T(128)} dynamic-slice(%all-reduce.82, %zero), dynamic_slice_sizes={32}
}
ENTRY main (p: f32[64]) -> f32[32] {
  %p = f32[64]{0:T(128)} parameter(0)
  ROOT %fusion = f32[32]{0:T(128)} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.7
}"""
    by_kind = hlo_cost.by_kind(hlo_cost.collectives(hlo_text.Program(text), 2))
    assert by_kind == {"reduce-scatter": {"count": 1, "bytes": 256, "wire_bytes": 128}}
