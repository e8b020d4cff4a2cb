"""Cost estimates of a sweep before it runs: parameters, FLOPs, memory and time of each variant."""

import collections
import contextlib
import dataclasses
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

from efficientllm import main
from efficientllm.config.field_keys import name_keys
from efficientllm.errors import UserError
from efficientllm.sweep import execute, grid, seeds, spec

MFU = 0.3  # least share of the measured GEMM peak that training steps of small models reach
IMPORTS = "import jax, flax, optax, orbax.checkpoint, tensorboard.summary, efficientllm.registry; jax.devices()"
COMPILE_S = 20.0  # train step and evaluation, on two cores: 4 to 23 s in the rows of experiments/


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost of a variant's run by closed formula; times are estimates of their order of magnitude."""

    parameters: int
    active: int
    tokens: int
    flops: float
    memory_bytes: float

    def seconds(self, peak: float) -> float:
        """Seconds at the share MFU of `peak` FLOP/s."""
        return self.flops / (MFU * peak)


def estimate_costs(sweep: spec.Sweep, extra: Sequence[str] = ()) -> dict[str, Cost]:
    """Estimates `{variant: Cost}`. Raises UserError for a wrong config, or one outside the sweep's `equal`."""
    costs: dict[str, Cost] = {}
    argv = {variant: spec.argv_of(sweep, variant, extra) for variant in sweep.variants}
    for variant in sweep.variants:  # all command lines first, because parsing is fast
        with _naming_variant(sweep, variant):
            for flags in _extreme_flags(sweep):
                main.parse([*argv[variant], *flags])
    for variant in sweep.variants:
        with _naming_variant(sweep, variant):
            costs[variant] = _cost(argv[variant])
    _check_equal(sweep, costs)
    return costs


@contextlib.contextmanager
def _naming_variant(sweep, variant):
    """Adds the variant's name to a UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(f"sweep {sweep.name}, variant {variant}: {error}") from None


def _extreme_flags(sweep):
    """Flags added to a variant's own, as lists: none, each value of the grid, both ends of the search."""
    key, values = sweep.grid or ("", ())
    if sweep.search:
        key, *values = sweep.search
    return [[], *([f"--config.{key}={value}"] for value in values)]


def _check_equal(sweep, costs):
    """Raises UserError for a variant that differs from the baseline by more than `sweep.equal` allows."""
    baseline = costs[sweep.baseline]
    for key, allowed in sweep.equal.items():
        for variant, cost in costs.items():
            value, baseline_value = getattr(cost, key), getattr(baseline, key)
            if abs(value - baseline_value) > allowed * baseline_value:
                raise UserError(
                    f"sweep {sweep.name}: {key} of variant {variant} is {value:,.0f}, of the baseline "
                    f"{sweep.baseline} {baseline_value:,.0f}: more than {allowed:.1%} apart"
                )


def _cost(argv):
    from efficientllm.registry.plugins import import_plugins

    config, _, _ = main.parse(list(argv))
    import_plugins(config.imports)
    with name_keys(config):
        return _cost_of_inference(config) if config.task == "infer" else _cost_of_training(config)


def _cost_of_training(config):
    """Cost of all steps; memory is the peak of one step."""
    import flax.linen as nn
    import jax

    from efficientllm import model
    from efficientllm.cost import formulas, step_memory
    from efficientllm.run_description import describe_run
    from efficientllm.train import config_checks, step

    run, train = describe_run(config, shapes_only=True), config.train
    config_checks.check_rows(train)
    lm = config_checks.training_lm(run)
    boxed = model.abstract_params(lm)
    state = jax.eval_shape(step.init_state(lm, train, config.seed, run.length, run.method, config.quant))
    params = formulas.count_parameters(lm, boxed)
    return Cost(
        parameters=params["total"],
        active=params["active"],
        tokens=train.steps * train.batch_size * run.length,
        flops=train.steps * formulas.step_flops(lm, boxed, run.length, train.batch_size, run.method),
        memory_bytes=step_memory.predicted_bytes(
            lm, nn.unbox(state), train.batch_size // train.accumulate, run.length, objective=run.objective
        ),
    )


def _cost_of_inference(config):
    """Cost of the measured repeats; memory is that of quantized weights and of what the requests need beside them."""
    import flax.linen as nn

    from efficientllm import model
    from efficientllm.cost import formulas
    from efficientllm.infer import setup as serving
    from efficientllm.quant import apply
    from efficientllm.run_description import describe_run
    from efficientllm.weights import resident_bytes

    serving.check_request(config)
    run, infer = describe_run(config, serving.devices_of(config), shapes_only=True), config.infer
    reads = run.objective.reads
    serving.check_mesh(config, run.mesh, reads)
    serving.check_keys(config, reads)
    requests = _text_requests if reads == "text" else _picture_requests
    lm, tokens, flops, states = requests(run)
    boxed, rows = model.abstract_params(lm), infer.repeats * infer.batch_size
    params = formulas.count_parameters(lm, boxed)
    return Cost(
        parameters=params["total"],
        active=params["active"],
        tokens=rows * tokens,
        flops=rows * flops,
        memory_bytes=resident_bytes(apply.abstract(nn.unbox(boxed), config.quant, infer.rules)) + states,
    )


