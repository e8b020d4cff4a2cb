"""Sliding windows against transformers' Mistral, and their decoding from a ring against the same logits."""

import functools

import jax
import numpy as np
import pytest

import peer
from efficientllm import model
from efficientllm.ops.attention import Context
from tiers import slow_case

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LAYERS, WINDOW = 2, 9


def pair(seed, window):
    """A random reference, ours of its shape, and the function from its tensors to ours."""
    G = int(np.random.default_rng(seed).choice([1, 2, 4]))
    config = transformers.MistralConfig(
        vocab_size=peer.VOCAB,
        hidden_size=40,
        intermediate_size=56,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=G,
        head_dim=8,
        sliding_window=window,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        attn_implementation="eager",
    )
    reference = peer.randomise(transformers.MistralForCausalLM(config), seed, size=0.2)
    size = {"num_layers": LAYERS, "dim": 40, "num_heads": 4, "num_kv_heads": G, "head_dim": 8, "hidden": 56}
    ours = peer.lm(size | {"norm_eps": 1e-5}, mixer=f"window(window={window})")
    to_tree = functools.partial(peer.tree, num_layers=LAYERS, layer=peer.LLAMA_LAYER, top=peer.LLAMA_TOP)
    return reference, ours, to_tree


@pytest.mark.parametrize("seed, window, length", [(0, WINDOW, 30), slow_case(1, 20, 100)])
def test_logits_loss_and_gradients(seed, window, length):
    """Of rows longer than the window; 100 tokens go through the chunked kernel."""
    peer.check(*pair(seed, window), peer.tokens(seed, length + 1), 1e-5)


@pytest.fixture(scope="module")
def decoder():
    """Logits of the reference, and a function that reads tokens into a state: `(ids, positions, states)`."""
    reference, ours, to_tree = pair(0, WINDOW)
    params = to_tree(dict(reference.named_parameters()))
    ids = peer.tokens(0, 40)
    expected = reference(torch.tensor(ids).long()).logits.detach().numpy()

    @jax.jit
    def read(ids, positions, states):
        return ours.apply({"params": params}, ids, Context.decoding(positions), states)[:2]

    return ours, ids, expected, read


@pytest.mark.parametrize(
    "pieces",
    [
        slow_case((20, 1, 3, 12, 1, 3), id="prefill-longer"),
        slow_case((4, 3, 1, 12, 20), id="prefill-shorter"),
        pytest.param((9, 1, 9, 1, 20), id="prefill-as-long"),
    ],
)
def test_ring_in_pieces(decoder, pieces):
    """Pieces shorter and longer than the ring, on states empty, partly filled and full."""
    ours, ids, expected, read = decoder
    states = model.init_states(ours, peer.B, 40)
    assert {leaf.shape[2] for leaf in jax.tree.leaves(states)} == {WINDOW}
    starts = np.cumsum((0, *pieces))
    for start, stop in zip(starts, starts[1:], strict=False):
        positions = np.broadcast_to(np.arange(start, stop, dtype=np.int32), (peer.B, stop - start))
        logits, states = read(ids[:, start:stop], positions, states)
        peer.close(logits, expected[:, start:stop], 1e-5)
    assert starts[-1] == 40


@pytest.mark.slow
def test_ring_of_rows_at_different_positions(decoder):
    """One row has read 4 tokens, the other 20, when both go on together."""
    ours, ids, expected, read = decoder
    apart = []
    for row, start in enumerate((4, 20)):
        states = model.init_states(ours, peer.B, 40)
        positions = np.broadcast_to(np.arange(start, dtype=np.int32), (peer.B, start))
        _, states = read(ids[:, :start], positions, states)
        apart.append(jax.tree.map(lambda leaf, row=row: leaf[:, row], states))
    states = jax.tree.map(lambda *leaves: np.stack(leaves, 1), *apart)
    at = np.array([[4], [20]], np.int32)
    for length in (3, 1, 12, 1):
        index = at + np.arange(length, dtype=np.int32)
        logits, states = read(np.take_along_axis(ids, index, 1), index, states)
        peer.close(logits, np.take_along_axis(expected, index[..., None], 1), 1e-5)
        at = at + length
