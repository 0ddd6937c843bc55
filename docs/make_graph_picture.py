"""``docs/images/steps.png``: the pipeline of ``docs/steps.md`` as boxes and arrows, from the graph that ``cryodask run`` resolves.

``python docs/make_graph_picture.py [PROJECT.yaml] [-o PICTURE.png]``; without a project file the first whole one of ``docs/steps.md``.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch

from cryodask.run.graph import Graph, Step
from cryodask.run.recipe import draft_plan

DOCS = Path(__file__).parent
COLOURS = {
    "exposures": "#8a949e", "particles": "#1f6fb4", "classes": "#c98a00", "map": "#b8322a", "mask": "#2f8f4e",
    "model": "#7a4fa3", "weights": "#6b4a2b",
}  # fmt: skip
BOX_WIDTH, BOX_HEIGHT, ROW, LANE, FIRST_LANE = 3.3, 0.62, 0.92, 0.26, 0.34


@dataclass
class Bus:
    """A product line, from the row of the step that gives it to the rows of the steps that take it."""

    type: str
    giver: int
    takers: list[int]
    lane: int = 0


def buses_of(graph: Graph) -> list[Bus]:
    """One line per product that some step takes, short ones first."""
    row = {step.label: i for i, step in enumerate(graph.steps)}
    found: dict[tuple[str, str], Bus] = {}
    for step in graph.steps:
        for products in step.inputs.values():
            for p in products:
                bus = found.setdefault((p.type, p.ref), Bus(p.type, row[p.step], []))
                bus.takers.append(row[step.label])
    return sorted(found.values(), key=lambda b: (b.takers[-1] - b.giver, b.giver))


def give_lanes(buses: Iterable[Bus]) -> None:
    """Assign each line to the first track that is free from its giver to its last taker."""
    lanes: list[list[tuple[int, int]]] = []
    for bus in buses:
        span = bus.giver, bus.takers[-1]
        free = (i for i, taken in enumerate(lanes) if all(span[1] <= a or span[0] >= b for a, b in taken))
        bus.lane = next(free, len(lanes))
        if bus.lane == len(lanes):
            lanes.append([])
        lanes[bus.lane].append(span)


def draw(graph: Graph, output: Path) -> None:
    """Particles are drawn on the left side, everything else on the right."""
    buses = buses_of(graph)
    sides = {-1: [b for b in buses if b.type == "particles"], 1: [b for b in buses if b.type != "particles"]}
    for side in sides.values():
        give_lanes(side)
    width = {s: FIRST_LANE + LANE * (1 + max((b.lane for b in some), default=0)) for s, some in sides.items()}
    height = ROW * len(graph.steps)
    wide = width[-1] + BOX_WIDTH + width[1]
    figure = Figure(figsize=(1.15 * wide, 0.72 * (height + 0.75)), dpi=150)
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(-width[-1], BOX_WIDTH + width[1]), ylim=(-height - 0.05, 0.7))
    ax.axis("off")
    for i, step in enumerate(graph.steps):
        _box(ax, i, step)
    taps = _taps(sides)
    for side, some in sides.items():
        edge = 0.0 if side < 0 else BOX_WIDTH
        for bus in some:
            colour, x = COLOURS[bus.type], edge + side * (FIRST_LANE + LANE * bus.lane)
            heights = [taps[side, row, id(bus)] for row in (bus.giver, *bus.takers)]
            ax.plot([edge, x, x], [heights[0], heights[0], heights[-1]], color=colour, lw=2, solid_capstyle="round", zorder=1)
            ax.plot([edge], [heights[0]], "o", color=colour, ms=5, zorder=4)
            for y in heights[1:]:
                style = {"arrowstyle": "-|>,head_width=0.22,head_length=0.42", "color": colour, "lw": 2, "shrinkA": 0, "shrinkB": 0}
                ax.annotate("", (edge, y), (x, y), arrowprops=style, zorder=2)
    used = [t for t in COLOURS if any(b.type == t for b in buses)]
    handles = [Line2D([], [], color=COLOURS[t], lw=3, label=t) for t in used]
    ax.legend(handles=handles, loc="upper center", ncols=len(used), frameon=False, fontsize=10, handlelength=1.4, columnspacing=1.4)
    figure.savefig(output, facecolor="white")


def _taps(sides: dict[int, list[Bus]]) -> dict[tuple[int, int, int], float]:
    """Height at which each product leaves or enters a box; inputs are above outputs."""
    out: dict[tuple[int, int, int], float] = {}
    for side, some in sides.items():
        rows = {row for bus in some for row in (bus.giver, *bus.takers)}
        for row in rows:
            coming = sorted((b for b in some if row in b.takers), key=lambda b: -b.lane)
            going = sorted((b for b in some if b.giver == row), key=lambda b: b.lane)
            here = [*coming, *going]
            for place, bus in enumerate(here):
                out[side, row, id(bus)] = -ROW * row - ROW / 2 + BOX_HEIGHT * (0.5 - (place + 1) / (len(here) + 1))
    return out


def _box(ax: object, row: int, step: Step) -> None:
    middle = -ROW * row - ROW / 2
    shape = FancyBboxPatch(
        (0, middle - BOX_HEIGHT / 2),
        BOX_WIDTH,
        BOX_HEIGHT,
        boxstyle="round,pad=0,rounding_size=0.1",
        fc="#f6f7f9",
        ec="#3b4652",
        lw=1.2,
        zorder=3,
    )
    ax.add_patch(shape)  # type: ignore[attr-defined]
    stage = f"{step.stage.name} as " if step.stage.name != step.label else ""
    values = step.params.model_dump()
    kept = {n: v for n, v in values.items() if v != type(step.params).model_fields[n].default}
    said = ", ".join(f"{n} {str(v).lower() if isinstance(v, bool) else f'{v:g}' if isinstance(v, float) else v}" for n, v in kept.items())
    put = {"ha": "center", "va": "center", "zorder": 5}
    y = middle + (0.11 if said else 0)
    ax.text(BOX_WIDTH / 2, y, f"{stage}{step.label}", fontsize=11, color="#10161c", **put)  # type: ignore[attr-defined]
    if said:
        ax.text(BOX_WIDTH / 2, middle - 0.15, said, fontsize=7.5, color="#5b6772", **put)  # type: ignore[attr-defined]


def example() -> str:
    """The first complete project file in ``docs/steps.md``."""
    blocks = re.findall(r"^```yaml\n(.*?)^```", (DOCS / "steps.md").read_text(), re.MULTILINE | re.DOTALL)
    return next(b for b in blocks if b.startswith("name:"))


def main() -> None:
    """Draw the graph of a project file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("project", nargs="?", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=DOCS / "images" / "steps.png")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = given.project or Path(folder) / "example.yaml"
        if given.project is None:
            path.write_text(example())
        graph = draft_plan(path).graph
    if graph.problems:
        raise SystemExit("\n".join(graph.problems))
    draw(graph, given.output)
    print(f"{given.output}: {given.output.stat().st_size} bytes")


if __name__ == "__main__":
    main()
