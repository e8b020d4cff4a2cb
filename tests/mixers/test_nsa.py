"""Native sparse attention and mixture of block attention against explicit loops, and kernels against each other."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficientllm.ops import block_sparse_kernel
from efficientllm.ops.attention import Context
from efficientllm.ops.block_sparse_attention import SelectedBlocks, attend_blocks
from efficientllm.registry import build
from tiers import slow_case, slow_except

DIM, H, G, K, BASE = 12, 4, 2, 6, 50.0
BRANCHES = ("compressed", "chosen", "recent")
SHAPE = {"num_heads": H, "num_kv_heads": G, "head_dim": K, "precision": "float32", "position": f"rope(base={BASE})"}


def documents(lengths):
    """A row of documents of these lengths -> (positions, segments), `[1, T]`."""
    positions = np.concatenate([np.arange(length) for length in lengths]).astype(np.int32)
    segments = np.repeat(np.arange(len(lengths)), lengths).astype(np.int32)
    return positions[None], segments[None]


def random_mixer(spec, seed, length, **fields):
    """A mixer with random parameters, and tokens for it."""
    mixer = build("mixer", spec, SHAPE | fields)
    rng = np.random.default_rng(seed)
    x_BTD = rng.standard_normal((1, length, DIM)).astype(np.float32)
    params = nn.unbox(jax.eval_shape(mixer.init, jax.random.key(0), x_BTD, Context.packed(*documents([length]))))
    params = params["params"]
    return mixer, jax.tree.map(lambda p: rng.standard_normal(p.shape).astype(np.float32) / len(p) ** 0.5, params), x_BTD


def rotate(x_K, position):
    angle_k = position * BASE ** (-np.arange(0, K, 2) / K)
    first, second = np.split(x_K, 2)
    return np.concatenate(
        [first * np.cos(angle_k) - second * np.sin(angle_k), second * np.cos(angle_k) + first * np.sin(angle_k)]
    )


def heads(x_TD, kernel, turned):
    x_THK = (x_TD @ kernel).reshape(len(x_TD), -1, K)
    return np.array([[rotate(x, t) for x in heads] for t, heads in enumerate(x_THK)]) if turned else x_THK


def softmax(scores):
    weights = np.exp(scores - np.max(scores))
    return weights / weights.sum()


def read(q_K, k_SGK, v_SGK, g, tokens):
    return softmax(k_SGK[tokens, g] @ q_K * K**-0.5) @ v_SGK[tokens, g]


def compress(params, x_lK):
    hidden = (x_lK + params["position"]).reshape(-1) @ params["up"]["kernel"]
    hidden = 0.5 * hidden * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
    return hidden @ params["down"]["kernel"]


def most(scores, forced, count):
    """Forced blocks, then others by score, up to `count`."""
    others = sorted(set(range(len(scores))) - set(forced), key=lambda j: -scores[j])
    return [*forced, *others][:count]


def nsa_by_loops(p, x_TD, l, d, size, n, window, causal=True):  # noqa: E741
    """One document, as the paper writes it; or in both directions, as `NSA` does."""
    T = len(x_TD)

    def kernel(name):
        return p[name]["kernel"]

    q = heads(x_TD, kernel("q"), True)
    k, v = ({b: heads(x_TD, kernel(f"{b}_{c}"), c + b != "kcompressed" and c == "k") for b in BRANCHES} for c in "kv")
    begins = range(0, T - l + 1, d)

    def compressed_block(x, i, g):
        return x["compressed"][i : i + l, g]

    small_k = [[rotate(compress(p["compress_k"], compressed_block(k, i, g)), i) for g in range(G)] for i in begins]
    small_v = [[compress(p["compress_v"], compressed_block(v, i, g)) for g in range(G)] for i in begins]
    gates = 1 / (1 + np.exp(-(x_TD @ kernel("gate")))).reshape(T, H, 3)
    y = np.zeros((T, H, K))
    for t in range(T):
        last = t if causal else T - 1
        current, visible = t // size, [i for i, begin in enumerate(begins) if begin + l - 1 <= last]
        forced = {0, max(0, current - 1), current} if causal else {current}
        for g in range(G):
            scores, group = np.zeros(last // size + 1), range(g * H // G, (g + 1) * H // G)
            for h in group:
                weights = np.zeros(10 * T)
                if visible:
                    weights[visible] = softmax(np.array([small_k[i][g] @ q[t, h] for i in visible]) * K**-0.5)
                    y[t, h] += gates[t, h, 0] * sum(weights[i] * small_v[i][g] for i in visible)
                for j in range(len(scores)):
                    for m in range(size // d):
                        for back in range(l // d):
                            scores[j] += weights[j * size // d + m - back]
            blocks = most(scores, sorted(forced), n)
            tokens = [s for j in blocks for s in range(j * size, (j + 1) * size) if s <= last]
            for h in group:
                y[t, h] += gates[t, h, 1] * read(q[t, h], k["chosen"], v["chosen"], g, tokens)
                recent = list(range(max(0, t - window + 1), min(last, t + window - 1) + 1))
                y[t, h] += gates[t, h, 2] * read(q[t, h], k["recent"], v["recent"], g, recent)
    return y.reshape(T, -1) @ kernel("o")


def moba_by_loops(p, x_TD, size, n, causal=True):
    """One document, as the paper writes it; or in both directions, as `MoBA` does."""
    T = len(x_TD)
    q, k, v = (heads(x_TD, p[name]["kernel"], name != "v") for name in "qkv")
    y = np.zeros((T, H, K))
    for t in range(T):
        for h in range(H):
            g, current = h * G // H, t // size
            whole = current if causal else T // size
            scores = [k[j * size : (j + 1) * size, g].mean(0) @ q[t, h] for j in range(whole)]
            blocks = most([*scores, 0.0] if causal else scores, [current], n)
            last = t if causal else T - 1
            tokens = [s for j in blocks for s in range(j * size, (j + 1) * size) if s <= last]
            y[t, h] = read(q[t, h], k, v, g, tokens)
    return y.reshape(T, -1) @ p["o"]["kernel"]


def check_loops(mixer, params, x_BTD, lengths, by_loops, context=Context.packed):
    """Each document of a packed row is what the loops give for it alone."""
    outputs = jax.jit(mixer.apply)({"params": params}, x_BTD, context(*documents(lengths)))[0]
    exact = jax.tree.map(np.float64, params)
    pieces = np.split(np.float64(x_BTD[0]), np.cumsum(lengths)[:-1])
    expected = np.concatenate([by_loops(exact, piece) for piece in pieces])
    np.testing.assert_allclose(outputs[0], expected, atol=1e-5)


@pytest.mark.parametrize("kernel", [slow_case("masked"), "grouped", "gathered"])
@pytest.mark.parametrize(
    "lengths, sizes",
    [
        ([51], (8, 4, 8, 4, 7)),
        slow_case([3, 38, 1, 17], (4, 2, 8, 3, 5)),
        slow_case([30, 29], (8, 2, 4, 5, 64)),
    ],
)
def test_nsa_is_what_the_paper_writes(lengths, sizes, kernel):
    names = ("compress_block", "compress_stride", "select_block", "select_count", "window")
    fields = dict(zip(names, sizes, strict=True)) | {"block_kernel": kernel, "attention_kernel": "auto"}
    mixer, params, x_BTD = random_mixer("nsa", sum(sizes), sum(lengths), **fields)

    def by_loops(p, x):
        return nsa_by_loops(p, x, *sizes)

    check_loops(mixer, params, x_BTD, lengths, by_loops)


@pytest.mark.parametrize("kernel", [slow_case("masked"), "grouped", "gathered"])
@pytest.mark.parametrize("lengths, sizes", [([41], (4, 3)), slow_case([9, 1, 40], (7, 2)), slow_case([20], (32, 3))])
def test_moba_is_what_the_paper_writes(lengths, sizes, kernel):
    fields = {"block": sizes[0], "block_count": sizes[1], "block_kernel": kernel}
    mixer, params, x_BTD = random_mixer("moba", sum(sizes), sum(lengths), **fields)
    check_loops(mixer, params, x_BTD, lengths, lambda p, x: moba_by_loops(p, x, *sizes))


@pytest.mark.parametrize("kernel", [slow_case("masked"), "grouped", slow_case("gathered")])
@pytest.mark.parametrize("lengths", [[48], slow_case([3, 38, 1, 17])])
def test_nsa_in_both_directions(lengths, kernel):
    sizes = (8, 4, 8, 3, 7)
    names = ("compress_block", "compress_stride", "select_block", "select_count", "window")
    fields = dict(zip(names, sizes, strict=True)) | {"block_kernel": kernel, "attention_kernel": "auto"}
    mixer, params, x_BTD = random_mixer("nsa", 5, sum(lengths), **fields)
    check_loops(mixer, params, x_BTD, lengths, lambda p, x: nsa_by_loops(p, x, *sizes, causal=False), Context.whole)


@pytest.mark.parametrize("kernel", [slow_case("masked"), "grouped", slow_case("gathered")])
@pytest.mark.parametrize("lengths", [[28, 14], slow_case([9, 1, 40])])
def test_moba_in_both_directions(lengths, kernel):
    fields = {"block": 7, "block_count": 2, "block_kernel": kernel}
    mixer, params, x_BTD = random_mixer("moba", 6, sum(lengths), **fields)
    check_loops(mixer, params, x_BTD, lengths, lambda p, x: moba_by_loops(p, x, 7, 2, causal=False), Context.whole)


def random_choice(rng, lengths, choosers, size, n):
    """`SelectedBlocks` of rows of documents: a query's own block and others at random, fewer where there are fewer."""
    positions, _ = documents(lengths)
    T = positions.shape[1]
    start_BTCn = np.full((1, T, choosers, n), -1, np.int32)
    for t, position in enumerate(positions[0]):
        for c in range(choosers):
            blocks = [position // size, *rng.permutation(position // size)][: rng.integers(1, n + 1)]
            start_BTCn[0, t, c, : len(blocks)] = t - position + size * np.array(blocks)
    return SelectedBlocks(jnp.array(start_BTCn), jnp.arange(T)[None], size)


CASES = {  # documents, choosers, query heads a chooser, KV heads, size, n
    "one document": ([150], 2, 2, 2, 16, 4),
    "many, of one token too": ([40, 1, 1, 70, 3, 30], 2, 3, 2, 8, 5),
    "each head chooses": ([37, 64], 4, 1, 2, 8, 3),
    "a block is the row": ([33], 1, 4, 1, 64, 2),
}


@pytest.mark.parametrize("chunk_bytes, tile_rows, tiles", [slow_case(1 << 25, 2048, 1), (1 << 14, 16, 3)])
@pytest.mark.parametrize("name", slow_except(CASES, "many, of one token too", "each head chooses"))
def test_grouped_and_masked_are_one_function(name, chunk_bytes, tile_rows, tiles, monkeypatch):
    monkeypatch.setattr(block_sparse_kernel, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(block_sparse_kernel, "TILE_ROWS", tile_rows)
    monkeypatch.setattr(block_sparse_kernel, "_tiles_a_step", lambda: tiles)
    lengths, choosers, heads, kv_heads, size, n = CASES[name]
    rng = np.random.default_rng(len(name))
    chosen, T = random_choice(rng, lengths, choosers, size, n), sum(lengths)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    shapes = (1, T, choosers * heads, 8), (1, T, kv_heads, 8), (1, T, kv_heads, 4)
    dy = normal(1, T, choosers * heads, 4)

    def loss(arrays, kernel):
        y = attend_blocks(*arrays, chosen, kernel)
        return jnp.sum(y * dy), y

    results = [
        jax.jit(jax.grad(functools.partial(loss, kernel=kernel), has_aux=True))(arrays)
        for arrays in [[normal(*shape) for shape in shapes]]
        for kernel in ("masked", "grouped")
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6, rtol=1e-5), *results)


@pytest.mark.slow
def test_queries_without_a_block_get_zeros():
    nothing = SelectedBlocks(jnp.full((1, 5, 1, 2), -1), jnp.arange(5)[None], 4)
    q, k = jnp.ones((1, 5, 2, 8)), jnp.ones((1, 5, 1, 8))
    for kernel in ("masked", "grouped", "gathered"):
        np.testing.assert_array_equal(attend_blocks(q, k, k, nothing, kernel), 0)


def temporary_bytes(length, kernel):
    """Of the forward and backward pass over a row whose queries read 4 blocks of 16 keys."""
    start = jax.ShapeDtypeStruct((1, length, 1, 4), jnp.int32)
    x = jax.ShapeDtypeStruct((1, length, 1, 32), jnp.float32)

    def loss(arrays, start):
        return jnp.sum(attend_blocks(*arrays, SelectedBlocks(start, jnp.arange(length)[None], 16), kernel))

    return jax.jit(jax.grad(loss)).lower((x, x, x), start).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_memory_grows_with_the_blocks_read_and_not_with_the_square_of_the_row():
    grouped, masked = ([temporary_bytes(length, kernel) for length in (4096, 8192)] for kernel in ("grouped", "masked"))
    assert grouped[1] < 2.2 * grouped[0]
    assert masked[1] > 3.8 * masked[0] and masked[0] > 10 * grouped[0]
