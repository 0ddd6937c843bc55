"""Particles and picks of other programs: optics per row, meaning of the images, repeated particles, names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from _star_tables import GROUP, PARTICLE, imported, loop, particles, stack, write
from _told import Told
from hypothesis import given, settings
from hypothesis import strategies as st

from cryodask.errors import InputError, MicrographError
from cryodask.formats import star
from cryodask.formats.mrc import write_mrc
from cryodask.formats.star import read_particle_table
from cryodask.interop import export_relion
from cryodask.kernels.ctf import ctf
from cryodask.kernels.fourier import frequencies
from cryodask.run.imports import Names, PicksImport
from cryodask.run.recipe import make_plan
from cryodask.run.session import run_plan
from cryodask.run.sources import list_exposures
from cryodask.stage import load_stages
from cryodask.stages._particle_tables import unknown_pixel
from cryodask.store.births import Birth, born


def some(count: int, **columns) -> list[dict]:
    return [
        {**PARTICLE, "ImageName": f"{i + 1}@a.mrcs", **{k: v[i] if isinstance(v, list) else v for k, v in columns.items()}}
        for i in range(count)
    ]


def file(folder: Path, rows, groups=(GROUP,), images: int = 8) -> Path:
    stack(folder / "a.mrcs", images)
    return write(folder / "p.star", particles(rows, groups))


# --- optics -------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"Voltage": 200}, "voltage_kv of 200 and 300"),
        ({"SphericalAberration": 1.4}, "spherical_aberration_mm of 1.4 and 2.7"),
        ({"AmplitudeContrast": 0.07}, "amplitude_contrast of 0.07 and 0.1"),
        ({"MicrographPixelSize": 1.5}, "pixel_size_angstrom of 1 and 1.5"),
    ],
)
def test_two_optics_in_one_micrograph_are_refused_and_in_two_micrographs_are_each_its_own(tmp_path, change, words):
    groups = [GROUP, {**GROUP, "OpticsGroup": 2, **change}]
    with pytest.raises(MicrographError, match=words):
        imported(file(tmp_path, some(4, OpticsGroup=[1, 2, 1, 2]), groups))
    path = file(tmp_path, some(4, OpticsGroup=[1, 2, 1, 2], MicrographName=["mic/a.mrc", "mic/b.mrc"] * 2), groups)
    for name, group in zip("ab", groups):
        got = imported(path, f"mic/{name}.mrc")
        assert got["voltage_kv"] == group["Voltage"]
        assert got["spherical_aberration_mm"] == group["SphericalAberration"]
        assert got["amplitude_contrast"] == group["AmplitudeContrast"]
        assert got["pixel_size_angstrom"] == group["MicrographPixelSize"]


def test_what_no_stage_uses_is_kept(tmp_path):
    kept = {"BeamTiltX": 0.5, "BeamTiltY": -0.1, "EvenZernike": "[0,1,2]", "MagMat00": 1.01, "MagMat01": 0, "MagMat10": 0, "MagMat11": 0.99}
    path = file(tmp_path, some(3, CtfBfactor=[0, 12.5, "nan"], CtfScalefactor=[1, 0.9, 1.1]), [{**GROUP, **kept}])
    got = imported(path)
    assert json.loads(got["relion_optics"]) == {f"rln{k}": str(v) for k, v in kept.items()}
    np.testing.assert_allclose(got["ctf_b_factor_angstrom2"], [0, 12.5, np.nan])
    np.testing.assert_allclose(got["ctf_scale_factor"], [1, 0.9, 1.1])


@pytest.mark.parametrize("label", ["DefocusU", "DefocusV", "DefocusAngle", "CoordinateX", "AngleRot", "AnglePsi", "OriginXAngst"])
def test_a_missing_number_that_is_needed_concerns_its_micrograph_only(tmp_path, label):
    names = ["mic/a.mrc", "mic/b.mrc"] * 2
    number = 9000 if label in ("DefocusU", "DefocusV") else 9
    values = {"CoordinateX": 9, "CoordinateY": 9} if label == "CoordinateX" else {}
    path = file(tmp_path, some(4, MicrographName=names, **{**values, label: [number, number, "nan", number]}))
    with pytest.raises(MicrographError, match=f"rln{label} of 1 of 2 particles of mic/a.mrc is not a number"):
        imported(path, "mic/a.mrc")
    assert len(imported(path, "mic/b.mrc")["particle_image"]) == 2


# --- images -------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("label", ["CtfDataAreCtfPremultiplied", "DataAreCtfPremultiplied"])
@pytest.mark.parametrize("in_optics", [True, False])
def test_images_multiplied_by_their_ctf_are_refused_but_not_their_positions(tmp_path, label, in_optics):
    rows = some(2, CoordinateX=[5, 90], CoordinateY=7)
    path = file(tmp_path, rows, [{**GROUP, label: 1}]) if in_optics else file(tmp_path, [{**r, label: 1} for r in rows])
    if in_optics:
        with pytest.raises(InputError, match=r"2 images of .* were multiplied by their CTF"):
            imported(path)
        assert imported(path, images=False)["pick_x"].tolist() == [5, 90]
    path = file(tmp_path, rows, [{**GROUP, label: 0}])
    assert imported(path)["particle_count"] == 2


def test_subtomograms_are_refused(tmp_path):
    with pytest.raises(InputError, match="subtomograms"):
        imported(file(tmp_path, some(2), [{**GROUP, "ImageDimensionality": 3}]))


@settings(max_examples=12, deadline=None)
@given(
    kv=st.sampled_from([100, 200, 300]),
    u=st.floats(3000, 30000),
    v=st.floats(3000, 30000),
    angle=st.floats(-180, 180),
    box=st.sampled_from([32, 33]),
)
def test_phase_flipped_images_are_flipped_back(tmp_path_factory, kv, u, v, angle, box):
    folder = tmp_path_factory.mktemp("flip")
    images = stack(folder / "a.mrcs", 3, box)
    ky, kx = (k.double() / (box * 2.0) for k in frequencies((box, box)))
    sign = torch.where(
        ctf(
            ky, kx, defocus_u_angstrom=u, defocus_v_angstrom=v, defocus_angle_rad=float(np.radians(angle)), voltage_kv=float(kv),
            spherical_aberration_mm=2.7, amplitude_contrast=0.1,
        ) < 0, -1.0, 1.0,
    )  # fmt: skip
    flipped = torch.fft.ifft2(torch.fft.fft2(torch.from_numpy(images).double()) * sign).real.float().numpy()
    write_mrc(folder / "a.mrcs", flipped, 2.0, stack=True)
    text = particles(
        some(3, DefocusU=repr(u), DefocusV=repr(v), DefocusAngle=repr(angle)),
        [{**GROUP, "Voltage": kv, "ImageSize": box, "CtfDataArePhaseFlipped": 1}],
    )
    got = imported(write(folder / "p.star", text))["particle_image"]
    # at Nyquist an even box has one row for both signs of a frequency
    assert abs(got - images).max() < (1e-4 if box % 2 else 1.5)
    assert (got - images).std() < (1e-4 if box % 2 else 0.25)
    assert (flipped - images).std() > 0.05


@pytest.mark.parametrize(("gain", "offset"), [(20.0, 128.0), (0.01, 0.0), (1.0, 3.0)])
def test_images_that_are_not_normalised_are_normalised(tmp_path, gain, offset):
    path = file(tmp_path, some(4))
    before = imported(path)["particle_image"]
    write_mrc(tmp_path / "a.mrcs", (before * gain + offset).astype(np.float32), 2.0, stack=True)
    after = imported(path)["particle_image"]
    assert np.corrcoef(before.ravel(), after.ravel())[0, 1] > 0.99
    assert abs(after.mean()) < 0.05
    assert abs(after.std() - 1) < 0.05


def test_images_with_the_usual_background_are_used_unchanged(tmp_path):
    path = file(tmp_path, some(4))
    np.testing.assert_array_equal(imported(path)["particle_image"], stack(tmp_path / "a.mrcs", 8)[:4])


def test_another_box_than_the_file_says_is_refused(tmp_path):
    with pytest.raises(MicrographError, match=r"boxes of 32 pixels, but rlnImageSize in .* is 64"):
        imported(file(tmp_path, some(2), [{**GROUP, "ImageSize": 64}]))


# --- several pixel sizes and boxes --------------------------------------------------------------------------------------------
def wave(box: int, pixel: float, period_angstrom: float) -> np.ndarray:
    x = (np.arange(box) - box // 2) * pixel
    return np.broadcast_to(np.cos(2 * np.pi * x / period_angstrom), (box, box)).astype(np.float32)


@pytest.mark.parametrize(("kinds", "wanted", "size"), [
    ([(64, 1.0), (64, 1.5)], 1.5, 42), ([(64, 1.0), (40, 2.0)], 2.0, 32), ([(48, 1.25), (48, 1.24)], 1.25, 46),
    ([(64, 1.0), (48, 1.0)], 1.0, 48), ([(60, 1.0), (61, 1.3)], 2.6, 22),
])  # fmt: skip
def test_images_of_several_scales_are_brought_to_one(tmp_path, kinds, wanted, size):
    rng = np.random.default_rng(3)
    groups, rows = [], []
    for i, (box, pixel) in enumerate(kinds):
        images = rng.normal(0, 0.02, (2, box, box)).astype(np.float32) + wave(box, pixel, 16.0)
        write_mrc(tmp_path / f"{i}.mrcs", images / images.std(), pixel, stack=True)
        groups.append({**GROUP, "OpticsGroup": i + 1, "ImagePixelSize": pixel, "ImageSize": box})
        rows += [{**PARTICLE, "ImageName": f"{n}@{i}.mrcs", "OpticsGroup": i + 1} for n in (1, 2)]
    path = write(tmp_path / "p.star", particles(rows, groups))
    with pytest.raises(InputError, match=r"has images of .* and .*"):
        imported(path)
    with pytest.raises(InputError, match="downscaled, not enlarged"):
        imported(path, pixel_size_angstrom=0.7 * max(pixel for _, pixel in kinds))
    got = imported(path, pixel_size_angstrom=wanted)
    assert got["particle_image"].shape == (4, size, size)
    assert got["particle_pixel_size_angstrom"] == wanted
    inside = slice(size // 4, -size // 4)
    truth = wave(size, wanted, 16.0)[inside, inside]
    for image in got["particle_image"]:
        assert np.corrcoef(image[inside, inside].ravel(), truth.ravel())[0, 1] > 0.98
    # positions alone need no common scale
    assert imported(path, images=False)["particle_count"] == 0


@pytest.mark.parametrize("kind", [(64, 1.0), (48, 1.0), (41, 1.3)])
@pytest.mark.parametrize("wanted", [None, 1.3, 2.6])
@pytest.mark.parametrize("box", [16, 40, 48, 72])
def test_images_are_cropped_or_padded_to_a_box(tmp_path, kind, wanted, box):
    own, pixel = kind
    images = np.random.default_rng(3).normal(0, 0.02, (2, own, own)).astype(np.float32) + wave(own, pixel, 16.0)
    write_mrc(tmp_path / "a.mrcs", images / images.std(), pixel, stack=True)
    rows = [{**PARTICLE, "ImageName": f"{n}@a.mrcs"} for n in (1, 2)]
    path = write(tmp_path / "p.star", particles(rows, [{**GROUP, "ImagePixelSize": pixel, "ImageSize": own}]))
    got = imported(path, box=box, pixel_size_angstrom=wanted)
    final = wanted or pixel
    assert got["particle_image"].shape == (2, box, box)
    assert got["particle_pixel_size_angstrom"] == final
    planned = load_stages()["import_particles"].outputs(
        load_stages()["import_particles"].params(star=str(path), box=box, pixel_size_angstrom=wanted)
    )
    assert planned[1].image == (box, final)
    edge = min(box, int(own * pixel / final))
    inside = slice(box // 2 - edge // 4, box // 2 + edge // 4)
    truth = wave(box, final, 16.0)[inside, inside]
    for image in got["particle_image"]:
        assert np.corrcoef(image[inside, inside].ravel(), truth.ravel())[0, 1] > 0.98
        assert image.std() > 0.5  # no empty margins


def test_an_odd_box_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must be even, 33 is odd"):
        imported(tmp_path / "p.star", box=33)


def test_images_of_several_boxes_and_one_pixel_size_need_only_a_box(tmp_path):
    groups = [{**GROUP, "OpticsGroup": i, "ImageSize": box} for i, box in ((1, 32), (2, 48))]
    for i, box in ((1, 32), (2, 48)):
        stack(tmp_path / f"{i}.mrcs", 1, box)
    rows = [{**PARTICLE, "ImageName": f"1@{i}.mrcs", "OpticsGroup": i} for i in (1, 2)]
    path = write(tmp_path / "p.star", particles(rows, groups))
    assert imported(path, box=40)["particle_image"].shape == (2, 40, 40)
    groups[1]["ImagePixelSize"] = 3.0
    with pytest.raises(InputError, match="32 pixels of 2 A and 48 pixels of 3 A"):
        imported(write(tmp_path / "p.star", particles(rows, groups)), box=40)


# --- repeated particles -------------------------------------------------------------------------------------------------------
@settings(max_examples=25, deadline=None)
@given(order=st.permutations([0, 1, 2, 3, 0, 1, 3, 3]),
       spelled=st.lists(st.sampled_from(["a.mrcs", "./a.mrcs", "x/../a.mrcs"]), min_size=8, max_size=8),
       micrographs=st.lists(st.sampled_from(["mic/a.mrc", "mic/b.mrc"]), min_size=8, max_size=8))  # fmt: skip
def test_an_image_that_is_listed_twice_is_used_once(tmp_path_factory, order, spelled, micrographs):
    rows = [{**PARTICLE, "ImageName": f"{i + 1}@{s}", "MicrographName": m} for i, s, m in zip(order, spelled, micrographs)]
    path = write(tmp_path_factory.mktemp("twice") / "p.star", particles(rows))
    table = star.read_particle_table(path)
    used = [int(i) for m in range(len(table.micrographs)) for i in table.rows_of(m)]
    assert sorted(table.image_index[used].tolist()) == [0, 1, 2, 3]
    first = [order.index(i) for i in range(4)]
    assert sorted(used) == sorted(first)
    assert sorted(table.repeated.tolist()) == sorted(set(range(8)) - set(first))


def test_repeated_images_are_not_in_both_halves(tmp_path):
    got = imported(file(tmp_path, [r for r in some(4, RandomSubset=[1, 2, 1, 2]) for _ in (0, 1)]))
    assert len(got["particle_image"]) == got["particle_count"] == 4
    assert got["half_set"].tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize(("distance", "left"), [(0.0, 1), (0.4, 1), (0.99, 1), (1.2, 2), (30.0, 2)])
@pytest.mark.parametrize("named", [True, False])
def test_particles_in_one_place_are_one(distance, left, named):
    found = {
        "pick_y": np.array([50.0, 50.0, 90.0]),
        "pick_x": np.array([40.0, 40.0 + distance, 10.0]),
        "pick_score": np.array([0.1, 0.7, 0.3]),
    }
    table = born(Birth(0), 0, found | ({"natural_key": np.array([5, 6, 7])} if named else {}), None)
    assert len(table["particle_id"]) == left + 1
    assert len(set(zip(table["pick_y"], table["pick_x"]))) == left + 1
    if left == 1:  # of named ones the first of the file, of picks the best
        assert table["pick_score"].tolist() == pytest.approx([0.1, 0.3] if named else [0.7, 0.3])


def test_positions_that_say_nothing_do_not_make_particles_one():
    for y in (0.0, 128.0):
        found = {"pick_y": np.full(3, y), "pick_x": np.full(3, y), "natural_key": np.array([5, 6, 7])}
        assert len(born(Birth(0), 0, found, None)["particle_id"]) == 3


# --- names --------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("count", [4096, 4097, 9000])
def test_a_long_stack_without_micrograph_names_is_several_exposures(tmp_path, count):
    rows = [{k: v for k, v in r.items() if k != "MicrographName"} for r in some(count)]
    table = star.read_particle_table(write(tmp_path / "p.star", particles(rows)))
    assert [len(table.rows_of(m)) for m in range(len(table.micrographs))] == [min(4096, count - n) for n in range(0, count, 4096)]
    assert table.micrographs == ["a.mrcs", "a_from4097.mrcs", "a_from8193.mrcs"][: len(table.micrographs)]


def test_a_stack_of_two_optics_groups_without_micrograph_names_is_two_exposures(tmp_path):
    rows = [{k: v for k, v in r.items() if k != "MicrographName"} for r in some(4, OpticsGroup=[1, 2, 1, 2])]
    path = file(tmp_path, rows, [GROUP, {**GROUP, "OpticsGroup": 2, "Voltage": 200}])
    assert star.read_particle_table(path).micrographs == ["a_optics1.mrcs", "a_optics2.mrcs"]
    assert [imported(path, f"a_optics{g}.mrcs")["voltage_kv"] for g in (1, 2)] == [300, 200]


@pytest.mark.parametrize(("name", "known", "found"), [
    ("a", ["a", "b"], "a"), ("000123_a", ["a", "b"], "a"), ("a", ["012345678901234567890_a"], "012345678901234567890_a"),
    ("000001_a", ["000002_a"], "000002_a"), ("a", ["000001_a", "000002_a"], None), ("000002_a", ["000001_a", "000002_a"], "000002_a"),
    ("12345_a", ["a"], None), ("200101_grid_1", ["200102_grid_2"], None), ("c", ["a"], None), ("000123_", ["a"], None),
])  # fmt: skip
def test_uids_before_a_name_are_understood_unless_that_is_ambiguous(name, known, found):
    assert Names(known).of(name) == found


XY = {"CoordinateX": 50, "CoordinateY": 60}


def picked(path: Path, micrograph: str | None) -> list[float]:
    stage = load_stages()["import_picks"]
    return stage.process(stage.params(folder="."), coordinates_path=str(path), micrograph_name=micrograph)["pick_x"].tolist()


@pytest.mark.parametrize(("names", "micrograph", "expected"), [
    (["mic/a.mrc", "mic/b.mrc"], "a", [0]), (["mic/a.mrc", "mic/b.mrc"], "b", [1]), (["b.mrc", "b.mrc"], "b", [0, 1]),
    (["a_DW.mrc", "a_DW.mrc"], "a", [0, 1]), (["000123_a.mrc", "b.mrc"], "a", [0]), (["a.mrc", "a_1.mrc"], "a", [0]),
    (["a.mrc", "a_1.mrc"], "a_1", [1]), (["x.mrc", "y.mrc"], "a", "name x, y"), (["a_1.mrc", "a_2.mrc"], "a", "name a_1, a_2"),
    (["ab.mrc", "b.mrc"], "a", "name ab, b"),
])  # fmt: skip
def test_rows_of_other_micrographs_are_not_picks_of_this_one(tmp_path, names, micrograph, expected):
    rows = [{"CoordinateX": i, "CoordinateY": 7, "MicrographName": n} for i, n in enumerate(names)]
    path = write(tmp_path / "a.star", loop("", rows))
    if isinstance(expected, list):
        assert picked(path, micrograph) == expected
    else:
        with pytest.raises(MicrographError, match=expected):
            picked(path, micrograph)


@pytest.mark.parametrize(("row", "words"), [
    ({"CoordinateX": 5}, "rlnCoordinateY"), ({"CoordinateY": 5}, "rlnCoordinateX"), ({"X": 5}, "rlnCoordinateX"),
    ({**XY, "CoordinateY": "nan"}, "rlnCoordinateY is not a number in row 1"),
    ({**XY, "CoordinateX": "True"}, "rlnCoordinateX is not numeric"),
])  # fmt: skip
def test_bad_coordinates_quarantine_their_micrograph(tmp_path, row, words):
    with pytest.raises(MicrographError, match=words):
        picked(write(tmp_path / "a.star", loop("", [row])), "a")


@pytest.mark.parametrize("files", [["a_autopick", "a_manualpick"], ["a", "a_autopick"], ["000001_a", "a"]])
def test_several_picks_files_of_a_micrograph_are_refused_with_their_names(tmp_path, files):
    (tmp_path / "picks [1]").mkdir()
    for name in [*files, "b"]:
        write(tmp_path / "picks [1]" / f"{name}.star", loop("", [XY]))
    with pytest.raises(
        InputError, match=rf"a has 2 picks files in .*: .*{files[0]}.star.*{files[1]}.star|a has 2 picks files in .*: .*{files[1]}.star"
    ):
        PicksImport(tmp_path / "picks [1]").among(["a", "b"])
    assert set(PicksImport(tmp_path / "picks [1]").among(["b"])) == {"b"}


def test_micrographs_keep_their_own_optics_and_a_failed_fit_concerns_only_its_own(tmp_path):
    for n in "ab":
        write_mrc(tmp_path / f"{n}.mrc", np.random.default_rng(ord(n)).normal(size=(32, 32)).astype(np.float32), 1.0)
    groups = [{**GROUP, "BeamTiltX": 0.5}, {**GROUP, "OpticsGroup": 2, "Voltage": 200, "MicrographPixelSize": 1.5, "BeamTiltX": 0}]
    rows = [
        {"MicrographName": f"{n}.mrc", "OpticsGroup": g, "DefocusU": u, "DefocusV": 14000, "DefocusAngle": 0}
        for n, g, u in (("a", 1, 15000), ("b", 2, "inf"))
    ]
    write(tmp_path / "m.star", loop("optics", groups) + loop("micrographs", rows))
    (tmp_path / "p.yaml").write_text(yaml.safe_dump({"name": "r", "pipeline": [{"import_micrographs": {"star": "m.star"}}]}))
    a, b = list_exposures(make_plan(tmp_path / "p.yaml"), None)
    assert (a.inputs["voltage_kv"], a.inputs["pixel_size_angstrom"], a.inputs["defocus_u_angstrom"]) == (300, 1.0, 15000)
    assert (b.inputs["voltage_kv"], b.inputs["pixel_size_angstrom"]) == (200, 1.5)
    assert "defocus_u_angstrom" not in b.inputs
    assert [json.loads(one.inputs["relion_optics"])["rlnBeamTiltX"] for one in (a, b)] == ["0.5", "0"]


@pytest.mark.parametrize(("other", "same"), [(2.0, True), (2.0000005, True), (1.999999, True), (2.001, False), (4.0, False)])
def test_voxel_sizes_that_differ_by_the_rounding_of_a_header_are_equal(tmp_path, other, same):
    halves = [str(tmp_path / f"h{i}.mrc") for i in (1, 2)]
    for path, voxel in zip(halves, (2.0, other)):
        write_mrc(path, np.random.default_rng(int(path[-5])).normal(size=(16, 16, 16)).astype(np.float32), voxel)
    stage = load_stages()["import_map"]
    if same:
        assert stage.process(stage.params(half_maps=halves))["map_pixel_size_angstrom"] == 2.0
    else:
        with pytest.raises(InputError, match="The half-maps differ"):
            stage.process(stage.params(half_maps=halves))


def test_what_is_kept_of_the_optics_goes_through_a_run_to_the_export(tmp_path, client):
    path = file(tmp_path, [*some(3, CtfBfactor=[0, 12.5, 3]), *some(2, CtfBfactor=0)], [{**GROUP, "BeamTiltX": 0.5, "MagMat00": 1.02}])
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"name": "r", "pipeline": [{"import_particles": {"star": path.name}}]}))
    told = Told()
    export_relion(run_plan(make_plan(tmp_path / "r.yaml"), client, listen=[told]), tmp_path / "out")
    assert "import_particles: 2 rows left out, because an earlier row has the same image: mic/a.mrc (2)" in told.said
    assert "import_particles: beam tilt of up to 0.5 mrad is kept for the export, but not corrected here" in told.said
    tables = star.read_tables(tmp_path / "out/particles.star")
    assert tables["optics"][["rlnBeamTiltX", "rlnMagMat00"]].values.tolist() == [[0.5, 1.02]]
    assert tables["particles"]["rlnCtfBfactor"].tolist() == [0, 12.5, 3]


# --- rows without a file ------------------------------------------------------------------------------------------------------
def micrographs(folder: Path, *names: str) -> Path:
    rows = [
        {"MicrographName": name, "OpticsGroup": 1, "DefocusU": 1e4, "DefocusV": 1e4, "DefocusAngle": 0.0, "CtfMaxResolution": 4.0}
        for name in names
    ]
    write(folder / "m.star", loop("optics", [GROUP]) + loop("micrographs", rows))
    path = folder / "p.yaml"
    path.write_text(yaml.safe_dump({"name": "p", "pipeline": [{"import_micrographs": {"star": "m.star"}}]}))
    return path


def micrograph(folder: Path, name: str, seed: int) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    write_mrc(folder / name, np.random.default_rng(seed).normal(size=(64, 64)).astype(np.float32), 1.0)


def failures(project) -> dict[str, str]:
    return {f["name"]: f["message"] for f in project.failures()}


def complete(project) -> bool:
    return not failures(project) and sorted(project["import_micrographs"]["micrograph"].values) == ["a", "b", "c"]


def test_a_row_that_names_a_missing_folder_is_its_own_fault_until_its_file_comes(tmp_path, client):
    plan = micrographs(tmp_path, "mic/a.mrc", "gone/b.mrc", "mic/c.mrc")
    for seed, name in enumerate(("mic/a.mrc", "mic/c.mrc")):
        micrograph(tmp_path, name, seed)
    assert failures(run_plan(make_plan(plan), client)).keys() == {"b"}
    micrograph(tmp_path, "gone/b.mrc", 2)
    assert complete(run_plan(make_plan(plan), client))
    # what was imported stays where a file has gone since
    shutil.rmtree(tmp_path / "gone")
    assert complete(run_plan(make_plan(plan), client))
    shutil.rmtree(tmp_path / "mic")
    assert complete(run_plan(make_plan(plan), client))


def test_a_table_none_of_whose_files_is_there_is_refused_before_work(tmp_path):
    with pytest.raises(InputError, match=r"None of the 2 micrographs .* exists; the first is mic/a\.mrc"):
        list_exposures(make_plan(micrographs(tmp_path, "mic/a.mrc", "mic/b.mrc")), None)


@pytest.mark.parametrize(("x", "y"), [(33.0, 0.0), (0.0, -32.5), (1e6, 1e6)])
def test_an_origin_outside_its_image_is_refused(tmp_path, x, y):
    # images of 32 pixels of 2 A
    path = file(tmp_path, some(3, OriginXAngst=[0.0, x, 3.0], OriginYAngst=[31.9, y, -31.9]))
    with pytest.raises((InputError, MicrographError), match=r"origins of 1 of 3 .* outside their images|XAngst of row 2 is 1e\+06"):
        imported(path)


def test_origins_within_their_images_are_kept(tmp_path):
    got = imported(file(tmp_path, some(2, OriginXAngst=[-31.9, 2.5], OriginYAngst=[31.9, 0.0])))
    assert got["particle_x"] * 1.0 - got["centre_x_angstrom"] == pytest.approx([-31.9, 2.5])


# --- pixels of positions -------------------------------------------------------------------------------------------------------
OLD = {k: v for k, v in PARTICLE.items() if k != "OpticsGroup"} | {
    "CoordinateX": 100, "CoordinateY": 80, "AngleRot": 0, "AngleTilt": 0, "AnglePsi": 0, "OriginX": 1.5, "OriginY": -2, "Voltage": 300,
    "SphericalAberration": 2.7, "AmplitudeContrast": 0.1, "DetectorPixelSize": 5, "Magnification": 25000,
}  # fmt: skip


@pytest.mark.parametrize(
    ("told", "given", "exposure", "pixel"),
    [(None, None, None, 2.0), (None, 1.0, None, 1.0), (None, None, 1.0, 1.0), (1.0, None, 1.003, 1.0), (1.0, 1.0, 1.0, 1.0),
     (None, 1.003, 1.0, 1.003), (1.0, None, 2.0, None), (1.0, 2.0, None, None), (None, 1.0, 1.1, None), (1.0, None, None, 1.0)],
)  # fmt: skip
def test_positions_are_in_pixels_of_the_micrographs_wherever_these_are_known(tmp_path, told, given, exposure, pixel):
    """Images of 2 A from RELION 3.0: position minus origin, both in Angstrom, is the centre."""
    row = OLD | ({} if told is None else {"MicrographPixelSize": told})
    path = write(tmp_path / "old.star", loop("", [row]))
    stack(tmp_path / "a.mrcs", 1)
    stage = load_stages()["import_particles"]

    def read():
        params = stage.params(star=str(path), micrograph_pixel_size_angstrom=given)
        return stage.process(params, particles_path=str(path), micrograph_name="mic/a.mrc", pixel_size_angstrom=exposure)

    if pixel is None:
        with pytest.raises(MicrographError, match="The micrographs have pixels of"):
            read()
        return
    found = read()
    assert found["pixel_size_angstrom"] == pixel
    assert found["particle_pixel_size_angstrom"] == 2.0
    assert found["centre_x_angstrom"].tolist() == pytest.approx([100 * pixel - 3.0])
    assert found["centre_y_angstrom"].tolist() == pytest.approx([80 * pixel + 4.0])


@pytest.mark.parametrize(
    ("row", "given", "exposures", "said"),
    [(OLD, None, False, True), (OLD, 1.0, False, False), (OLD, None, True, False), (OLD | {"MicrographPixelSize": 1}, None, False, False),
     ({k: v for k, v in OLD.items() if "Coordinate" not in k}, None, False, False)],
)  # fmt: skip
def test_positions_in_unknown_pixels_are_told(tmp_path, row, given, exposures, said):
    table = read_particle_table(write(tmp_path / "old.star", loop("", [row])))
    found = unknown_pixel(table, given, exposures=exposures)
    assert bool(found) == said
    assert not said or "taken to be in pixels of 2 A" in found[0]
