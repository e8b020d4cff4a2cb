"""Random command lines: one to three keys with values of wrong type, extreme, empty, huge, or mutated specs."""

import random

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


def _spec(draw, techniques):
    name = draw.choice(sorted(techniques))
    if draw.random() < 0.2:
        return draw.choice([name[:-1], name + "x", name.upper(), name]) + draw.choice(ARGUMENTS)
    fields = draw.sample(sorted(techniques[name]), min(len(techniques[name]), draw.choice((0, 1, 1, 2))))
    return f"{name}({', '.join(f'{field}={_value(draw)}' for field in fields)})"


def _value(draw):
    return draw.choice(VALUES[:10] if draw.random() < 0.7 else VALUES)


LARGE = ("train.steps", "train.length", "train.batch_size", "infer.", "sample.tokens", "plan.", "quality.")


def is_long(line):
    """Whether the line asks for what a machine may well do, for hours."""
    return any(f"config.{key}" in flag and ("9" * 30 in flag or "1e3" in flag) for flag in line for key in LARGE)
