"""The graph of the steps of a project as a picture: each step to the right of those that it takes its inputs from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cryodask.store.project import Project

BOX = (122, 40)
_GAP = (26, 16)


@dataclass(frozen=True)
class Node:
    """A step in the picture: its label, where its box begins, and how far it is."""

    label: str
    x: int
    y: int
    state: str


@dataclass(frozen=True)
class Graph:
    """Boxes and arrows, and the size of the picture, in pixels."""

    nodes: list[Node]
    edges: list[tuple[int, int, int, int]]
    width: int
    height: int


def drawn(project: Project, counts: Mapping[str, int]) -> Graph:
    """Where the boxes and arrows are; ``counts``: exposures that the per-exposure steps have."""
    behind = {label: _behind(project, label) for label in project.stages}
    level: dict[str, int] = {}
    for label in project.stages:
        level[label] = 1 + max((level[other] for other in behind[label]), default=-1)
    down: dict[int, int] = {}
    nodes: dict[str, Node] = {}
    for label in project.stages:
        line = down.setdefault(level[label], 0)
        down[level[label]] += 1
        nodes[label] = Node(label, level[label] * (BOX[0] + _GAP[0]) + 2, line * (BOX[1] + _GAP[1]) + 2, _state(project, label, counts))
    edges = [
        (nodes[other].x + BOX[0], nodes[other].y + BOX[1] // 2, nodes[label].x, nodes[label].y + BOX[1] // 2)
        for label, others in behind.items()
        for other in others
        # an arrow over several levels would only repeat what the arrows between them say
        if level[label] == level[other] + 1
    ]
    width = (max(level.values(), default=0) + 1) * (BOX[0] + _GAP[0]) - _GAP[0] + 4
    return Graph(list(nodes.values()), edges, width, max(down.values(), default=1) * (BOX[1] + _GAP[1]) - _GAP[1] + 4)


def _behind(project: Project, label: str) -> list[str]:
    """Steps of the project that a step takes an input from, directly or through a part."""
    places = {ref.step for refs in project.step(label).inputs.values() for ref in refs}
    by_place = {project.step(other).place: other for other in project.stages}
    parts = {by_place[p] for refs in project.step(label).inputs.values() for ref in refs for p in ref.places() if p in by_place}
    return [other for other in project.stages if other in places | parts and other != label]


def _state(project: Project, label: str, counts: Mapping[str, int]) -> str:
    if label in counts:
        return f"{counts[label]} exposures"
    return "done" if project.generation(label).committed() else "not finished"
