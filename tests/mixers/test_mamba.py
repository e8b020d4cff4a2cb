"""Mamba and Mamba-2 against transformers, in float32: logits, loss, gradients; the scans against each other."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hlo
from configs import base
from efficientllm import model
from efficientllm.architecture import from_config
from efficientllm.ops import ssd
from efficientllm.ops.attention import Context
from efficientllm.ops.selective_scan import selective_scan
from tests.contract import loss_fn
from tiers import slow_case

VOCAB, B, T = 96, 2, 75  # beyond one chunk, and no multiple of it


def _perturbed(reference):
    """Biases, norms and skips too: at their initial values they would hide a mistake."""
    import torch

    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return reference.eval()


def _mamba(rng):
    transformers = pytest.importorskip("transformers")
    shape = {"inner": 2 * 48, "state_dim": int(rng.choice([4, 16])), "conv": int(rng.choice([3, 4]))}
    rank, bias, conv_bias = int(rng.choice([3, 5])), bool(rng.integers(2)), bool(rng.integers(2))
    config = transformers.MambaConfig(
        vocab_size=VOCAB,
        hidden_size=48,
        state_size=shape["state_dim"],
        conv_kernel=shape["conv"],
        expand=2,
        time_step_rank=rank,
        use_bias=bias,
        use_conv_bias=conv_bias,
        num_hidden_layers=2,
        layer_norm_epsilon=1e-5,
    )
    spec = f"mamba({_keywords(shape)}, step_rank={rank}, use_bias={bias}, conv_bias={conv_bias})"
    return spec, _perturbed(transformers.MambaForCausalLM(config)), functools.partial(_mamba_mixer, bias, conv_bias)


def _mamba_mixer(bias, conv_bias, get):
    x, gate = np.split(get("in_proj.weight").T, 2, 1)
    mixer = {
        "x": {"kernel": x},
        "gate": {"kernel": gate},
        "conv": {"taps": get("conv1d.weight")[:, 0].T},
        "select": {"kernel": get("x_proj.weight").T},
        "step": {"kernel": get("dt_proj.weight").T},
        "step_bias": get("dt_proj.bias"),
        "A_log": get("A_log"),
        "skip": get("D"),
        "o": {"kernel": get("out_proj.weight").T},
    }
    if bias:
        mixer["x"]["bias"], mixer["gate"]["bias"] = np.split(get("in_proj.bias"), 2)
        mixer["o"]["bias"] = get("out_proj.bias")
    if conv_bias:
        mixer["conv"]["bias"] = get("conv1d.bias")
    return mixer


def _mamba2(rng):
    transformers = pytest.importorskip("transformers")
    P, groups, N = int(rng.choice([8, 16])), int(rng.choice([1, 2])), int(rng.choice([8, 16]))
    bias, conv_bias, inner = bool(rng.integers(2)), bool(rng.integers(2)), 96
    config = transformers.Mamba2Config(
        vocab_size=VOCAB,
        hidden_size=48,
        state_size=N,
        head_dim=P,
        num_heads=inner // P,
        n_groups=groups,
        expand=2,
        conv_kernel=4,
        chunk_size=16,
        use_bias=bias,
        use_conv_bias=conv_bias,
        num_hidden_layers=2,
        layer_norm_epsilon=1e-5,
        tie_word_embeddings=True,
    )
    shape = {"inner": inner, "ssm_head_dim": P, "state_dim": N, "num_groups": groups, "chunk": int(rng.choice([8, 32]))}
    spec = f"mamba2({_keywords(shape)}, use_bias={bias}, conv_bias={conv_bias})"
    convert = functools.partial(_mamba2_mixer, bias, conv_bias, inner, groups * N)
    return spec, _perturbed(transformers.Mamba2ForCausalLM(config)), convert


def _mamba2_mixer(bias, conv_bias, inner, states, get):
    names, edges = ("gate", "x", "bc", "step"), np.cumsum([inner, inner, 2 * states])
    mixer = {
        name: {"kernel": piece} for name, piece in zip(names, np.split(get("in_proj.weight").T, edges, 1), strict=True)
    }
    for name, taps in zip(("x", "bc"), np.split(get("conv1d.weight")[:, 0].T, [inner], 1), strict=True):
        mixer[f"conv_{name}"] = {"taps": taps}
    mixer |= {"step_bias": get("dt_bias"), "A_log": get("A_log"), "skip": get("D"), "scale": get("norm.weight")}
    mixer["o"] = {"kernel": get("out_proj.weight").T}
    if bias:
        for name, piece in zip(names, np.split(get("in_proj.bias"), edges), strict=True):
            mixer[name]["bias"] = piece
        mixer["o"]["bias"] = get("out_proj.bias")
    if conv_bias:
        for name, piece in zip(("x", "bc"), np.split(get("conv1d.bias"), [inner]), strict=True):
            mixer[f"conv_{name}"]["bias"] = piece
    return mixer


def _keywords(fields):
    return ", ".join(f"{key}={value}" for key, value in fields.items())


def _params(tensors, convert):
    """Our tree from transformers' names, of weights or of their gradients."""
    arrays = {name: leaf.detach().numpy() for name, leaf in tensors.items()}

    def layer(i):
        mixer = convert(lambda name: arrays[f"backbone.layers.{i}.mixer.{name}"])
        return {"mixer": mixer, "mixer_norm": {"scale": arrays[f"backbone.layers.{i}.norm.weight"]}}

    blocks = jax.tree.map(lambda *leaves: np.stack(leaves), layer(0), layer(1))
    names = {"embedding": "backbone.embeddings.weight", "norm": "backbone.norm_f.weight"}
    return {
        "embedding": arrays[names["embedding"]],
        "groups": {"block_0": blocks},
        "norm": {"scale": arrays[names["norm"]]},
    }


