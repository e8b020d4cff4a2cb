"""RWKV-7 against the authors' package, its kernels against the plain recurrence, its size against released models'."""

import functools
import importlib.util
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from efficientllm import model
from efficientllm.architecture import from_config
from efficientllm.cost import formulas
from efficientllm.cost.jaxpr_flops import count_matmul_flops
from efficientllm.errors import UserError
from efficientllm.ops import rwkv_recurrence
from efficientllm.ops.attention import Context
from tests.contract import loss_fn
from tiers import slow_case, slow_except

VOCAB, T = 40, 37  # no multiple of a chunk
# (layers, width, width of a head, hidden)
SHAPES = [(2, 32, 16, 96), (3, 48, 8, 80)]
RANKS = {"decay_rank": 7, "a_rank": 6, "v_rank": 5, "gate_rank": 9}
# Our name of a low-rank map: theirs, and the rank it has.
LOW_RANK = {"decay": ("w", "decay_rank"), "a": ("a", "a_rank"), "v_share": ("v", "v_rank"), "gate": ("g", "gate_rank")}


def _lm(layers, dim, head_dim, hidden, vocab=VOCAB, mixer="", **changes):
    config = base.get_config().model
    config.unroll = 0
    config.size = (
        f"tiny(num_layers={layers}, dim={dim}, head_dim={head_dim}, num_heads={dim // head_dim}, hidden={hidden})"
    )
    config.mixer, config.ffn, config.position = f"rwkv({mixer})", "channel_mix", "none"
    config.norm, config.embed_norm, config.tied = "layernorm(eps=1e-5)", True, False
    for key, value in changes.items():
        config[key] = value
    return from_config.from_config(config, vocab)


