"""The resolver: nonsense is a problem and never an exception, and what is accepted holds under checks that do not use the rules."""

from __future__ import annotations

from typing import Any

import pytest
from _graph_plans import MAP, PRE, plan, sources
from _graph_stages import STAGES, make_params
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cryodask.run.graph import Graph, Step, resolve

NAMES = st.sampled_from([*STAGES, "refine3d as fine", "extract as", " as x", "ctf.x", "", "größe", "mask as m@1", "refine3d\n", "from"])


REFS = st.sampled_from(["ctf", "refine3d", "refine3d@3f", "classify3d.class2", "curate.", "@", ".", "pick.particles", "nobody", "a b", "ü"])


LEAVES = st.none() | st.booleans() | st.integers(-3, 300) | st.floats() | REFS | st.text(max_size=4) | st.binary(max_size=2)


VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(REFS | st.integers(), inner, max_size=3), max_leaves=6
)


KEYS = st.sampled_from(["from", "live", "symmetry", "classes", "box", "map", "particles", "recentre", "reference"]) | st.integers(0, 2)


NONSENSE = VALUES | NAMES | st.dictionaries(NAMES, st.dictionaries(KEYS, VALUES, max_size=3) | VALUES, max_size=2)


@settings(max_examples=400, deadline=None)
@given(st.lists(NONSENSE, max_size=6), st.integers(0, 9))
@example(["0\x1f0"], 0)  # blanks of other kinds
@example(["\x1f/"], 0)
def test_nonsense_is_a_problem_and_never_an_exception(entries: list[Any], start: int) -> None:
    graph = plan([*MAP[:start], *entries])
    assert all(isinstance(p, str) and p for p in graph.problems)
    assert graph.problems or len(graph.steps) == 1 + min(start, 8) + len(entries)


@pytest.mark.parametrize("entries", [None, 3, "motion", {"motion": {}}, {1, 2}, b"x"])
def test_a_pipeline_that_is_no_list_is_a_problem(entries: Any) -> None:
    (problem,) = resolve(entries, STAGES, make_params=make_params).problems
    assert "list of steps" in problem


LOOP: list[Any] = []
LOOP.append(LOOP)


@pytest.mark.parametrize(
    "entry",
    [
        None,
        3,
        2.5,
        True,
        [],
        {},
        ["motion"],
        {"a": 1, "b": 2},
        {3: {}},
        {None: None},
        {("a",): 1},
        LOOP,
        object(),
        {"ctf": LOOP},
        {"ctf": {"from": LOOP}},
        {"mask": {"from": {"map": LOOP}}},
        {"ctf": {"from": {"exposures": {}}}},
        {"ctf": 3},
        {"ctf": "x"},
    ],
)
def test_an_entry_that_is_no_step_is_one_problem(entry: Any) -> None:
    assert len(plan([*MAP, entry]).problems) == 1


WORDS = ["classify2d", "curate", "ab_initio", "refine3d", "mask", "postprocess", "ctf_refine", "polish", "classify3d", "expand", "contract"]


WORDS += [
    "variability",
    "extract",
    "subtract",
    "merge",
    "consensus",
    "select",
    "deduplicate",
    "local_resolution",
    "select_exposures",
    "ctf",
]


WORDS += ["motion", "pick", "reconstruct", "align_maps", "import_mask", "import_map", "annotate", "hand", "import_model", "dock", "match"]


GIVEN = {"extract": {"box": 160}, "classify3d": {"classes": 2}, "import_mask": {"file": "m"}, "import_map": {"file": "m"}}


GIVEN |= {"import_model": {"file": "m"}, "merge": {"nearer_than_angstrom": 50}}


@st.composite
def growing(draw: st.DrawFn) -> list[Any]:
    """A pipeline that grows by the steps that are accepted; its last step may be refused."""
    entries: list[Any] = list(PRE)
    labels = ["ingest", "motion", "ctf", "pick", "extract"]
    for place in range(draw(st.integers(1, 14))):
        name = draw(st.sampled_from(WORDS))
        values: dict[str, Any] = dict(GIVEN.get(name, {}))
        if name in ("refine3d", "ab_initio", "expand") and draw(st.booleans()):
            values["symmetry"] = draw(st.sampled_from(["C1", "D2"]))
        if name == "ab_initio" and draw(st.integers(0, 4)) == 0:
            values["classes"] = 2
        if name == "extract":
            values["recentre"] = draw(st.booleans())
        one = st.builds(lambda a, b: a + b, st.sampled_from(labels), st.sampled_from(["", "", "", "", ".class1", ".class2"]))
        chosen: dict[str, Any] = {}
        for port in STAGES[name].ports:
            if (port.default == "explicit" and not port.optional) or draw(st.integers(0, 5)) == 0:
                chosen[port.name] = draw(st.lists(one, min_size=1, max_size=3)) if port.many else draw(one)
        if chosen:
            values["from"] = chosen
        entry = {f"{name} as {name}{place}": values}
        graph = plan([*entries, entry])
        assert len(graph.problems) < 2
        if not graph.problems:
            entries.append(entry)
            labels.append(f"{name}{place}")
    return entries


