"""Interval plots of claims as small SVGs: each pair's ratio with its 95 % interval, and the claimed bound."""

import math
import typing
from xml.sax.saxutils import escape

NAMESPACE = 'xmlns="http://www.w3.org/2000/svg"'  # which a file needs, and an element of a page does not
_MOST = 12  # pairs
_WIDTH, _LEFT, _RIGHT, _LINE, _TOP, _BOTTOM = 520, 210, 12, 18, 8, 26
_COLOURS = {"does not hold": "#dc2626", "holds": "#059669"}
_FIRST = {"does not hold": 0, "holds": 1}  # of many pairs: one that does not hold decides
_OPEN, _AXIS = "#d97706", "#64748b"  # legible on white and on black


def draw_claim(claim: dict[str, typing.Any]) -> str | None:
    """Draws the pairs of a claim that have a ratio -> an SVG, or None without any. Of many, those that decide it."""
    pairs = [pair for pair in claim["pairs"] if "ratio" in pair]
    pairs = sorted(pairs, key=lambda pair: _FIRST.get(_status(pair), len(_FIRST)))[:_MOST]
    if not pairs:
        return None
    bound = float(claim["ratio"].split()[1])
    place = _scale([bound, 1.0, *(end for pair in pairs for end in _ends(pair))])
    label = escape(f"{claim['name']}: {claim['metric']} ratio {claim['ratio']}", {'"': "&quot;"})
    height = _TOP + _LINE * len(pairs) + _BOTTOM
    parts = [
        f'<svg {NAMESPACE} class="interval" role="img" aria-label="{label}" viewBox="0 0 {_WIDTH} {height}" '
        f'width="{_WIDTH}" height="{height}" font-family="sans-serif" font-size="11" fill="{_AXIS}">',
        f"<title>{label}</title>",
        *(_rule(place(1.0), height, "1", "3 3") if bound != 1.0 else ()),
        *_rule(place(bound), height, f"claimed {claim['ratio']}"),
    ]
    for number, pair in enumerate(pairs):
        parts += _interval(pair, place, _TOP + _LINE * (number + 0.5))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _status(pair):
    return pair["status"].partition(",")[0]


def _ends(pair):
    return [end for end in (pair["low"], pair["ratio"], pair["high"]) if end is not None]


def _scale(values):
    """A logarithmic scale from ratios to x, with a tenth of room on both sides."""
    logs = [math.log(min(max(value, 1e-6), 1e6)) for value in values]
    low, high = min(logs), max(logs)
    room = max(0.1 * (high - low), 0.005)
    low, high = low - room, high + room
    return lambda value: _LEFT + (math.log(min(max(value, 1e-6), 1e6)) - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)


def _rule(x, height, label, dash=""):
    anchor = "end" if x > _WIDTH - 80 else "middle"
    return (
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{height - _BOTTOM + 4}" stroke="{_AXIS}" '
        f'stroke-dasharray="{dash or "none"}"/>',
        f'<text x="{x:.1f}" y="{height - (4 if dash else 14) + 2}" text-anchor="{anchor}">{escape(label)}</text>',
    )


def _interval(pair, place, y):
    colour = _COLOURS.get(_status(pair), _OPEN)
    name = f"{pair['variant']} / {pair['against']}"
    name = name if len(name) <= 34 else f"{name[:33]}…"
    yield f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{escape(name)}</text>'
    if pair["low"] is not None:
        yield (
            f'<line x1="{place(pair["low"]):.1f}" x2="{place(pair["high"]):.1f}" y1="{y:.1f}" y2="{y:.1f}" '
            f'stroke="{colour}" stroke-width="2"/>'
        )
    yield f'<circle cx="{place(pair["ratio"]):.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>'