def _text_requests(run):
    """`(LM, generated tokens of a request, its FLOPs, bytes of the states of a batch)`."""
    from efficientllm import model
    from efficientllm.cost import formulas
    from efficientllm.infer import setup as serving

    infer = run.config.infer
    length, middle = infer.prompt_length + infer.max_new_tokens, infer.prompt_length + infer.max_new_tokens // 2
    lm = serving.serving_lm(run, length)
    boxed = model.abstract_params(lm)
    decode = infer.max_new_tokens * formulas.decode_flops(lm, boxed, middle)
    flops = formulas.forward_flops(lm, boxed, infer.prompt_length) + decode
    return lm, infer.max_new_tokens, flops, infer.batch_size * formulas.state_bytes(lm, length)


def _picture_requests(run):
    """`(Denoiser, patches of a picture, its FLOPs, bytes of the arrays of a step of a batch)`."""
    from efficientllm import model
    from efficientllm.infer import image_samples, picture_costs
    from efficientllm.infer import setup as serving

    lm = serving.serving_denoiser(run)
    sampler = image_samples.sampler_of(lm, run.config.infer, run.objective)
    costs = picture_costs.PictureCosts(sampler, model.abstract_params(lm), run.objective.encoder)
    return lm, costs.tokens, costs.image_flops, costs.live_bytes(run.config.infer.batch_size)


def start_seconds() -> float:
    """Seconds of a run outside its steps: imports, measured here in a process, and COMPILE_S."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", IMPORTS], check=False, capture_output=True)
    return time.perf_counter() - begin + COMPILE_S


def _minutes(runs, costs, peak, start, out):
    """Formats the expected time, `about 19 minutes, ...`, and what it consists of; hours from two hours on.

    Steps are estimated by FLOPs, starting and compiling by run. Finished runs count as 0, and their times are the
    estimate for further runs of the same variant.
    """
    finished = {
        run: execute.run_seconds(out / run.folder) for run in runs if out and execute.read_outcome(out / run.folder)
    }
    seconds_of_variant = collections.defaultdict(list)
    for run, seconds in finished.items():
        if seconds is not None:
            seconds_of_variant[run.variant].append(seconds)
    unfinished = [run for run in runs if run not in finished]
    steps = sum(costs[run.variant].seconds(peak) for run in unfinished if run.variant not in seconds_of_variant)
    earlier = sum(
        statistics.fmean(seconds_of_variant[run.variant]) for run in unfinished if run.variant in seconds_of_variant
    )
    starts = start * sum(run.variant not in seconds_of_variant for run in unfinished)
    minutes = (steps + earlier + starts) / 60
    sentences = [f"about {minutes:.0f} minutes" if minutes < 120 else f"about {minutes / 60:.1f} hours"]
    if starts:
        sentences.append(f"{steps / 60:.0f} of steps at {MFU:.0%} of {peak / 1e9:.0f} GFLOP/s")
        sentences.append(f"{starts / 60:.0f} of starting and compiling at {start:.0f} s a run")
    if earlier:
        sentences.append(f"{earlier / 60:.0f} as runs of the same variants took")
    return ", ".join(sentences) + (f" ({len(finished)} have rows)" if finished else "")


def format_costs(
    sweep: spec.Sweep,
    costs: dict[str, Cost],
    runs: Sequence[spec.Run],
    out: pathlib.Path | None = None,
    extra: Sequence[str] = (),
) -> str:
    """Formats the cost of every variant, what the seeds can tell, and the list of runs.

    `out` holds the rows of earlier runs; `extra` are the flags of all runs.
    """
    from efficientllm.cost import device_peaks
    from efficientllm.metrics import host

    peak = device_peaks.measure_gemm_peak("float32").value
    room = host.memory_total_bytes()
    lines = [f"{'variant':24}{'parameters':>14}{'active':>14}{'tokens':>12}{'PFLOP':>10}{'memory':>10}{'time':>10}"]
    for variant, cost in costs.items():
        mark = "" if cost.memory_bytes <= room else f"  does not fit into {room / 1e9:.0f} GB"
        lines.append(
            f"{variant:24}{cost.parameters:14,}{cost.active:14,}{cost.tokens:12,}{cost.flops / 1e15:10.3g}"
            f"{cost.memory_bytes / 1e9:8.2f}GB{cost.seconds(peak):9.0f}s{mark}"
        )
    if sweep.search:
        key, least, most = sweep.search
        lines.append(f"the largest {key} from {least:,} to {most:,} that runs, of each; the costs are without it")
        return "\n".join(lines)
    start = start_seconds()
    lines.append(
        f"{len(runs)} runs in {runs[-1].block + 1} blocks, {_minutes(runs, costs, peak, start, out)}; memory from "
        "shapes: weights, gradients, optimiser, activations"
    )
    if sweep.grid:
        key, values = sweep.grid
        minutes = _minutes(list(grid.list_tries(sweep, extra)), costs, peak, start, out and out / grid.FOLDER)
        lines.append(f"before them {len(values)} values of {key}, each variant: {minutes}")
    if sweep.measures != "cost":
        lines.append(seeds.describe_power(sweep, runs, out))
    lines += [f"  {run.folder}  {' '.join(run.argv)}" for run in runs]
    return "\n".join(lines)