def _state_dict(rng, layers, dim, head_dim, hidden):
    """Random weights under the package's names: no parameter is at a value that hides it."""

    def normal(*shape, scale=1.0):
        return (scale * rng.standard_normal(shape)).astype(np.float32)

    def norm(name):
        return {f"{name}.weight": 1 + normal(dim, scale=0.2), f"{name}.bias": normal(dim, scale=0.2)}

    def linear(name, n, m):
        return {f"{name}.weight": normal(n, m, scale=m**-0.5)}

    weights = {"emb.weight": normal(VOCAB, dim)} | norm("ln_out") | linear("head", VOCAB, dim) | norm("blocks.0.ln0")
    for i in range(layers):
        att, ffn = f"blocks.{i}.att.", f"blocks.{i}.ffn."
        weights |= norm(f"blocks.{i}.ln1") | norm(f"blocks.{i}.ln2") | norm(f"{att}ln_x")
        for name in ("receptance", "key", "value", "output"):
            weights |= linear(att + name, dim, dim)
        weights |= linear(f"{ffn}key", hidden, dim) | linear(f"{ffn}value", dim, hidden)
        weights |= {f"{att}x_{name}": rng.random((1, 1, dim), np.float32) for name in "rwkvag"}
        weights |= {f"{att}{name}": 1 + normal(1, 1, dim, scale=0.3) for name in ("k_k", "k_a")}
        weights |= {f"{att}r_k": normal(dim // head_dim, head_dim), f"{ffn}x_k": rng.random((1, 1, dim), np.float32)}
        for letter, rank in LOW_RANK.values():
            if (i, letter) == (0, "v"):
                continue  # the first layer has none
            weights[f"{att}{letter}1"] = normal(dim, RANKS[rank], scale=dim**-0.5)
            weights[f"{att}{letter}2"] = normal(RANKS[rank], dim, scale=0.4)
            if letter != "g":
                weights[f"{att}{letter}0"] = normal(1, 1, dim, scale=2.0 if letter == "w" else 0.5)
    return weights


def _params(weights, layers):
    """Our tree from arrays under the package's names, in the layout of its files; what the first layer lacks is 0."""

    def flat(name):
        return np.ravel(weights[name])

    def norm(name):
        return {"scale": flat(f"{name}.weight"), "bias": flat(f"{name}.bias")}

    def kernel(name):
        return {"kernel": weights[f"{name}.weight"].T}

    def low_rank(att, letter):
        owner = att if f"{att}{letter}1" in weights else "blocks.1.att."
        products = {"down": {"kernel": weights[f"{owner}{letter}1"]}, "up": {"kernel": weights[f"{owner}{letter}2"]}}
        products |= {} if letter == "g" else {"bias": flat(f"{owner}{letter}0")}
        return products if owner == att else jax.tree.map(np.zeros_like, products)

    def layer(i):
        block, att, ffn = f"blocks.{i}.", f"blocks.{i}.att.", f"blocks.{i}.ffn."
        theirs = {"r": "receptance", "k": "key", "v": "value", "o": "output"}
        mixer = {ours: kernel(att + name) for ours, name in theirs.items()}
        mixer |= {ours: low_rank(att, letter) for ours, (letter, _) in LOW_RANK.items()}
        mixer |= {name: flat(att + name) for name in ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "k_k", "k_a", "r_k")}
        mixer["norm"] = norm(f"{att}ln_x")
        mix = {"x_k": flat(f"{ffn}x_k"), "key": kernel(f"{ffn}key"), "value": kernel(f"{ffn}value")}
        norms = {"mixer_norm": norm(f"{block}ln1"), "ffn_norm": norm(f"{block}ln2")}
        return {"mixer": mixer, "ffn": mix} | norms

    return {
        "embedding": weights["emb.weight"],
        "embed_norm": norm("blocks.0.ln0"),
        "groups": {"block_0": jax.tree.map(lambda *leaves: np.stack(leaves), *map(layer, range(layers)))},
        "norm": norm("ln_out"),
        "head": kernel("head"),
    }


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """For each shape: random weights, tokens, and what the package makes of them."""
    torch = pytest.importorskip("torch")
    if importlib.util.find_spec("rwkv") is None:
        pytest.skip("needs the package rwkv")
    folder, cases = tmp_path_factory.mktemp("rwkv"), []
    for seed, shape in enumerate(SHAPES):
        rng = np.random.default_rng(seed)
        weights, ids = _state_dict(rng, *shape), rng.integers(0, VOCAB, T + 1)
        torch.save({name: torch.tensor(leaf) for name, leaf in weights.items()}, folder / f"{seed}.pth")
        np.savez(folder / f"{seed}.npz", tokens=ids[:-1], targets=ids[1:])
        cases.append((shape, weights, ids))
    script = pathlib.Path(__file__).with_name("rwkv_reference.py")
    subprocess.run([sys.executable, script, folder], check=True, capture_output=True)
    return [(*case, dict(np.load(folder / f"{seed}.out.npz"))) for seed, case in enumerate(cases)]


def _positions(length, rows=1):
    return np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))


def _spec(**fields):
    return ", ".join(f"{key}={value!r}" for key, value in fields.items())


@pytest.mark.xdist_group("rwkv package")
@pytest.mark.parametrize("case, kernel", [slow_case(0, "sequential"), (0, "chunked"), slow_case(1, "auto")])
def test_logits_are_the_packages(reference, case, kernel):
    shape, weights, ids, theirs = reference[case]
    lm = _lm(*shape, mixer=_spec(**RANKS, rwkv_kernel=kernel))
    params = _params(weights, shape[0])
    ours, _, _ = jax.jit(lm.apply)({"params": params}, ids[None, :-1], Context.packed(_positions(T)))
    np.testing.assert_allclose(ours[0], theirs["logits"], atol=2e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.xdist_group("rwkv package")
@pytest.mark.parametrize("case", range(len(SHAPES)))
def test_gradients_are_the_packages(reference, case):
    shape, weights, ids, theirs = reference[case]
    lm, params = _lm(*shape, mixer=_spec(**RANKS)), _params(weights, shape[0])
    batch = {"tokens": ids[None, :-1], "targets": ids[None, 1:], "positions": _positions(T)}
    batch |= {"segments": np.ones((1, T), np.int32), "weights": np.ones((1, T), np.float32)}
    (loss, _), grads = jax.jit(jax.value_and_grad(lambda p: loss_fn(lm, p, batch, T), has_aux=True))(params)
    np.testing.assert_allclose(loss, theirs["loss"], rtol=1e-6)
    gradients = {name.removeprefix("grad/"): leaf for name, leaf in theirs.items() if name.startswith("grad/")}
    stored = ("key.weight", "value.weight", "receptance.weight", "output.weight", "head.weight")
    gradients = {
        name: leaf.T if name.endswith(stored) else leaf for name, leaf in gradients.items()
    }  # it keeps them transposed
    expected = _params(gradients, shape[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6, rtol=2e-4), grads, expected)


def _plain(tokens, starts_BT, memory_BHKV):
    """The recurrence as the paper writes it: a transition matrix a token, `S_t = S_{t-1} G_t + v_t k_t^T`."""

    def step(s_BHVK, inputs):
        token, starts_B = inputs
        s_BHVK = s_BHVK * (1 - starts_B[:, None, None, None])
        transition = (
            jax.vmap(jax.vmap(jnp.diag))(jnp.exp(token.log_w)) - token.kappa[..., None] * token.beta[..., None, :]
        )
        s_BHVK = s_BHVK @ transition + token.v[..., None] * token.k[..., None, :]
        return s_BHVK, (s_BHVK @ token.r[..., None])[..., 0]

    by_token = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), (tokens, starts_BT.astype(jnp.float32)))
    s_BHVK, y_TBHV = jax.lax.scan(step, jnp.swapaxes(memory_BHKV, -1, -2), by_token)
    return jnp.moveaxis(y_TBHV, 0, 1), jnp.swapaxes(s_BHVK, -1, -2)