@pytest.mark.parametrize("seed", [0, slow_case(1), slow_case(2)])
@pytest.mark.parametrize("family", [_mamba, slow_case(_mamba2)], ids=["mamba", "mamba2"])
def test_logits_loss_and_gradients(family, seed):
    torch = pytest.importorskip("torch")
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    spec, reference, convert = family(rng)
    config = base.get_config().model
    config.unroll = 0
    config.size = "tiny(num_layers=1, dim=48, norm_eps=1e-5)"  # two blocks without an ffn
    config.mixer, config.ffn = spec, "none"
    lm, params = from_config.from_config(config, VOCAB), _params(dict(reference.named_parameters()), convert)
    ids = rng.integers(0, VOCAB, (B, T + 1))

    theirs = reference(torch.tensor(ids[:, :-1])).logits
    loss = torch.nn.functional.cross_entropy(theirs.flatten(0, 1), torch.tensor(ids[:, 1:]).flatten())
    loss.backward()
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    batch = {"tokens": ids[:, :-1], "targets": ids[:, 1:], "positions": positions}
    batch |= {"segments": np.ones((B, T), np.int32), "weights": np.ones((B, T), np.float32)}

    def ours(params):
        (loss, _), grads = jax.value_and_grad(lambda p: loss_fn(lm, p, batch, B * T), has_aux=True)(params)
        return lm.apply({"params": params}, ids[:, :-1], Context.packed(positions))[0], loss, grads

    logits, our_loss, grads = jax.jit(ours)(params)
    _close(logits, theirs.detach().numpy())
    np.testing.assert_allclose(our_loss, loss.item(), rtol=1e-5)
    jax.tree.map(_close, grads, _params({k: v.grad for k, v in reference.named_parameters()}, convert))


def _close(actual, expected, tolerance=1e-4):
    """Within the tolerance of the array's largest value."""
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


def _documents(rng, length):
    """Rows of some documents: True but at their first tokens."""
    return rng.random((B, length)) > 0.1


