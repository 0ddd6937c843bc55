"""Headers against the tables and the project that name their files: pixel sizes, the places of maps, defoci in micrometres."""

from __future__ import annotations

import numpy as np
import pytest
import yaml
from _star_tables import GROUP, MICROGRAPH, PARTICLE, loop, particles, stack, write
from test_counts import here  # noqa: F401

from cryodask.errors import InputError, StarError
from cryodask.formats import star
from cryodask.formats.mrc import open_mrc, write_mrc
from cryodask.run.checks import look_ahead
from cryodask.run.recipe import make_plan
from cryodask.run.session import run_plan
from cryodask.run.sources import check_files, list_exposures


def plan_of(folder, *steps):
    return make_plan(write(folder / "r.yaml", yaml.safe_dump({"name": "r", "pipeline": list(steps)})))


def warnings_of(plan):
    return [w for w in look_ahead(plan, None, list_exposures(plan, None)).warnings if "header" in w]


def set_header(path, words, dtype="<f4"):
    raw = bytearray(path.read_bytes())
    for place, value in words.items():
        raw[4 * place : 4 * place + 4] = np.array([value], dtype).tobytes()
    path.write_bytes(raw)


SIZES = [(2.0, False), (2.015, False), (2.03, True), (1.0, False), (0.0, False), (1.01, True), (20.0, True), (-2.0, False), (np.nan, False)]


@pytest.mark.parametrize(("header", "told"), SIZES)
def test_stacks_of_another_pixel_size_than_their_table_are_told(tmp_path, header, told):
    for name in "ab":
        stack(tmp_path / f"{name}.mrcs", 2, seed=ord(name))
        set_header(tmp_path / f"{name}.mrcs", {10: 32 * header, 11: 32 * header})
    rows = [{**PARTICLE, "ImageName": f"{i}@{n}.mrcs", "MicrographName": f"{n}.mrc"} for n in "ab" for i in (1, 2)]
    write(tmp_path / "p.star", particles(rows))
    plan = plan_of(tmp_path, {"import_particles": {"star": "p.star"}})
    said = [
        f"import_particles: 2 stacks such as a.mrcs have a pixel size of {header:.4g} A in the header, but 2 A in p.star, which is used. "
        "Check rlnImagePixelSize there."
    ]
    assert warnings_of(plan) == (said if told else [])
    assert warnings_of(plan_of(tmp_path, {"import_particles": {"star": "p.star", "images": False}})) == []


@pytest.mark.parametrize(("header", "told"), [(1.1, False), (1.2, True), (1.0, False), (0.55, True)])
def test_a_micrograph_of_another_pixel_size_than_its_table_is_told(tmp_path, header, told):
    for i, name in enumerate("ab"):
        write_mrc(tmp_path / f"{name}.mrc", np.full((8, 8), i, np.float32), header if name == "b" else 1.1)
    rows = [{**MICROGRAPH, "MicrographName": f"{name}.mrc"} for name in "ab"]
    write(tmp_path / "m.star", loop("optics", [{**GROUP, "MicrographPixelSize": 1.1}]) + loop("micrographs", rows))
    said = warnings_of(plan_of(tmp_path, {"import_micrographs": {"star": "m.star"}}))
    assert len(said) == told
    assert all(f"the micrograph b.mrc has a pixel size of {header:g} A in the header, but 1.1 A in m.star" in one for one in said)


@pytest.mark.parametrize(("edge", "voxel", "told"), [(32, 2.0, False), (32, 1.0, True), (16, 4.0, False), (32, 2.05, True)])
def test_a_start_map_with_as_many_voxels_of_another_size_is_told(tmp_path, edge, voxel, told):
    stack(tmp_path / "a.mrcs", 2)
    write(tmp_path / "p.star", particles([{**PARTICLE, "ImageName": f"{i}@a.mrcs"} for i in (1, 2)]))
    write_mrc(tmp_path / "m.mrc", np.random.default_rng(0).normal(size=(edge,) * 3).astype(np.float32), voxel)
    refine = {"refine3d": {"symmetry": "C1", "reference": "m.mrc"}}
    said = warnings_of(plan_of(tmp_path, {"import_particles": {"star": "p.star"}}, refine))
    assert said == (
        [
            f"refine3d: m.mrc has 32 voxels of {voxel:g} A according to its header, the particles have 32 pixels of 2 A. "
            "Correct the voxel size in the header if both are of one size."
        ]
        if told
        else []
    )


