"""The resolver: what the steps of a pipeline give, and what rests on what."""

from __future__ import annotations

import cProfile
from typing import Any

import pytest
from _graph_plans import BARE, CLEAN, EXPANDED, FOCUS, HET, K3, MAP, ONE, POST, PRE, TWO_SESSIONS, plan, source, sources
from _graph_stages import STAGES, E, declare

from cryodask.products import ImageFact, Product, register_part
from cryodask.run.graph import Graph
from cryodask.run.graph.facts import order_of

BRANCHED: list[Any] = [
    *MAP,
    *POST,
    {"refine3d as c1": {"symmetry": "C1", "from": {"particles": "curate", "map": "ab_initio"}}},
    {"mask as m1": source(map="c1")},
    {"postprocess as p1": source(map="c1", mask="m1")},
]


CHANGES: list[tuple[list[Any], str, set[str]]] = [
    (BRANCHED, "c1", {"c1", "m1", "p1"}),
    (BRANCHED, "mask", {"mask", "postprocess"}),
    (BRANCHED, "ctf", {"ctf", "classify2d", "curate", "ab_initio", "refine3d", "mask", "postprocess", "c1", "m1", "p1"}),
    ([*PRE, {"annotate": {"name": "n"}}, "classify2d", "curate"], "annotate", {"annotate"}),
    (
        ["motion", "ctf", "train_denoiser", "denoise", {"pick": {"diameter_angstrom": 180}}, {"extract": {"box": 160}}, "classify2d"],
        "denoise",
        {"denoise"},
    ),
    ([*MAP, "variability", "polish"], "variability", {"variability"}),
    (
        [*PRE, {"select_exposures": {}}, "classify2d", "curate", "ab_initio"],
        "select_exposures",
        {"select_exposures", "classify2d", "curate", "ab_initio"},
    ),
    ([*CLEAN, {"extract as full": {"box": 256}}, "ab_initio"], "curate", {"curate", "full", "ab_initio"}),
    ([*MAP, "ctf_refine", {"refine3d as fine": {}}], "ctf_refine", {"ctf_refine", "fine"}),
    ([*MAP, {"extract as full": {"box": 256}}], "refine3d", {"refine3d"}),
    ([*MAP, {"extract as full": {"box": 256, "recentre": True}}], "refine3d", {"refine3d", "full"}),
]


def passes(graph: Graph, changed: str) -> set[str]:
    """Labels of what must run again when a step has changed."""
    stale = {changed}
    for step in graph.steps:
        if graph.rests_on(step) & stale:
            stale.add(step.label)
    return stale


@pytest.mark.parametrize(("pipeline", "changed", "expected"), CHANGES)
def test_a_change_reruns_what_rests_on_it_and_nothing_else(pipeline: list[Any], changed: str, expected: set[str]) -> None:
    graph = plan(pipeline)
    assert graph.problems == ()
    assert passes(graph, changed) == expected


UNITED: list[Any] = [
    *PRE,
    {"select as a": {"where": "x"}},
    {"select as b": source(particles="extract")},
    {"merge": source(particles=["a", "b"])},
    "classify2d",
]


MORE_CHANGES: list[tuple[list[Any], str, set[str], Any]] = [
    (UNITED, "a", {"a", "merge", "classify2d"}, ONE),
    ([*PRE, "clean_edges", "classify2d"], "clean_edges", {"clean_edges"}, ONE),
    ([*MAP, {"refine3d as l": {"local": True}}], "refine3d", {"refine3d", "l"}, ONE),
    ([*CLEAN, {"curate as c2": {"worst_ctf_resolution_angstrom": 5, **source(particles="curate")}}], "curate", {"curate", "c2"}, ONE),
    ([*TWO_SESSIONS, "classify2d"], "s1", {"s1", "merge", "classify2d"}, BARE),
    ([*MAP, K3, {"reconstruct": {"from": "classify3d.class1"}}], "classify3d", {"classify3d", "reconstruct"}, ONE),
    ([*MAP, K3, {"mask": source(map="refine3d")}], "classify3d", {"classify3d"}, ONE),
    ([*EXPANDED, "contract", {"extract as e": {"box": 64}}], "expand", {"expand", "contract", "e"}, ONE),
    ([*MAP, {"mask": {}}, {"refine3d as m": source(mask="mask")}], "mask", {"mask", "m"}, ONE),
    ([*PRE, "edit_picks", {"extract as e": {"box": 64}}, "classify2d"], "edit_picks", {"edit_picks", "e", "classify2d"}, ONE),
    ([*PRE, {"deduplicate": {}}, "classify2d"], "deduplicate", {"deduplicate", "classify2d"}, ONE),
]


