"""Products with int4 rows on NVIDIA and TPU: tiles of weights are decompressed where they are multiplied.

XLA would write all rows decompressed to memory for every product. Letters: W bytes of a row, C of a tile of it, H bytes
of a group (half of its weights).
"""

import functools
import itertools
import typing

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

ROWS, TOKENS, WIDTH = 128, 128, 1024  # of a tile, at most
PROCESSORS = 132  # of an H100; a product with fewer programs leaves some without work
LEAST = 16  # rows and columns of what tensor cores multiply
VECTORS = 4  # rows of x that are multiplied without them on a GPU, at most


def product(x_MK, leaf, operand, platform, interpret=False):
    """float32 `x @ rows.T` for an `int4.Int4`, operands rounded to `operand`; None where no kernel has its shape."""
    if leaf.x_scale is not None:
        x_MK = x_MK.astype(jnp.float32) * leaf.x_scale
    if not takes(len(leaf.values), leaf.values.shape[-1] // leaf.scale.shape[-1], platform):
        return None
    return products(x_MK, (leaf,), operand, platform, interpret)[0]


def products(x_MK, leaves, operand, platform, interpret=False):
    """`product` with each of `leaves`, none of which has an input factor; several are those that `joins` takes."""
    (M, K), W, G = x_MK.shape, leaves[0].values.shape[-1], leaves[0].scale.shape[-1]
    tokens = min(TOKENS, pl.next_power_of_2(max(M, LEAST)))
    rest = 0 if platform == "gpu" and M <= VECTORS else -M % tokens
    x_MK = jnp.pad(x_MK.astype(operand), ((0, rest), (0, 2 * W - K)))
    x_MG2H = x_MK.reshape(-1, G, 2, W // G)  # what is in lower, and in upper, bits of a group
    if platform == "tpu":
        return [_tpu(x_MG2H, leaf, tokens, interpret)[:M] for leaf in leaves]
    y_MR = _gpu(x_MG2H, leaves, tokens, interpret)[:M]
    return jnp.split(y_MR, list(itertools.accumulate(len(leaf.values) for leaf in leaves))[:-1], -1)


def joins(leaves, platform):
    """Whether one call multiplies x with all of `leaves`: on a GPU, where their groups are of one size and kind."""
    first = leaves[0]
    alike = all(
        leaf.x_scale is None
        and leaf.scale.shape[-1] == first.scale.shape[-1]
        and _named(leaf).keys() == _named(first).keys()
        for leaf in leaves
    )
    H = first.values.shape[-1] // first.scale.shape[-1]
    return platform == "gpu" and alike and all(takes(len(leaf.values), H, platform) for leaf in leaves)


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


class Tile(typing.NamedTuple):
    """What a program multiplies on a GPU: rows of weights, so many bytes of them at a time, in so many parts of their
    width, whose sums are added after."""

    rows: int
    width: int
    warps: int
    stages: int | None = None
    parts: int = 1


def tile(M, R, W, H):
    """The Tile for M rows of x and weights of R rows of W bytes, H a group: what was fastest on an H100 of those that
    experiments/inference/tiles.py tries."""
    most = 1 << (R.bit_length() - 1)
    if M <= VECTORS:
        return Tile(min(2 if R < 2048 else 4, most), max(H, min(1024, pl.next_power_of_2(W))), 2)
    few = M <= TOKENS // 2
    rows, width = min(64 if few else ROWS, most), max(H, min(128 if few else 32, pl.next_power_of_2(W)))
    programs = pl.cdiv(M, min(TOKENS, pl.next_power_of_2(max(M, LEAST)))) * pl.cdiv(R, rows)
    return Tile(rows, width, 4, 3, max(1, min(4, 2 * PROCESSORS // programs, W // width)))


def _gpu(x_MG2H, leaves, tokens, interpret):
    """A program a tile of the output, through Triton, whose tiles are powers of two: the last rows overlap those before
    them, and what is right of the last byte is masked. Few rows of x are vectors, more are tensor cores' matrices."""
    from jax.experimental.pallas import triton  # deprecated since jax 0.11: see `products.has_triton`

    (M, G, _, H), sizes = x_MG2H.shape, [len(leaf.values) for leaf in leaves]
    W = G * H
    rows, width, warps, stages, parts = tile(M, sum(sizes), W, H)
    rows = min(rows, *(1 << (R.bit_length() - 1) for R in sizes))
    groups, turns = width // H, pl.cdiv(pl.cdiv(W, width), parts)
    masked = turns * parts * width > W  # the last bytes of the last part lie beyond the row
    # The three phases of a program: sums of zero, a tile's contribution to them, what is written of them.
    start, multiply, finish = _vectors(M, rows, groups) if M <= VECTORS else _matrices(tokens, rows)
    tokens = M if M <= VECTORS else tokens
    tiles = [pl.cdiv(R, rows) for R in sizes]
    operands = [(leaf.values, _named(leaf)) for leaf in leaves]

    def kernel(x_ref, *refs):
        *refs, y_ref = refs
        of_tokens, row_tile, part = (pl.program_id(axis) for axis in range(3))

        def read(at, first, end):
            """What `at` names, `[_, size, ...]`, zero from `end` on of what begins at `first`."""
            if not masked:
                return triton.load(at)
            live = (first + jnp.arange(at.shape[1]) < end).reshape(1, -1, *(1,) * (len(at.shape) - 2))
            return triton.load(at, mask=jnp.broadcast_to(live, at.shape), other=0)

        def multiply_tile(first, R, above, values_ref, named_refs):
            """Rows from `first` of a leaf's R, which are `above` that many in the output."""
            of_rows = pl.ds(jnp.minimum(first, R - rows), rows)  # the last tile overlaps the one before it

            def step(turn, y):
                # Bytes and groups that this turn reads: codes [rows, groups, H], scales [rows, groups].
                byte, group = (part * turns + turn) * width, (part * turns + turn) * groups
                of_bytes, of_groups = pl.ds(byte, width), pl.ds(group, groups)
                codes = read(values_ref.at[of_rows, of_bytes], byte, W).astype(jnp.int32).reshape(rows, groups, H)
                named = {
                    name: read(ref.at[of_rows, of_groups], group, G).astype(jnp.float32)
                    for name, ref in named_refs.items()
                }

                def x(token, count):
                    index = pl.ds(of_tokens * tokens + token, count)
                    halves = [read(x_ref.at[index, of_groups, pl.ds(half, 1)], group, G) for half in (0, 1)]
                    return [half.reshape(count, groups, H) for half in halves]

                return multiply(y, x, codes, named)

            for token, y in finish(jax.lax.fori_loop(0, turns, step, start())):
                index = pl.ds(of_tokens * tokens + token, len(y))
                y_ref[pl.ds(part, 1), index, pl.ds(above + of_rows.start, rows)] = y[None]

        before, above = 0, 0
        for R, count, (_, named) in zip(sizes, tiles, operands, strict=True):
            values_ref, named_refs = refs[0], dict(zip(named, refs[1:], strict=False))
            refs = refs[1 + len(named) :]
            here = functools.partial(multiply_tile, (row_tile - before) * rows, R, above, values_ref, named_refs)
            if len(sizes) == 1:
                here()
            else:
                pl.when((row_tile >= before) & (row_tile < before + count))(here)
            before, above = before + count, above + R

    y_PMR = pl.pallas_call(
        kernel,
        jax.ShapeDtypeStruct((parts, M, sum(sizes)), jnp.float32),
        grid=(M // tokens, sum(tiles), parts),
        compiler_params=triton.CompilerParams(num_warps=warps, num_stages=stages),  # else it would be Mosaic GPU's
        interpret=interpret,
        name="int4_product",
    )(x_MG2H, *jax.tree.leaves([(values, list(named.values())) for values, named in operands]))
    return y_PMR[0] if parts == 1 else y_PMR.sum(0)


def _vectors(M, rows, groups):
    """Sums of groups, scaled, of each of M tokens: codes are multiplied as they are, those in upper bits, which are
    sixteen times too large there, by a sixteenth of x, and the zero point by the sum of x."""

    def multiply(sums, x, codes, named):
        low, high = ((codes & bits).astype(jnp.float32) for bits in (15, 240))
        scale, zero, minimum = (named.get(name) for name in ("scale", "zero", "minimum"))
        out = []
        for token, before in enumerate(sums):
            x_low, x_high = (half.astype(jnp.float32) for half in x(token, 1))
            products = (low * x_low + high * (x_high * 0.0625)).sum(-1)
            total = (x_low + x_high).sum(-1)
            if minimum is None:
                out.append(before + scale * (products - total * (8.0 if zero is None else zero)))
            else:
                out.append(before + scale * products + minimum * total)
        return tuple(out)

    def start():
        return tuple(jnp.zeros((rows, groups), jnp.float32) for _ in range(M))

    return start, multiply, lambda sums: [(token, y.sum(-1)[None]) for token, y in enumerate(sums)]


def _matrices(tokens, rows):
    """Products of `tokens` with decompressed weights."""

    def multiply(y, x, codes, named):
        named = {name: array[..., None] for name, array in named.items()}
        for half, part in zip(x(0, tokens), (codes & 15, codes >> 4), strict=True):
            w = _weights(part.astype(jnp.float32), named["scale"], named.get("zero"), named.get("minimum"))
            y += _dot(half.reshape(tokens, -1), w.reshape(rows, -1), 1)
        return y

    return lambda: jnp.zeros((tokens, rows), jnp.float32), multiply, lambda y: [(0, y)]


def _width(W, H):
    """Bytes of a row in a TPU's tile: all, or whole lanes of them and sublanes of groups, the last tile fullest."""
    if W <= WIDTH:
        return W
    widths = [C for C in (WIDTH, WIDTH // 2, WIDTH // 4, WIDTH // 8) if C % (8 * H) == 0] or [8 * H]
    return min(widths, key=lambda C: -W % C)


def _tpu(x_MG2H, leaf, tokens, interpret):
    """A grid of tiles, along rows innermost. A tile is turned first: scales then broadcast over sublanes.

    Scales come turned, and in float32, which TPUs have no float16 for: a thirty-second of the weights, of four bytes.
    """
    (M, G, _, H), R = x_MG2H.shape, len(leaf.scale)
    W = G * H
    rows, width = min(ROWS, R), _width(W, H)
    # Where the last tile is wider than what is left, its codes are whatever lies there: times a scale of zero.
    rest = -W % width
    halves = [jnp.pad(x_MG2H[:, :, half].reshape(M, W), ((0, 0), (0, rest))) for half in (0, 1)]
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
