"""The resolver: wrong pipelines are refused with the cause and the way out, what is probably not meant is accepted with a warning."""

from __future__ import annotations

from typing import Any

import pytest
from _graph_plans import BARE, CLEAN, EXPANDED, FOCUS, HET, K3, MAP, MODEL, ONE, POST, PRE, TWO, TWO_STARTS, plan, source
from _graph_stages import STAGES

pytestmark = pytest.mark.heavy


def wrong(name: str, pipeline: list[Any], text: str, inputs: Any = ONE) -> tuple[str, list[Any], str, Any]:
    return name, pipeline, text, inputs


WRONG: list[tuple[str, list[Any], str, Any]] = [
    wrong("no ctf", ["motion", {"pick": {"diameter_angstrom": 180}}, {"extract": {"box": 160}}, "classify2d"], "classify2d needs ctf"),
    wrong("no motion", ["ctf"], "ctf needs micrograph"),
    wrong("unknown stage", ["motion", "ctff"], "Did you mean 'ctf'"),
    wrong("another program's name of a stage", ["motion", "ctffind"], "Did you mean 'ctf'"),
    wrong("more copies than ids have", [*CLEAN, {"ab_initio": {"symmetry": "D64"}}, "refine3d", "expand"], "128 operators"),
    wrong("plug-in not installed", ["motion", "other.deblur"], "package"),
    wrong("unknown parameter", ["motion", {"ctf": {"finest": 3}}], "Did you mean 'finest_angstrom'"),
    wrong("input given as parameter", [*MAP, {"refine3d as b": {"map": "ab_initio"}}], "is an input, not a parameter"),
    wrong("unknown label", [*MAP, {"refine3d as b": source(particles="curat")}], "Did you mean 'curate'"),
    wrong("label of a later step", [*CLEAN, {"refine3d as b": source(map="ab_initio")}, "ab_initio"], "comes after this step"),
    wrong("its own result", [*MAP, {"refine3d as b": source(map="b")}], "own result"),
    wrong("unknown port", [*MAP, {"refine3d as b": source(volume="ab_initio")}], "has no input 'volume'"),
    wrong("wrong type", [*MAP, {"refine3d as b": source(map="curate")}], "gives classes and particles, not a map"),
    wrong("a map as a mask", [*MAP, {"postprocess": source(mask="refine3d")}], "not a mask"),
    wrong(
        "class that is not there",
        [*MAP, K3, {"refine3d as b": source(particles="classify3d.class4")}],
        "gives no particles called 'class4'",
    ),
    wrong("class 0", [*MAP, K3, {"refine3d as b": source(particles="classify3d.class0")}], "gives no particles called 'class0'"),
    wrong("which class?", [*MAP, K3, {"refine3d as b": {}}], "which particles?"),
    wrong("which class after ab initio with classes?", [*CLEAN, {"ab_initio": {"classes": 3}}, "refine3d"], "which particles?"),
    wrong("map of classes not said", [*CLEAN, {"ab_initio": {"classes": 2}}, {"refine3d": source(particles="curate")}], "which map?"),
    wrong("mask after classes, map not said", [*MAP, K3, "mask"], "which map?"),
    wrong("list for one set", [*MAP, K3, {"refine3d as b": source(particles=["classify3d.class1", "classify3d.class2"])}], "merge: {from"),
    wrong("merge of one", [*MAP, {"merge": source(particles=["curate"])}], "two sets or more"),
    wrong("merge twice the same", [*MAP, {"merge": source(particles=["curate", "curate"])}], "one source twice"),
    wrong("merge without sources", [*MAP, "merge"], "has no default"),
    wrong(
        "merge of two cuts of the same particles",
        [
            *MAP,
            {"extract as centred": {"box": 160, "recentre": True}},
            {"extract as again": {"box": 160, **source(particles="refine3d")}},
            {"merge": source(particles=["centred", "again"])},
        ],
        "images of the same particles, extracted by centred and by again. Choose one: merge: {prefer: centred} or {prefer: again}",
    ),
    wrong("list of one step", [*MAP, {"refine3d as b": {"from": ["curate"]}}], "write from: curate."),
    wrong("list of one map", [*MAP, {"refine3d as b": source(map=["ab_initio"])}], "write from: {map: ab_initio}."),
    wrong("movies brought in twice", [{"ingest as more": {}}, "motion"], "ingest already reads all movies of inputs. Remove this step."),
    wrong(
        "two pickers merged without a distance",
        ["motion", "ctf", {"pick": {"diameter_angstrom": 180}}, "external.topaz", {"merge": source(particles=["pick", "topaz"])}],
        "nearer_than_angstrom",
    ),
    wrong(
        "merge of images of two sizes",
        [*MAP, {"extract as big": {"box": 256}}, {"merge": source(particles=["refine3d", "big"])}],
        "the images differ",
    ),
    wrong("merge of expanded and unexpanded", [*EXPANDED, {"merge": source(particles=["refine3d", "expand"])}], "symmetry copies"),
    wrong(
        "curate by CTF without ctf",
        [
            {"import_particles": {"star": "p.star", "has": "image,ctf,position"}},
            "classify2d",
            {"curate": {"worst_ctf_resolution_angstrom": 6}},
        ],
        "needs the quality of the CTF fits",
        BARE,
    ),
    wrong(
        "merged frames, poses needed",
        [
            *CLEAN,
            {"ab_initio as a": {}},
            {"refine3d as ra": {}},
            {"ab_initio as b": source(particles="curate")},
            {"refine3d as rb": source(particles="curate", map="b")},
            {"merge": source(particles=["ra", "rb"])},
            {"ctf_refine": source(map="rb")},
        ],
        "do not overlay",
    ),
    wrong(
        "three refinements merged, map not said",
        [
            *MAP,
            K3,
            *[{f"refine3d as r{k}": {"from": f"classify3d.class{k}"}} for k in (1, 2, 3)],
            {"merge": source(particles=["r1", "r2", "r3"])},
            {"refine3d as all": {}},
        ],
        "which map?",
    ),
    wrong(
        "poses of one branch, map of another",
        [
            *CLEAN,
            {"ab_initio as a": {}},
            {"refine3d as ra": {}},
            {"ab_initio as b": source(particles="curate")},
            {"refine3d as rb": source(particles="curate", map="b")},
            {"ctf_refine": source(particles="ra", map="rb")},
        ],
        "do not overlay",
    ),
    wrong(
        "mask of another map",
        [
            *CLEAN,
            {"ab_initio as a": {}},
            {"refine3d as ra": {}},
            {"mask as ma": {}},
            {"ab_initio as b": source(particles="curate")},
            {"refine3d as rb": source(particles="curate", map="b")},
            {"postprocess": source(map="rb", mask="ma")},
        ],
        "Make a mask from rb",
    ),
    wrong(
        "mask of another map, by default",
        [
            *CLEAN,
            {"ab_initio as a": {}},
            {"refine3d as ra": {}},
            {"mask as ma": {}},
            {"ab_initio as b": source(particles="curate")},
            {"refine3d as rb": source(particles="curate", map="b")},
            "postprocess",
        ],
        "no mask is in the frame",
    ),
    wrong("polish before any refinement", [*CLEAN, "ab_initio", "polish"], "polish needs pose"),
    wrong("polish with an ab initio map", [*MAP, {"polish": source(map="ab_initio")}], "half-maps"),
    wrong("mask of an ab initio map", [*CLEAN, "ab_initio", "mask"], "half-maps"),
    wrong(
        "polish imported micrographs",
        [
            {"import_micrographs": {"star": "m.star"}},
            "ctf",
            {"pick": {"diameter_angstrom": 180}},
            {"extract": {"box": 160}},
            "ab_initio",
            "refine3d",
            "polish",
        ],
        "polish needs frames",
        BARE,
    ),
    wrong("curate before classify2d", [*PRE, "curate"], "curate needs class2d"),
    wrong(
        "curate an extraction of kept particles",
        [*CLEAN, {"pick as p2": {"diameter_angstrom": 180}}, {"extract as e2": {"box": 160}}, {"curate as c2": {}}],
        "needs class2d",
    ),
    wrong(
        "recentre without positions",
        ["motion", "ctf", {"pick": {"diameter_angstrom": 180}}, {"extract": {"box": 160, "recentre": True}}],
        "recentre needs refined positions",
    ),
    wrong(
        "extraction of imported particles without micrographs",
        [{"import_particles": {"star": "p.star", "has": "image,ctf,position,pose"}}, {"extract": {"box": 160}}],
        "extract needs micrograph",
        BARE,
    ),
    wrong("global refinement of copies", [*EXPANDED, {"refine3d as b": {}}], "symmetry copies"),
    wrong("2D classes of copies", [*EXPANDED, {"classify2d as b": {}}], "symmetry copies"),
    wrong("CTF refinement of copies", [*EXPANDED, "ctf_refine"], "symmetry copies"),
    wrong("expansion in C1", [*CLEAN, {"ab_initio": {"symmetry": "C1"}}, {"refine3d": {}}, "expand"], "nothing to expand"),
    wrong("expansion in another group", [*MAP, {"expand": {"symmetry": "D3"}}], "not the symmetry"),
    wrong(
        "CTF refinement of subtracted images",
        [*MAP, {"import_mask as m": {"file": "m.mrc"}}, {"subtract": source(mask="m")}, "ctf_refine"],
        "needs unsubtracted images",
    ),
    wrong("subtract without a mask", [*MAP, "subtract"], "has no default"),
    wrong("subtract takes the nearest mask", [*MAP, "mask", "subtract"], "has no default"),
    wrong("symmetry misspelt", [*CLEAN, {"ab_initio": {"symmetry": "D"}}], "not a point group"),
    wrong("two steps of one name", [*MAP, "refine3d"], "Two steps are called"),
    wrong("label is a stage's name", [*MAP, {"refine3d as extract": {}}], "name of a stage"),
    wrong("label with a dot", [*MAP, {"refine3d as fine.1": {}}], "cannot be the name"),
    wrong("label with a blank", [*MAP, {"refine3d as my best": {}}], "cannot be the name"),
    wrong("as without a name", [*MAP, {"refine3d as": {}}], "no name follows"),
    wrong("two stages under one dash", [*MAP, {"mask": {}, "postprocess": {}}], "one dash per step"),
    wrong("from is a number", [*MAP, {"refine3d as b": {"from": 3}}], "write from: STEP"),
    wrong("source is a number", [*MAP, {"refine3d as b": source(map=3)}], "is not the name of a step"),
    wrong(
        "consensus of different picks",
        [
            *MAP,
            {"pick as p2": {"diameter_angstrom": 180}},
            {"extract as e2": {"box": 160}},
            {"refine3d as r2": source(particles="e2", map="refine3d")},
            {"consensus": source(particles="refine3d", other="r2")},
        ],
        "hold different particles",
    ),
    wrong("consensus with itself", [*MAP, {"consensus": source(other="refine3d")}], "both sets come from"),
    wrong("consensus without the other", [*MAP, "consensus"], "has no default"),
    wrong("box in pixels, two pixel sizes", PRE, "pixel sizes", TWO),
    wrong("odd box", ["motion", "ctf", {"pick": {"diameter_angstrom": 180}}, {"extract": {"box": 161}}], "must be even"),
    wrong(
        "a picker's map of another sample",
        [*MAP, {"pick as p2": {"diameter_angstrom": 180}}, {"extract as e2": {"box": 160}}, {"refine3d as r2": {}}],
        "no map was made from the particles",
    ),
    wrong("starting map twice", [*MAP, {"refine3d as b": {"reference": "x.mrc", "from": {"map": "refine3d"}}}], "given twice"),
    wrong("local refinement without poses", [*CLEAN, "ab_initio", {"refine3d": {"local": True}}], "starts from poses"),
    wrong("no model", [*MAP, "dock"], "dock needs a model"),
    wrong("model not docked", [*MAP, {"import_model": {"file": "m.cif"}}, "model_map"], "Add  - dock"),
    wrong(
        "denoised micrographs that nobody made",
        ["motion", "ctf", {"pick": {"diameter_angstrom": 180, "image": "denoised"}}],
        "no denoised micrographs",
    ),
    wrong(
        "weights trained for another thing",
        ["motion", "ctf", "train_denoiser", {"pick": {"diameter_angstrom": 180}}, {"extract": {"box": 160}}, "junk"],
        "not to junk",
    ),
    wrong("import without a file", ["import_picks"], "say which file"),
    wrong("project without a path", ["import_project"], "say which project", BARE),
    wrong(
        "particles of another data set",
        [
            "motion",
            "ctf",
            {"pick": {"diameter_angstrom": 180}},
            {"extract": {"box": 160}},
            {"import_micrographs as other": {"star": "m.star"}},
            {"ctf as c2": {}},
            {"classify2d": source(exposures="c2")},
        ],
        "were picked in the exposures of",
    ),
    wrong("exposures as particles", [*MAP, {"refine3d as b": source(particles="ctf")}], "gives exposures, not particles"),
    wrong("list of maps for one", [*MAP, {"refine3d as b": source(map=["ab_initio", "refine3d"])}], "takes one"),
    wrong("from a step that gives nothing of it", [*MAP, {"refine3d as b": {"from": "mask"}}, "mask"], "comes after this step"),
]


