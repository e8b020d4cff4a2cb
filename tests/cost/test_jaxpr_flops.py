import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from efficientllm.cost.jaxpr_flops import count_matmul_flops

pytestmark = pytest.mark.quick

B, T, D, H, G, K = 2, 16, 32, 8, 2, 4


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def gqa(x, wq, wk, wv, wo):
    q = jnp.einsum("btd,dgmh->btgmh", x, wq)
    k, v = jnp.einsum("btd,dgh->btgh", x, wk), jnp.einsum("btd,dgh->btgh", x, wv)
    scores = jnp.einsum("btgmh,bsgh->bgmts", q, k)
    return jnp.einsum("btgmh,gmhd->btd", jnp.einsum("bgmts,bsgh->btgmh", scores, v), wo)


def gqa_shapes(length):
    weights = shape(D, G, H // G, K), shape(D, G, K), shape(D, G, K), shape(G, H // G, K, D)
    return shape(B, length, D), *weights


def gqa_flops(length):
    return 2 * B * length * D * (2 * H * K + 2 * G * K) + 4 * B * length**2 * H * K


@pytest.mark.parametrize("length", [T, 4 * T])
def test_grouped_attention_and_its_quadratic_part(length):
    """A step count without the sequence length would be the same for both lengths, per token."""
    assert count_matmul_flops(gqa, *gqa_shapes(length)) == gqa_flops(length)


def test_a_full_backward_is_twice_the_forward():
    step = jax.grad(lambda *a: gqa(*a).sum(), argnums=(0, 1, 2, 3, 4))
    assert count_matmul_flops(step, *gqa_shapes(T)) == 3 * gqa_flops(T)


def test_lora_is_not_charged_for_frozen_weights():
    d_in, d_out, rank, tokens = 32, 24, 4, 10

    def loss(adapter, w, x):
        return (x @ w + (x @ adapter[0]) @ adapter[1]).sum()

    step = jax.grad(loss, argnums=(0, 2))
    flops = count_matmul_flops(step, (shape(d_in, rank), shape(rank, d_out)), shape(d_in, d_out), shape(tokens, d_in))
    assert flops == 2 * tokens * (2 * d_in * d_out + 3 * rank * (d_in + d_out))
    assert flops < 6 * tokens * d_in * d_out


def test_a_scan_counts_its_length():
    def layers(x, w):
        return jax.lax.scan(lambda h, wi: (h @ wi, None), x, w)[0]

    product_flops = 2 * T * D * D
    assert count_matmul_flops(layers, shape(T, D), shape(24, D, D)) == 24 * product_flops
    nested = jax.jit(lambda x, w: jax.lax.map(lambda _: layers(x, w), jnp.arange(3)))
    assert count_matmul_flops(nested, shape(T, D), shape(24, D, D)) == 3 * 24 * product_flops


def test_rematerialised_products_count_twice():
    def block(x, w):
        return jnp.sin(x @ w) @ w

    plain = count_matmul_flops(jax.grad(lambda x, w: block(x, w).sum()), shape(D, D), shape(D, D))
    again = count_matmul_flops(jax.grad(lambda x, w: jax.checkpoint(block)(x, w).sum()), shape(D, D), shape(D, D))
    assert again - plain == 2 * D**3


def test_ragged_products_cost_rows_not_groups():
    """Forward, and both ragged forms of the backward."""
    x, w, sizes = shape(12, D), shape(8, D, K), jax.ShapeDtypeStruct((8,), jnp.int32)
    product_flops = 2 * 12 * D * K
    assert count_matmul_flops(jax.lax.ragged_dot, x, w, sizes) == product_flops
    step = jax.grad(lambda x, w, sizes: jax.lax.ragged_dot(x, w, sizes).sum(), argnums=(0, 1))
    assert count_matmul_flops(step, x, w, sizes) == 3 * product_flops


@pytest.mark.parametrize("groups", [1, D])
def test_convolutions(groups):
    def conv(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=groups
        )

    kernel = shape(4, D // groups, D)
    assert count_matmul_flops(conv, shape(B, T, D), kernel) == 2 * B * T * D * 4 * D // groups


def test_a_cond_counts_its_dearest_branch():
    def fn(flag, x):
        return jax.lax.cond(flag, lambda x: x @ x, lambda x: x @ x @ x, x)

    assert count_matmul_flops(fn, jax.ShapeDtypeStruct((), bool), shape(D, D)) == 2 * 2 * D**3


def test_a_while_loop_with_products_is_refused_and_one_without_counts_nothing():
    def loop(x, body):
        return jax.lax.while_loop(lambda c: c[0] < 5, lambda c: (c[0] + 1, body(c[1])), (0, x))[1]

    with pytest.raises(ValueError, match="trip count"):
        count_matmul_flops(lambda x: loop(x, lambda y: y @ y), shape(D, D))
    assert count_matmul_flops(lambda x: loop(x, jnp.sin) @ x, shape(D, D)) == 2 * D**3


def test_custom_derivatives_count_once():
    @jax.custom_vjp
    def product(x, w):
        return x @ w

    product.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))
    assert count_matmul_flops(product, shape(T, D), shape(D, K)) == 2 * T * D * K
    step = jax.grad(lambda x, w: product(x, w).sum(), argnums=(0, 1))
    assert count_matmul_flops(step, shape(T, D), shape(D, K)) == 3 * 2 * T * D * K


def test_a_shard_map_counts_every_shard():
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    split = jax.shard_map(
        lambda x, w: jax.lax.psum(x @ w, "tensor"),
        mesh=mesh,
        in_specs=(PartitionSpec("data", "tensor"), PartitionSpec("tensor")),
        out_specs=PartitionSpec("data"),
    )
    assert count_matmul_flops(split, shape(T, D), shape(D, K)) == 2 * T * D * K


def test_an_opaque_kernel_is_refused():
    call = jax.ffi.ffi_call("some_kernel", jax.ShapeDtypeStruct((D, D), jnp.float32))
    with pytest.raises(ValueError, match="ffi_call"):
        count_matmul_flops(lambda x: call(x), shape(D, D))


def test_xla_counts_a_scan_once_which_is_why_this_exists():
    def layers(x, w):
        return jax.lax.scan(lambda h, wi: (h @ wi, None), x, w)[0]

    x, w = shape(T, D), shape(24, D, D)
    assert jax.jit(layers).lower(x, w).cost_analysis()["flops"] < count_matmul_flops(layers, x, w) / 10
