"""Draws the rooms of efficientllm, level by level, with an arrow from each to those that it imports from.

    python tests/draw_imports.py    # writes efficientllm/imports.svg; run it after an import between rooms has changed

Arrows that follow from others are left out. Layered drawing (Sugiyama, Tagawa and Toda 1981): a long arrow has a bend
on every level that it crosses, and the order within levels comes from the mean position of neighbours.
"""

import math
import sys

import import_graph

FILE = import_graph.ROOT / "efficientllm" / "imports.svg"
HEIGHT, BOX, LETTER, GAP, BEND = 58, 26, 7.4, 18, 10  # px: of a level, of a box, of a letter; between boxes; of a bend
SWEEPS = 60
STYLE = (
    "text{font:13px ui-monospace,SFMono-Regular,Menlo,monospace;fill:#1f2328;text-anchor:middle}"
    ".box{fill:#f6f8fa;stroke:#57606a}.arrow{fill:none;stroke:#8c959f}.head{fill:#8c959f}.page{fill:#fff}"
)


def svg(arrows):
    """The drawing of an acyclic graph of rooms `{room: {rooms it imports from}}`."""
    rows, chains = layout(import_graph.levels(arrows), import_graph.reduced(arrows))
    x = positions(rows, chains)
    width = max(x[node] + _width(node) / 2 for row in rows for node in row) + GAP
    places = {node: (x[node], HEIGHT * level + HEIGHT / 2) for level, row in enumerate(rows) for node in row}
    shapes = [_arrow([places[node] for node in chain]) for chain in chains]
    shapes += [_box(node, *places[node]) for row in rows for node in row if isinstance(node, str)]
    head = (
        '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path class="head" d="M0 0L8 4L0 8z"/></marker>'
    )
    size = f'width="{width:.0f}" height="{HEIGHT * len(rows)}"'
    page = f'<rect class="page" {size} rx="6"/>'
    start = f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {width:.0f} {HEIGHT * len(rows)}">'
    return "\n".join([start, f"<style>{STYLE}</style>", head, page, *shapes, "</svg>", ""])


def layout(levels, arrows):
    """Rows of nodes from the top, and every arrow as a chain of nodes: rooms by name, bends as `(from, to, level)`."""
    level_of = {name: level for level, row in enumerate(levels) for name in row}
    rows, chains = [list(row) for row in levels], []
    for name in sorted(arrows):
        for target in sorted(arrows[name]):
            bends = [(name, target, level) for level in range(level_of[name] + 1, level_of[target])]
            for bend in bends:
                rows[bend[2]].append(bend)
            chains.append([name, *bends, target])
    return rows, chains


def positions(rows, chains):
    """`{node: x}` without overlaps, each near its neighbours; sorts `rows` from left to right."""
    neighbours = {node: [] for row in rows for node in row}
    for chain in chains:
        for upper, lower in zip(chain, chain[1:], strict=False):
            neighbours[upper].append(lower)
            neighbours[lower].append(upper)
    x = {node: 100.0 * place for row in rows for place, node in enumerate(row)}
    for sweep in range(SWEEPS):
        for row in rows if sweep % 2 else reversed(rows):
            wanted = {node: math.fsum(map(x.get, neighbours[node])) / max(1, len(neighbours[node])) for node in row}
            row.sort(key=lambda node: (wanted[node], str(node)))
            x |= _apart(row, wanted)
    left = min(x[node] - _width(node) / 2 for node in x)
    return {node: place - left + GAP for node, place in x.items()}


def _apart(row, wanted):
    """`{node: x}` of a sorted row, moved to the right as far as widths demand and back by the mean of that."""
    x, edge = {}, float("-inf")
    for node in row:
        x[node] = max(wanted[node], edge + _width(node) / 2)
        edge = x[node] + _width(node) / 2 + GAP
    moved = math.fsum(x[node] - wanted[node] for node in row) / len(row)
    return {node: place - moved for node, place in x.items()}


def _width(node):
    return LETTER * len(node) + 18 if isinstance(node, str) else BEND


def _arrow(places):
    """A smooth line down through `places`, from below the first box to above the last."""
    (x, y), *_ = places
    path = f"M{x:.1f} {y + BOX / 2:.1f}"
    y += BOX / 2
    for i, (to_x, to_y) in enumerate(places[1:], 1):
        to_y -= BOX / 2 * (i == len(places) - 1)
        middle = (y + to_y) / 2
        path += f"C{x:.1f} {middle:.1f} {to_x:.1f} {middle:.1f} {to_x:.1f} {to_y:.1f}"
        x, y = to_x, to_y
    return f'<path class="arrow" marker-end="url(#head)" d="{path}"/>'


def _box(name, x, y):
    left, top, width = x - _width(name) / 2, y - BOX / 2, _width(name)
    box = f'<rect class="box" x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{BOX}" rx="4"/>'
    return f'{box}<text x="{x:.1f}" y="{y + 4.5:.1f}">{name}</text>'


def main():
    """Writes the drawing -> exit status."""
    arrows = import_graph.rooms(import_graph.imports())
    if cycle := import_graph.cycle(arrows):
        print(f"no drawing: rooms import in a circle: {' -> '.join(cycle)}", file=sys.stderr)
        return 1
    FILE.write_text(svg(arrows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