# --- where maps lie ----------------------------------------------------------------------------------------------------------
ORIGIN, START = (49, 50, 51), (4, 5, 6)


def placed(path, origin=(0.0, 0.0, 0.0), start=(0, 0, 0), axes=(1, 2, 3), edge=8):
    write_mrc(path, np.random.default_rng(len(str(path))).normal(size=(edge,) * 3).astype(np.float32), 2.0)
    set_header(path, dict(zip(ORIGIN, origin)))
    set_header(path, dict(zip(START, start)) | dict(zip((16, 17, 18), axes)), "<i4")
    return path


@pytest.mark.parametrize(
    ("words", "offset"),
    [
        ({}, None), ({"origin": (-8.0, -8.0, -8.0)}, None), ({"start": (-4, -4, -4)}, None), ({"start": (-3, -3, -3)}, None),
        ({"origin": (2.0, 4.0, 60.0)}, (30, 2, 1)), ({"start": (1, 2, 30)}, (30, 2, 1)),
        ({"start": (30, 2, 1), "axes": (3, 2, 1)}, (30, 2, 1)), ({"start": (2, 30, 1), "axes": (2, 3, 1)}, (30, 2, 1)),
        ({"origin": (np.nan, 0.0, 0.0)}, None), ({"origin": (2.0, 4.0, 60.0), "start": (5, 5, 5)}, (30, 2, 1)),
    ],
)  # fmt: skip
def test_origin_and_start_indices_say_where_a_map_lies(tmp_path, words, offset):
    assert open_mrc(placed(tmp_path / "m.mrc", **words)).header.offset_voxels == offset


@pytest.mark.parametrize(
    ("first", "second", "refused"),
    [
        ({"start": (1, 2, 30)}, {"start": (1, 2, 30)}, False),
        ({"start": (1, 2, 30)}, {"origin": (2.0, 4.0, 60.0)}, False),
        ({"start": (1, 2, 30)}, {}, False),
        ({"start": (-4, -4, -4)}, {}, False),
        ({"start": (1, 2, 30)}, {"start": (1, 2, 29)}, True),
        ({"origin": (2.0, 4.0, 60.0)}, {"origin": (2.0, 4.0, 90.0)}, True),
    ],
)
def test_maps_of_one_grid_in_two_places_are_refused(tmp_path, first, second, refused):
    a, b = placed(tmp_path / "a.mrc", **first), placed(tmp_path / "bb.mrc", **second)
    halves = plan_of(tmp_path, {"import_map": {"half_maps": [str(a), str(b)]}})
    mask = plan_of(tmp_path, {"import_map": {"file": str(a)}}, {"import_mask": {"file": str(b)}})
    for plan in (halves, mask):
        if refused:
            with pytest.raises(InputError, match=r"begin at different voxels \(x, y, z\).*a\.mrc at \(1, 2, 30\)"):
                check_files(plan)
        else:
            check_files(plan)


# --- defoci in micrometres ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("u", "v"), [(1.5, 1.4), (1.5, 15000.0), (15000.0, 1.4), (-1.5, -1.4)])
def test_a_micrograph_with_a_defocus_in_micrometres_is_quarantined_and_no_other(tmp_path, here, u, v):  # noqa: F811
    rows = [{**MICROGRAPH, "MicrographName": f"{name}.mrc"} for name in "abc"]
    rows[1] |= {"DefocusU": u, "DefocusV": v}
    for i, name in enumerate("abc"):
        write_mrc(tmp_path / f"{name}.mrc", np.random.default_rng(i).normal(size=(32, 32)).astype(np.float32), 1.0)
    write(tmp_path / "m.star", loop("optics", [GROUP]) + loop("micrographs", rows))
    project = run_plan(plan_of(tmp_path, {"import_micrographs": {"star": "m.star"}}), here)
    assert project["import_micrographs"]["micrograph"].values.tolist() == ["a", "c"]
    (failure,) = project.failures()
    assert failure["name"] == "b"
    assert failure["error"] == "MicrographError"
    assert "it is in micrometres" in failure["message"]


def test_micrographs_that_all_have_a_defocus_in_micrometres_are_refused(tmp_path):
    rows = [{**MICROGRAPH, "MicrographName": f"{name}.mrc", "DefocusU": 1.5, "DefocusV": 1.4} for name in "ab"]
    with pytest.raises(StarError, match=r"at most 1\.5 A in all rows"):
        star.read_micrographs(write(tmp_path / "m.star", loop("optics", [GROUP]) + loop("micrographs", rows)))
