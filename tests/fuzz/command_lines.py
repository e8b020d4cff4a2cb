"""Random command lines, and what becomes of them: `python tests/fuzz/command_lines.py [COUNT] [SEED] [MODE]`.

MODE `parse` looks at each line alone. `describe` makes what it names of shapes, as a sweep does beforehand. `run`
starts what it names, a tiny model for two steps. Processes that take too long are ended. Prints the lines that ended
in a traceback or not at all, and one JSON object of counts.
"""

import collections
import contextlib
import io
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import traceback

NUMBERS = ["-1", "0", "1", "3", "2.5", "nan", "inf", "-inf", "1e400", "1e39", "1e-50", "-0.0", "1e3", "0x10", "1_0"]
NUMBERS += [
    "",
    " ",
    "None",
    "True",
    "[]",
    "()",
    "'3'",
    "3,4",
    "½",
    "٣",
    "--",
    "1e",
    "9" * 30,
    "9" * 5000,
    "-" * 3000 + "1",
]
TEXTS = [
    "",
    " ",
    "x" * 300,
    "x" * 5000,
    "é" * 200,
    "💥",
    "\u202e",
    "../x",
    "/",
    "a/b",
    "{}",
    "%s%n",
    "'",
    '"',
    "(",
    ")",
]
TEXTS += ["None", "3", "-" * 3000, "(" * 3000, "[" * 3000, "\udc80", "\x1b[31m", "a\nb", "/dev/zero", "/dev/stdin", "~"]
READ = ["-1", "0", "1", "3", "-2147483649", "4294967296", "9" * 30, "1e39", "inf", "nan", "-0.5", "1e-50"]  # as numbers
TUPLES = ["()", "[]", "(1,)", "((),)", "(('x',),)", "(('x', 1), 2)", "(('(', 1),)", "(('.*', -1),)", "(('.*', 1e400),)"]
TUPLES += ["((((1,),),),)", "('', None)", "[['.*', 1]]", "x", "{'a': 1}", "(" * 200 + ")" * 200, "(('.*', 'int5'),)"]
ARGUMENTS = ["", "()", "(", "(1)", "(*[])", "(**{})", "(x=x)", "(x=1)", "(x=1, x=2)", "(x=lambda: 0)", "(x=__import__)"]
VALUES = [
    "-1",
    "0",
    "1",
    "2",
    "3",
    "0.5",
    "1e400",
    "-1e400",
    "1e-50",
    "9" * 30,
    "9" * 5000,
    "None",
    "True",
    "'x'",
    "()",
]
VALUES += [
    "(1, 'x')",
    "{}",
    "'('",
    "'(a+)+$'",
    "b'x'",
    "'rope(base=-1)'",
    "'int4(group=1)'",
    "-" * 3000 + "1",
    "'\\w'",
    "...",
]
SLIPS = [
    "--confg=x",
    "-x",
    "--",
    "x",
    "--config.",
    "--config..x=1",
    "--config.x=1",
    "--config.train=1",
    "--config.train.steps",
]
SLIPS += [
    "--noconfig.seed",
    "--config.model.mixer.x=1",
    "--overwrite=x",
    "--config.train={}",
    "--workdir",
    "--config=",
    "-",
]
KINDS = {
    **{f"model.{kind}": kind for kind in ("size", "mixer", "ffn", "position", "norm", "precision")},
    **{kind: kind for kind in ("adapter", "quant", "data", "tokenizer")},
    **{"train.optimizer": "optimizer", "train.schedule": "schedule", "infer.sampler": "sampler"},
}


def lines(seed, techniques, keys):
    """Endless lists of overrides: one to three keys each, of wrong type, extreme, empty, huge or mutated specs."""
    draw = random.Random(seed)
    while True:
        line = [
            _override(draw, draw.choice(sorted(keys)), techniques, keys) for _ in range(draw.choice((1, 1, 1, 2, 3)))
        ]
        if draw.random() < 0.05:
            line.insert(draw.randrange(len(line) + 1), draw.choice(SLIPS))
        yield line


def _override(draw, key, techniques, keys):
    default = keys[key]
    if key in KINDS and draw.random() < 0.8:
        value = _spec(draw, techniques[KINDS[key]])
    elif isinstance(default, tuple):
        value = draw.choice(TUPLES + TEXTS)
    elif isinstance(default, str):
        value = draw.choice([default, default[:-1], default + "x", *TEXTS])
    else:
        value = draw.choice(READ if draw.random() < 0.7 else NUMBERS + TEXTS[:6])
    return f"--config.{key}={value}"


def _spec(draw, known):
    name = draw.choice(sorted(known))
    if draw.random() < 0.2:
        return draw.choice([name[:-1], name + "x", name.upper(), name]) + draw.choice(ARGUMENTS)
    fields = draw.sample(sorted(known[name]), min(len(known[name]), draw.choice((0, 1, 1, 2))))
    return f"{name}({', '.join(f'{field}={_value(draw)}' for field in fields)})"


