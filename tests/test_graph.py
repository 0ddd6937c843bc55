"""The resolver: right pipelines take the sources that a microscopist expects, wrong ones are refused with the cause and the way out."""

from __future__ import annotations

import cProfile
from typing import Any

import pytest
from _graph_stages import STAGES, E, declare, make_params
from hypothesis import given, settings
from hypothesis import strategies as st

from cryodask.products import Product, register_part
from cryodask.run.graph import Graph, Step, resolve
from cryodask.run.graph_facts import order_of
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

RIGHT: list[tuple[Any, ...]] = [
    (
        "standard",
        [*MAP, *POST],
        {"refine3d.particles": "curate", "refine3d.map": "ab_initio", "postprocess.map": "refine3d", "postprocess.mask": "mask"},
    ),
    (
        "re-extraction at refined positions, twice",
        [
            *MAP,
            {"extract as big": {"box": 160, "recentre": True}},
            {"refine3d as fine": {}},
            {"extract as bigger": {"box": 192, "recentre": True}},
            {"refine3d as finest": {}},
        ],
        {
            "big.particles": "refine3d",
            "fine.particles": "big",
            "fine.map": "refine3d",
            "bigger.particles": "fine",
            "finest.map": "fine",
            "finest.particles": "bigger",
        },
    ),
    (
        "the issue's three refinements",
        [*MAP, {"extract as big": {"box": 256}}, {"refine3d as fine": {}}, {"refine3d as again": {}}],
        {"again.map": "fine", "again.particles": "fine"},
    ),
    (
        "three classes apart, merged, refined",
        [
            *MAP,
            K3,
            *[
                {f"refine3d as r{k}": {"symmetry": "C1", "from": {"particles": f"classify3d.class{k}", "map": f"classify3d.class{k}"}}}
                for k in (1, 2, 3)
            ],
            {"merge": source(particles=["r1", "r2", "r3"])},
            {"refine3d as all": source(map="r1")},
        ],
        {"all.particles": "merge", "r2.map": "classify3d.class2", "r1.exposures": "ctf"},
    ),
    (
        "one class refined, then postprocessed",
        [*MAP, K3, {"refine3d as best": {"from": "classify3d.class2"}}, *POST],
        {"best.particles": "classify3d.class2", "best.map": "classify3d.class2", "mask.map": "best", "postprocess.map": "best"},
    ),
    (
        "polish, CTF refinement, polish",
        [
            *MAP,
            *POST,
            "polish",
            {"refine3d as p1": {}},
            {"mask as m1": {}},
            {"postprocess as pp1": {}},
            "ctf_refine",
            {"refine3d as p2": {}},
            {"polish as polish2": {}},
            {"refine3d as p3": {}},
        ],
        {
            "polish.map": "postprocess",
            "polish.exposures": "ctf",
            "p1.particles": "polish",
            "p1.exposures": "polish",
            "p1.map": "postprocess",
            "ctf_refine.particles": "p1",
            "ctf_refine.map": "pp1",
            "p2.exposures": "ctf_refine",
            "p2.map": "pp1",
            "polish2.map": "p2",
            "polish2.exposures": "ctf_refine",
            "p3.exposures": "polish2",
        },
    ),
    (
        "CTF refinement first, then polish",
        [*MAP, *POST, "ctf_refine", {"refine3d as c1": {}}, "polish", {"refine3d as c2": {}}],
        {"ctf_refine.map": "postprocess", "c1.exposures": "ctf_refine", "polish.map": "c1", "c2.particles": "polish"},
    ),
    (
        "two pickers joined",
        [
            "motion",
            "ctf",
            {"pick": {"diameter_angstrom": 180}},
            "external.topaz",
            {"merge": {"from": {"particles": ["pick", "topaz"]}, "nearer_than_angstrom": 90}},
            {"extract": {"box": 160}},
            "classify2d",
        ],
        {"topaz.exposures": "ctf", "extract.particles": "merge", "extract.exposures": "ctf", "classify2d.exposures": "ctf"},
    ),
    (
        "templates from own classes, extracted again",
        [
            *CLEAN,
            {"pick as again": {"diameter_angstrom": 180, "from": {"templates": "curate"}}},
            {"extract as ex2": {"box": 160}},
            {"classify2d as c2": {}},
            {"curate as cur2": {}},
        ],
        {"again.templates": "curate", "again.exposures": "ctf", "ex2.particles": "again", "cur2.classes": "c2", "cur2.particles": "c2"},
    ),
    (
        "manual picks on top of automatic ones",
        ["motion", "ctf", {"pick": {"diameter_angstrom": 180}}, "edit_picks", {"extract": {"box": 160}}],
        {"edit_picks.particles": "pick", "extract.particles": "edit_picks"},
    ),
    (
        "picks by hand only",
        ["motion", {"import_picks": {"folder": "picks"}}, {"extract": {"box": 160}}, "ctf", "classify2d"],
        {"extract.particles": "import_picks", "extract.exposures": "motion", "classify2d.exposures": "ctf"},
    ),
    (
        "ctf after extraction (today's list)",
        ["motion", {"pick": {"diameter_angstrom": 180}}, {"extract": {"box": 160}}, "ctf", "classify2d", "curate"],
        {"classify2d.exposures": "ctf", "curate.exposures": "ctf"},
    ),
    (
        "exposures selected after extraction",
        [*PRE, {"select_exposures": {"worst_ctf_resolution_angstrom": 6}}, "classify2d", "curate", "ab_initio"],
        {"classify2d.exposures": "select_exposures", "ab_initio.exposures": "select_exposures"},
    ),
    (
        "import: micrographs of RELION",
        [{"import_micrographs": {"star": "m.star"}}, "ctf", {"pick": {"diameter_angstrom": 180}}, {"extract": {"box": 160}}, "classify2d"],
        {"ctf.exposures": "import_micrographs", "classify2d.exposures": "ctf"},
        BARE,
    ),
    (
        "reconstructed with refined CTFs, then polished",
        [*MAP, "ctf_refine", "reconstruct", "polish"],
        {"reconstruct.particles": "ctf_refine", "polish.map": "reconstruct", "polish.exposures": "ctf_refine"},
    ),
    (
        "import: RELION's micrographs and picks",
        [{"import_micrographs": {"star": "m.star"}}, {"import_picks": {"folder": "p"}}, {"extract": {"box": 160}}, "ctf", "classify2d"],
        {"import_picks.exposures": "import_micrographs", "classify2d.exposures": "ctf"},
        BARE,
    ),
    (
        "import: half-maps only",
        [{"import_map": {"half_maps": ["a", "b"]}}, "mask", "postprocess"],
        {"mask.map": "import_map", "postprocess.mask": "mask", "postprocess.map": "import_map"},
        BARE,
    ),
    (
        "two refinements of other starts, aligned, merged, CTF refined",
        [
            *CLEAN,
            {"ab_initio as a": {}},
            {"refine3d as ra": {}},
            {"ab_initio as b": source(particles="curate")},
            {"refine3d as rb": source(particles="curate", map="b")},
            {"align_maps": source(particles="rb", map="rb", to="ra")},
            {"merge": {"prefer": "ra", "from": {"particles": ["ra", "align_maps"]}}},
            {"ctf_refine": source(map="ra")},
        ],
        {"ctf_refine.particles": "merge", "ctf_refine.map": "ra"},
    ),
    (
        "import: particles with CTF, no micrographs",
        [{"import_particles": {"star": "p.star", "has": "image,ctf,position"}}, "classify2d", "curate", "ab_initio", "refine3d"],
        {"classify2d.particles": "import_particles", "refine3d.map": "ab_initio"},
        BARE,
    ),
    (
        "import: refinement of RELION, polished here",
        [
            "motion",
            "ctf",
            {"import_particles": {"star": "run_data.star", "has": "position,pose"}},
            {"import_map": {"half_maps": ["a", "b"], "symmetry": "D2", "frame_of": "import_particles"}},
            "polish",
            "refine3d",
        ],
        {
            "import_particles.exposures": "ctf",
            "polish.map": "import_map",
            "polish.exposures": "ctf",
            "refine3d.particles": "polish",
            "refine3d.map": "import_map",
        },
    ),
    (
        "import: cryoSPARC particles refined here",
        [
            "motion",
            "ctf",
            {"import_particles": {"cs": "J2.cs", "has": "position,pose"}},
            {"extract": {"box": 160, "recentre": True}},
            {"import_map": {"file": "v.mrc"}},
            "refine3d",
        ],
        {"extract.particles": "import_particles", "refine3d.map": "import_map"},
    ),
    (
        "mask made by hand in another program",
        [*MAP, {"import_mask": {"file": "chimera.mrc"}}, "postprocess", {"external.relion_postprocess": {}}],
        {
            "import_mask.map": "refine3d",
            "postprocess.mask": "import_mask",
            "relion_postprocess.map": "postprocess",
            "relion_postprocess.mask": "import_mask",
        },
    ),
    (
        "focused classes on an expanded set, then back",
        [
            *MAP,
            "expand",
            {"import_mask as focus": {"file": "domain.mrc"}},
            {"classify3d": {"classes": 4, "from": {"mask": "focus"}}},
            {"contract": source(particles="classify3d.class2")},
            {"refine3d as state": {"symmetry": "C1"}},
        ],
        {
            "expand.map": "refine3d",
            "classify3d.particles": "expand",
            "classify3d.map": "refine3d",
            "state.particles": "contract",
            "state.map": "classify3d.class2",
        },
    ),
    (
        "subtracted, classified, whole images again",
        [
            *MAP,
            {"import_mask as core": {"file": "c.mrc"}},
            {"subtract": source(mask="core")},
            {"classify3d": {"classes": 2}},
            {"extract as whole": {"box": 160, "from": {"particles": "classify3d.class1"}}},
            {"refine3d as last": source(map="refine3d")},
        ],
        {"classify3d.particles": "subtract", "last.particles": "whole"},
    ),
    (
        "consensus of two refinements",
        [
            *MAP,
            {"refine3d as second": {"seed": 1, "from": {"particles": "curate", "map": "ab_initio"}}},
            {"consensus": {"largest_degrees": 5, "from": {"particles": "refine3d", "other": "second"}}},
            {"refine3d as agreed": source(map="refine3d")},
        ],
        {"consensus.particles": "refine3d", "consensus.other": "second", "agreed.particles": "consensus"},
    ),
    (
        "three data sets, two pixel sizes, one refinement",
        [
            "motion",
            "ctf",
            {"pick": {"diameter_angstrom": 180}},
            {"extract": {"box_angstrom": 280, "pixel_size_angstrom": 2.2}},
            "classify2d",
            "curate",
            "ab_initio",
            "refine3d",
            "ctf_refine",
            {"refine3d as fine": {}},
        ],
        {"extract.exposures": "ctf", "fine.exposures": "ctf_refine"},
        TWO,
    ),
    (
        "three projects pooled",
        [
            *[{f"import_project as s{k}": {"project": f"../s{k}", "step": "curate"}} for k in (1, 2, 3)],
            {"merge": source(particles=["s1", "s2", "s3"])},
            "ab_initio",
            "refine3d",
        ],
        {"refine3d.particles": "merge", "refine3d.map": "ab_initio"},
        BARE,
    ),
    (
        "live session",
        [
            *PRE,
            {"classify2d": {"classes": 50, "live": {"every_particles": 5000}}},
            {"curate": {"live": True}},
            {"ab_initio": {"live": True}},
            {"refine3d": {"live": True}},
        ],
        {"refine3d.particles": "curate"},
    ),
    (
        "two branches compared",
        [
            *CLEAN,
            {"ab_initio as a": {"symmetry": "D2"}},
            {"refine3d as ra": {}},
            {"ab_initio as b": {"symmetry": "C1", "from": {"particles": "curate"}}},
            {"refine3d as rb": source(particles="curate", map="b")},
            {"mask as ma": source(map="ra")},
            {"postprocess as pa": source(map="ra")},
            {"mask as mb": source(map="rb")},
            {"postprocess as pb": source(map="rb")},
        ],
        {"ra.map": "a", "rb.map": "b", "pa.mask": "ma", "pb.mask": "mb"},
    ),
    (
        "a branch continued without from",
        [
            *MAP,
            {"refine3d as c1": {"symmetry": "C1", "from": {"particles": "curate", "map": "ab_initio"}}},
            {"ctf_refine": source(particles="refine3d")},
        ],
        {"ctf_refine.map": "refine3d", "ctf_refine.exposures": "ctf"},
    ),
    (
        "CTF refined on two branches",
        [
            *MAP,
            K3,
            {"refine3d as r1": {"from": "classify3d.class1"}},
            {"refine3d as r2": {"from": "classify3d.class2"}},
            {"ctf_refine as t1": {"from": {"particles": "r1"}}},
            {"ctf_refine as t2": {"from": {"particles": "r2"}}},
            {"refine3d as f1": {"from": {"particles": "t1"}}},
        ],
        {"t1.map": "r1", "t2.map": "r2", "f1.exposures": "t1", "f1.map": "r1"},
    ),
    (
        "denoised for picking, extracted from the sums",
        [
            "motion",
            "ctf",
            "train_denoiser",
            "denoise",
            {"pick": {"diameter_angstrom": 180, "image": "denoised"}},
            {"extract": {"box": 160}},
        ],
        {"denoise.weights": "train_denoiser", "pick.exposures": "denoise", "extract.exposures": "denoise"},
    ),
    (
        "a new ab initio before the second refinement",
        [*MAP, {"ab_initio as new": {"symmetry": "C1"}}, {"refine3d as second": {"symmetry": "C1"}}],
        {"second.map": "new", "second.particles": "refine3d"},
    ),
    (
        "2D check after a refinement, then CTF refinement",
        [*MAP, {"classify2d as look": {}}, "ctf_refine"],
        {"ctf_refine.particles": "look", "ctf_refine.map": "refine3d"},
    ),
    (
        "variability between refinement and polish",
        [*MAP, "variability", "polish"],
        {"polish.map": "refine3d", "polish.particles": "variability"},
    ),
    (
        "local resolution before the next refinement",
        [*MAP, *POST, "local_resolution", {"refine3d as next": {}}],
        {"local_resolution.map": "postprocess", "next.map": "postprocess"},
    ),
    (
        "hand decided, all goes on mirrored",
        [*MAP, {"import_model": {"file": "5a1a.cif"}}, "dock", {"hand": source(model="dock")}, {"ctf_refine": {}}],
        {"hand.map": "refine3d", "ctf_refine.map": "hand", "ctf_refine.particles": "hand"},
    ),
    (
        "domain mask present, global refinement goes on",
        [*MAP, {"import_mask as domain": {"file": "d.mrc"}}, {"refine3d as next": {}}],
        {"next.mask": None, "next.map": "refine3d"},
    ),
    (
        "junk classifier trained and applied",
        [
            *PRE,
            "classify2d",
            {"annotate": {"name": "junk_by_eye"}},
            "train_junk",
            "junk",
            {"select": {"where": "particle_quality > 0.5"}},
            "ab_initio",
        ],
        {"junk.weights": "train_junk", "ab_initio.particles": "select"},
    ),
    (
        "second 2D round, curated, map from the first",
        [*MAP, {"classify2d as round2": source(particles="curate")}, {"curate as cur2": {}}, {"refine3d as r2": {}}],
        {"cur2.classes": "round2", "r2.particles": "cur2", "r2.map": "refine3d"},
    ),
]


