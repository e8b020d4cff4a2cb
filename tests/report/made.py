"""Rows, run folders and sweep folders for tests of reports, written without a run."""

import json
import math
import random

from efficientllm.metrics.reading import Reading
from efficientllm.record.row import PHYSICAL_UNITS, build_record, write_record
from efficientllm.record.tensorboard import SummaryWriter

UNITS = {"al_s": "s", "amu_gb": "GB", "pcu": "1", "tt_tokens_per_param_s": "1/s", "aec_w": "W"}
IMAGE_UNITS = {"images_per_s": "1/s", "flops_per_image": "FLOP", "j_per_image": "J"}
CPU = {"platform": "cpu", "kind": "cpu", "count": 1}
H100 = {"platform": "gpu", "kind": "NVIDIA H100", "count": 1}
# Times, memory and loss of a sweep over attention, as multiples of the baseline's.
TRUE = {"gqa": (1.0, 1.0, 1.0), "mqa": (0.9, 0.8, 1.0), "mla": (1.3, 1.1, 0.97)}


def config(mixer="gqa", seed=0, **changes):
    """A flat config's nested form; keys such as `train.steps` replace values."""
    made = {
        "name": f"attention-{mixer}",
        "task": "pretrain",
        "seed": seed,
        "model": {"size": "tiny", "mixer": mixer, "ffn": "swiglu", "pattern": [], "position": "rope"},
        "data": "python_docs()",
        "tokenizer": "bytes",
        "train": {"steps": 100, "batch_size": 8, "length": 128},
    }
    for key, value in changes.items():
        *path, last = key.split(".")
        target = made
        for group in path:
            target = target.setdefault(group, {})
        target[last] = value
    return made


def row(
    folder,
    mixer="gqa",
    seed=0,
    outcome="ok",
    sweep=None,
    devices=CPU,
    energy="nvml energy counter (measured, gpu, edges +-0.8%)",
    changes=None,
    task="pretrain",
    conditions=None,
    told=None,
    unit="nat",
    **values,
):
    """Writes `folder/record.json` with these values (`al_s=0.5`, `eval_loss=None`, ...) and returns its path.

    `conditions` are `conditions.row`'s, `told` is joined to the provenance, `unit` is that of the quality.
    """
    readings = {"paper": {}, "physical": {}, "quality": {}}
    for key, value in values.items():
        group = "paper" if key in UNITS else "physical" if key in PHYSICAL_UNITS | IMAGE_UNITS else "quality"
        source = energy if key in ("aec_w", "j_per_token", "energy_j") else "test"
        if value is not None:
            units = UNITS | PHYSICAL_UNITS | IMAGE_UNITS
            readings[group][key] = Reading(value, units.get(key, unit), source)
    record = build_record(
        outcome=outcome,
        name=f"attention-{mixer}",
        task=task,
        config=config(mixer, seed, **(changes or {})),
        provenance={
            "devices": devices,
            "host": {"processor": {"name": "Test", "cores": 2}},
            "started": f"2026-01-01T00:00:{seed:02}",
            **(told or {}),
        },
        paper_readings=readings["paper"],
        physical=readings["physical"],
        quality=readings["quality"],
        conditions=conditions,
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_record(record | ({"sweep": sweep} if sweep else {}), folder / "record.json")
    return folder / "record.json"


GLYPHS = {"source": "glyphs(size=32)", "fingerprint": "f" * 64, "size": 32, "classes": 4}


def image_row(folder, mixer="mha", seed=0, changes=None, told=None, **values):
    """Writes `folder/record.json` of a run that learns from pictures."""
    trained = {"model.embed": "patches(patch=4)", "objective": "flow()", "data": "glyphs(size=32)", "train.length": 128}
    values = {"eval_loss": 1.0, **values}
    told = {"data": GLYPHS, **(told or {})}
    return row(folder, mixer, seed, changes=trained | (changes or {}), told=told, unit="1", **values)


LEVELS = {f"eval_loss_level_{level}": 1 + level / 10 for level in range(1, 8)}


def samples(folder, seed=0, count=6, side=16, border=2, classes="ABCDEF", nearest=True, base=False, **lies):
    """Writes the grid of a run's samples, of the nearest training pictures, and what is known of them -> the pictures.

    With `base`, a grid of a model before tuning too, upside down.

    `lies` are joined to what is known; their names end in an underscore.
    """
    import numpy as np

    from efficientllm.infer.pictures import grid_columns, image_grid, write_png

    (folder / "samples").mkdir(exist_ok=True)
    pictures = np.random.default_rng(seed).integers(0, 256, (2, count, side, side, 3), dtype=np.uint8)
    write_png(folder / "samples" / "grid.png", image_grid(pictures[0], border=border))
    about = {"count": count, "height": side, "width": side, "border": border, "columns": grid_columns(count)}
    about |= {"labels": list(range(count)), "classes": [*classes][:count], "how": "euler in 28 steps"}
    if nearest:
        write_png(folder / "samples" / "nearest.png", image_grid(pictures[1], border=border))
        about["nearest"] = {"distances": [float(place) for place in range(count)], "unseen": 30.5, "of": 1297}
    if base:
        write_png(folder / "samples" / "base.png", image_grid(pictures[0, :, ::-1], border=border))
    (folder / "samples" / "samples.json").write_text(
        json.dumps(about | {key.rstrip("_"): value for key, value in lies.items()})
    )
    return pictures


def curves(folder, steps=500):
    """An event file with a loss."""
    writer = SummaryWriter(folder)
    for step in range(1, steps + 1):
        writer.scalars(step, {"loss": 2 + 5 / step})
    writer.close()


def sweep(folder, blocks=6, noise=0.01, seed=1, techniques=TRUE, event_files=False, devices=CPU, **more):
    """A sweep over `techniques` with the baseline gqa first and last in each block; returns its folder."""
    rng = random.Random(seed)
    for block in range(blocks):
        order = ["gqa", *(name for name in techniques if name != "gqa"), "gqa"]
        slow = math.exp(rng.gauss(0, 0.05))  # what a block shares
        for place, mixer in enumerate(order):
            times, memory, loss = techniques[mixer]
            told = {
                "name": "attention",
                "variant": mixer,
                "baseline": "gqa",
                "block": block,
                "order": place,
                "seed": block,
            }
            run_folder = folder / f"{block}-{place}-{mixer}"
            row(
                run_folder,
                mixer,
                seed=block,
                sweep=told,
                devices=devices,
                al_s=0.5 * times * slow * math.exp(rng.gauss(0, noise)),
                tt_tokens_per_param_s=0.002 / times / slow,
                amu_gb=2 * memory * math.exp(rng.gauss(0, noise / 10)),
                pcu=0.5 * math.exp(rng.gauss(0, noise)),
                eval_loss=5.5 * loss * math.exp(rng.gauss(0, noise / 10)),
                perplexity=math.exp(5.5 * loss) * math.exp(rng.gauss(0, noise / 10)),
                flops_per_token=8e6 * times,
                params_total=1.3e6,
                **more,
            )
            if event_files:
                curves(run_folder)
    return folder