WALL = 8  # times the processors' time that a line may take


def _value(draw):
    return draw.choice(VALUES[:10] if draw.random() < 0.7 else VALUES)


class Hang(BaseException):
    """Raised where a line takes longer than it may."""


def outcome(function, argv, seconds):
    """`(ok | line | status | traceback | hang, what was said)` of `function(argv)`."""

    def stop(signum, frame):
        raise Hang

    said, before = io.StringIO(), {kind: signal.signal(kind, stop) for kind in (signal.SIGPROF, signal.SIGALRM)}
    signal.setitimer(signal.ITIMER_PROF, seconds)  # of the processors: other work is no hang
    signal.setitimer(signal.ITIMER_REAL, WALL * seconds)  # and something that waits is one
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
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
        return ("ok" if status == 0 else "status"), f"{status} {said.getvalue()}"
    last = said.getvalue().strip().splitlines()
    return ("line" if last and last[-1].startswith("efficientllm: ") else "traceback"), said.getvalue()


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
    from efficientllm.sweep import check

    try:
        check._cost(argv)
    except UserError as error:
        print(f"efficientllm: {error}", file=sys.stderr)
        return 2
    return 0


def known():
    """`(fields by name by kind, keys with their defaults)` of the package, read from what is registered."""
    from efficientllm import registry
    from efficientllm.workdir import flatten

    try:
        from efficientllm import base_config as base
    except ImportError:  # of an older checkout
        from configs import base
    kinds = set(KINDS.values())
    techniques = {k: {n: list(registry.settable(registry.lookup(k, n))) for n in registry.names(k)} for k in kinds}
    return techniques, flatten(base.get_config().to_dict())


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
    return ["--config=configs/base.py", f"--workdir={folder / str(index)}"] + [
        f"--config.{k}={v}" for k, v in values.items()
    ]


LARGE = ("train.steps", "train.length", "train.batch_size", "infer.", "sample.tokens", "plan.", "quality.")


def is_long(line):
    """Whether the line asks for what a machine may well do, for hours."""
    return any(f"config.{key}" in flag and ("9" * 30 in flag or "1e3" in flag) for flag in line for key in LARGE)


def work(folder, start, count, seed, mode, seconds):
    """Prints a JSON line for each of the command lines from `start` on."""
    drawn = lines(seed, *known())
    function = described if mode == "describe" else parsed
    if mode == "run":
        from efficientllm.main import main as function
    for index in range(count):
        line = next(drawn)
        if index < start or (mode != "parse" and is_long(line)):
            continue
        argv = [*tiny(folder, index), *line] if mode != "parse" else ["--config=configs/base.py", *line]
        print(json.dumps({"index": index, "begins": line}), flush=True)
        kind, said = outcome(function, argv, seconds)
        print(json.dumps({"index": index, "outcome": kind, "line": line, "said": said[-600:]}), flush=True)


def survey(count, seed, mode, seconds):
    """`[{"outcome": ..., "line": ..., "said": ...}]`; a process that hangs or dies is started again after its line."""
    found, start = [], 0
    with tempfile.TemporaryDirectory() as folder:
        while start < count:
            argv = [sys.executable, __file__, "work", folder, str(start), str(count), str(seed), mode, str(seconds)]
            process = subprocess.Popen(
                argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL
            )
            start, ended = _follow(process, found, start, (WALL + 2) * seconds + 60)
            if ended:
                break
    return found


def _follow(process, found, start, patience):
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
            found.append(entry)
            start, begun = entry["index"] + 1, None
    process.wait()
    if begun is None:
        return start, True
    kind = "hang" if process.returncode == -signal.SIGKILL else "died"
    found.append({"index": begun["index"], "outcome": kind, "line": begun["begins"], "said": f"{process.returncode}"})
    return begun["index"] + 1, False


def _killer(process, patience):
    import threading

    timer = threading.Timer(patience, process.kill)
    timer.start()
    return timer


def main():
    if sys.argv[1:2] == ["work"]:
        folder, start, count, seed, mode, seconds = sys.argv[2:]
        work(pathlib.Path(folder), int(start), int(count), int(seed), mode, float(seconds))
        return
    given = sys.argv[1:]
    count, seed, mode = (*given, *("200", "0", "parse")[len(given) :])
    os.environ["JAX_PLATFORMS"] = "cpu"
    found = survey(int(count), int(seed), mode, 5.0 if mode == "parse" else 60.0)
    for entry in found:
        if entry["outcome"] in ("traceback", "hang", "died"):
            print(json.dumps(entry, ensure_ascii=True)[:900])
    print(json.dumps({"tried": len(found), **collections.Counter(entry["outcome"] for entry in found)}))


if __name__ == "__main__":
    main()
