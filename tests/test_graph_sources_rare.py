"""The resolver: pipelines that are right but rare take the sources that a microscopist expects."""

from __future__ import annotations

from typing import Any

import pytest
from _graph_plans import BARE, CLEAN, EXPANDED, FOCUS, HET, K3, MAP, MODEL, POST, PRE, TWO, TWO_SESSIONS, TWO_STARTS, assert_sources, source

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
        {"k2.map": "r", "rr.map": "k2.class2", "ctf_refine.map": "postprocess", "last.particles": "ctf_refine", "last.map": "postprocess"},
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
        {"r.particles": "ctf_refine", "r.exposures": "ctf", "r.map": "refine3d"},
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
        "united after a CTF refinement each, every particle with its own",
        [
            *MAP,
            K3,
            {"refine3d as r1": {"from": "classify3d.class1"}},
            {"ctf_refine as t1": {}},
            {"refine3d as r2": {"from": "classify3d.class2"}},
            {"ctf_refine as t2": {}},
            {"merge": source(particles=["t1", "t2"])},
            {"refine3d as r": source(map="r1")},
        ],
        {"r.exposures": "ctf", "r.particles": "merge"},
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
        "a starting map from a file",
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


@pytest.mark.parametrize("case", MORE_RIGHT, ids=lambda case: case[0])
def test_a_rare_pipeline_takes_the_sources_that_a_microscopist_expects(case: tuple[Any, ...]) -> None:
    assert_sources(case)
