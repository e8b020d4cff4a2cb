"""Fuzzing of command lines: `python -m fuzz.command_lines [COUNT] [SEED] [MODE]`, from tests/.

MODE `parse` reads each line only. `describe` builds its model, method and optimizer from shapes, as a sweep does. `run`
runs a tiny model for two steps. Processes that take too long are ended. Prints the lines that ended in a traceback or
not at all, and one JSON object of counts.
"""

import collections
import contextlib
import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
import traceback

from fuzz.drawn import KINDS, is_long, lines

ROOT = pathlib.Path(__file__).parents[2]
BASE = f"--config={ROOT}/configs/base.py"
WALL = 8  # times the processors' time that a line may take


class Hang(BaseException):
    """Raised where a line takes longer than it may."""


def outcome(function, argv, seconds):
    """`(ok | line | status | traceback | hang, what was said)` of `function(argv)`."""

    def stop(signum, frame):
        raise Hang

    printed, before = io.StringIO(), {kind: signal.signal(kind, stop) for kind in (signal.SIGPROF, signal.SIGALRM)}
    signal.setitimer(signal.ITIMER_PROF, seconds)  # of the processors: other work is no hang
    signal.setitimer(signal.ITIMER_REAL, WALL * seconds)  # and something that waits is one
    try:
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(io.StringIO()):
            status = function(argv)
    except Hang:
        return "hang", ""
    except BaseException:
        return "traceback", traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for kind, handler in before.items():
            signal.signal(kind, handler)
    if status != 2:
        return ("ok" if status == 0 else "status"), f"{status} {printed.getvalue()}"
    last = printed.getvalue().strip().splitlines()
    return ("line" if last and last[-1].startswith("efficientllm: ") else "traceback"), printed.getvalue()


def parsed(argv):
    """The exit status of a line that is only read."""
    from efficientllm import main
    from efficientllm.errors import UserError

    try:
        main.parse(argv)
    except UserError as error:
        print(f"efficientllm: {error}", file=sys.stderr)
        return 2
    return 0


def described(argv):
    """The exit status of a line whose model, method and optimiser are described without arrays."""
    from efficientllm.errors import UserError
    from efficientllm.sweep import cost_estimates

    try:
        cost_estimates._cost(argv)
    except UserError as error:
        print(f"efficientllm: {error}", file=sys.stderr)
        return 2
    return 0


def fields_and_keys():
    """`(fields by name by kind, keys with their defaults)` of the package, read from what is registered."""
    from efficientllm import base_config, registry
    from efficientllm.config.plain import flatten

    kinds = set(KINDS.values())
    techniques = {
        k: {n: list(registry.spec_parameters(registry.lookup(k, n))) for n in registry.names(k)} for k in kinds
    }
    return techniques, flatten(base_config.get_config().to_dict())


def tiny(folder, index):
    """The command line that a fuzzed one is added to."""
    texts = folder / "texts"
    if not texts.exists():
        texts.mkdir()
        for i in range(30):
            (texts / f"{i}.txt").write_text(" ".join(f"word{j * i % 17} and {j % 5}" for j in range(60)))
    values = {
        "model.size": "tiny(num_layers=1, dim=16, num_heads=2, num_kv_heads=1, head_dim=8, hidden=16)",
        "data": f"text(path='{texts}/*.txt')", "tokenizer": "bytes", "train.steps": 2, "train.length": 16,
        "train.batch_size": 2, "eval.batches": 1, "sample.tokens": 2, "infer.repeats": 1, "infer.max_new_tokens": 2,
        "infer.prompt_length": 4, "task": ("pretrain", "pretrain", "infer")[index % 3],
    }  # fmt: skip
    return [BASE, f"--workdir={folder / str(index)}"] + [f"--config.{k}={v}" for k, v in values.items()]


def work(folder, start, count, seed, mode, seconds):
    """Prints a JSON line for each of the command lines from `start` on."""
    drawn = lines(seed, *fields_and_keys())
    function = described if mode == "describe" else parsed
    if mode == "run":
        from efficientllm.main import main as function
    for index in range(count):
        line = next(drawn)
        if index < start or (mode != "parse" and is_long(line)):
            continue
        argv = [*tiny(folder, index), *line] if mode != "parse" else [BASE, *line]
        print(json.dumps({"index": index, "begins": line}), flush=True)
        kind, printed = outcome(function, argv, seconds)
        print(json.dumps({"index": index, "outcome": kind, "line": line, "said": printed[-600:]}), flush=True)


def survey(count, seed, mode, seconds):
    """`[{"outcome": ..., "line": ..., "said": ...}]`; a process that hangs or dies is started again after its line."""
    outcomes, start = [], 0
    with tempfile.TemporaryDirectory() as folder:
        while start < count:
            arguments = map(str, (folder, start, count, seed, mode, seconds))
            process = subprocess.Popen(
                [sys.executable, "-m", "fuzz.command_lines", "work", *arguments],
                env=os.environ | {"PYTHONPATH": os.pathsep.join([f"{ROOT}/tests", str(ROOT)])},
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                stdin=subprocess.DEVNULL,
            )
            start, ended = _follow(process, outcomes, start, (WALL + 2) * seconds + 60)
            if ended:
                break
    return outcomes


def _follow(process, outcomes, start, patience):
    """Collects what `process` prints -> `(where to go on, whether it came to its end)`."""
    begun = None
    while True:
        timer = _killer(process, patience)
        text = process.stdout.readline()
        timer.cancel()
        if not text:
            break
        entry = json.loads(text)
        if "begins" in entry:
            begun = entry
        else:
            outcomes.append(entry)
            start, begun = entry["index"] + 1, None
    process.stdout.close()
    process.wait()
    if begun is None:
        return start, True
    kind = "hang" if process.returncode == -signal.SIGKILL else "died"
    outcomes.append(
        {"index": begun["index"], "outcome": kind, "line": begun["begins"], "said": f"{process.returncode}"}
    )
    return begun["index"] + 1, False


def _killer(process, patience):
    timer = threading.Timer(patience, process.kill)
    timer.start()
    return timer


def main():
    if sys.argv[1:2] == ["work"]:
        folder, start, count, seed, mode, seconds = sys.argv[2:]
        work(pathlib.Path(folder), int(start), int(count), int(seed), mode, float(seconds))
        return
    arguments = sys.argv[1:]
    count, seed, mode = (*arguments, *("200", "0", "parse")[len(arguments) :])
    os.environ["JAX_PLATFORMS"] = "cpu"
    outcomes = survey(int(count), int(seed), mode, 5.0 if mode == "parse" else 60.0)
    for entry in outcomes:
        if entry["outcome"] in ("traceback", "hang", "died"):
            print(json.dumps(entry, ensure_ascii=True)[:900])
    print(json.dumps({"tried": len(outcomes), **collections.Counter(entry["outcome"] for entry in outcomes)}))


if __name__ == "__main__":
    main()
