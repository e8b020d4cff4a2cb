"""Small command-line runs for tests: a corpus, arguments, processes, and the losses of a run."""

import os
import pathlib
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[1]
STEPS = 12


def corpus(folder):
    """A folder of 60 short text files."""
    folder.mkdir()
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "returns", "none"]
    for i in range(60):
        text = " ".join(words[(i * 7 + j * j) % len(words)] for j in range(120))
        (folder / f"{i:02}.txt").write_text(f"Document {i}. {text}\n")
    return folder


def arguments(folder, workdir, config="configs/base.py", **overrides):
    """The command line of a run of `STEPS` steps that takes a few seconds."""
    values = {
        "model.size": "tiny(num_layers=2, dim=32, num_heads=2, num_kv_heads=1, head_dim=16, hidden=48)",
        "model.unroll": 0,  # a loop, as on accelerators: half the compilation
        "data": f"text(path='{folder}/*.txt')",
        "tokenizer": "bytes",
        "train.steps": STEPS,
        "train.length": 32,
        "train.log_every": 1,
        "eval.every": 6,
        "eval.batches": 2,
        "checkpoint.every": 4,
        "sample.tokens": 4,
        **{key.replace("__", "."): value for key, value in overrides.items()},
    }
    flags = [f"--config.{key}={value}" for key, value in values.items()]
    return [f"--config={ROOT / config}", f"--workdir={workdir}", *flags]


def start(argv, devices=1, file_kib="unlimited", **environment):
    """The command line as a process with `devices` simulated devices that writes no file beyond `file_kib`."""
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}")
    return subprocess.Popen(
        ["bash", "-c", f'ulimit -f {file_kib}; exec "$@"', "-", sys.executable, "-m", "efficientllm.main", *argv],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": flags, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process, timeout=300):
    """`(exit status, output)` of a process."""
    output, _ = process.communicate(timeout=timeout)
    return process.returncode, output


def losses(workdir):
    """`{step: loss}`, bit for bit. The last loss written for a step counts, as in TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(workdir), size_guidance={"tensors": 0})
    events.Reload()
    by_step = {}
    for event in sorted(events.Tensors("loss"), key=lambda event: event.wall_time):
        by_step[event.step] = event.tensor_proto.tensor_content or tuple(event.tensor_proto.float_val)
    return by_step


def when(workdir, text, act, deadline=120):
    """Calls `act` as soon as `text` stands in the run's log."""
    end = time.monotonic() + deadline
    log = workdir / "log.txt"
    while time.monotonic() < end:
        if log.exists() and text in log.read_text():
            act()
            return
        time.sleep(0.002)
    raise AssertionError(f"{text!r} never came in {log}")