WARNED: list[tuple[str, list[Any], str]] = [
    (
        "picks that nobody takes",
        [
            "motion",
            "ctf",
            {"pick": {"diameter_angstrom": 180}},
            {"import_picks as manual": {"folder": "x"}},
            {"extract": {"box": 160}},
            "classify2d",
        ],
        "Nothing uses the particles of pick",
    ),
    (
        "ctf2 on another branch",
        [*PRE, {"motion as rigid": source(exposures="ingest")}, {"ctf as ctf2": {}}, "classify2d"],
        "Nothing uses the exposures of ctf2",
    ),
    (
        "two ab initio side by side",
        [*CLEAN, {"ab_initio as a": {}}, {"ab_initio as b": {"symmetry": "D2"}}, "refine3d"],
        "stands beside it",
    ),
    (
        "imported map and poses, unknown frames",
        [
            "motion",
            "ctf",
            {"import_particles": {"star": "r.star", "has": "position,pose"}},
            {"import_map": {"half_maps": ["a", "b"]}},
            {"polish": source(map="import_map")},
        ],
        "checked on the first particles",
    ),
]


MORE_WRONG: list[tuple[str, list[Any], str, Any]] = [
    wrong("no ingest", ["motion"], "Stages that give exposures: ingest", BARE),
    wrong("particles of nothing", ["motion", {"extract": {"box": 64}}], "extract needs particles"),
    wrong(
        "classes of a merged set",
        [*MAP, K3, {"merge": source(particles=["classify3d.class1", "classify3d.class2"])}, {"refine3d as r": {}}],
        "which map?",
    ),
    wrong("several maps of one step", [*HET, {"refine3d": {"from": "ab_initio"}}], "gives several maps"),
    wrong("class that is not there, by from", [*HET, {"refine3d": {"from": "ab_initio.class7"}}], "gives no output called 'class7'"),
    wrong("frames of two starts united", [*TWO_STARTS, {"merge": source(particles=["ra", "rb"])}, "ctf_refine"], "do not overlay"),
    wrong(
        "frames of two classes united",
        [
            *HET,
            {"refine3d as x": {"from": "ab_initio.class1"}},
            {"refine3d as y": {"from": "ab_initio.class2"}},
            {"merge": source(particles=["x", "y"])},
            "reconstruct",
        ],
        "do not overlay",
    ),
    wrong("consensus across frames", [*TWO_STARTS, {"consensus": source(particles="ra", other="rb")}], "align_maps"),
    wrong("polish with another start's map", [*TWO_STARTS, {"polish": source(particles="ra", map="rb")}], "do not overlay"),
    wrong(
        "map of the other hand",
        [*MAP, *MODEL, {"hand": source(model="dock")}, {"ctf_refine": source(particles="hand", map="refine3d")}],
        "do not overlay",
    ),
    wrong(
        "mask of the other hand",
        [*MAP, *POST, *MODEL, {"hand": source(model="dock")}, {"postprocess as p2": {}}],
        "no mask is in the frame of hand",
    ),
    wrong(
        "mask of another class",
        [
            *HET,
            {"refine3d as x": {"from": "ab_initio.class1"}},
            {"mask as mx": {}},
            {"refine3d as y": {"from": "ab_initio.class2"}},
            {"postprocess": source(mask="mx")},
        ],
        "Make a mask from y",
    ),
    wrong(
        "explicit mask of another start in a refinement",
        [*TWO_STARTS, {"mask as ma": source(map="ra")}, {"refine3d as z": source(particles="rb", map="rb", mask="ma")}],
        "Make a mask from rb",
    ),
    wrong("model of the other hand", [*MAP, *MODEL, {"hand": source(model="dock")}, "model_map"], "is not in the frame of the map"),
    wrong("copies merged with contracted", [*EXPANDED, "contract", {"merge": source(particles=["expand", "contract"])}], "Contract first"),
    wrong("expanded twice", [*EXPANDED, {"expand as again": {}}], "symmetry copies"),
    wrong("first map of copies", [*EXPANDED, {"ab_initio as n": {}}], "symmetry copies"),
    wrong("poses after contract", [*EXPANDED, "contract", "ctf_refine"], "needs pose"),
    wrong(
        "subtracted merged with whole",
        [*MAP, *FOCUS, {"subtract": source(mask="focus")}, {"merge": source(particles=["refine3d", "subtract"])}],
        "signal was subtracted",
    ),
    wrong(
        "2D classes of subtracted images",
        [*MAP, *FOCUS, {"subtract": source(mask="focus")}, {"classify2d as c": {}}],
        "needs unsubtracted images",
    ),
    wrong("network of another purpose, by name", [*PRE, "train_denoiser", {"junk": source(weights="train_denoiser")}], "not to junk"),
    wrong("no network", [*PRE, "junk"], "Stages that give weights"),
    wrong("averages of an import", [{"import_project": {"project": "x"}}, "curate"], "gives no class averages", BARE),
    wrong("view as a reference", [*MAP, "local_resolution", {"refine3d as r": source(map="local_resolution")}], "Use the map before it"),
    wrong("half-maps of an imported map", [{"import_map": {"file": "x.mrc"}}, "mask"], "half-maps", BARE),
    wrong(
        "two pixel sizes, curated box",
        ["motion", {"pick": {}}, {"extract": {"box_angstrom": 300}}],
        "give box_angstrom and pixel_size_angstrom",
        TWO,
    ),
    wrong("frame of a later step", [{"import_map": {"file": "x", "frame_of": "refine"}}], "no earlier step has that name", BARE),
    wrong("frame of a step without one", [*PRE, {"import_map": {"file": "x", "frame_of": "ctf"}}], "neither poses nor a map"),
    wrong("file that cannot be read", [{"import_map": {"file": "missing.mrc"}}], "missing.mrc cannot be read", BARE),
    wrong("sources as a bare list", [*PRE, "external.topaz", {"merge": {"from": ["pick", "topaz"]}}], "from: {particles: [pick, topaz]}"),
    wrong("one source for a list, by from", [*PRE, {"merge": {"from": "pick"}}], "by name only"),
    wrong("an empty list", [*PRE, {"merge": source(particles=[])}], "empty list"),
    wrong(
        "the full name of an adapter",
        ["motion", "external.topaz", {"extract": {"box": 160, "from": "external.topaz"}}],
        "is called 'topaz'",
    ),
    wrong("an adapter without its package", ["motion", "topaz"], "Did you mean 'external.topaz'"),
    wrong("the label of an adapter", [*MAP, {"refine3d as topaz": {}}], "name of a stage"),
    wrong("label inputs", [*MAP, {"refine3d as inputs": {}}], "word of the project file"),
    wrong("label of other letters", [*MAP, {"refine3d as größe": {}}], "cannot be the name"),
    wrong("label that is a number", [*MAP, {"refine3d as 2": {}}], "cannot be the name"),
    wrong("a name without as", [*MAP, {"refine3d fine": {}}], "refine3d as fine"),
    wrong("no key after the @", [*MAP, {"mask": source(map="refine3d@")}], "is not the key of a result"),
    wrong("no output after the dot", [*MAP, {"mask": source(map="refine3d.")}], "no output name follows"),
    wrong("nothing under a port", [*MAP, {"mask": source(map=None)}], "is not the name of a step"),
    wrong("an empty name", [*MAP, {"mask": {"from": ""}}], "is not the name of a step"),
    wrong("a port of a number", [*MAP, {"mask": {"from": {7: "refine3d"}}}], "has no input 7"),
    wrong("a parameter of a number", [*MAP, {"mask": {3: 4}}], "is not the name of a parameter"),
    wrong("inputs as parameters", [*PRE, {"merge": {"particles": ["pick", "extract"]}}], "Write from: {particles: [pick, extract]}"),
    wrong("a stage that takes nothing", [*PRE, {"import_map": {"file": "x", "from": "ctf"}}], "no inputs"),
    wrong("a mask where none is taken by from", [*MAP, "mask", {"ctf as c2": {"from": "mask"}}], "gives mask"),
]


