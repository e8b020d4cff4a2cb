"""How compile time, step time and host memory grow with layers, devices, experts and sequence length.

  python experiments/scale/run.py --out=experiments/scale/results

Each point is a process of its own, with CPU devices that do not exist where more than one is asked for: it lowers and
compiles the training step of the config, runs it, and prints what that took. One axis grows at a time. Points that are
done stay done: the same command goes on where it was stopped.
"""

import argparse
import csv
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

SIZE = {"num_layers": 4, "dim": 128, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32, "hidden": 384}
BASE = {"layers": 4, "devices": 1, "experts": 0, "length": 128}
GROWN = {
    "layers": (2, 4, 8, 16, 32, 64),
    "devices": (1, 2, 4, 8, 16, 32, 64),
    "experts": (2, 4, 8, 16, 32, 64),
    "length": (128, 256, 512, 1024, 2048, 4096),
}
KEYS = ("axis", "value", "lower_s", "compile_s", "step_s", "peak_rss_bytes", "program_bytes")
STEPS = 5


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/scale")
    parser.add_argument("--point", help="one point as JSON, printed as JSON (what the processes are called with)")
    parser.add_argument("--most", type=int, default=64, help="largest value of layers, devices and experts")
    ours = parser.parse_args()
    if ours.point:
        print(json.dumps(measure(json.loads(ours.point))))
        return
    out = pathlib.Path(ours.out)
    out.mkdir(parents=True, exist_ok=True)
    rows = collect(out / "points.csv", ours.most)
    draw(rows, out / "scale.png")
    print(f"{len(rows)} points: {out / 'points.csv'}, {out / 'scale.png'}")


def collect(file, most):
    """The rows of all points, those missing measured and added to the file one by one."""
    rows = list(csv.DictReader(file.open())) if file.exists() else []
    done = {(row["axis"], int(row["value"])) for row in rows}
    points = [(axis, value) for axis, values in GROWN.items() for value in values if axis == "length" or value <= most]
    todo = [point for point in points if point not in done]
    begin = time.monotonic()
    for index, (axis, value) in enumerate(todo):
        row = {"axis": axis, "value": value} | in_its_process(BASE | {axis: value})
        new = not file.exists()
        with file.open("a", newline="") as opened:
            writer = csv.DictWriter(opened, KEYS)
            if new:
                writer.writeheader()
            writer.writerow(row)
        rows.append({key: str(item) for key, item in row.items()})
        left = (time.monotonic() - begin) / (index + 1) * (len(todo) - index - 1)
        print(
            f"{axis} {value}: compile {row['compile_s']:.2f} s, step {row['step_s']:.3f} s; {left:.0f} s left",
            flush=True,
        )
    return rows


def in_its_process(point):
    flags = f"--xla_force_host_platform_device_count={point['devices']}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    argv = [sys.executable, __file__, f"--point={json.dumps(point)}"]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{point}: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(point):
    """What the step of one point took, in this process."""
    import jax
    import numpy as np

    from configs import base
    from efficientllm import architecture, sharding
    from efficientllm.adapters.selected import Full
    from efficientllm.metrics import host
    from efficientllm.train import footprint, step

    config = base.get_config()
    size = ", ".join(f"{key}={value}" for key, value in (SIZE | {"num_layers": point["layers"]}).items())
    config.model.size = f"custom({size}, rope_base=1e4, vocab_size=2048)"
    if point["experts"]:
        config.model.ffn = f"moe(num_experts={point['experts']}, top_k=2, hidden=64)"
    rows = max(4, point["devices"])
    lm, method = architecture.from_config(config.model), Full()
    mesh = sharding.make_mesh("fsdp=-1")
    with jax.set_mesh(mesh):
        boxed = jax.eval_shape(step.init_state(lm, config.train, 0, point["length"], method))
        where = sharding.shardings(boxed, mesh)
        state = step.jit_create(lm, config.train, 0, point["length"], where, method)()
        shapes = footprint.batch_shapes(rows, point["length"], sharding.batch_sharding(mesh))
        begin = time.perf_counter()
        lowered = step.jit_train_step(lm, config.train, mesh, where, method).trace(state, shapes).lower()
        lowered_at = time.perf_counter()
        compiled = lowered.compile()
        compiled_at = time.perf_counter()
        batch = jax.tree.map(lambda leaf: jax.device_put(np.ones(leaf.shape, leaf.dtype), leaf.sharding), shapes)
        seconds = []
        for _ in range(STEPS + 1):
            start = time.perf_counter()
            state, _ = compiled(state, batch)
            jax.block_until_ready(state.params)
            seconds.append(time.perf_counter() - start)
    return {
        "lower_s": lowered_at - begin,
        "compile_s": compiled_at - lowered_at,
        "step_s": statistics.median(seconds[1:]),
        "peak_rss_bytes": host.peak_rss_bytes(),
        "program_bytes": len(compiled.as_text()),
    }


def draw(rows, file):
    """Each axis a column, each quantity a row, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = (("compile_s", "compile, s", 1), ("step_s", "step, s", 1), ("peak_rss_bytes", "peak resident, GB", 1e9))
    figure, axes = pyplot.subplots(len(shown), len(GROWN), figsize=(11, 7), sharex="col", squeeze=False)
    for column, axis in enumerate(GROWN):
        points = sorted((int(row["value"]), row) for row in rows if row["axis"] == axis)
        for line, (key, label, unit) in enumerate(shown):
            place = axes[line][column]
            place.plot([value for value, _ in points], [float(row[key]) / unit for _, row in points], marker="o")
            place.set_xscale("log", base=2)
            place.set_ylim(bottom=0)
            place.grid(alpha=0.3)
            if not column:
                place.set_ylabel(label)
        axes[-1][column].set_xlabel(axis)
    figure.tight_layout()
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
