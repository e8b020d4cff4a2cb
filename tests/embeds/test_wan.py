"""Wan's sizes, the FLOPs of its forward pass and of a sampler's step, and texts that are read once a request."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import wan
from efficientllm import model, sharding
from efficientllm.architecture import from_config
from efficientllm.cost import formulas, jaxpr_flops
from efficientllm.embeds.condition import Condition
from efficientllm.embeds.picture import ImageFormat
from efficientllm.infer.denoise import DiffusionSampler
from efficientllm.infer.picture_costs import PictureCosts
from efficientllm.registry import build

pytestmark = pytest.mark.quick


def denoiser(variant="tiny", picture=None, **changes):
    config = wan.get_config(variant).model
    config.update(changes)
    return from_config.from_config(config, picture)


def products(lm, T, S, D, F, C, E):
    """Multiply-adds of a forward pass: all, and those of the text alone."""
    L = lm.num_groups
    blocks = L * (6 * D**2 * T + 2 * T**2 * D + 2 * T * S * D + 2 * D * F * T)
    of_text = L * 2 * D**2 * S + (E * D + D**2) * S
    ends = 2 * C * lm.patch**2 * D * T + 256 * D + D**2 + 6 * D**2
    return blocks + of_text + ends, of_text


@pytest.mark.parametrize(
    "variant, parameters, tflop, size, width",
    [
        ("1.3b", 1_418_996_800, 283.0, (21, 60, 104), (1536, 8960)),
        ("1.3b", 1_418_996_800, 31.6, (5, 60, 104), (1536, 8960)),
        ("1.3b", 1_418_996_800, 4.65, (1, 60, 104), (1536, 8960)),
        ("14b", 14_288_491_584, 1678, (21, 60, 104), (5120, 13824)),
        ("14b", 14_288_491_584, 6523, (21, 90, 160), (5120, 13824)),
    ],
)
def test_sizes_have_the_published_parameters(variant, parameters, tflop, size, width):
    lm = denoiser(variant).clone(size=size)
    boxed, T = model.abstract_params(lm), lm.row_length(0)
    assert formulas.count_parameters(lm, boxed)["total"] == parameters
    flops = formulas.forward_flops(lm, boxed, T)
    macs, of_text = products(lm, T, 512, *width, 16, 4096)
    assert flops == 2 * macs and formulas.request_flops(lm, boxed, T) == 2 * of_text
    assert float(f"{flops / 1e12:.4g}") == pytest.approx(tflop, rel=2e-3)


def test_products_are_those_of_the_program():
    lm = denoiser()
    boxed = model.abstract_params(lm)
    jaxpr = jax.make_jaxpr(lambda params: lm.apply({"params": params}, *lm.example(0)))(nn.unbox(boxed))
    macs, _ = products(lm, lm.row_length(0), 16, 64, 160, 16, 32)
    assert jaxpr_flops.count_program_flops(jaxpr) == 2 * macs == formulas.forward_flops(lm, boxed, lm.row_length(0))


def test_products_of_a_gradient_are_those_of_the_program():
    """No gradient reaches the states of the text, one reaches its map by the keys and values of cross-attention."""
    # By default a CPU multiplies scores twice, and the native kernel does always.
    lm = denoiser(attention_kernel="xla").clone(remat="everything_saveable")
    boxed = model.abstract_params(lm)

    def loss(params):
        return jnp.sum(lm.apply({"params": params}, *lm.example(0))[0] ** 2)

    program = jax.make_jaxpr(jax.grad(loss))(nn.unbox(boxed))
    assert jaxpr_flops.count_program_flops(program) == formulas.train_flops(lm, boxed, lm.row_length(0))


def test_a_step_of_the_real_size_holds_no_scores_of_all_pairs():
    """32,760 tokens: in each layer of a guided step, the scores of twelve heads and two rows would be 103 GB."""
    lm = denoiser("1.3b", precision="bfloat16")
    sampler = DiffusionSampler(lm, build("objective", "flow()"), build("solver", "unipc(steps=2)"), 5.0)
    held = PictureCosts(sampler, model.abstract_params(lm)).live_bytes(1)
    assert 2 * 32_760 * 8960 * 2 < held < 2 * 4 * 32_760**2


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("scan", [True, False])
def test_steps_share_the_keys_and_values_of_texts(guidance, scan):
    lm = denoiser(scan=scan)
    boxed = model.abstract_params(lm)
    sampler = DiffusionSampler(lm, build("objective", "flow()"), build("solver", "unipc(steps=3)"), guidance)
    costs, shape = PictureCosts(sampler, boxed), (*lm.size, lm.channels)
    program = sampler.trace(nn.unbox(boxed), 2, shape)
    assert jaxpr_flops.count_program_flops(program.jaxpr) == 2 * 3 * costs.step_flops
    once = sampler.trace_request(nn.unbox(boxed), 2)
    assert jaxpr_flops.count_program_flops(once.jaxpr) == 2 * costs.request_flops
    call = formulas.forward_flops(lm, boxed, lm.row_length(0))
    assert costs.step_flops + costs.request_flops == call * (1 if guidance == 1 else 2)
    # Keys and values of two layers: 16 tokens of 64 numbers of 4 bytes.
    assert costs.request_bytes(2) == 2 * (1 if guidance == 1 else 2) * 2 * 2 * 16 * 64 * 4


def test_a_request_of_the_real_size_holds_94_mb_of_keys_and_values():
    lm = denoiser("1.3b", precision="bfloat16")
    params = nn.unbox(model.abstract_params(lm))
    states = jax.eval_shape(lm.request_states, params, Condition(text_BSE=jnp.zeros((1, 512, 4096))))
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(states))
    assert held == 30 * 2 * 512 * 1536 * 2


def random_parameters(lm):
    shapes, noise = nn.unbox(model.abstract_params(lm)), np.random.default_rng(0)
    return jax.tree.map(lambda leaf: 0.2 * noise.standard_normal(leaf.shape, np.float32), shapes)


def test_a_sampled_clip_is_that_of_calls_without_states():
    lm = denoiser()
    params, noise = random_parameters(lm), np.random.default_rng(1)
    condition = Condition(text_BSE=jnp.asarray(noise.standard_normal((2, 16, 32), np.float32)))
    objective, solver, key = build("objective", "flow()"), build("solver", "euler(steps=2)"), jax.random.key(0)
    sampler, shape = DiffusionSampler(lm, objective, solver, 3.0), (*lm.size, lm.channels)
    x = sampler.begin(2, key, shape).x_BhwC
    sigmas, apply = [1.0, 0.5, 0.0], jax.jit(lm.apply)
    for sigma, following in zip(sigmas, sigmas[1:], strict=False):
        wanted, unwanted = (
            apply({"params": params}, x, jnp.full(2, 1000 * sigma), text)[0]
            for text in (condition, lm.null_condition(2))
        )
        x = x + (following - sigma) * (unwanted + 3.0 * (wanted - unwanted))
    sampled = sampler.sample(params, condition, key, shape)
    np.testing.assert_allclose(sampled, x, rtol=0, atol=2e-5 * np.abs(x).max())


@pytest.mark.slow
@pytest.mark.parametrize("mesh_spec", ["sequence=8", "fsdp=2, tensor=2, sequence=2"])
def test_eight_devices_give_what_one_gives(mesh_spec):
    """Devices share the tokens of a clip, or rows, heads and tokens."""
    lm, noise = denoiser(), np.random.default_rng(1)
    boxed, params = model.abstract_params(lm), random_parameters(lm)
    clips, text = (noise.standard_normal(shape, np.float32) for shape in ((2, 3, 8, 12, 16), (2, 16, 32)))

    def loss(params):
        prediction, _ = lm.apply({"params": params}, clips, jnp.array([999.0, 37.0]), Condition(text_BSE=text))
        return jnp.mean(prediction**2)

    alone = jax.jit(jax.value_and_grad(loss))(params)
    mesh = sharding.make_mesh(mesh_spec)
    with jax.set_mesh(mesh):
        where = sharding.shardings(boxed, mesh)
        step = jax.jit(jax.value_and_grad(loss), out_shardings=(None, where))
        together = jax.device_get(step(jax.device_put(params, where)))
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(alone[1]))

    def close(a, b):  # sums in another order: of the largest gradient for small ones, which are differences
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * np.abs(a).max() + 1e-6 * largest)

    jax.tree.map(close, alone, together)


def test_the_data_say_the_size_of_clips():
    assert denoiser(picture=ImageFormat((5, 4, 8), 16, 0)).size == (5, 4, 8)
    assert denoiser().size == (3, 8, 12)
