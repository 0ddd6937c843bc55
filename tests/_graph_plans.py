"""Pipelines, and how they are resolved, for the tests of the graph."""

from __future__ import annotations

from typing import Any

from _graph_stages import STAGES, make_params

from cryodask.run.graph import Graph, resolve
from cryodask.stage import Stage

ONE = {"ingest": frozenset({1.0})}


TWO = {"ingest": frozenset({1.06, 0.83})}


BARE: dict[str, frozenset[float]] = {}
"""A project without movies: ingest is not put in front."""


def plan(pipeline: Any, inputs: dict[str, frozenset[float]] = ONE, stages: dict[str, Stage] = STAGES) -> Graph:
    entries = ["ingest", *pipeline] if inputs else pipeline
    return resolve(entries, stages, make_params=make_params, pixel_sizes=inputs)


def sources(graph: Graph) -> dict[str, Any]:
    """``{"refine3d.map": "ab_initio"}``; a list for several."""
    found = {(s.label, port): [p.ref for p in products] for s in graph.steps for port, products in s.inputs.items()}
    return {f"{label}.{port}": refs[0] if len(refs) == 1 else refs for (label, port), refs in found.items()}


def source(**ports: Any) -> dict[str, Any]:
    return {"from": ports}


PRE: list[Any] = ["motion", "ctf", {"pick": {"diameter_angstrom": 180}}, {"extract": {"box": 160, "scale_to": 64}}]


CLEAN: list[Any] = [*PRE, {"classify2d": {"classes": 50}}, {"curate": {"keep": "auto"}}]


MAP: list[Any] = [*CLEAN, {"ab_initio": {"symmetry": "D2"}}, {"refine3d": {"symmetry": "D2"}}]


POST: list[Any] = ["mask", "postprocess"]


K3: dict[str, Any] = {"classify3d": {"classes": 3}}


EXPANDED: list[Any] = [*MAP, "expand"]


FOCUS: list[Any] = [{"import_mask as focus": {"file": "domain.mrc"}}]


TWO_STARTS: list[Any] = [
    *CLEAN,
    {"ab_initio as a": {}},
    {"refine3d as ra": {}},
    {"ab_initio as b": source(particles="curate")},
    {"refine3d as rb": source(particles="curate", map="b")},
]


HET: list[Any] = [*CLEAN, {"ab_initio": {"classes": 2}}]


TWO_SESSIONS: list[Any] = [
    {"import_project as s1": {"project": "../1"}},
    {"import_project as s2": {"project": "../2"}},
    {"merge": source(particles=["s1", "s2"])},
]


MODEL: list[Any] = [{"import_model": {"file": "m.cif"}}, "dock"]


def assert_sources(case: tuple[Any, ...]) -> None:
    """A case is its name, a pipeline, the sources that it must take, and the pixel sizes where they are not ``ONE``."""
    _, pipeline, expected, *inputs = case
    graph = plan(pipeline, *inputs)
    assert graph.problems == ()
    got = sources(graph)
    assert {key: got.get(key) for key in expected} == expected