@pytest.mark.parametrize(("pipeline", "changed", "expected", "inputs"), MORE_CHANGES)
def test_a_key_rests_on_declared_parts_ids_and_whole_products(pipeline: list[Any], changed: str, expected: set[str], inputs: Any) -> None:
    graph = plan(pipeline, inputs)
    assert graph.problems == ()
    assert passes(graph, changed) == expected


def product(graph: Graph, label: str, type_: str, output: str | None = None) -> Product:
    return graph.step(label).outputs[output or type_, type_]


def test_parts_keep_their_givers() -> None:
    graph = plan([*MAP, *POST])
    final = product(graph, "postprocess", "map")
    assert final.parts == {
        "final": "refine3d", "half_maps": "refine3d", "verdict": "refine3d", "fsc": "postprocess", "view": "postprocess",
    }  # fmt: skip
    particles = product(graph, "refine3d", "particles")
    assert (particles.parts["image"], particles.parts["class2d"], particles.parts["pose"]) == ("extract", "classify2d", "refine3d")
    assert (particles.ids, particles.births, particles.frame, particles.pose_frames) == ("curate", {"pick"}, None, {"ab_initio"})


def test_ids_are_those_of_the_step_that_settled_them() -> None:
    graph = plan([*EXPANDED, {"classify3d": {"classes": 2}}, {"contract": source(particles="classify3d.class2")}, "select_exposures"])
    found = {s.label: s.given("particles")[0].ids for s in graph.steps if s.given("particles")}
    assert {k: found[k] for k in ("classify2d", "refine3d", "expand", "classify3d", "contract")} == {
        "classify2d": "extract", "refine3d": "curate", "expand": "expand", "classify3d": "expand", "contract": "contract",
    }  # fmt: skip
    assert product(graph, "classify3d", "particles", "class1").ids == "classify3d.class1"
    assert product(graph, "ctf", "exposures").ids == "ingest"
    assert product(graph, "select_exposures", "exposures").ids == "select_exposures"


def test_a_class_has_the_class_numbers_and_the_poses_of_its_classification() -> None:
    graph = plan([*HET, {"align_classify3d": {"classes": 2, **source(particles="curate", maps=["ab_initio.class1", "ab_initio.class2"])}}])
    one = product(graph, "align_classify3d", "particles", "class2")
    assert (one.parts["pose"], one.parts["class3d"]) == ("align_classify3d", "align_classify3d")
    assert one.pose_frames == {"ab_initio.class2"}
    assert product(graph, "align_classify3d", "particles").pose_frames == {"ab_initio.class1", "ab_initio.class2"}


def test_contracting_goes_back_to_what_was_before_the_expansion() -> None:
    graph = plan([*EXPANDED, *FOCUS, {"subtract": source(mask="focus")}, "contract"])
    subtracted, contracted = product(graph, "subtract", "particles"), product(graph, "contract", "particles")
    assert (subtracted.copies, subtracted.subtracted, subtracted.parts["image"]) == (4, "subtract", "subtract")
    assert (contracted.copies, contracted.subtracted, contracted.parts["image"]) == (1, None, "extract")
    assert "pose" not in contracted.parts
    assert contracted.pose_frames == frozenset()


def test_symmetry_left_out_is_that_of_the_map_but_of_copies_c1() -> None:
    graph = plan([*CLEAN, {"ab_initio": {"symmetry": "D2"}}, "refine3d", "reconstruct", "expand", {"classify3d": {"classes": 2}}])
    assert product(graph, "refine3d", "map").point_group == "D2"
    assert product(graph, "reconstruct", "map").point_group == "D2"
    assert product(graph, "classify3d", "map", "class1").point_group == "C1"


def test_each_class_of_a_first_map_has_a_frame_of_its_own() -> None:
    graph = plan(HET)
    frames = {p.frame for p in graph.step("ab_initio").given("map")}
    assert frames == {"ab_initio.class1", "ab_initio.class2"}


def test_exposures_of_an_import_are_its_own_only_where_it_was_given_none() -> None:
    alone = plan([{"import_particles": {"star": "p", "has": "image,ctf,position"}}, "classify2d"], BARE)
    assert product(alone, "import_particles", "particles").exposures is product(alone, "import_particles", "exposures")
    assert sources(alone)["classify2d.exposures"] == "import_particles"
    beside = plan(["motion", "ctf", {"import_particles": {"star": "p"}}])
    assert ("exposures", "exposures") not in beside.step("import_particles").outputs
    assert product(beside, "import_particles", "particles").sources == {"ingest"}


def test_united_sessions_hold_the_exposures_of_both() -> None:
    graph = plan(TWO_SESSIONS, BARE)
    exposures = product(graph, "merge", "exposures")
    assert (exposures.sources, exposures.ids, exposures.parts["ctf"]) == ({"s1", "s2"}, "merge", "merge")
    assert product(graph, "merge", "particles").parts["image"] == "merge"


