"""Tables and trajectories of the solvers against float64 formulas of the papers."""

import jax.numpy as jnp
import numpy as np
import pytest

from efficientllm.errors import UserError
from efficientllm.objectives.ddpm import DDPM as Diffusion
from efficientllm.objectives.flow import Flow
from efficientllm.registry import build, names
from efficientllm.solvers.euler import flow_sigmas
from efficientllm.solvers.spacing import kept_steps

pytestmark = pytest.mark.quick
ALPHA_BARS = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))


def solver(spec):
    return build("solver", spec, where="config.infer.solver")


def field(x, level, outputs=3):
    """A fixed prediction v(x, t), of noise or velocity and, with six outputs, of the variance."""
    out = np.sin(1.3 * x + level / 300) + 0.1 * x
    return np.concatenate([out, np.cos(x - level / 500)], -1) if outputs == 6 else out


def trajectory(solver, objective, x, noises=None, outputs=3):
    """x after each step, in float32 as the compiled loop has it."""
    tables, memory, steps = solver.tables(objective), solver.memory(x), []
    for index in range(len(tables["level"])):
        row = {name: jnp.float32(table[index]) for name, table in tables.items()}
        prediction = jnp.float32(field(np.float32(x), np.float32(tables["level"][index]), outputs))
        noise = jnp.float32(noises[index]) if solver.draws else None
        x, memory = solver.step(row, jnp.float32(x), prediction, memory, noise)
        steps.append(np.asarray(x))
    return np.stack(steps)


