"""What a compiled step sends is what the closed formula says, on every kind of mesh."""

import jax
import pytest

from configs import base
from efficientllm.plan import collectives, hlo, program, steps

# No two kinds of array are of one size; the vocabulary is named, so that there is no tokenizer to ask.
LAYERS, SIZES = 3, "dim=48, num_heads=8, num_kv_heads=4, head_dim=8, hidden=72, rope_base=1e4, vocab_size=88"
MESHES = (
    "data=8",
    "fsdp=8",
    "data=2, fsdp=4",
    "data=2, tensor=4",
    "fsdp=4, tensor=2",
    "fsdp=4, sequence=2",
    "data=2, fsdp=2, tensor=2",
)
pytestmark = pytest.mark.xdist_group("collectives")


def described(mesh, **changes):
    config = base.get_config()
    config.mesh, config.model.size = mesh, f"custom(num_layers={LAYERS}, {SIZES})"
    config.train.batch_size, config.train.length = 16, 26
    config.update_from_flattened_dict(changes)
    return steps.describe(config, jax.devices()[:8], "cpu")


def sent(found):
    """Bytes that a device sends in a step, by kind."""
    return {kind: total["wire_bytes"] for kind, total in program.by_kind(found).items()}


def compiled(one):
    done = steps.compile_step(one, steps.traced(one)[0])
    return sent(program.collectives(hlo.Program(done.text), 8))


def scalars(one):
    """Bytes at most of what the formula leaves out: two norms of every gradient over each axis, and a few counts."""
    axes = sum(size > 1 for size in one.mesh.shape.values())
    return axes * 2 * 4 * (2 * len(jax.tree.leaves(one.shaped.params)) + 8)


def segments(one):
    """The documents of each row's tokens, once, and in the backward pass of every layer: of a divided row."""
    rows, ways = one.config.train.batch_size // one.mesh.shape["fsdp"], one.mesh.shape["sequence"]
    return 4 * rows * one.config.train.length * (ways - 1) // ways * (1 + LAYERS)


@pytest.mark.parametrize(
    "mesh, changes",
    [(mesh, {}) for mesh in MESHES]
    + [("data=2, fsdp=2, tensor=2", {"model.tied": False}), ("fsdp=4, tensor=2", {"train.accumulate": 2})],
)
def test_a_step_sends_what_the_formula_says(mesh, changes):
    one = described(mesh, **changes)
    ours, theirs = sent(collectives.closed(one)), compiled(one)
    assert ours.keys() == theirs.keys()
    more = {kind: theirs[kind] - ours[kind] for kind in theirs}
    assert 0 <= more.pop("all-reduce") <= scalars(one) < 0.01 * sum(theirs.values())
    if "all-gather" in more and one.mesh.shape["sequence"] > 1:
        assert more.pop("all-gather") == segments(one)
    assert set(more.values()) <= {0}, (ours, theirs)