def wrong(name: str, pipeline: list[Any], text: str, inputs: Any = ONE) -> tuple[str, list[Any], str, Any]:
    return name, pipeline, text, inputs


WRONG: list[tuple[str, list[Any], str, Any]] = [
    wrong("no ctf", ["motion", {"pick": {"diameter_angstrom": 180}}, {"extract": {"box": 160}}, "classify2d"], "classify2d needs ctf"),
    wrong("no motion", ["ctf"], "ctf needs micrograph"),
    wrong("unknown stage", ["motion", "ctff"], "Did you mean 'ctf'"),
    wrong("plug-in not installed", ["motion", "other.deblur"], "package"),
    wrong("unknown parameter", ["motion", {"ctf": {"finest": 3}}], "Did you mean 'finest_angstrom'"),
    wrong("input given as parameter", [*MAP, {"refine3d as b": {"map": "ab_initio"}}], "is an input, not a parameter"),
    wrong("unknown label", [*MAP, {"refine3d as b": source(particles="curat")}], "Did you mean 'curate'"),
    wrong("label of a later step", [*CLEAN, {"refine3d as b": source(map="ab_initio")}, "ab_initio"], "stands after this step"),
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
        "different images of the same particles, cut by centred and by again. Say which count: merge: {prefer: centred} or {prefer: again}",
    ),
    wrong("list of one step", [*MAP, {"refine3d as b": {"from": ["curate"]}}], "write from: curate."),
    wrong("list of one map", [*MAP, {"refine3d as b": source(map=["ab_initio"])}], "write from: {map: ab_initio}."),
    wrong("movies brought in twice", [{"ingest as more": {}}, "motion"], "come in by ingest already. Remove this step."),
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
        "merged after a CTF refinement each",
        [
            *MAP,
            K3,
            {"refine3d as r1": {"from": "classify3d.class1"}},
            "ctf_refine",
            {"refine3d as r2": {"from": "classify3d.class2"}},
            {"ctf_refine as t2": {}},
            {"merge": source(particles=["ctf_refine", "t2"])},
        ],
        "different values for the same exposures",
    ),
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
        "Make a mask of rb",
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
        "no mask lies in the frame",
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
        "needs whole images",
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
    wrong("consensus with itself", [*MAP, {"consensus": source(other="refine3d")}], "both sets are"),
    wrong("consensus without the other", [*MAP, "consensus"], "has no default"),
    wrong("box in pixels, two pixel sizes", PRE, "pixel sizes", TWO),
    wrong("odd box", ["motion", "ctf", {"pick": {"diameter_angstrom": 180}}, {"extract": {"box": 161}}], "must be even"),
    wrong(
        "a picker's map of another sample",
        [*MAP, {"pick as p2": {"diameter_angstrom": 180}}, {"extract as e2": {"box": 160}}, {"refine3d as r2": {}}],
        "no map was made from the particles",
    ),
    wrong("start map twice", [*MAP, {"refine3d as b": {"reference": "x.mrc", "from": {"map": "refine3d"}}}], "given twice"),
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
    wrong("from a step that gives nothing of it", [*MAP, {"refine3d as b": {"from": "mask"}}, "mask"], "stands after this step"),
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
        "Nothing takes the particles of pick",
    ),
    (
        "ctf2 on another branch",
        [*PRE, {"motion as rigid": source(exposures="ingest")}, {"ctf as ctf2": {}}, "classify2d"],
        "Nothing takes the exposures of ctf2",
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

MORE_RIGHT: list[tuple[Any, ...]] = [
    (
        "own labels throughout",
        [
            {"motion as aligned": {}},
            {"ctf as fit": {}},
            {"pick as blobs": {}},
            {"extract as boxes": {"box": 64}},
            {"classify2d as avg": {}},
        ],
        {"fit.exposures": "aligned", "boxes.particles": "blobs", "avg.exposures": "fit"},
    ),
    (
        "one class of an ab initio start",
        [*HET, {"refine3d": {"from": "ab_initio.class2"}}, *POST, "ctf_refine"],
        {"ctf_refine.map": "postprocess"},
    ),
    (
        "the map of a class follows its particles",
        [*HET, {"refine3d": source(particles="ab_initio.class1")}],
        {"refine3d.particles": "ab_initio.class1", "refine3d.map": "ab_initio.class1"},
    ),
    (
        "all particles against one class map",
        [*HET, {"refine3d": source(particles="curate", map="ab_initio.class1")}],
        {"refine3d.particles": "curate", "refine3d.map": "ab_initio.class1"},
    ),
    (
        "heterogeneous refinement",
        [
            *HET,
            {"align_classify3d": {"classes": 2, **source(particles="curate", maps=["ab_initio.class1", "ab_initio.class2"])}},
            {"refine3d as r": {"from": "align_classify3d.class2"}},
            "ctf_refine",
        ],
        {"align_classify3d.maps": ["ab_initio.class1", "ab_initio.class2"], "r.map": "align_classify3d.class2", "ctf_refine.map": "r"},
    ),
    (
        "a class of a class",
        [
            *MAP,
            K3,
            {"refine3d as r": {"from": "classify3d.class1"}},
            {"classify3d as k2": {"classes": 2}},
            {"refine3d as rr": {"from": "k2.class2"}},
            *POST,
            "ctf_refine",
            {"refine3d as last": {}},
        ],
        {"k2.map": "r", "rr.map": "k2.class2", "ctf_refine.map": "postprocess", "last.exposures": "ctf_refine", "last.map": "postprocess"},
    ),
    (
        "two classes together, map said",
        [*MAP, K3, {"merge": source(particles=["classify3d.class1", "classify3d.class3"])}, {"refine3d as r": source(map="refine3d")}],
        {"r.particles": "merge", "r.map": "refine3d", "r.exposures": "ctf"},
    ),
    (
        "all classes together",
        [*MAP, K3, {"refine3d as r": source(particles="classify3d")}],
        {"r.particles": "classify3d", "r.map": "refine3d"},
    ),
    (
        "a selection looks at all classes",
        [*MAP, K3, {"select": {"where": "p > 0.9"}}, {"refine3d as r": {}}],
        {"select.particles": "classify3d", "r.particles": "select", "r.map": "refine3d"},
    ),
    (
        "a person chooses among the 2D classes of all 3D classes",
        [*MAP, K3, "select_classes"],
        {"select_classes.particles": "classify3d", "select_classes.classes": "classify2d"},
    ),
    ("variability of all classes", [*MAP, K3, "variability"], {"variability.particles": "classify3d", "variability.map": "refine3d"}),
    (
        "polish of a class against the consensus map",
        [*MAP, K3, {"polish": source(particles="classify3d.class1", map="refine3d")}, {"refine3d as r": {}}],
        {"polish.exposures": "ctf", "r.exposures": "polish", "r.map": "classify3d.class1"},
    ),
    (
        "from fills particles and exposures of one step",
        [*MAP, "ctf_refine", "variability", {"refine3d as r": {"from": "ctf_refine"}}],
        {"r.particles": "ctf_refine", "r.exposures": "ctf_refine", "r.map": "refine3d"},
    ),
    (
        "from fills particles and classes",
        [*CLEAN, {"curate as again": {"from": "classify2d"}}],
        {"again.particles": "classify2d", "again.classes": "classify2d"},
    ),
    (
        "one output by its name",
        [*MAP, {"mask": {"from": "refine3d.map"}}, {"select": {"from": "curate.particles", "where": "x"}}],
        {"mask.map": "refine3d", "select.particles": "curate"},
    ),
    (
        "curated twice",
        [*CLEAN, {"curate as c2": {"keep": [1]}}, "select_classes"],
        {"c2.particles": "curate", "c2.classes": "classify2d", "select_classes.classes": "classify2d"},
    ),
    (
        "two selections of one classification, united and curated",
        [
            *PRE,
            "classify2d",
            {"select as a": {"where": "x"}},
            {"select as b": {"where": "y", **source(particles="classify2d")}},
            {"merge": source(particles=["a", "b"])},
            "curate",
        ],
        {"curate.particles": "merge", "curate.classes": "classify2d", "curate.exposures": "ctf"},
    ),
    (
        "a second picker, refined from the first one's map",
        [
            *MAP,
            {"pick as p2": source(reference="refine3d")},
            {"extract as e2": {"box": 160}},
            {"refine3d as r2": source(map="refine3d")},
            "ctf_refine",
        ],
        {"p2.reference": "refine3d", "p2.exposures": "ctf", "e2.particles": "p2", "r2.particles": "e2", "ctf_refine.map": "r2"},
    ),
    (
        "two births carried together by match",
        [
            *MAP,
            {"pick as p2": {}},
            {"extract as e2": {"box": 160, "scale_to": 64}},
            {"match": source(particles="e2", to="refine3d")},
            "ctf_refine",
        ],
        {"match.to": "refine3d", "ctf_refine.particles": "match", "ctf_refine.map": "refine3d"},
    ),
    (
        "automatic picks united with those edited by hand: no distance is needed",
        [*PRE[:3], "edit_picks", {"merge": source(particles=["pick", "edit_picks"])}, {"extract": {"box": 160}}],
        {"merge.particles": ["pick", "edit_picks"], "extract.particles": "merge"},
    ),
    (
        "three pickers",
        [
            *PRE[:3],
            "external.topaz",
            {"import_picks": {"folder": "x"}},
            {"merge": {"nearer_than_angstrom": 90, **source(particles=["pick", "topaz", "import_picks"])}},
            {"extract": {"box": 160}},
        ],
        {"merge.particles": ["pick", "topaz", "import_picks"], "extract.exposures": "ctf"},
    ),
    (
        "picked before and after a selection of exposures, united: all exposures count",
        [
            *PRE[:3],
            "select_exposures",
            {"pick as p2": {}},
            {"merge": {"nearer_than_angstrom": 5, **source(particles=["pick", "p2"])}},
            {"extract": {"box": 160}},
            "classify2d",
        ],
        {"extract.exposures": "merge", "classify2d.exposures": "merge"},
    ),
    (
        "two sessions, classified together",
        [*TWO_SESSIONS, "classify2d", "curate", "ab_initio"],
        {"classify2d.exposures": "merge", "ab_initio.particles": "curate"},
        BARE,
    ),
    (
        "united sessions get another CTF",
        [*TWO_SESSIONS, "ctf", "classify2d"],
        {"ctf.exposures": "merge", "classify2d.exposures": "ctf"},
        BARE,
    ),
    (
        "united after a CTF refinement each, exposures said",
        [
            *MAP,
            K3,
            {"refine3d as r1": {"from": "classify3d.class1"}},
            {"ctf_refine as t1": {}},
            {"refine3d as r2": {"from": "classify3d.class2"}},
            {"ctf_refine as t2": {}},
            {"merge": source(particles=["t1", "t2"], exposures="t1")},
            {"refine3d as r": source(map="r1")},
        ],
        {"r.exposures": "t1", "r.particles": "merge"},
    ),
    (
        "expanded, subtracted, classified, contracted",
        [
            *EXPANDED,
            *FOCUS,
            {"subtract": source(mask="focus")},
            {"classify3d": {"classes": 2}},
            {"contract": source(particles="classify3d.class2")},
            {"refine3d as state": {}},
        ],
        {
            "subtract.particles": "expand",
            "classify3d.particles": "subtract",
            "state.particles": "contract",
            "state.map": "classify3d.class2",
        },
    ),
    (
        "expanded set reconstructed and looked at",
        [*EXPANDED, "reconstruct", "variability", {"classify3d": {"classes": 2}}, {"reconstruct as one": {"from": "classify3d.class1"}}],
        {"variability.map": "reconstruct", "classify3d.map": "reconstruct", "one.particles": "classify3d.class1"},
    ),
    (
        "mirrored, all goes on in the new frame",
        [
            *MAP,
            *POST,
            *MODEL,
            {"hand": source(model="dock")},
            {"mask as m2": {}},
            {"postprocess as p2": {}},
            "ctf_refine",
            {"refine3d as r2": {}},
        ],
        {"hand.map": "postprocess", "m2.map": "hand", "p2.mask": "m2", "p2.map": "hand", "ctf_refine.map": "p2", "r2.map": "p2"},
    ),
    (
        "imported half-maps mirrored without particles",
        [{"import_map": {"half_maps": ["a", "b"]}}, *MODEL, {"hand": source(model="dock")}, *POST],
        {"hand.map": "import_map", "hand.particles": None, "postprocess.map": "hand", "postprocess.mask": "mask"},
        BARE,
    ),
    (
        "a start map from a file",
        [*CLEAN, {"refine3d": {"reference": "x.mrc"}}, *POST, "ctf_refine"],
        {"refine3d.map": None, "ctf_refine.map": "postprocess"},
    ),
    (
        "imported poses and map, nothing said",
        ["motion", "ctf", {"import_particles": {"star": "r", "has": "position,pose"}}, {"import_map": {"half_maps": ["a", "b"]}}, "polish"],
        {"polish.map": "import_map"},
    ),
    ("an imported map before the refinement", [*CLEAN, {"import_map as emdb": {"file": "x.mrc"}}, "refine3d"], {"refine3d.map": "emdb"}),
    (
        "local refinement keeps to the map of the poses",
        [*MAP, {"ab_initio as new": {}}, {"refine3d as fine": {"local": True}}],
        {"fine.map": "refine3d"},
    ),
    ("a second ctf after curation", [*CLEAN, {"ctf as c2": {}}, "ab_initio"], {"c2.exposures": "ctf", "ab_initio.exposures": "c2"}),
    (
        "the later of two ctf beside each other",
        [*PRE, {"ctf as c1": source(exposures="motion")}, {"ctf as c2": source(exposures="ctf")}, "classify2d"],
        {"classify2d.exposures": "c2"},
    ),
    ("denoised after extraction", [*PRE, "train_denoiser", "denoise", "classify2d"], {"classify2d.exposures": "denoise"}),
    (
        "two networks, each for its purpose",
        [*PRE, "train_denoiser", {"annotate": {}}, "train_junk", "denoise", "junk"],
        {"denoise.weights": "train_denoiser", "junk.weights": "train_junk"},
    ),
    (
        "two masks, the one of this map",
        [*TWO_STARTS, {"mask as ma": source(map="ra")}, {"mask as mb": source(map="rb")}, {"postprocess": source(map="ra")}],
        {"postprocess.mask": "ma"},
    ),
    (
        "aligned frames, consensus",
        [*TWO_STARTS, {"align_maps": source(particles="rb", map="rb", to="ra")}, {"consensus": source(particles="ra", other="align_maps")}],
        {"consensus.particles": "ra"},
    ),
    (
        "aligned particles keep to the aligned map",
        [*TWO_STARTS, {"align_maps": source(particles="rb", map="rb", to="ra")}, "ctf_refine"],
        {"ctf_refine.particles": "align_maps", "ctf_refine.map": "align_maps"},
    ),
    (
        "templates from the kept classes of a second round",
        [*CLEAN, {"classify2d as c2": {}}, {"curate as k2": {}}, {"pick as again": source(templates="k2")}],
        {"again.templates": "k2", "again.exposures": "ctf"},
    ),
    (
        "two data sets in angstrom",
        ["motion", "ctf", {"pick": {}}, {"extract": {"box_angstrom": 300, "pixel_size_angstrom": 2}}, "classify2d"],
        {"classify2d.exposures": "ctf"},
        TWO,
    ),
    (
        "a pinned map",
        [*MAP, {"refine3d as b": source(map="refine3d@3f2a", particles="curate")}],
        {"b.map": "refine3d", "b.particles": "curate"},
    ),
    (
        "words on their own lines",
        [{"motion": None}, {"ctf": {}}, {"pick  as   p": {}}, {"extract": {"box": 160}}],
        {"extract.particles": "p"},
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
        "no mask lies in the frame of hand",
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
        "Make a mask of y",
    ),
    wrong(
        "explicit mask of another start in a refinement",
        [*TWO_STARTS, {"mask as ma": source(map="ra")}, {"refine3d as z": source(particles="rb", map="rb", mask="ma")}],
        "Make a mask of rb",
    ),
    wrong("model of the other hand", [*MAP, *MODEL, {"hand": source(model="dock")}, "model_map"], "does not lie in the map"),
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
        "2D classes of subtracted images", [*MAP, *FOCUS, {"subtract": source(mask="focus")}, {"classify2d as c": {}}], "needs whole images"
    ),
    wrong("network of another purpose, by name", [*PRE, "train_denoiser", {"junk": source(weights="train_denoiser")}], "not to junk"),
    wrong("no network", [*PRE, "junk"], "Stages that give weights"),
    wrong("averages of an import", [{"import_project": {"project": "x"}}, "curate"], "gives no class averages", BARE),
    wrong("view as a reference", [*MAP, "variability", {"refine3d as r": source(map="variability.series")}], "Take the map before it"),
    wrong("half-maps of an imported map", [{"import_map": {"file": "x.mrc"}}, "mask"], "half-maps", BARE),
    wrong(
        "two pixel sizes, curated box",
        ["motion", {"pick": {}}, {"extract": {"box_angstrom": 300}}],
        "Give box_angstrom and pixel_size_angstrom",
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
    wrong("no output after the dot", [*MAP, {"mask": source(map="refine3d.")}], "no output is named"),
    wrong("nothing under a port", [*MAP, {"mask": source(map=None)}], "is not the name of a step"),
    wrong("an empty name", [*MAP, {"mask": {"from": ""}}], "is not the name of a step"),
    wrong("a port of a number", [*MAP, {"mask": {"from": {7: "refine3d"}}}], "has no input 7"),
    wrong("a parameter of a number", [*MAP, {"mask": {3: 4}}], "is not the name of a parameter"),
    wrong("inputs as parameters", [*PRE, {"merge": {"particles": ["pick", "extract"]}}], "Write from: {particles: [pick, extract]}"),
    wrong("a stage that takes nothing", [*PRE, {"import_map": {"file": "x", "from": "ctf"}}], "no inputs"),
    wrong("a mask where none is taken by from", [*MAP, "mask", {"ctf as c2": {"from": "mask"}}], "gives mask"),
]


def passes(graph: Graph, changed: str) -> set[str]:
    """Labels of what must run again when a step has changed."""
    stale = {changed}
    for step in graph.steps:
        if graph.rests_on(step) & stale:
            stale.add(step.label)
    return stale


@pytest.mark.parametrize("case", [*RIGHT, *MORE_RIGHT], ids=lambda case: case[0])
def test_a_right_pipeline_takes_the_sources_that_a_microscopist_expects(case: tuple[Any, ...]) -> None:
    _, pipeline, expected, *inputs = case
    graph = plan(pipeline, *inputs)
    assert graph.problems == ()
    got = sources(graph)
    assert {key: got.get(key) for key in expected} == expected


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
    ("a mask that nobody takes", [*MAP, {"mask as m1": {}}, "mask", "postprocess"], "Nothing takes the mask of m1"),
    (
        "a first map that nobody takes",
        [*CLEAN, {"import_map as emdb": {"file": "x"}}, {"ab_initio": {}}, "refine3d"],
        "Nothing takes the map of emdb",
    ),
    (
        "a selection that is passed over",
        [*CLEAN, {"select as good": {"where": "x"}}, {"select as other": source(particles="curate")}, "ab_initio"],
        "Nothing takes the particles of good",
    ),
    (
        "exposures that were selected on another branch",
        [*PRE, "select_exposures", {"ctf as c2": source(exposures="ctf")}, "classify2d"],
        "Nothing takes the exposures of select_exposures",
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
    assert final.parts == {"final": "refine3d", "half_maps": "refine3d", "fsc": "postprocess", "view": "postprocess"}
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
    assert (facts.source, facts.kind) == ("ctf", (160, 64, 2.5))


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


def test_only_installed_stages_are_advised() -> None:
    few = {name: STAGES[name] for name in ("ingest", "pick", "classify2d", "polish", "refine3d", "extract", "import_micrographs")}
    for pipeline in (["pick"], ["import_micrographs", "classify2d"], [{"import_micrographs": {"star": "x"}}, {"pick": {}}, "classify2d"]):
        graph = plan(pipeline, stages=few)
        for word in ("motion", "ctf before", "external", "mask"):
            assert word not in " ".join(graph.problems)


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


# --- anything at all ---------------------------------------------------------------------------------------------------------------------

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
        if not shared - {"ingest", "motion", "ctf"} and graph.step(base.step).inputs:
            out.append(f"map {base.ref} has nothing to do with {particles.ref}")
    if not graph.rests_on(step) <= ancestors(graph, step.label):
        out.append("rests on what does not stand behind it")
    return out


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