@pytest.mark.parametrize(
    ("name", "pipeline", "text", "inputs"), [*WRONG, *MORE_WRONG], ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_wrong_pipeline_is_refused_once_with_its_cause(name: str, pipeline: list[Any], text: str, inputs: Any) -> None:
    graph = plan(pipeline, inputs)
    assert len(graph.problems) == 1
    assert text in graph.problems[0]


@pytest.mark.parametrize("case", [*WRONG, *MORE_WRONG], ids=lambda case: case[0])
def test_steps_after_a_wrong_one_add_no_problem_of_their_own(case: tuple[Any, ...]) -> None:
    _, pipeline, text, inputs = case
    more = [{"select as after": {"where": "x"}}, {"extract as after2": {"box": 64, "from": "after"}}, {"ctf_refine as after3": {}}]
    graph = plan([*pipeline, *more], inputs)
    assert len(graph.problems) == 1
    assert text in graph.problems[0]


@pytest.mark.parametrize(("name", "pipeline", "text"), WARNED, ids=[w[0] for w in WARNED])
def test_what_is_probably_not_meant_is_accepted_with_a_warning(name: str, pipeline: list[Any], text: str) -> None:
    graph = plan(pipeline)
    assert graph.problems == ()
    assert any(text in w for w in graph.warnings)


MORE_WARNED: list[tuple[str, list[Any], str]] = [
    ("a mask that nobody takes", [*MAP, {"mask as m1": {}}, "mask", "postprocess"], "Nothing uses the mask of m1"),
    (
        "a first map that nobody takes",
        [*CLEAN, {"import_map as emdb": {"file": "x"}}, {"ab_initio": {}}, "refine3d"],
        "Nothing uses the map of emdb",
    ),
    (
        "a selection that is passed over",
        [*CLEAN, {"select as good": {"where": "x"}}, {"select as other": source(particles="curate")}, "ab_initio"],
        "Nothing uses the particles of good",
    ),
    (
        "exposures that were selected on another branch",
        [*PRE, "select_exposures", {"ctf as c2": source(exposures="ctf")}, "classify2d"],
        "Nothing uses the exposures of select_exposures",
    ),
    ("annotated classes refined together", [*MAP, K3, "annotate", {"refine3d as r": source(map="refine3d")}], "all classes of classify3d"),
    (
        "the map of a branch beside the one of the particles",
        [*MAP, {"refine3d as c1": source(particles="curate", map="ab_initio")}, {"refine3d as x": source(particles="refine3d")}],
        "refine3d stands beside it",
    ),
    ("united frames", [*TWO_STARTS, {"merge": source(particles=["ra", "rb"])}], "Steps that need one frame will refuse this set"),
    (
        "poses of unknown frames",
        ["motion", "ctf", {"import_particles": {"star": "r", "has": "position,pose"}}, {"import_map": {"half_maps": ["a", "b"]}}, "polish"],
        "frame_of: import_particles",
    ),
]


@pytest.mark.parametrize(("name", "pipeline", "text"), MORE_WARNED, ids=[w[0] for w in MORE_WARNED])
def test_a_result_that_is_passed_over_is_named(name: str, pipeline: list[Any], text: str) -> None:
    graph = plan(pipeline)
    assert graph.problems == ()
    assert len([w for w in graph.warnings if text in w]) == 1


@pytest.mark.parametrize(
    "pipeline", [[*MAP, *POST], [*PRE, "classify2d", "curate"], [*MAP, {"extract as big": {"box": 256}}, {"refine3d as f": {}}]]
)
def test_an_ordinary_pipeline_warns_of_nothing(pipeline: list[Any]) -> None:
    assert plan(pipeline).warnings == ()


def test_what_stands_for_a_type_is_no_suggestion_for_an_output() -> None:
    (problem,) = plan([*MAP, K3, {"refine3d as b": source(particles="classify3d.largest")}]).problems
    assert problem.endswith("It gives classify3d, classify3d.class1, classify3d.class2 and classify3d.class3.")


def test_independent_problems_are_all_told_at_once() -> None:
    graph = plan(
        [
            "motion",
            "ctff",
            {"pick": {"diametre": 1}},
            {"extract": {"box": 160, "from": 3}},
            "classify2d",
            {"curate": {"from": {"clases": "x"}}},
        ]
    )
    assert len(graph.problems) == 4
    for text, problem in zip(("'ctff'", "'diametre'", "from is 3", "'clases'"), graph.problems, strict=True):
        assert text in problem


def test_only_installed_stages_are_advised() -> None:
    few = {name: STAGES[name] for name in ("ingest", "pick", "classify2d", "polish", "refine3d", "extract", "import_micrographs")}
    for pipeline in (["pick"], ["import_micrographs", "classify2d"], [{"import_micrographs": {"star": "x"}}, {"pick": {}}, "classify2d"]):
        graph = plan(pipeline, stages=few)
        for word in ("motion", "ctf before", "external", "mask"):
            assert word not in " ".join(graph.problems)
