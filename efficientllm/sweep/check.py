"""What is known of a sweep before anything runs: what each variant costs, whether it fits, whether it is fair."""

import dataclasses

from efficientllm.errors import UserError
from efficientllm.sweep import spec

MFU = 0.3  # of the host's best matrix product: what a training step of a small model reaches at the least


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a variant's run costs by closed formula; times are guesses of their order."""

    parameters: int
    active: int
    tokens: int
    flops: float
    memory_bytes: float

    def seconds(self, peak):
        """At MFU of `peak` FLOP/s."""
        return self.flops / (MFU * peak)


def costs(sweep, extra=()):
    """`{variant: Cost}`. Raises UserError naming the variant whose config is wrong, or that is not equal to the
    baseline in what the sweep says must be."""
    found = {}
    for variant in sweep.variants:
        try:
            found[variant] = _cost(spec.argv_of(sweep, variant, extra))
        except UserError as error:
            raise UserError(f"sweep {sweep.name}, variant {variant}: {error}") from None
    _check_equal(sweep, found)
    return found


def _check_equal(sweep, found):
    base = found[sweep.baseline]
    for key, allowed in sweep.equal.items():
        for variant, cost in found.items():
            ours, theirs = getattr(cost, key), getattr(base, key)
            if abs(ours - theirs) > allowed * theirs:
                raise UserError(
                    f"sweep {sweep.name}: {key} of variant {variant} is {ours:,.0f}, of the baseline "
                    f"{sweep.baseline} {theirs:,.0f}: more than {allowed:.1%} apart"
                )


def _cost(argv):
    import flax.linen as nn
    import jax

    from efficientllm import accounting, main, model
    from efficientllm.registry import build
    from efficientllm.run import import_plugins
    from efficientllm.train import footprint, setup, step

    config, _, _ = main.parse(list(argv))
    import_plugins(config.imports)
    if config.task == "infer":
        return _cost_of_inference(config)
    lm, method = _described(config), build("adapter", config.adapter, where="config.adapter")
    setup.check_form(config.quant, config.adapter, method)
    method.check(lm)
    lm = lm.clone(scan=False) if method.unrolled else lm
    train, boxed = config.train, model.abstract_params(lm)
    setup.check_rows(train)
    state = jax.eval_shape(step.init_state(lm, train, config.seed, train.length, method, config.quant))
    params = accounting.parameters(lm, boxed)
    return Cost(
        parameters=params["total"],
        active=params["active"],
        tokens=train.steps * train.batch_size * train.length,
        flops=train.steps * accounting.step_flops(lm, boxed, train.length, train.batch_size, method),
        memory_bytes=footprint.predicted_bytes(lm, nn.unbox(state), train.batch_size // train.accumulate, train.length),
    )


def _cost_of_inference(config):
    """Of the measured repeats; memory is that of the compressed weights and the states."""
    import flax.linen as nn

    from efficientllm import accounting, model
    from efficientllm.infer import serving
    from efficientllm.quant import tree
    from efficientllm.quant.rows import resident_bytes

    lm, ours = _described(config), config.infer
    serving.check(config)
    boxed = model.abstract_params(lm)
    serving.check_rules(boxed, ours.rules)
    params, length = accounting.parameters(lm, boxed), ours.prompt_length + ours.max_new_tokens
    model.check_length(lm, length, "config.infer.prompt_length and config.infer.max_new_tokens")
    middle = ours.prompt_length + ours.max_new_tokens // 2
    decode = ours.max_new_tokens * accounting.decode_flops(lm, boxed, middle)
    rows = ours.repeats * ours.batch_size
    weights = resident_bytes(tree.abstract(nn.unbox(boxed), config.quant, ours.rules))
    return Cost(
        parameters=params["total"],
        active=params["active"],
        tokens=rows * ours.max_new_tokens,
        flops=rows * (accounting.forward_flops(lm, boxed, ours.prompt_length) + decode),
        memory_bytes=weights + ours.batch_size * accounting.state_bytes(lm, length),
    )


def _described(config):
    from efficientllm import architecture, data
    from efficientllm.train import setup

    source = setup.open_pretrained(config.model.pretrained, weights=False)
    described = setup.described(config.model, source)
    architecture.check(described)
    size = None
    if source is None and not architecture.has_vocabulary(described):
        size = data.build_tokenizer(config.tokenizer, config.data).vocab_size
    return architecture.from_config(described, size)


def table(sweep, costs, runs):
    """Every variant's cost, and every run, as text."""
    from efficientllm.metrics import host, peaks

    peak = peaks.measure_gemm_peak("float32").value
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
    seconds = sum(costs[run.variant].seconds(peak) for run in runs)
    lines.append(
        f"{len(runs)} runs in {runs[-1].block + 1} blocks, about {seconds / 60:.0f} minutes at {MFU:.0%} of "
        f"{peak / 1e9:.0f} GFLOP/s; memory from shapes: weights, gradients, optimiser, activations"
    )
    if sweep.grid:
        key, values = sweep.grid
        tried = len(values) * sum(cost.seconds(peak) for cost in costs.values())
        lines.append(f"before them {len(values)} values of {key}, each variant: about {tried / 60:.0f} minutes more")
    lines += [f"  {run.folder}  {' '.join(run.argv)}" for run in runs]
    return "\n".join(lines)
