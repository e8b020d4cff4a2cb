"""Entries of `config.model.pattern`: `COUNT * mixer + mixer | ffn`, of which only a mixer is needed."""

import re
import typing

_COUNTED = re.compile(r"\s*([1-9]\d{0,4})\s*\*\s*(.*)", re.DOTALL)


class Entry(typing.NamedTuple):
    """An entry: repeats of its block, None where none are said; specs of parallel mixers; that of the ffn, or ""."""

    repeats: int | None
    mixers: list[str]
    ffn: str


def parse_entry(entry: str) -> Entry:
    """`"13 * joint + mha(x=1) | gelu"` -> `Entry(13, ["joint", "mha(x=1)"], "gelu")`; specs are not checked."""
    counted = _COUNTED.fullmatch(entry)
    mixers, *ffn = split_specs(counted[2] if counted else entry, "|")
    return Entry(int(counted[1]) if counted else None, split_specs(mixers), " | ".join(ffn))


def split_specs(specs: str, mark: str = "+") -> list[str]:
    """`"a(x='+') + b"` -> `["a(x='+')", "b"]`: splits at a mark that is in no brackets and in no text."""
    pieces, depth, quote, before = [""], 0, "", ""
    for char in specs:
        if quote:
            quote = "" if char == quote and before != "\\" else quote
        elif char in "'\"":
            quote = char
        else:
            depth += (char in "([{") - (char in ")]}")
        if char == mark and not depth and not quote:
            pieces.append("")
        else:
            pieces[-1] += char
        before = "" if before == "\\" else char
    return [piece.strip() for piece in pieces]
