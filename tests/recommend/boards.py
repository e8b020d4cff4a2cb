"""Evidence written by tests: rows of sweeps whose best technique is known by construction."""

from efficientllm.recommend.request import Changes
from report import made

LLAMA = "llama"
TINY_PARAMETERS = 134_515_008.0  # those of smollm2-135m
CPU = {"platform": "cpu", "kind": "cpu", "count": 1}


def write(
    folder,
    task,
    variants,
    baseline,
    seeds=3,
    spread=0.001,
    parameters=TINY_PARAMETERS,
    shared: Changes | None = None,
    told=None,
    **values,
):
    """Writes rows of a sweep of `variants`, `{name: (changes of the config, {metric: value})}`; returns the folder.

    The value of seed s is multiplied by 1 + s `spread`, of all variants alike.
    """
    for name, (changes, metrics) in variants.items():
        for seed in range(seeds):
            readings = values | {key: value * (1 + seed * spread) for key, value in metrics.items()}
            made.row(
                folder / f"{seed}-{name}",
                "gqa",
                seed=seed,
                task=task,
                sweep={"name": "made", "variant": name, "baseline": baseline, "block": seed, "order": 0},
                changes={"name": name, "task": task, **(shared or {}), **changes},
                told=told,
                params_total=parameters,
                **readings,
            )
    return folder


def tuning(folder, losses, rank=64, **options):
    """Adapters on SmolLM2-135M by held-out loss, `{adapter: loss}`; the baseline is lora."""
    variants = {
        name: ({"adapter": f"{name}(rank={rank}, alpha={2 * rank})"}, {"eval_loss": loss})
        for name, loss in losses.items()
    }
    shared = {"model.pretrained": "smollm2-135m"}
    return write(folder, "tune", variants, "lora", shared=shared, **options)


FORMS = {"bfloat16": "bfloat16", "float32": "float32", "int8": "int8()", "nf4": "nf4()", "int4": "int4()"}


def serving(folder, losses, pretrained="smollm2-135m", more=None, **options):
    """Forms of the weights by held-out loss, `{form: loss}`; `more` are further metrics by form."""
    variants = {
        name: ({"quant": FORMS[name]}, {"eval_loss": loss} | ((more or {}).get(name) or {}))
        for name, loss in losses.items()
    }
    return write(folder, "infer", variants, "bfloat16", shared={"model.pretrained": pretrained}, **options)