def ancestors(graph: Graph, label: str) -> set[str]:
    found: set[str] = set()
    waiting = [label]
    while waiting:
        for products in graph.step(waiting.pop()).inputs.values():
            for p in products:
                if p.step not in found:
                    found.add(p.step)
                    waiting.append(p.step)
    return found


def broken(graph: Graph, step: Step, place: dict[str, int]) -> list[str]:
    """Invariants of a step, from its sources alone."""
    out = []
    ports = {p.name: p for p in step.stage.ports}
    exposures, particles, base = (step.inputs.get(name, (None,))[0] for name in ("exposures", "particles", "map"))
    for name, products in step.inputs.items():
        port = ports[name]
        for p in products:
            if place[p.step] >= place[step.label]:
                out.append(f"{name} is not of an earlier step")
            if p.ref not in {q.ref for q in graph.step(p.step).outputs.values() if q.type == p.type}:
                out.append(f"{name} is nothing that its step gives")
            if p.type == "particles" and p.ids not in {q.ref for s in graph.steps for q in s.given("particles")}:
                out.append(f"who is in {p.ref} is unknown")
            if p.copies > 1 and not port.copies:
                out.append(f"{name} takes copies")
            if p.type == "mask" and name in step.implicit and port.default != "related":
                out.append("a mask that nobody asked for")
            if not set(port.parts) - {"ctf"} <= p.parts.keys():
                out.append(f"{name} lacks a part")
    if particles is not None and base is not None and "pose" in ports["particles"].parts:
        known = not any("unknown" in str(f) for f in (*particles.pose_frames, base.frame))
        if known and particles.pose_frames != {base.frame}:
            out.append(f"poses in {particles.pose_frames}, map in {base.frame}")
    if particles is not None and exposures is not None:
        if not particles.sources & exposures.sources:
            out.append("particles of other exposures")
        behind = ancestors(graph, particles.step) | {particles.step}
        foreign = [a for a in ancestors(graph, exposures.step) | {exposures.step} if a not in behind and graph.step(a).given("particles")]
        if "exposures" in step.implicit and foreign:
            out.append(f"default exposures rest on the particles of {foreign}")
    if particles is not None and base is not None and "map" in step.implicit:
        shared = (ancestors(graph, base.step) | {base.step}) & (ancestors(graph, particles.step) | {particles.step})
        made_from = [p for a in ancestors(graph, base.step) | {base.step} for ps in graph.step(a).inputs.values() for p in ps]
        # an imported map, or one made from imported maps alone, belongs to any particles
        if not shared - {"ingest", "motion", "ctf"} and any(p.type == "particles" for p in made_from):
            out.append(f"map {base.ref} has nothing to do with {particles.ref}")
    if not graph.rests_on(step) <= ancestors(graph, step.label):
        out.append("rests on what does not stand behind it")
    return out


@pytest.mark.heavy
@settings(max_examples=150, deadline=None)
@given(growing())
def test_what_is_accepted_holds_under_checks_that_do_not_use_the_rules(pipeline: list[Any]) -> None:
    graph = plan(pipeline)
    assert graph.problems == ()
    place = {s.label: k for k, s in enumerate(graph.steps)}
    assert [(s.label, fault) for s in graph.steps for fault in broken(graph, s, place)] == []


@settings(max_examples=60, deadline=None)
@given(growing())
def test_sources_said_explicitly_give_the_same_graph(pipeline: list[Any]) -> None:
    graph = plan(pipeline)
    said = []
    for step, entry in zip(graph.steps[1:], pipeline, strict=True):
        (head, values) = (entry, {}) if isinstance(entry, str) else next(iter(entry.items()))
        written = {
            port: [f"{p.step}.{p.output}" for p in products] if step.stage.port(port).many else f"{products[0].step}.{products[0].output}"  # type: ignore[union-attr]
            for port, products in step.inputs.items()
        }
        said.append({head: {**values, "from": written}})
    again = plan(said)
    assert again.problems == ()
    assert sources(again) == sources(graph)
    assert [s.outputs for s in again.steps] == [s.outputs for s in graph.steps]


def test_a_stage_that_cannot_say_what_it_gives_is_a_problem_of_its_step():
    (problem,) = resolve([{"align_classify3d": {"classes": [None]}}], STAGES, make_params=make_params).problems[:1]
    assert "align_classify3d cannot say what it gives with these parameters (TypeError" in problem