@pytest.mark.parametrize("length", [1, 31, slow_case(130)])
def test_selective_scans_are_the_recurrence(length, monkeypatch):
    if length == 31:  # several chunks, and a last one that is not full
        monkeypatch.setattr("efficientllm.ops.selective_scan.CHUNK", {"sequential": 8, "associative": 8})
    rng = np.random.default_rng(length)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    C, N = 6, 4
    step = jax.nn.softplus(normal(B, length, C))
    operands = normal(B, length, C), step, -jnp.exp(normal(C, N)), normal(B, length, N), normal(B, length, N)
    keep, memory = jnp.asarray(_documents(rng, length), jnp.float32), normal(B, C, N)

    def recurrence(x, step, A, b, c, keep, h):
        out = []
        for t in range(x.shape[1]):
            decay = jnp.exp(step[:, t, :, None] * A) * keep[:, t, None, None]
            h = decay * h + (step[:, t] * x[:, t])[..., None] * b[:, t, None]
            out.append(jnp.sum(h * c[:, t, None], -1))
        return jnp.stack(out, 1), h

    kernels = [functools.partial(selective_scan, kernel=kernel) for kernel in ("sequential", "associative")]
    _same_function(recurrence, kernels, operands, keep, memory)


@pytest.mark.parametrize("kernel", ["sequential", "associative"])
def test_one_token_is_one_step(kernel):
    """A token that is decoded is no chunk: nothing is larger than the state."""
    C, N = 6, 4
    shapes = (B, 1, C), (B, 1, C), (C, N), (B, 1, N), (B, 1, N), (B, 1), (B, C, N)
    operands = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    program = jax.make_jaxpr(functools.partial(selective_scan, kernel=kernel))(*operands).jaxpr
    assert max(map(math.prod, hlo.array_shapes(program))) == B * C * N


@pytest.mark.parametrize("length", [1, slow_case(16), 43])
def test_chunks_of_ssd_are_its_steps(length, monkeypatch):
    rng = np.random.default_rng(length)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    H, P, J, N = 4, 3, 2, 5
    step = jax.nn.softplus(normal(B, length, H))
    operands = normal(B, length, H, P), step, -jnp.exp(normal(H)), normal(B, length, J, N), normal(B, length, J, N)
    keep, memory = jnp.asarray(_documents(rng, length)), normal(B, H, P, N)

    def steps(x, step, A, b, c, keep, memory):
        out = []
        for t in range(x.shape[1]):
            now = slice(t, t + 1)
            y, memory = ssd.step(x[:, now], step[:, now], A, b[:, now], c[:, now], keep[:, now], memory, None)
            out.append(y)
        return jnp.concatenate(out, 1), memory

    for span in (ssd.SPAN, 20):  # rows of one span, and of several
        monkeypatch.setattr(ssd, "SPAN", span)
        kernels = [functools.partial(ssd.chunked, chunk=chunk) for chunk in (8, 16)]
        _same_function(steps, kernels, operands, keep, memory)


def _same_function(expected, kernels, operands, keep, memory):
    """Outputs, the last state, and gradients of all operands and of the first state."""

    def all_of(kernel):
        def loss(operands, memory):
            y, after = kernel(*operands, keep, memory)
            return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(after)), (y, after)

        return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(operands, memory)

    reference = all_of(expected)
    for kernel in kernels:
        jax.tree.map(functools.partial(_close, tolerance=1e-5), all_of(kernel), reference)


# Shapes of the released checkpoints (state-spaces on the hub); transformers counts the parameters.
RELEASED = {
    "mamba-130m": ("mamba", 24, 768, 50280),
    "mamba-1.4b": ("mamba", 48, 2048, 50280),
    "mamba-2.8b": ("mamba", 64, 2560, 50280),
    "mamba2-130m": ("mamba2", 24, 768, 50288),
    "mamba2-1.3b": ("mamba2", 48, 2048, 50288),
    "mamba2-2.7b": ("mamba2", 64, 2560, 50288),
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_sizes(name):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    family, blocks, dim, vocab = RELEASED[name]
    config = base.get_config().model
    config.unroll = 0
    config.size = f"tiny(num_layers={blocks // 2}, dim={dim}, vocab_size={vocab})"
    config.mixer, config.ffn = family, "none"
    count = sum(leaf.size for leaf in jax.tree.leaves(model.abstract_params(from_config.from_config(config))))
    shape = {"vocab_size": vocab, "hidden_size": dim, "num_hidden_layers": blocks}
    if family == "mamba2":
        shape |= {"head_dim": 64, "num_heads": dim // 32, "n_groups": 1, "tie_word_embeddings": True}
    kind = {"mamba": "Mamba", "mamba2": "Mamba2"}[family]
    with torch.device("meta"):
        theirs = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**shape))
    assert count == theirs.num_parameters()
