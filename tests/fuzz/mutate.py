"""Seeded mutations of a valid sample: of its JSON, its bytes and its kind of file."""

import copy
import json
import os
import struct

DEEP, DIGITS = "@deep@", "@digits@"  # what json.dumps cannot write, put in afterwards
EXTREMES = [
    *(None, True, False, 0, 1, -1, 2, 7, 2**31, 2**63, 2**64, 10**30, -(10**9), 0.5, -0.5, 1e-30, 1e308, -1e308),
    *(float("inf"), float("nan"), DEEP, DIGITS),
    *("", "4", "nan", "none", "\ud800", "x" * 10_000, "../../etc/passwd", "\n\x1b[31m", "(a|aa)+$", "{{ 1 / 0 }}"),
    *([], [[]], {}, {"a": []}, [None], [1] * 1000, [0.1, "x"], {"": 0}, ["x", "y"]),
]
WORDS = [0, 1, 2**7, 2**8 - 1, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1]


def text(rng, value, times=2):
    """JSON bytes of `value` after a few mutations, sometimes of the bytes too."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, times)):
        value = tree(rng, value)
    written = json.dumps(value)
    written = written.replace(json.dumps(DEEP), "[" * 20_000 + "]" * 20_000).replace(json.dumps(DIGITS), "9" * 6000)
    data = written.encode()
    return data_of(rng, data, 1) if rng.random() < 0.2 else data


def tree(rng, value):
    """A JSON value with one of its nodes changed, taken out, named anew, nested, or exchanged with another."""
    places = list(_places(value))
    if not places:
        return rng.choice(EXTREMES)
    holder, key = rng.choice(places)
    action = rng.randrange(7)
    if action == 0:
        del holder[key]
    elif action == 1 and isinstance(holder, dict):
        holder[rng.choice(["", "x", f"{key}2", str(key).upper(), "__class__", "rope_type"])] = holder.pop(key)
    elif action == 2:
        other, name = rng.choice(places)
        holder[key] = copy.deepcopy(other.get(name) if isinstance(other, dict) else other[name])
    elif action == 3:
        holder[key] = [holder[key]] if rng.random() < 0.5 else {"a": holder[key]}
    elif action == 4 and isinstance(holder[key], int | float):
        holder[key] = holder[key] * rng.choice([-1, 0, 2, 10**6, 0.5, 1 / 3]) + rng.choice([0, 1, -1])
    else:
        holder[key] = copy.deepcopy(rng.choice(EXTREMES))  # which may be changed in its turn
    return value


def _places(value):
    """`(dict or list, key)` of every node but the root."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in list(keys):
        yield value, key
        yield from _places(value[key])


def data_of(rng, data, times=3, within=None):
    """Bytes with some changed; `within` is how many of the first are changed most often."""
    data = bytearray(data)
    for _ in range(rng.randint(1, times)):
        size = len(data) if within is None or rng.random() < 0.1 else min(within, len(data))
        at = rng.randrange(size) if size else 0
        action = rng.randrange(7)
        if action == 0 and size:
            data[at] ^= 1 << rng.randrange(8)
        elif action == 1 and size:
            data[at] = rng.choice([0, 1, 9, 10, 34, 91, 123, 127, 128, 255])
        elif action == 2:
            del data[at:]
        elif action == 3:
            data[at:at] = rng.randbytes(rng.choice([1, 4, 8, 100]))
        elif action == 4:
            del data[at : at + rng.choice([1, 2, 4, 8, 100])]
        elif action == 5:
            word = struct.pack("<Q", rng.choice(WORDS))[: rng.choice([1, 2, 4, 8])]
            data[at : at + len(word)] = word
        else:
            data[at:at] = data[at : at + rng.choice([1, 8, 100, 1000])]
    return bytes(data)


def kind_of_file(rng, path):
    """Puts something in the place of a file that is none; returns what."""
    kinds = {
        "a FIFO": os.mkfifo,
        "a folder": os.mkdir,
        "a loop of links": lambda place: os.symlink(place, place),
        "/dev/zero": lambda place: os.symlink("/dev/zero", place),
        "an empty file": lambda place: open(place, "w").close(),
        "nothing": lambda place: None,
    }
    kind = rng.choice(sorted(kinds))
    os.unlink(path)
    kinds[kind](path)
    return kind