def _random(rng, B, length, H, K, V, log_w=None):
    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    kappa = normal(B, length, H, K)
    kappa /= np.linalg.norm(kappa, axis=-1, keepdims=True)
    if log_w is None:
        log_w = -0.606531 * rng.random((B, length, H, K), np.float32)
    return rwkv_recurrence.Tokens(
        r=normal(B, length, H, K),
        log_w=np.broadcast_to(np.float32(log_w), kappa.shape),
        k=0.3 * normal(B, length, H, K),
        v=normal(B, length, H, V),
        kappa=kappa,
        beta=kappa * rng.random((B, length, H, K), np.float32),
    )


@functools.cache
def _values_and_gradients(kernel):
    """`(tokens, starts, memory, weights) -> (gradients, (y, memory))`, jitted once for all cases of a shape."""
    function = functools.partial(rwkv_recurrence.recur, kernel=kernel) if kernel else _plain

    def total(tokens, memory, starts_BT, weights):
        y, last = function(tokens, starts_BT, memory)
        return jnp.sum(y * weights[0]) + jnp.sum(last * weights[1]), (y, last)

    differentiated = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))
    return lambda tokens, starts_BT, memory, weights: differentiated(tokens, memory, starts_BT, weights)


def _assert_equal(kernel, tokens, starts_BT, memory):
    rng = np.random.default_rng(9)
    weights = rng.standard_normal(tokens.v.shape, np.float32), rng.standard_normal(memory.shape, np.float32)
    ours, plain = (_values_and_gradients(name)(tokens, starts_BT, memory, weights) for name in (kernel, None))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5, rtol=1e-4), ours, plain)
    y, _ = jax.jit(functools.partial(rwkv_recurrence.recur, kernel=kernel))(tokens, starts_BT, memory)
    np.testing.assert_allclose(y, plain[1][0], atol=3e-5, rtol=1e-4)  # without a gradient


CASES = {
    # tokens, share of them that start a document, log of the decay (None: random)
    "one token": (1, 0.0, None),
    "short": (5, 0.3, None),
    "chunks and a rest": (53, 0.0, None),
    "many documents": (53, 0.15, None),
    "all start": (53, 1.0, None),
    "fastest decay": (53, 0.05, -0.606531),
    "no decay": (53, 0.05, 0.0),
}
KERNELS = ["sequential", "chunked", "split"]


# The one that uses both others with every case; of the chunked one what its chunks divide.
DEFAULT = [("split", case) for case in CASES]
DEFAULT += [("chunked", case) for case in ("chunks and a rest", "fastest decay", "no decay")]


@pytest.mark.parametrize(
    "kernel, case", slow_except([(kernel, case) for kernel in KERNELS for case in CASES], *DEFAULT)
)
def test_kernels_are_the_recurrence(kernel, case):
    length, starting, log_w = CASES[case]
    rng = np.random.default_rng(len(case))
    starts_BT = rng.random((2, length)) < starting
    memory = rng.standard_normal((2, 3, 8, 4), np.float32)
    _assert_equal(kernel, _random(rng, 2, length, 3, 8, 4, log_w), starts_BT, memory)


