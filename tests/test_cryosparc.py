"""cryoSPARC's tables: real ones against RELION's of the same particles, and anything written comes back."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib.recfunctions import drop_fields

from cryodask.errors import InputError
from cryodask.formats import cryosparc, star
from cryodask.kernels.orientations import angular_error_deg, euler_to_matrix

ANGLES = ("rot_deg", "tilt_deg", "psi_deg")


@pytest.fixture(scope="module")
def real(shared) -> Path:
    return shared / "data" / "metadata" / "cryosparc"


def test_a_real_table_is_the_star_file_that_it_was_imported_from(real):
    table = cryosparc.read_particles(real / "empiar_10076_7.cs")
    known = star.read_tables(real / "empiar_10076_7.star")[""]
    for name, relion in (
        ("defocus_u_angstrom", "rlnDefocusU"),
        ("defocus_v_angstrom", "rlnDefocusV"),
        ("defocus_angle_deg", "rlnDefocusAngle"),
    ):
        np.testing.assert_allclose(table[name], known[relion].to_numpy(float), rtol=1e-6)
    assert [f"{i + 1}@{s}" for i, s in zip(table["image_index"], table["image_stack"])] == known["rlnImageName"].tolist()
    assert table["particle_pixel_size_angstrom"] == pytest.approx(1.31, abs=1e-5)
    assert table["voltage_kv"].tolist() == [300.0] * 7
    assert table["cryosparc_uid"][0] == 3806243878409217281
    assert table["optics_group_name"][0] == "exposure_group_23"


def test_poses_of_a_real_refinement(real, tmp_path):
    """The rotation of one particle computed by hand: the transpose of exp([w]x), row by row."""
    (tmp_path / "p.cs").write_bytes(gzip.decompress((real / "cryosparc_P12_J24_001_particles.cs.gz").read_bytes()))
    table = cryosparc.read_particles(tmp_path / "p.cs")
    assert len(table["rot_deg"]) == 2019
    w = np.array([2.3386633, -0.25595567, -1.2236784])
    angle = np.linalg.norm(w)
    k = np.array([[0, -w[2], w[1]], [w[2], 0, -w[0]], [-w[1], w[0], 0]]) / angle
    expected = (np.eye(3) + np.sin(angle) * k + (1 - np.cos(angle)) * k @ k).T
    found = euler_to_matrix(*(torch.deg2rad(torch.from_numpy(table[n][:1])) for n in ANGLES))[0].numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert table["origin_x_angstrom"][0] == pytest.approx(11.334375 * 2.95, rel=1e-5)
    assert table["origin_y_angstrom"][0] == pytest.approx(-1.828125 * 2.95, rel=1e-5)
    assert table["half_set"][0] == 1
    assert table["defocus_angle_deg"][0] == pytest.approx(np.degrees(-1.3636448), rel=1e-5)


def test_a_real_table_of_classes_and_an_empty_one(real):
    table = cryosparc.read_particles(real / "cryosparc_J2_particles_exported.cs")
    assert table["class_number"][0] == 5
    assert table["image_stack"][0] == "J1/imported/000090334788266266069_18jam15b_0345_ali_DW.mrcs"
    assert "rot_deg" not in table
    assert all(len(values) == 0 for values in cryosparc.read_particles(real / "dataset_4k.cs").values())


def columns(count: int, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    u = rng.uniform(5e3, 3e4, count)
    return {
        "cryosparc_uid": rng.integers(0, 2**64, count, dtype=np.uint64),
        "image_stack": np.array([f"particles_{i % 2}.mrcs" for i in range(count)], dtype=object),
        "image_index": np.arange(count),
        "box": np.full(count, 64),
        "particle_pixel_size_angstrom": np.full(count, 2.5),
        "voltage_kv": np.where(np.arange(count) % 2, 200.0, 300.0),
        "spherical_aberration_mm": np.full(count, 2.7),
        "amplitude_contrast": np.full(count, 0.1),
        "defocus_u_angstrom": u,
        "defocus_v_angstrom": u - rng.uniform(0, 500, count),
        "defocus_angle_deg": rng.uniform(-180, 180, count),
        "phase_shift_deg": rng.uniform(0, 180, count),
        "rot_deg": rng.uniform(-180, 180, count),
        "tilt_deg": rng.uniform(0, 180, count),
        "psi_deg": rng.uniform(-180, 180, count),
        "origin_y_angstrom": rng.normal(0, 5, count),
        "origin_x_angstrom": rng.normal(0, 5, count),
        "half_set": np.arange(count) % 2,
        "particle_y": rng.uniform(0, 3000, count),
        "particle_x": rng.uniform(0, 4000, count),
        "micrograph_name": np.array([f"m{i}.mrc" for i in range(count)], dtype=object),
        "pixel_size_angstrom": np.full(count, 1.25),
    }


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 40), seed=st.integers(0, 2**32 - 1), suffix=st.sampled_from([".cs", ".csg"]))
def test_what_is_written_comes_back(tmp_path_factory, count, seed, suffix):
    path, before = tmp_path_factory.mktemp("cs") / "p.cs", columns(count, seed)
    cryosparc.write_particles(path, before, (3000, 4000))
    after = cryosparc.read_particles(path.with_suffix(suffix))
    poses = [euler_to_matrix(*(torch.deg2rad(torch.from_numpy(c[n])) for n in ANGLES)) for c in (before, after)]
    assert float(angular_error_deg(*poses, np.eye(3)[None]).max()) < 0.05  # float32
    for name, values in before.items():
        if name in ANGLES:
            continue
        if values.dtype.kind == "f":
            np.testing.assert_allclose(after[name], values, rtol=1e-5, atol=1e-3, err_msg=name)
        else:
            assert after[name].tolist() == values.tolist(), name


ABERRATIONS = {"ctf/shift_A": 2, "ctf/tilt_A": 2, "ctf/trefoil_A": 2, "ctf/tetra_A": 4, "ctf/anisomag": 4}


def with_aberrations(path: Path, values: dict[str, np.ndarray]) -> None:
    """Add fields to a table."""
    table = np.load(path)
    more = np.zeros(len(table), table.dtype.descr + [(name, "<f4", (v.shape[1],)) for name, v in values.items()])
    for name in table.dtype.names:
        more[name] = table[name]
    for name, v in values.items():
        more[name] = v
    with open(path, "wb") as file:
        np.save(file, more)


@pytest.mark.parametrize("only", [*ABERRATIONS, ""])
def test_aberrations_come_back_bit_for_bit_also_through_a_star_file(tmp_path, only):
    rng = np.random.default_rng(5)
    of = np.arange(6) % 3  # three exposure groups, one without any
    given = {
        n: np.where(of[:, None] > 0, rng.normal(size=(3, size))[of], 0).astype("f4") for n, size in ABERRATIONS.items() if only in (n, "")
    }
    for name, factor in (("ctf/tilt_A", 5000), ("ctf/anisomag", 0.05)):
        if name in given:
            given[name] *= np.float32(factor)
    cryosparc.write_particles(tmp_path / "p.cs", columns(6, 3), (3000, 4000))
    with_aberrations(tmp_path / "p.cs", given)
    table = cryosparc.read_particles(tmp_path / "p.cs")
    assert [bool(text) for text in table["relion_optics"]] == (of > 0).tolist()
    del table["contrast_sign"]
    star.write_particles(tmp_path / "p.star", {**table, "cryosparc_uid": table["cryosparc_uid"].view(np.int64)})
    through = star.read_particles(tmp_path / "p.star")
    through["cryosparc_uid"] = through["cryosparc_uid"].view(np.uint64)
    for read in (table, through):
        cryosparc.write_particles(tmp_path / "back.cs", read)
        back = np.load(tmp_path / "back.cs")
        for name, values in given.items():
            assert back[name].tobytes() == values.tobytes(), name
        assert not set(ABERRATIONS) - set(given) & set(back.dtype.names)


@pytest.mark.parametrize(
    "without",
    ["blob/idx", "blob/shape", "blob/psize_A", "alignments3D/shift", "alignments3D/psize_A", "location/micrograph_shape",
     "location/micrograph_path", "location/center_y_frac"],
)  # fmt: skip
def test_a_column_that_is_missing_beside_its_companions_is_named(tmp_path, without):
    cryosparc.write_particles(tmp_path / "p.cs", columns(3, 1), (3000, 4000))
    table = np.load(tmp_path / "p.cs")
    np.save((tmp_path / "p.cs").open("wb"), table[[name for name in table.dtype.names if name != without]])
    with pytest.raises(InputError, match=rf"p\.cs has no column {without}"):
        cryosparc.read_particles(tmp_path / "p.cs")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("blob/sign", 0, "neither 1 nor -1"), ("blob/sign", np.nan, "neither 1 nor -1"), ("blob/shape", [64, 32], "not square"),
        ("ctf/df_angle_rad", 45.0, "it is in degrees"), ("ctf/phase_shift_rad", 90.0, "it is in degrees"),
        ("blob/path", b">\xfc.mrcs", "not UTF-8"), ("blob/path", b"", "blob/path of row 1 is empty"),
        ("blob/idx", 2**32 - 1, "blob/idx of row 1 is"), ("blob/shape", 0, "blob/shape of row 1 is 0, which is not between 2"),
        ("blob/psize_A", 0, "blob/psize_A of row 1 is 0, which is not between 0.05 and 100 A"),
        ("ctf/accel_kv", 3, "ctf/accel_kv of row 1 is 3, which is not between 20 and 3000 kV"), ("ctf/accel_kv", 3e5, "accel_kv"),
        ("ctf/cs_mm", 2.7e7, "ctf/cs_mm of row 1"), ("ctf/amp_contrast", 10, "ctf/amp_contrast of row 1"),
        ("ctf/df1_A", 1.5, "in micrometres"), ("alignments3D/split", 7, "alignments3D/split of row 1 is 7"),
        ("alignments3D/pose", 1e9, "alignments3D/pose of row 1"), ("location/micrograph_shape", 0, "micrograph_shape of row 1 is 0"),
        ("blob/path", b">", "blob/path of row 1 is empty"),
        ("location/center_x_frac", 1.5, "center_x_frac of row 1 is 1.5"), ("location/center_y_frac", -0.2, "center_y_frac of row 1"),
    ],
)  # fmt: skip
def test_values_that_cannot_be_are_named(tmp_path, name, value, said):
    cryosparc.write_particles(tmp_path / "p.cs", columns(3, 1), (3000, 4000))
    table = np.load(tmp_path / "p.cs")
    table[name] = value
    np.save((tmp_path / "p.cs").open("wb"), table)
    with pytest.raises(InputError, match=said):
        cryosparc.read_particles(tmp_path / "p.cs")


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ([("uid", "<f8"), ("ctf/accel_kv", "<f4")], "uid is not a column of whole numbers"),
        ([("uid", "<u8"), ("ctf/accel_kv", "S4")], "ctf/accel_kv is not a column of numbers"),
        ([("uid", "<u8"), ("ctf/df_angle_rad", "U4")], "ctf/df_angle_rad is not a column of numbers"),
        ([("uid", "<u8"), ("ctf/accel_kv", "<f4", (3,))], "ctf/accel_kv is not a column of numbers"),
        ([("uid", "<u8"), ("blob/path", "<i8")], "blob/path is not a column of text"),
        ([("uid", "<u8"), ("location/micrograph_path", "?")], "micrograph_path is not a column of text"),
        ([("uid", "<u8"), ("gain_ref_blob/path", "S4", (2,))], "gain_ref_blob/path is not a column of text"),
        ([("uid", "<u8"), ("movie_blob/has_defect_file", "S4")], "has_defect_file is not a column of numbers"),
        ([("uid", "<u8"), ("gain_ref_blob/flip_x", "<u4", (2,))], "flip_x is not a column of numbers"),
        ([("uid", "<u8"), ("ctf/df1_A", "<f4")], "has no column ctf/df2_A"),
        ([("uid", "<u8", (2,))], "uid is not a column of whole numbers"),
    ],
)
def test_columns_of_other_types_are_named(tmp_path, columns, said):
    table = np.zeros(1, columns)
    table["uid"] = 5
    np.save((tmp_path / "p.cs").open("wb"), table)
    with pytest.raises(InputError, match=said):
        cryosparc.read_particles(tmp_path / "p.cs")


@pytest.mark.parametrize(
    ("name", "kind", "value"),
    [
        ("alignments2D/class", "<f4", 1.5), ("blob/idx", "<f8", 0.5), ("mscope_params/phase_plate", "<f4", np.nan),
        ("ctf/exp_group_id", "<f4", np.nan),
    ],
)  # fmt: skip
def test_parts_of_whole_numbers_are_refused(tmp_path, name, kind, value):
    table = np.zeros(2, [("uid", "<u8"), ("movie_blob/path", "S5"), ("movie_blob/psize_A", "<f4"), (name, kind)])
    table["uid"], table["movie_blob/psize_A"], table[name][1] = [5, 6], 1.0, value
    np.save((tmp_path / "p.cs").open("wb"), table)
    for read in (cryosparc.read_particles, cryosparc.read_micrographs):
        with pytest.raises(InputError, match=f"{name} is not a whole number"):
            read(tmp_path / "p.cs")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("num_items: 4", "num_items: 9", r"has 9 particles or exposures, but p\.cs has fewer"),
        (">p.cs", ">gone.cs", r"gone\.cs does not exist"), ("results:", "other:", "no results with a metafile"),
        ("num_items: 4", "num_items: many", "no results with a metafile"),
    ],
)  # fmt: skip
def test_groups_that_do_not_fit_their_files_are_refused(tmp_path, old, new, said):
    cryosparc.write_particles(tmp_path / "p.cs", columns(4, 1))
    group = tmp_path / "p.csg"
    group.write_text(group.read_text().replace(old, new))
    with pytest.raises(InputError, match=said):
        cryosparc.read_particles(group)


def test_damaged_tables_are_read_or_refused(tmp_path):
    cryosparc.write_particles(tmp_path / "p.cs", columns(4, 1), (3000, 4000))
    rng = np.random.default_rng(1)
    good = {ending: (tmp_path / f"p{ending}").read_bytes() for ending in (".cs", ".csg")}
    refused = 0
    for number in range(400):
        ending = ".csg" if number % 4 == 0 else ".cs"
        data = bytearray(good[ending])
        for _ in range(rng.integers(1, 4)):
            at, what = int(rng.integers(0, min(len(data), 1800))), rng.integers(0, 4)
            if what == 0:
                data[at] = int(rng.integers(0, 256))
            elif what == 1:
                del data[at : at + int(rng.integers(1, 20))]
            elif what == 2:
                data[at:at] = bytes(rng.integers(32, 127, int(rng.integers(1, 9)), dtype=np.uint8))
            else:
                data = data[: at + 2]
        (tmp_path / f"q{ending}").write_bytes(data)
        try:
            cryosparc.read_particles(tmp_path / f"q{ending}")
        except InputError:
            refused += 1
    assert refused > 280


@pytest.mark.parametrize(("name", "width"), [("ctf/tilt_A", 3), ("ctf/tetra_A", 2), ("ctf/anisomag", 2)])
def test_vectors_of_another_length_are_named(tmp_path, name, width):
    cryosparc.write_particles(tmp_path / "p.cs", columns(3, 1))
    with_aberrations(tmp_path / "p.cs", {name: np.ones((3, width), "f4")})
    with pytest.raises(InputError, match=rf"{name} has the shape \({width},\)"):
        cryosparc.read_particles(tmp_path / "p.cs")


def test_a_beam_tilt_is_cs_times_its_sine(tmp_path):
    cryosparc.write_particles(tmp_path / "p.cs", columns(2, 3))
    with_aberrations(tmp_path / "p.cs", {"ctf/tilt_A": np.array([[2.7e7 * np.sin(1e-3), 0], [0, -2.7e7 * np.sin(5e-4)]], "f4")})
    groups = [json.loads(text) for text in cryosparc.read_particles(tmp_path / "p.cs")["relion_optics"]]
    assert [[float(g[f"rlnBeamTilt{axis}"]) for axis in "XY"] for g in groups] == [[1.0, 0.0], [0.0, -0.5]]
    relion = [json.dumps({"rlnBeamTiltX": "1", "rlnBeamTiltY": "0"}), json.dumps({"rlnBeamTiltY": "-0.5"})]
    cryosparc.write_particles(tmp_path / "r.cs", {**columns(2, 3), "relion_optics": np.array(relion, dtype=object)})
    assert np.load(tmp_path / "r.cs")["ctf/tilt_A"] == pytest.approx(np.load(tmp_path / "p.cs")["ctf/tilt_A"], rel=1e-6)
    with_aberrations(tmp_path / "r.cs", {"ctf/trefoil_A": np.array([[1, np.nan], [0, 0]], "f4")})
    with pytest.raises(InputError, match="ctf/trefoil_A has NaN"):
        cryosparc.read_particles(tmp_path / "r.cs")


@pytest.mark.parametrize("text", ["x", "nan", "", "1,2", "[1]"])
@pytest.mark.parametrize("label", ["rlnBeamTiltX", "cryosparcTilt"])
def test_an_aberration_that_is_no_number_is_none(tmp_path, label, text):
    optics = np.array([json.dumps({label: text}), ""], dtype=object)
    cryosparc.write_particles(tmp_path / "r.cs", {**columns(2, 3), "relion_optics": optics})
    whole = (label, text) in (("rlnBeamTiltX", "[1]"), ("cryosparcTilt", "1,2"))
    table = np.load(tmp_path / "r.cs")
    assert ("ctf/tilt_A" in table.dtype.names and table["ctf/tilt_A"].any()) == whole


@pytest.mark.parametrize("suffix", [".cs", ".csg"])
@pytest.mark.parametrize("movies", [True, False])
def test_micrographs_come_back(tmp_path, suffix, movies):
    before = {n: v for n, v in columns(5, 7).items() if n in (*cryosparc._CTF, "cryosparc_uid", "pixel_size_angstrom")}
    before["micrograph_name"] = np.array([f"micrographs/ä{i}.mrc" for i in range(5)], dtype=object)
    if movies:
        before["movie_name"] = np.array([f"/data/m{i}.tif" for i in range(5)], dtype=object)
    cryosparc.write_micrographs(tmp_path / "m.cs", before, (3000, 4000))
    after = cryosparc.read_micrographs(tmp_path / f"m{suffix}")
    assert set(after) == {*before, "optics_group_name"}
    for name, values in before.items():
        if values.dtype.kind == "f":
            np.testing.assert_allclose(after[name], values, rtol=1e-6, err_msg=name)
        else:
            assert after[name].tolist() == values.tolist(), name
    assert np.load(tmp_path / "m.cs")["micrograph_blob/shape"].tolist() == [[3000, 4000]] * 5


def test_a_group_joins_its_files_by_uid(tmp_path):
    one = columns(5, 1)
    cryosparc.write_particles(tmp_path / "p.cs", one, (3000, 4000))
    whole = np.load(tmp_path / "p.cs")
    images = [n for n in whole.dtype.names if n == "uid" or n.startswith("blob")]
    np.save((tmp_path / "blob.cs").open("wb"), whole[images])
    np.save((tmp_path / "rest.cs").open("wb"), whole[["uid", *(n for n in whole.dtype.names if n not in images)]][::-1])
    (tmp_path / "g.csg").write_text("results:\n  blob: {metafile: '>blob.cs'}\n  ctf: {metafile: '>rest.cs'}\n")
    joined = cryosparc.read_particles(tmp_path / "g.csg")
    for name, values in cryosparc.read_particles(tmp_path / "p.cs").items():
        assert joined[name].tolist() == values.tolist(), name
    np.save((tmp_path / "rest.cs").open("wb"), whole[["uid", "ctf/df1_A"]][:3])
    with pytest.raises(InputError, match="lacks particles"):
        cryosparc.read_particles(tmp_path / "g.csg")


def test_files_that_are_no_tables_are_refused(tmp_path):
    good = tmp_path / "p.cs"
    cryosparc.write_particles(good, columns(4, 2))
    table = np.load(good)
    for name, content, message in (
        ("empty.cs", b"", "cannot be read"),
        ("cut.cs", good.read_bytes()[:-20], "cannot be read"),
        ("text.cs", b"data_particles\n", "cannot be read"),
        ("g.csg", b"results: 3\n", "not a group"),
        ("h.csg", b"\xff", "not a valid group"),
        ("i.csg", b"results: {a: {metafile: x.cs}}\nresults: {a: {metafile: y.cs}}\n", "'results' is given twice"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=message):
            cryosparc.read_particles(tmp_path / name)
    with pytest.raises(InputError, match="does not exist"):
        cryosparc.read_particles(tmp_path / "absent.cs")
    np.save((tmp_path / "plain.cs").open("wb"), np.zeros(3))
    with pytest.raises(InputError, match="no column uid"):
        cryosparc.read_particles(tmp_path / "plain.cs")
    twice = table.copy()
    twice["uid"][1] = twice["uid"][0]
    np.save((tmp_path / "twice.cs").open("wb"), twice)
    with pytest.raises(InputError, match="uid twice"):
        cryosparc.read_particles(tmp_path / "twice.cs")
    table["ctf/df1_A"][2] = np.nan
    np.save((tmp_path / "nan.cs").open("wb"), table)
    with pytest.raises(InputError, match="defocus_u_angstrom has NaN"):
        cryosparc.read_particles(tmp_path / "nan.cs")


@pytest.mark.parametrize("more", [b"x", b"\0" * 8, "again"])
def test_a_file_that_goes_on_after_its_rows_is_refused(tmp_path, more):
    path = tmp_path / "p.cs"
    cryosparc.write_particles(path, columns(3, 0), (3000, 4000))
    whole = path.read_bytes()
    path.write_bytes(whole + (whole if more == "again" else more))
    with pytest.raises(InputError, match="goes on after its 3 rows"):
        cryosparc.read_particles(path)


@pytest.mark.parametrize("name", ["blob/path", "location/micrograph_path"])
def test_paths_that_are_needed_are_not_empty(tmp_path, name):
    path = tmp_path / "p.cs"
    cryosparc.write_particles(path, columns(3, 0), (3000, 4000))
    table = np.load(path)
    table[name][1] = b""
    np.save(path.open("wb"), table)
    with pytest.raises(InputError, match=f"{name} of row 2 is empty"):
        cryosparc.read_particles(path)


@pytest.mark.parametrize("name", ["ctf/df1_A", "ctf/df2_A", "ctf/df_angle_rad"])
def test_a_defocus_has_two_values_and_an_angle(tmp_path, name):
    path = tmp_path / "p.cs"
    cryosparc.write_particles(path, columns(3, 0), (3000, 4000))
    table = np.load(path)
    np.save(path.open("wb"), drop_fields(table, name))
    with pytest.raises(InputError, match=f"no column {name}"):
        cryosparc.read_particles(path)
