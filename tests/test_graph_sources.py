"""The resolver: right pipelines take the sources that a microscopist expects."""

from __future__ import annotations

from typing import Any

import pytest
from _graph_plans import BARE, CLEAN, K3, MAP, POST, PRE, TWO, assert_sources, source

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
            "p2.exposures": "polish",
            "p2.particles": "ctf_refine",
            "p2.map": "pp1",
            "polish2.map": "p2",
            "polish2.exposures": "polish",
            "p3.exposures": "polish2",
        },
    ),
    (
        "CTF refinement first, then polish",
        [*MAP, *POST, "ctf_refine", {"refine3d as c1": {}}, "polish", {"refine3d as c2": {}}],
        {"ctf_refine.map": "postprocess", "c1.exposures": "ctf", "polish.map": "c1", "c2.particles": "polish"},
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
        {"reconstruct.particles": "ctf_refine", "polish.map": "reconstruct", "polish.particles": "ctf_refine"},
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
        {"extract.exposures": "ctf", "fine.particles": "ctf_refine"},
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
        {"t1.map": "r1", "t2.map": "r2", "f1.particles": "t1", "f1.map": "r1"},
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


@pytest.mark.parametrize("case", RIGHT, ids=lambda case: case[0])
def test_a_right_pipeline_takes_the_sources_that_a_microscopist_expects(case: tuple[Any, ...]) -> None:
    assert_sources(case)