def start(seed=0):
    """`(x at the start, noises of 300 steps)`."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((2, 4, 4, 3)), rng.standard_normal((300, 2, 4, 4, 3))


def ancestral(indices, x, noises, variance):
    """Algorithm 2 of Ho et al. on kept steps, with the mean of the posterior at the predicted picture; float64."""
    steps = []
    for index, (t, before) in enumerate(zip(indices[::-1], [*indices[-2::-1], None], strict=True)):
        alpha_bar, previous = ALPHA_BARS[t], 1.0 if before is None else ALPHA_BARS[before]
        beta = 1 - alpha_bar / previous
        out = field(x, t, 6)
        noise_hat, v = out[..., :3], out[..., 3:]
        picture = (x - np.sqrt(1 - alpha_bar) * noise_hat) / np.sqrt(alpha_bar)
        mean = np.sqrt(previous) * beta / (1 - alpha_bar) * picture
        mean = mean + np.sqrt(1 - beta) * (1 - previous) / (1 - alpha_bar) * x
        x = mean
        if before is not None:
            posterior = beta * (1 - previous) / (1 - alpha_bar)
            fraction = {"learned": (v + 1) / 2, "posterior": 0.0, "beta": 1.0}[variance]
            x = mean + np.exp(0.5 * (fraction * np.log(beta) + (1 - fraction) * np.log(posterior))) * noises[index]
        steps.append(x)
    return np.stack(steps)


@pytest.mark.parametrize("variance", ("learned", "posterior", "beta"))
def test_ancestral_sampling_is_algorithm_2_on_the_kept_steps(variance):
    x, noises = start()
    actual = trajectory(solver(f"ddpm(steps=8, variance={variance!r})"), Diffusion(), x, noises, 6)
    expected = ancestral([0, 143, 285, 428, 571, 714, 856, 999], x, noises, variance)
    # e^-5 of the picture is in the first x: 5e-8 of float32 becomes 1e-5 of the picture.
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_250_kept_steps_are_those_of_the_reference():
    indices = kept_steps("even", 250, 1000)
    assert indices.tolist() == [round(i * 999 / 249) for i in range(250)]
    tables = solver("ddpm").tables(Diffusion())
    assert tables["level"].tolist() == indices[::-1].tolist() and tables["level"][0] == 999
    # Betas rebuilt from the kept steps: their products are the alpha-bars again.
    np.testing.assert_allclose(np.cumprod(1 / tables["x"][::-1] ** 2), ALPHA_BARS[indices], rtol=1e-12)
    assert tables["noise"].tolist() == [1.0] * 249 + [0.0]


def test_all_steps_kept_are_the_diffusion_itself():
    tables = solver("ddpm(steps=1000)").tables(Diffusion())
    betas = np.linspace(1e-4, 0.02, 1000)[::-1]
    np.testing.assert_allclose(np.exp(tables["log_most"]), betas, rtol=1e-9)
    np.testing.assert_allclose(tables["x"], 1 / np.sqrt(1 - betas), rtol=1e-12)
    np.testing.assert_allclose(tables["log_least"][-1], tables["log_least"][-2])  # clipped: the first has the second's


@pytest.mark.parametrize("eta", (0.0, 0.5, 1.0))
def test_ddim_is_equation_12(eta):
    x, noises = start(1)
    indices, expected, y = np.arange(8) * 125, [], x
    for index, (t, before) in enumerate(zip(indices[::-1], [*indices[-2::-1], None], strict=True)):
        alpha_bar, previous = ALPHA_BARS[t], 1.0 if before is None else ALPHA_BARS[before]
        sigma = eta * np.sqrt((1 - previous) / (1 - alpha_bar) * (1 - alpha_bar / previous))
        noise_hat = field(y, t)
        picture = (y - np.sqrt(1 - alpha_bar) * noise_hat) / np.sqrt(alpha_bar)
        y = np.sqrt(previous) * picture + np.sqrt(1 - previous - sigma**2) * noise_hat + sigma * noises[index]
        expected.append(y)
    ddim = solver(f"ddim(steps=8, eta={eta})")
    assert ddim.draws == (eta > 0)
    actual = trajectory(ddim, Diffusion(), x, noises)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_ddim_of_noise_one_is_ancestral_sampling():
    x, noises = start(2)
    ddim = trajectory(solver("ddim(steps=20, eta=1.0, spacing='even')"), Diffusion(), x, noises)
    ddpm = trajectory(solver("ddpm(steps=20, variance='posterior')"), Diffusion(), x, noises)
    np.testing.assert_allclose(ddim, ddpm, rtol=1e-4, atol=1e-4 * np.abs(ddpm).max())


def test_a_right_prediction_gives_the_picture_whatever_the_steps():
    """The noise that x and a picture imply, which is what a model of one picture predicts."""
    picture = np.random.default_rng(3).uniform(-1, 1, (2, 4, 4, 3))
    for spec in ("ddim(steps=7)", "ddim(steps=10, spacing='even')", "ddpm(steps=9, variance='posterior')"):
        integrator, (x, noises) = solver(spec), start(4)
        tables = integrator.tables(Diffusion())
        for index, level in enumerate(tables["level"]):
            noise_hat = (x - np.sqrt(ALPHA_BARS[int(level)]) * picture) / np.sqrt(1 - ALPHA_BARS[int(level)])
            row = {name: table[index] for name, table in tables.items()}
            x, _ = integrator.step(row, x, noise_hat, (), noises[index] if integrator.draws else None)
        np.testing.assert_allclose(x, picture, atol=1e-5)


@pytest.mark.parametrize(
    "spacing, steps, first, last", [("leading", 250, 996, 0), ("even", 250, 999, 0), ("stride", 250, 996, 0)]
)
def test_spacings_of_the_two_references(spacing, steps, first, last):
    levels = solver(f"ddim(steps={steps}, spacing={spacing!r})").tables(Diffusion())["level"]
    assert (levels[0], levels[-1], len(levels)) == (first, last, steps)


def test_kept_steps_that_the_references_tell_apart():
    assert kept_steps("leading", 334, 1000)[-1] == 666 and kept_steps("stride", 334, 1000)[-1] == 999
    assert kept_steps("even", 3, 1000).tolist() == [0, 500, 999]  # 499.5 to even
    assert kept_steps("even", 1, 1000).tolist() == [0]
    for steps in range(1, 101):
        assert len(set(kept_steps("even", steps, 100))) == steps
    # 1 of 20 strides of 49.95 sums to less than 499.5 and 10 times it does not.
    assert kept_steps("even", 21, 1000)[10] != round(10 * 999 / 20)
    with pytest.raises(UserError, match="steps = 300: no stride keeps so many of 1000 steps; give a divisor"):
        kept_steps("stride", 300, 1000)
    with pytest.raises(UserError, match="steps = 1001: the objective has 1000"):
        solver("ddim(steps=1001)").tables(Diffusion())


def test_the_sigmas_of_stable_diffusion_3():
    sigmas = flow_sigmas(28, 3.0, "sd3")
    assert len(sigmas) == 29 and sigmas[0] == 1
    np.testing.assert_allclose(sigmas[-4:], (0.1998, 0.1109, 0.008929, 0), rtol=5e-4)
    once = flow_sigmas(28, 3.0)
    np.testing.assert_allclose(once[-3:], (3 * (2 / 28) / (1 + 2 * 2 / 28), 3 * (1 / 28) / (1 + 2 / 28), 0))


def test_euler_takes_the_shift_of_the_objective_unless_it_has_its_own():
    def levels(spec, **fields):
        return solver(spec).tables(Flow(**fields))["level"].tolist()

    assert levels("euler(steps=4)") == [1000, 750, 500, 250]
    assert levels("euler(steps=4)", shift=3.0) == levels("euler(steps=4, shift=3.0)") == [1000, 900, 750, 500]
    assert levels("euler(steps=4, shift=1.0)", shift=3.0) == [1000, 750, 500, 250]
    assert levels("euler(sigmas=(1.0, 0.4))", shift=3.0) == [1000, 400]


def test_euler_on_a_straight_line_is_exact():
    picture, (x, _) = np.random.default_rng(5).uniform(-1, 1, (2, 4, 4, 3)), start()
    velocity, integrator = jnp.float32(x - picture), solver("euler(steps=5, shift=3.0, levels='sd3')")
    tables = integrator.tables(Flow())
    for index in range(5):
        x, _ = integrator.step({name: table[index] for name, table in tables.items()}, x, velocity, (), None)
    np.testing.assert_allclose(x, picture, atol=1e-6)


def test_unipc_has_wans_levels_and_is_of_second_order():
    """Its error of a smooth velocity falls by four when steps double, and Euler's by two."""
    levels = solver("unipc(steps=10, shift=3.0)").tables(Flow())["level"]
    assert levels.tolist() == [999, 964, 923, 875, 818, 750, 667, 563, 429, 251]
    exact = solver("unipc(steps=10, shift=3.0, integer_levels=False)").tables(Flow())
    np.testing.assert_allclose(exact["level"], 1000 * exact["sigma"])

    def end(spec):
        integrator, x = solver(spec), start(6)[0]
        tables, memory = integrator.tables(Flow()), integrator.memory(jnp.zeros_like(x))
        for index in range(len(tables["level"])):
            row = {name: table[index] for name, table in tables.items()}
            x, memory = integrator.step(row, x, smooth(x, tables["level"][index] / 1000), memory, None)
        return np.asarray(x)

    def smooth(x, sigma):  # of normal pictures, mean 0.5 and deviation 0.3: the flow maps one normal to the other
        variance = (1 - sigma) ** 2 * 0.09 + sigma**2
        image = 0.5 + (1 - sigma) * 0.09 / variance * (x - (1 - sigma) * 0.5)
        return (x - image) / sigma

    right = 0.5 + 0.3 * start(6)[0]
    errors = [np.abs(end(f"unipc(steps={n}, integer_levels=False)") - right).max() for n in (40, 80)]
    assert 3 < errors[0] / errors[1] < 6
    assert errors[1] < 0.2 * np.abs(end("euler(steps=80)") - right).max()