@pytest.mark.parametrize("kernel", ["chunked", "split"])
def test_rows_of_several_spans_are_the_recurrence(kernel, monkeypatch):
    monkeypatch.setattr(rwkv_recurrence, "SPAN", 32)
    rng = np.random.default_rng(0)
    starts_BT, memory = rng.random((2, 75)) < 0.1, rng.standard_normal((2, 3, 8, 4), np.float32)
    _assert_equal(kernel, _random(rng, 2, 75, 3, 8, 4, None), starts_BT, memory)


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_are_stable_where_every_key_is_the_same(kernel):
    """The system's matrix is then full of ones, and its powers reach thousands."""
    tokens = _random(np.random.default_rng(0), 2, 53, 3, 8, 4, log_w=0.0)
    kappa = np.broadcast_to(tokens.kappa[:, :1], tokens.kappa.shape)
    tokens = tokens.replace(kappa=kappa, beta=kappa, k=kappa)
    _assert_equal(kernel, tokens, np.zeros((2, 53), bool), np.zeros((2, 3, 8, 4), np.float32))


def test_what_the_gradient_keeps_is_linear_in_the_tokens():
    def residual_bytes(length, kernel):
        tokens = _random(np.random.default_rng(0), 1, length, 2, 32, 32)
        starts = np.zeros((1, length), bool)

        def run(tokens):
            return jax.vjp(lambda t: rwkv_recurrence.recur(t, starts, kernel=kernel), tokens)[1]

        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(run, tokens)))

    assert residual_bytes(1024, "split") < 2.05 * residual_bytes(512, "split")
    assert residual_bytes(1024, "split") < residual_bytes(1024, "sequential") / 2


@pytest.mark.parametrize("kernel", slow_except(KERNELS, "chunked"))
def test_flops_of_every_kernel(kernel):
    lm = _lm(2, 32, 8, 48, mixer=_spec(**RANKS, rwkv_kernel=kernel))
    boxed, ids = model.abstract_params(lm), np.zeros((1, 45), np.int32)
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), boxed)
    counted = count_matmul_flops(lambda: lm.apply({"params": params}, ids, Context.packed(_positions(45))))
    assert counted == formulas.forward_flops(lm, boxed, 45, executed=True)


# Parameters of the released RWKV7-World models, and where a rank is not the default's.
RELEASED = [
    (12, 768, "", 191_034_624),
    (24, 1024, "gate_rank=128", 450_767_872),
    (24, 2048, "", 1_527_404_544),
    (32, 2560, "", 2_947_735_040),
]


@pytest.mark.parametrize("layers, dim, mixer, released", RELEASED)
def test_parameters_are_the_released_models(layers, dim, mixer, released):
    lm = _lm(layers, dim, 64, 4 * dim, vocab=65536, mixer=mixer)
    boxed = model.abstract_params(lm)
    v_rank = boxed["groups"]["block_0"]["mixer"]["v_share"]["down"]["kernel"].value.shape[-1]
    unread = 2 * dim * v_rank + dim  # the first layer's share of v_first
    assert formulas.count_parameters(lm, boxed)["total"] == released + unread


def test_the_state_does_not_grow():
    lm = _lm(2, 32, 8, 48)
    assert formulas.state_bytes(lm, 8) == formulas.state_bytes(lm, 1 << 20) == 2 * 4 * (2 * 32 + 32 * 8)


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(UserError, match="head_dim = 24 does not divide the width of the model, 32"):
        model.abstract_params(_lm(2, 32, 8, 48, mixer="head_dim=24"))


def test_a_state_of_another_width_is_refused():
    lm = _lm(2, 32, 8, 48, ffn="channel_mix(dim=16)")
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), model.abstract_params(lm))
    states = model.init_states(lm, 1, 4)
    with pytest.raises(UserError, match="dim = 16 is not the width of the model, 32"):
        lm.apply({"params": params}, np.zeros((1, 4), np.int32), Context.decoding(_positions(4)), states)
