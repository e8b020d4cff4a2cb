"""Growth of compile time, step time and host memory with layers, devices, experts and sequence length.

  python experiments/scale/run.py --out=experiments/scale/results

Each point is a process of its own, with simulated CPU devices where it needs more than one. It compiles and runs the
training step of the config. One axis grows at a time. Finished points are kept: the same command resumes after a
stop. Writes points.csv, scale.png and report.md.
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

from efficientllm.errors import exit_with

SIZE = {"num_layers": 4, "dim": 128, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32, "hidden": 384}
BASE = {"layers": 4, "unrolled": 0, "devices": 1, "experts": 0, "length": 128}
# `unrolled` counts layers too: they are compiled one after another instead of in a loop.
GROWN = {
    "layers": (2, 4, 8, 16, 32, 64),
    "unrolled": (2, 4, 8, 16, 32),
    "devices": (1, 2, 4, 8, 16, 32, 64),
    "experts": (2, 4, 16, 64),
    "length": (128, 256, 512, 1024, 2048),
}
PANELS = ("layers", "devices", "experts", "length")
KEYS = ("axis", "value", "lower_s", "compile_s", "step_s", "peak_rss_bytes", "program_bytes")
STEPS = 3


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/scale")
    parser.add_argument("--point", help="measure one point, given as JSON, and print JSON (for the processes)")
    parser.add_argument("--most", type=int, default=64, help="largest value of layers, devices and experts, 2 or more")
    parser.add_argument("--longest", type=int, default=2048, help="largest length")
    options = parser.parse_args()
    if options.point:
        print(json.dumps(measure(json.loads(options.point))))
        return
    if options.most < 2 or options.longest < BASE["length"]:
        parser.error(
            f"--most must be at least 2, and --longest at least {BASE['length']}, the length of the other points"
        )
    out = pathlib.Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    rows = collect(out / "points.csv", options.most, options.longest)
    draw(rows, out / "scale.png")
    (out / "report.md").write_text(report(rows))
    print(f"{len(rows)} points: {', '.join(str(out / name) for name in ('points.csv', 'scale.png', 'report.md'))}")


def points(most, longest):
    """`(axis, value)` of every point up to the largest values."""
    return [
        (axis, value)
        for axis, values in GROWN.items()
        for value in values
        if value <= (longest if axis == "length" else most)
    ]


def collect(file, most, longest):
    """Measures the points that the file lacks, appends each, and returns the rows of all."""
    rows = list(csv.DictReader(file.open())) if file.exists() else []
    done = {(row["axis"], int(row["value"])) for row in rows}
    todo = [point for point in points(most, longest) if point not in done]
    begin = time.monotonic()
    for index, (axis, value) in enumerate(todo):
        row = {"axis": axis, "value": value} | measure_in_process(BASE | {axis: value})
        new = not file.exists()
        with file.open("a", newline="") as opened:
            writer = csv.DictWriter(opened, KEYS, lineterminator="\n")
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


def measure_in_process(point):
    flags = f"--xla_force_host_platform_device_count={point['devices']}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    argv = [sys.executable, __file__, f"--point={json.dumps(point)}"]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{point}: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(point):
    """Measures the training step of one point in this process."""
    import jax
    import numpy as np

    from efficientllm import base_config, sharding
    from efficientllm.adapters.freeze import Full
    from efficientllm.architecture import from_config
    from efficientllm.metrics import host
    from efficientllm.objectives.next_token import NEXT_TOKEN
    from efficientllm.train import step

    layers = point["unrolled"] or point["layers"]
    config = base_config.get_config()
    config.model.unroll = point["unrolled"]
    size = ", ".join(f"{key}={value}" for key, value in (SIZE | {"num_layers": layers}).items())
    config.model.size = f"custom({size}, rope_base=1e4, vocab_size=2048)"
    if point["experts"]:
        config.model.ffn = f"moe(num_experts={point['experts']}, top_k=2, hidden=64)"
    rows = max(4, point["devices"])
    lm, method = from_config.from_config(config.model), Full()
    mesh = sharding.make_mesh("fsdp=-1")
    with jax.set_mesh(mesh):
        boxed = jax.eval_shape(step.init_state(lm, config.train, 0, point["length"], method))
        where = sharding.shardings(boxed, mesh)
        state = step.jit_create(lm, config.train, 0, point["length"], where, method)()
        shapes = NEXT_TOKEN.batch_shapes(lm, rows, point["length"], mesh)
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


def rows_of_axis(rows, axis):
    """`(value, row)` of an axis, in ascending order."""
    return sorted(((int(row["value"]), row) for row in rows if row["axis"] == axis), key=lambda pair: pair[0])


def draw(rows, file):
    """Draws a column of panels per axis and a row per quantity. The horizontal axes are logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = (("compile_s", "compile, s", 1), ("step_s", "step, s", 1), ("peak_rss_bytes", "peak resident, GB", 1e9))
    figure, axes = pyplot.subplots(len(shown), len(PANELS), figsize=(11, 7), sharex="col", squeeze=False)
    for column, axis in enumerate(PANELS):
        lines = {"a loop": "layers", "unrolled": "unrolled"} if axis == "layers" else {axis: axis}
        for line, (key, label, unit) in enumerate(shown):
            place = axes[line][column]
            for name, source in lines.items():
                values, measured = zip(*rows_of_axis(rows, source), strict=True)
                place.plot(values, [float(row[key]) / unit for row in measured], "o-", label=name)
            place.set_xscale("log", base=2)
            place.xaxis.set_major_formatter("{x:.0f}")
            place.set_ylim(0, 1.1 * place.get_ylim()[1])
            place.grid(alpha=0.3)
            if not column:
                place.set_ylabel(label)
        axes[-1][column].set_xlabel(axis)
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def report(rows):
    """Formats the machine, the growth of each axis and every point as Markdown."""
    from efficientllm.record import provenance

    commit, processor = provenance.git_state()["commit"], provenance.processor()
    device = f"{processor['name']}, {processor['cores']} cores, jax {provenance.versions()['jax']}"
    lines = [f"{time.strftime('%Y-%m-%d')}, commit {(commit or 'unknown')[:7]}, {device}.\n", *growth(rows), ""]
    columns = ("axis", "value", "lower s", "compile s", "step ms", "peak MB", "program kB")
    lines += ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for axis in GROWN:
        for value, row in rows_of_axis(rows, axis):
            seconds = f"{float(row['lower_s']):.2f} | {float(row['compile_s']):.2f} | {1e3 * float(row['step_s']):.1f}"
            peak, program = float(row["peak_rss_bytes"]) / 1e6, float(row["program_bytes"]) / 1e3
            lines.append(f"| {axis} | {value} | {seconds} | {peak:.0f} | {program:.0f} |")
    return "\n".join(lines) + "\n"


def growth(rows):
    """Yields a line per axis: its last point as a multiple of its first."""
    for axis in GROWN:
        if len(axis_rows := rows_of_axis(rows, axis)) > 1:
            (smallest, first), (largest, last) = axis_rows[0], axis_rows[-1]
            ratios = {key: float(last[key]) / float(first[key]) for key in ("compile_s", "step_s", "peak_rss_bytes")}
            growths = "compile x{:.2f}, step x{:.2f}, peak memory x{:.2f}".format(*ratios.values())
            yield f"- {axis} {smallest} to {largest}: {growths}"


if __name__ == "__main__":
    exit_with(main)