def test_sets_picked_before_and_after_the_ctf_share_it_once_united() -> None:
    united = {"merge": {"nearer_than_angstrom": 90, **source(particles=["pick", "topaz"])}}
    graph = plan(["motion", "pick", "ctf", "external.topaz", united, {"extract": {"box": 64}}, "classify2d"])
    assert graph.problems == ()
    assert sources(graph)["classify2d.exposures"] == "ctf"
    graph = plan(["motion", "pick", "ctf", "select_exposures", "external.topaz", united, {"extract": {"box": 64}}, "classify2d"])
    assert graph.problems == ()
    exposures = product(graph, "merge", "exposures")
    assert (exposures.ids, exposures.parts["ctf"], "kept" in exposures.parts) == ("merge", "ctf", False)
    assert {"ctf", "ingest"} <= graph.rests_on(graph.step("classify2d"))


def test_sets_whose_exposures_got_other_parts_side_by_side_have_both_once_united() -> None:
    united = {"merge": {"nearer_than_angstrom": 90, **source(particles=["a", "b"])}}
    beside = [{"pick as a": {}}, {"clean_edges": source(exposures="motion")}, {"pick as b": {}}]
    graph = plan(["motion", "ctf", *beside, united, {"extract": {"box": 64}}, "classify2d"])
    assert graph.problems == ()
    exposures = product(graph, "merge", "exposures")
    assert (exposures.parts["ctf"], exposures.parts["mask2d"], exposures.ids) == ("ctf", "clean_edges", "ingest")
    assert sources(graph)["classify2d.exposures"] == "merge"


def test_boxes_of_two_pixel_sizes_are_not_one_stack() -> None:
    facts = plan(PRE).step("extract").outputs["particles", "particles"].image
    assert facts is not None
    assert facts == ImageFact("ctf", 160, 64, 2.5)


def test_pins_stand_beside_the_sources() -> None:
    graph = plan([*MAP, {"refine3d as b": source(particles="curate", map="refine3d@3f2a")}, {"mask": {"from": "refine3d@77b1"}}])
    assert graph.problems == ()
    assert graph.step("b").pins == {"particles": ("",), "exposures": ("",), "map": ("3f2a",)}
    assert graph.step("mask").pins == {"map": ("77b1",)}
    graph = plan([*MAP, K3, {"merge": source(particles=["classify3d.class1@aa11", "classify3d.class2"])}])
    assert graph.step("merge").pins == {"particles": ("aa11", "")}


def test_ports_that_a_rule_filled_are_implicit() -> None:
    step = plan([*MAP, {"refine3d as b": source(map="ab_initio")}]).step("b")
    assert step.implicit == {"particles", "exposures"}


def test_an_input_that_a_parameter_replaces_needs_no_source() -> None:
    graph = plan([*CLEAN, {"refine3d": {"reference": "x.mrc"}}])
    assert graph.problems == ()
    assert "map" not in graph.step("refine3d").inputs
    assert product(graph, "refine3d", "map").frame == "refine3d"


def test_a_stage_of_another_package_is_resolved_and_missed_like_others() -> None:
    register_part("exposures", "acme.deblurred", "deblurred micrograph of package acme")
    stages = dict(STAGES)
    declare("acme.deblur", ["exposures[micrograph]"], [E("acme.deblurred")], "strength", into=stages)
    declare("acme.count", ["exposures[acme.deblurred]"], [], into=stages)
    graph = plan([*PRE, {"acme.deblur": {"strength": 2}}, "acme.count", "classify2d"], stages=stages)
    assert graph.problems == ()
    assert sources(graph)["count.exposures"] == "deblur"
    assert sources(graph)["classify2d.exposures"] == "deblur"
    (problem,) = plan([*PRE, "acme.count"], stages=stages).problems
    assert "deblurred micrograph of package acme" in problem
    assert "Add acme.deblur before it" in problem


@pytest.mark.parametrize(("group", "order"), [("C1", 1), ("C7", 7), ("D2", 4), ("T", 12), ("O", 24), ("I2", 60), ("x", 1), (None, 1)])
def test_order_of_a_point_group(group: str | None, order: int) -> None:
    assert order_of(group) == order


def test_the_work_of_resolving_a_pipeline_grows_no_faster_than_the_square_of_its_length() -> None:
    def calls(rounds: int) -> int:
        steps = [
            {f"{name} as {name}_{k}": {}} for k in range(rounds) for name in ("refine3d", "mask", "postprocess", "ctf_refine", "polish")
        ]
        with cProfile.Profile() as profile:
            graph = plan([*MAP, *steps])
        assert graph.problems == ()
        assert len(graph.steps) == 9 + len(steps)
        return sum(entry.callcount for entry in profile.getstats())

    assert calls(16) < 4 * calls(8) < 4e7
