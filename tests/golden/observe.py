"""Runs the golden cases in this process and writes what came of them: python -m golden.observe OUT.json NAME...

Started by `golden.process`, with the flags of XLA that make its numbers the same everywhere.
"""

import contextlib
import csv
import hashlib
import io
import json
import pathlib
import re
import shutil
import struct
import sys
import tempfile
import traceback

import numpy as np

import runs
from efficientllm import main
from efficientllm.ops.native import matmul
from golden import cases
from golden.process import MARK

# Readings that follow from shapes, without a clock, a compiler or a device.
COUNTED = (
    "flops_per_token",
    "kv_bytes_per_token",
    "params_active",
    "params_total",
    "params_trainable",
    "resident_weight_bytes",
)
TIME_COLUMN = 10  # width of the last column of a sweep's table


def observe(name, workdir):
    """`{"structure": {...}, "numbers": {...}}` of a case; `numbers` hold what depends on floating point."""
    if name in cases.TRAINED:
        return trained(*cases.TRAINED[name], workdir)
    if name in cases.SERVED:
        return served(*cases.SERVED[name], workdir)
    return OTHERS[name](workdir)


def run(config, values, workdir):
    """The row of a run of the command line."""
    require(main.main(cases.argv(config, values, workdir)) == 0, "the run failed")
    return json.loads((workdir / "record.json").read_text())


def trained(config, values, workdir):
    """What a training run left: losses, tree of parameters, the adapter's tensors, the row."""
    row = run(config, values, workdir)
    structure = row_structure(row) | {"state": state_tree(workdir / "checkpoints" / str(values["train.steps"]))}
    if (workdir / "adapter").is_dir():
        structure["adapter"] = tensors(workdir / "adapter" / "adapter_model.safetensors")
        structure["adapter_config"] = json.loads((workdir / "adapter" / "adapter_config.json").read_text())
    losses = {f"step {step}": float_of(loss).hex() for step, loss in sorted(runs.losses(workdir).items())}
    return {"structure": structure, "numbers": row_numbers(row) | {"loss": losses}}


def served(config, values, workdir):
    """What an inference run left: greedy completions, held-out loss, the row."""
    row = run(config, values, workdir)
    lines = (workdir / "samples" / "generated.jsonl").read_text().splitlines()
    generated = [json.loads(line) for line in lines]
    return {"structure": row_structure(row), "numbers": row_numbers(row) | {"generated": generated}}


def continued(workdir):
    """Three more steps of the stored run."""
    shutil.copytree(cases.STORED_RUN, workdir)
    return trained("base", cases.STORED | {"train.steps": cases.STORED_STEPS + 3}, workdir)


def converted(workdir):
    """The stored run as a folder of transformers: its config, its tensors, and their bytes."""
    from efficientllm.convert.__main__ import main as convert

    require(convert([cases.STORED_RUN, f"--out={workdir}"]) == 0, "convert failed")
    file = workdir / "model.safetensors"
    structure = {"tensors": tensors(file), "config": json.loads((workdir / "config.json").read_text())}
    return {"structure": structure | {"sha256": hashlib.sha256(file.read_bytes()).hexdigest()}, "numbers": {}}


def reported(workdir):
    """The line of the stored run in a report's table."""
    from efficientllm.report.__main__ import main as report

    require(report([cases.STORED_RUN, f"--out={workdir}"]) == 0, "report failed")
    with open(workdir / "rows.csv", newline="") as file:
        return {"structure": {"rows": list(csv.DictReader(file))}, "numbers": {}}


def planned(workdir):
    """A plan by shapes: no program is compiled for the GPU that it is of."""
    row = run("base", cases.PLAN, workdir)
    return {"structure": row_structure(row) | {"predicted": row["predicted"]}, "numbers": {}}


def swept(workdir):
    """A sweep's dry run: its table without the guessed times and what seeds can tell, and its runs."""
    from efficientllm.sweep.__main__ import main as sweep

    file = pathlib.Path(__file__).with_name("compared_sweep.py")
    with contextlib.redirect_stdout(io.StringIO()) as text:
        require(sweep([f"--config={file}", f"--out={workdir}", "--dry_run"]) == 0, "the dry run failed")
    lines = text.getvalue().splitlines()
    summary = next(index for index, line in enumerate(lines) if re.match(r"\d+ runs in \d+ blocks,", line))
    table = [line[:-TIME_COLUMN].split() for line in lines[:summary]]
    runs_listed = [line.split(maxsplit=1) for line in lines[summary + 1 :] if line.startswith("  ")]
    counted = lines[summary].partition(",")[0]
    return {"structure": {"table": table, "counted": counted, "runs": runs_listed}, "numbers": {}}


OTHERS = {
    "run_v0.1_continued": continued,
    "run_v0.1_converted": converted,
    "run_v0.1_reported": reported,
    "plan": planned,
    "sweep": swept,
}


def require(condition, message):
    """Raises where a case did not run."""
    if not condition:
        raise RuntimeError(message)


def row_structure(row):
    """The keys of a row and of its groups, and its counted readings."""
    keys = {key: sorted(value) if isinstance(value, dict) else None for key, value in row.items() if key != "config"}
    counted = {key: row["physical"][key] for key in COUNTED if row["physical"].get(key) is not None}
    return {"record": keys, "counted": counted}


def row_numbers(row):
    """The held-out loss of a row, the kernels that it was computed by, and the memory that jax's trace asks for."""
    predicted = row["physical"]["predicted_memory_bytes"]
    kernels = row["provenance"]["kernels"]
    return {"eval_loss": row["quality"]["eval_loss"].hex(), "kernels": kernels, "predicted_memory_bytes": predicted}


def state_tree(checkpoint):
    """`{path: [dtype, shape]}` of a checkpoint's arrays."""
    import jax
    import orbax.checkpoint as ocp

    tree = ocp.StandardCheckpointer().metadata((checkpoint / "state").absolute()).item_metadata.tree
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(keys, simple=True, separator="/"): [str(leaf.dtype), list(leaf.shape)]
        for keys, leaf in leaves
    }


def tensors(file):
    """`{name: [dtype, shape]}` of the header of a safetensors file."""
    with open(file, "rb") as opened:
        header = json.loads(opened.read(struct.unpack("<Q", opened.read(8))[0]))
    return {name: [entry["dtype"], entry["shape"]] for name, entry in header.items() if name != "__metadata__"}


def float_of(loss):
    """The float of a TensorBoard scalar, as `runs.losses` gives it."""
    return float(np.frombuffer(loss, np.float32)[0] if isinstance(loss, bytes) else loss[0])


def observed(name, folder):
    """What `observe` gives, or where the case failed, why."""
    print(f"{MARK}{name}", flush=True)
    try:
        return observe(name, folder / name)
    except Exception:  # the other cases are run all the same; the test of this one fails with the text
        return {"failed": traceback.format_exc()}


if __name__ == "__main__":
    out, *names = sys.argv[1:]
    matmul.attention_instruction_sets = lambda: ()  # values were written when native attention needed AVX-512
    with tempfile.TemporaryDirectory(prefix="efficientllm-golden-") as folder:
        observations = {name: observed(name, pathlib.Path(folder)) for name in names}
    pathlib.Path(out).write_text(json.dumps(observations))