@pytest.mark.parametrize(
    "spec, objective, message",
    [
        ("euler", Diffusion(), "euler samples from models of the objective 'flow', and this is 'ddpm'"),
        ("ddim", Flow(), "ddim samples from models of the objective 'ddpm', and this is 'flow'"),
        ("ddpm", Diffusion(vlb=False), r"variance = 'learned': needs the objective 'ddpm\(vlb=True\)'"),
        ("euler(sigmas=(0.4, 1.0))", Flow(), "must fall, and end above 0"),
        ("euler(sigmas=(1.0, 0.0))", Flow(), "must fall, and end above 0"),
        ("euler(sigmas=(2.0, 1.0))", Flow(), "each at least 0 and at most 1"),
        ("euler(steps=0)", Flow(), "steps = 0: must be at least 1"),
        ("ddim(eta=-1.0)", Diffusion(), "eta = -1.0: must be at least 0"),
        ("ddim(spacing='odd')", Diffusion(), "is none of even, leading, stride"),
    ],
)
def test_what_is_refused(spec, objective, message):
    with pytest.raises(UserError, match=message) as error:
        solver(spec).check(objective)
    assert str(error.value).startswith(("solver: ", "config.infer.solver = "))


def test_every_solver_says_what_it_integrates():
    assert {solver(name).process for name in names("solver")} == {"ddpm", "flow"}
