"""Products with int4 rows on NVIDIA and TPU: tiles of weights are decompressed where they are multiplied.

XLA would write all rows decompressed to memory for every product. Letters: W bytes of a row, C of a tile of it, H bytes
of a group (half of its weights).
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

ROWS, TOKENS, WIDTH = 128, 128, 1024  # of a tile, at most
LEAST = 16  # rows and columns of what tensor cores multiply


def product(x_MK, leaf, operand, platform, interpret=False):
    """float32 `x @ rows.T` for an `int4.Int4`, operands rounded to `operand`; None where no kernel has its shape."""
    if leaf.x_scale is not None:
        x_MK = x_MK.astype(jnp.float32) * leaf.x_scale
    (M, K), (R, W), G = x_MK.shape, leaf.values.shape, leaf.scale.shape[-1]
    if not takes(R, W // G, platform):
        return None
    tokens = min(TOKENS, pl.next_power_of_2(max(M, LEAST)))
    x_MK = jnp.pad(x_MK.astype(operand), ((0, -M % tokens), (0, 2 * W - K)))
    x_MG2H = x_MK.reshape(-1, G, 2, W // G)
    halves = [x_MG2H[:, :, half].reshape(-1, W) for half in (0, 1)]  # of what is in lower, and in upper, bits
    call = {"gpu": _gpu, "tpu": _tpu}[platform]
    return call(halves, leaf, tokens, interpret)[:M]


def takes(rows, group_bytes, platform):
    """Whether there is a kernel for so many rows of weights, and bytes of a group."""
    return platform != "gpu" or min(rows, group_bytes) >= LEAST


def _weights(codes, scale, zero, minimum):
    """As `int4.decode`, of arrays that broadcast."""
    if minimum is not None:
        return codes * scale + minimum
    return (codes - (8.0 if zero is None else zero)) * scale


def _dot(x, w, axis):
    """`x[tokens, C]` with `w`, along its `axis`."""
    precision = "highest" if x.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        x, w.astype(x.dtype), (((1,), (axis,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def _named(leaf):
    """The names and arrays of what a leaf has beside its codes."""
    return {name: x for name in ("scale", "zero", "minimum") if (x := getattr(leaf, name)) is not None}


def _gpu(halves, leaf, tokens, interpret):
    """A program a tile of the output, through Triton, which masks nothing: the last tile overlaps the one before."""
    M, (R, G), H = len(halves[0]), leaf.scale.shape, leaf.values.shape[-1] // leaf.scale.shape[-1]
    rows, groups = min(ROWS, 1 << (R.bit_length() - 1)), 1
    while G % (2 * groups) == 0 and 2 * groups * H <= 64:
        groups *= 2
    beside = _named(leaf)

    def kernel(low_ref, high_ref, values_ref, *refs):
        *beside_refs, y_ref = refs
        first = jnp.minimum(pl.program_id(1) * rows, R - rows)
        of_rows, of_tokens = pl.ds(first, rows), pl.ds(pl.program_id(0) * tokens, tokens)

        def step(i, y):
            at, of_groups = pl.ds(i * groups * H, groups * H), pl.ds(i * groups, groups)
            parts = {
                name: ref[of_rows, of_groups].astype(jnp.float32)[:, :, None]
                for name, ref in zip(beside, beside_refs, strict=True)
            }
            bytes_ = values_ref[of_rows, at].astype(jnp.int32).reshape(rows, groups, H)
            for x_ref, codes in ((low_ref, bytes_ & 15), (high_ref, bytes_ >> 4)):
                w = _weights(codes.astype(jnp.float32), parts["scale"], parts.get("zero"), parts.get("minimum"))
                y += _dot(x_ref[of_tokens, at], w.reshape(rows, groups * H), 1)
            return y

        zeros = jnp.zeros((tokens, rows), jnp.float32)
        y_ref[of_tokens, of_rows] = jax.lax.fori_loop(0, G // groups, step, zeros)

    return pl.pallas_call(
        kernel,
        jax.ShapeDtypeStruct((M, R), jnp.float32),
        grid=(M // tokens, pl.cdiv(R, rows)),
        compiler_params=triton.CompilerParams(),  # without them, it would be Mosaic GPU's
        interpret=interpret,
        name="int4_product",
    )(*halves, leaf.values, *beside.values())


def _width(W, H):
    """Bytes of a row in a TPU's tile: all, or whole lanes of them and sublanes of groups, the last tile fullest."""
    if W <= WIDTH:
        return W
    widths = [C for C in (WIDTH, WIDTH // 2, WIDTH // 4, WIDTH // 8) if C % (8 * H) == 0] or [8 * H]
    return min(widths, key=lambda C: -W % C)


def _tpu(halves, leaf, tokens, interpret):
    """A grid of tiles, along rows innermost. A tile is turned first: scales then broadcast over sublanes.

    Scales come turned, and in float32, which TPUs have no float16 for: a thirty-second of the weights, of four bytes.
    """
    (M, W), R, H = halves[0].shape, len(leaf.scale), leaf.values.shape[-1] // leaf.scale.shape[-1]
    rows, width = min(ROWS, R), _width(W, H)
    # Where the last tile is wider than what is left, its codes are whatever lies there: times a scale of zero.
    rest = -W % width
    halves = [jnp.pad(half, ((0, 0), (0, rest))) for half in halves]
    beside = {name: jnp.pad(x.T.astype(jnp.float32), ((0, rest // H), (0, 0))) for name, x in _named(leaf).items()}

    def kernel(low_ref, high_ref, values_ref, *refs):
        *beside_refs, y_ref = refs
        parts = {name: ref[...][:, None] for name, ref in zip(beside, beside_refs, strict=True)}
        bytes_ = values_ref[...].astype(jnp.int32).T.reshape(width // H, H, rows)
        y = jnp.zeros((tokens, rows), jnp.float32)
        for x_ref, codes in ((low_ref, bytes_ & 15), (high_ref, bytes_ >> 4)):
            w = _weights(codes.astype(jnp.float32), parts["scale"], parts.get("zero"), parts.get("minimum"))
            y += _dot(x_ref[...], w.reshape(width, rows), 0)

        @pl.when(pl.program_id(2) == 0)
        def _():
            y_ref[...] = jnp.zeros_like(y_ref)

        y_ref[...] += y

    of_x = pl.BlockSpec((tokens, width), lambda m, r, c: (m, c))
    of_beside = pl.BlockSpec((width // H, rows), lambda m, r, c: (c, r))
    return pl.pallas_call(
        kernel,
        jax.ShapeDtypeStruct((M, R), jnp.float32),
        grid=(M // tokens, pl.cdiv(R, rows), pl.cdiv(W, width)),
        in_specs=[of_x, of_x, pl.BlockSpec((rows, width), lambda m, r, c: (r, c)), *[of_beside] * len(beside)],
        out_specs=pl.BlockSpec((tokens, rows), lambda m, r, c: (m, r)),
        interpret=interpret,
        name="int4_product",
    )(*halves, leaf.values, *beside.values())
