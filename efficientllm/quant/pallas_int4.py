"""Pallas kernels for int4 products on NVIDIA and TPU, which dequantize tiles of weights in registers.

XLA would write all dequantized rows to memory for every product.
"""

import functools
import itertools
import typing
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from efficientllm.quant.int4_tile import dot, named_scales, weights_of

if typing.TYPE_CHECKING:
    from efficientllm.quant.int4 import Int4

ROWS, TOKENS, WIDTH = 128, 128, 1024  # largest sides of a tile: rows of weights, rows of x, bytes of a row
PROCESSORS = 132  # of an H100; a product with fewer programs leaves some idle
LEAST = 16  # least rows and columns of a tensor core's operands
VECTORS = 4  # most rows of x that a GPU multiplies without tensor cores


def product(
    x_mk: jax.Array, leaf: "Int4", operand: jax.typing.DTypeLike, platform: str, interpret: bool = False
) -> jax.Array | None:
    """Compute float32 `x @ rows.T` `[m, r]`, operands rounded to `operand`; None where no kernel takes the shape."""
    if leaf.x_scale is not None:
        x_mk = x_mk.astype(jnp.float32) * leaf.x_scale
    if not takes(len(leaf.values), leaf.values.shape[-1] // leaf.scale.shape[-1], platform):
        return None
    return products(x_mk, (leaf,), operand, platform, interpret)[0]


def products(
    x_mk: jax.Array, leaves: Sequence["Int4"], operand: jax.typing.DTypeLike, platform: str, interpret: bool = False
) -> list[jax.Array]:
    """Multiply x by each of `leaves`, which have no `x_scale`; `joins` says which leaves go together."""
    (vectors, inputs), row_bytes, row_groups = x_mk.shape, leaves[0].values.shape[-1], leaves[0].scale.shape[-1]
    tokens = min(TOKENS, pl.next_power_of_2(max(vectors, LEAST)))
    rest = 0 if platform == "gpu" and vectors <= VECTORS else -vectors % tokens
    x_mk = jnp.pad(x_mk.astype(operand), ((0, rest), (0, 2 * row_bytes - inputs)))
    x_mg2h = x_mk.reshape(-1, row_groups, 2, row_bytes // row_groups)  # inputs of lower, and of upper, bits
    if platform == "tpu":
        return [_tpu(x_mg2h, leaf, tokens, interpret)[:vectors] for leaf in leaves]
    y_mr = _gpu(x_mg2h, leaves, tokens, interpret)[:vectors]
    return jnp.split(y_mr, list(itertools.accumulate(len(leaf.values) for leaf in leaves))[:-1], -1)


def joins(leaves: Sequence["Int4"], platform: str) -> bool:
    """Whether one call multiplies x by all of `leaves`: on a GPU, where their groups have one size and kind."""
    first = leaves[0]
    alike = all(
        leaf.x_scale is None
        and leaf.scale.shape[-1] == first.scale.shape[-1]
        and named_scales(leaf).keys() == named_scales(first).keys()
        for leaf in leaves
    )
    group_bytes = first.values.shape[-1] // first.scale.shape[-1]
    return platform == "gpu" and alike and all(takes(len(leaf.values), group_bytes, platform) for leaf in leaves)


def takes(rows: int, group_bytes: int, platform: str) -> bool:
    """Whether a kernel exists for so many rows of weights and bytes of a group."""
    return platform != "gpu" or min(rows, group_bytes) >= LEAST


class Tile(typing.NamedTuple):
    """Tile of a GPU program: `rows` of weights, `width` bytes of them in a step.

    A row's width is split into `parts`, whose products are summed after the kernel. `warps` and `stages` are Triton's.
    """

    rows: int
    width: int
    warps: int
    stages: int | None = None
    parts: int = 1


def tile(vectors: int, outputs: int, row_bytes: int, group_bytes: int) -> Tile:
    """Choose the Tile for so many rows of x (`vectors`) and of weights (`outputs`).

    The choice is the fastest on an H100 of those that experiments/inference/tiles.py tries.
    """
    most = 1 << (outputs.bit_length() - 1)
    if vectors <= VECTORS:
        width = max(group_bytes, min(1024, pl.next_power_of_2(row_bytes)))
        return Tile(min(2 if outputs < 2048 else 4, most), width, 2)
    few = vectors <= TOKENS // 2
    rows = min(64 if few else ROWS, most)
    width = max(group_bytes, min(128 if few else 32, pl.next_power_of_2(row_bytes)))
    programs = pl.cdiv(vectors, min(TOKENS, pl.next_power_of_2(max(vectors, LEAST)))) * pl.cdiv(outputs, rows)
    return Tile(rows, width, 4, 3, max(1, min(4, 2 * PROCESSORS // programs, row_bytes // width)))


class _Layout(typing.NamedTuple):
    """Tile of a GPU program, the phases of the program, and the rows of weights that both work on.

    The phases are `start() -> sums`, `multiply(sums, x, codes, named) -> sums` of a tile's products, and
    `finish(sums) -> [(token, products)]`.
    """

    tile: Tile
    tokens: int
    row_groups: int
    group_bytes: int
    row_bytes: int
    groups: int  # of a step
    turns: int  # steps along a part of a row
    phases: tuple[Callable, Callable, Callable]

    def read(self, at: typing.Any, first: jax.Array, end: int) -> jax.Array:
        """Load `at`, `[_, size, ...]`, whose second axis begins at index `first`; zero from index `end` on."""
        from jax.experimental.pallas import triton

        if self.turns * self.tile.parts * self.tile.width == self.row_bytes:
            return triton.load(at)
        # The last bytes of the last part lie beyond the row.
        live = (first + jnp.arange(at.shape[1]) < end).reshape(1, -1, *(1,) * (len(at.shape) - 2))
        return triton.load(at, mask=jnp.broadcast_to(live, at.shape), other=0)


def _gpu(x_mg2h, leaves, tokens, interpret):
    """Multiply through Triton, with one program for each tile of the output.

    Triton's tiles are powers of two: the last tile of rows overlaps the one before it, and bytes beyond a row are
    masked. Few rows of x are multiplied as vectors, more as matrices on tensor cores.
    """
    from jax.experimental.pallas import triton  # deprecated since jax 0.11: see `matmul.has_triton`

    (vectors, row_groups, _, group_bytes), sizes = x_mg2h.shape, [len(leaf.values) for leaf in leaves]
    row_bytes = row_groups * group_bytes
    rows, width, warps, stages, parts = tile(vectors, sum(sizes), row_bytes, group_bytes)
    rows = min(rows, *(1 << (outputs.bit_length() - 1) for outputs in sizes))
    groups, turns = width // group_bytes, pl.cdiv(pl.cdiv(row_bytes, width), parts)
    few = vectors <= VECTORS
    tokens = vectors if few else tokens
    phases = _vectors(vectors, rows, groups) if few else _matrices(tokens, rows)
    cut = Tile(rows, width, warps, stages, parts)
    layout = _Layout(cut, tokens, row_groups, group_bytes, row_bytes, groups, turns, phases)
    tiles = [pl.cdiv(outputs, rows) for outputs in sizes]
    operands = [(leaf.values, named_scales(leaf)) for leaf in leaves]

    def kernel(x_ref, *refs):
        *refs, y_ref = refs
        of_tokens, row_tile, part = (pl.program_id(axis) for axis in range(3))
        multiply_tile = functools.partial(_multiply_tile, layout, x_ref, y_ref, of_tokens, part)
        before, above = 0, 0
        for outputs, count, (_, named) in zip(sizes, tiles, operands, strict=True):
            leaf_refs = refs[0], dict(zip(named, refs[1:], strict=False))
            refs = refs[1 + len(named) :]
            multiply_leaf = functools.partial(multiply_tile, (row_tile - before) * rows, outputs, above, *leaf_refs)
            if len(sizes) == 1:
                multiply_leaf()
            else:
                pl.when((row_tile >= before) & (row_tile < before + count))(multiply_leaf)
            before, above = before + count, above + outputs

    y_pmr = pl.pallas_call(
        kernel,
        jax.ShapeDtypeStruct((parts, vectors, sum(sizes)), jnp.float32),
        grid=(vectors // tokens, sum(tiles), parts),
        compiler_params=triton.CompilerParams(num_warps=warps, num_stages=stages),  # else it would be Mosaic GPU's
        interpret=interpret,
        name="int4_product",
    )(x_mg2h, *jax.tree.leaves([(values, list(named.values())) for values, named in operands]))
    return y_pmr[0] if parts == 1 else y_pmr.sum(0)


def _multiply_tile(layout, x_ref, y_ref, of_tokens, part, first, outputs, above, values_ref, named_refs):
    """Multiply by the rows from `first` of a leaf with `outputs` rows, after `above` rows in the output."""
    (rows, width, *_), groups, turns, row_groups = layout.tile, layout.groups, layout.turns, layout.row_groups
    start, multiply, finish = layout.phases
    of_rows = pl.ds(jnp.minimum(first, outputs - rows), rows)  # the last tile overlaps the one before it

    def step(turn, y):
        # Bytes and groups that this turn reads: codes [rows, groups, h], scales [rows, groups].
        byte, group = (part * turns + turn) * width, (part * turns + turn) * groups
        of_bytes, of_groups = pl.ds(byte, width), pl.ds(group, groups)
        codes = layout.read(values_ref.at[of_rows, of_bytes], byte, layout.row_bytes)
        codes = codes.astype(jnp.int32).reshape(rows, groups, layout.group_bytes)
        named = {
            name: layout.read(ref.at[of_rows, of_groups], group, row_groups).astype(jnp.float32)
            for name, ref in named_refs.items()
        }

        def x(token, count):
            index = pl.ds(of_tokens * layout.tokens + token, count)
            halves = [layout.read(x_ref.at[index, of_groups, pl.ds(half, 1)], group, row_groups) for half in (0, 1)]
            return [half.reshape(count, groups, layout.group_bytes) for half in halves]

        return multiply(y, x, codes, named)

    for token, y in finish(jax.lax.fori_loop(0, turns, step, start())):
        index = pl.ds(of_tokens * layout.tokens + token, len(y))
        y_ref[pl.ds(part, 1), index, pl.ds(above + of_rows.start, rows)] = y[None]


def _vectors(vectors, rows, groups):
    """The phases for few rows of x: scaled sums `[rows, groups]` for each.

    Codes are multiplied unshifted: those in upper bits are sixteen times too large, so that their x is divided by
    sixteen. The zero point is multiplied by the sum of x.
    """

    def multiply(sums, x, codes, named):
        low, high = ((codes & bits).astype(jnp.float32) for bits in (15, 240))
        scale, zero, minimum = (named.get(name) for name in ("scale", "zero", "minimum"))
        sums_after = []
        for token, before in enumerate(sums):
            x_low, x_high = (half.astype(jnp.float32) for half in x(token, 1))
            products = (low * x_low + high * (x_high * 0.0625)).sum(-1)
            total = (x_low + x_high).sum(-1)
            if minimum is None:
                sums_after.append(before + scale * (products - total * (8.0 if zero is None else zero)))
            else:
                sums_after.append(before + scale * products + minimum * total)
        return tuple(sums_after)

    def start():
        return tuple(jnp.zeros((rows, groups), jnp.float32) for _ in range(vectors))

    return start, multiply, lambda sums: [(token, y.sum(-1)[None]) for token, y in enumerate(sums)]


def _matrices(tokens, rows):
    """The phases for many rows of x: products `[tokens, rows]` with dequantized weights on tensor cores."""

    def multiply(y, x, codes, named):
        named = {name: array[..., None] for name, array in named.items()}
        for half, half_codes in zip(x(0, tokens), (codes & 15, codes >> 4), strict=True):
            w = weights_of(half_codes.astype(jnp.float32), named["scale"], named.get("zero"), named.get("minimum"))
            y += dot(half.reshape(tokens, -1), w.reshape(rows, -1), 1)
        return y

    return lambda: jnp.zeros((tokens, rows), jnp.float32), multiply, lambda y: [(0, y)]


def _width(row_bytes, group_bytes):
    """Bytes of a row in a TPU's tile: all, or whole lanes and whole sublanes of groups, to fill the last tile most."""
    if row_bytes <= WIDTH:
        return row_bytes
    widths = [width for width in (WIDTH, WIDTH // 2, WIDTH // 4, WIDTH // 8) if width % (8 * group_bytes) == 0]
    return min(widths or [8 * group_bytes], key=lambda width: -row_bytes % width)


def _tpu(x_mg2h, leaf, tokens, interpret):
    """Multiply on a TPU over a grid of tiles, whose innermost axis runs along the rows' bytes.

    A tile of codes is transposed before it is dequantized, so that scales broadcast over sublanes. Scales are
    transposed outside the kernel, to float32, as TPUs have no float16: four bytes for at least 32 weights.
    """
    (vectors, row_groups, _, group_bytes), outputs = x_mg2h.shape, len(leaf.scale)
    row_bytes = row_groups * group_bytes
    rows, width = min(ROWS, outputs), _width(row_bytes, group_bytes)
    # Codes of the last tile beyond a row are undefined; scales there are zero.
    rest = -row_bytes % width
    halves = [jnp.pad(x_mg2h[:, :, half].reshape(vectors, row_bytes), ((0, 0), (0, rest))) for half in (0, 1)]
    beside = {
        name: jnp.pad(x.T.astype(jnp.float32), ((0, rest // group_bytes), (0, 0)))
        for name, x in named_scales(leaf).items()
    }

    def kernel(low_ref, high_ref, values_ref, *refs):
        *beside_refs, y_ref = refs
        # Codes and scales broadcast as [groups, bytes of a group, rows] and [groups, 1, rows].
        named = {name: ref[...][:, None] for name, ref in zip(beside, beside_refs, strict=True)}
        bytes_ = values_ref[...].astype(jnp.int32).T.reshape(width // group_bytes, group_bytes, rows)
        y = jnp.zeros((tokens, rows), jnp.float32)
        for x_ref, codes in ((low_ref, bytes_ & 15), (high_ref, bytes_ >> 4)):
            w = weights_of(codes.astype(jnp.float32), named["scale"], named.get("zero"), named.get("minimum"))
            y += dot(x_ref[...], w.reshape(width, rows), 0)

        @pl.when(pl.program_id(2) == 0)
        def _():
            y_ref[...] = jnp.zeros_like(y_ref)

        y_ref[...] += y

    of_x = pl.BlockSpec((tokens, width), lambda m, r, c: (m, c))
    of_beside = pl.BlockSpec((width // group_bytes, rows), lambda m, r, c: (c, r))
    return pl.pallas_call(
        kernel,
        jax.ShapeDtypeStruct((vectors, outputs), jnp.float32),
        grid=(vectors // tokens, pl.cdiv(outputs, rows), pl.cdiv(row_bytes, width)),
        in_specs=[of_x, of_x, pl.BlockSpec((rows, width), lambda m, r, c: (r, c)), *[of_beside] * len(beside)],
        out_specs=pl.BlockSpec((tokens, rows), lambda m, r, c: (m, r)),
        interpret=interpret,
        name="int4_product",
    )(*halves, leaf.values, *beside.values())
