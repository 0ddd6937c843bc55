"""STAR files of other programs and of text editors: each layout is read rightly, or refused with the line and the name."""

from __future__ import annotations

import shutil
import subprocess

import numpy as np
import pytest
from _star_tables import GROUP, MICROGRAPH, PARTICLE, loop, pairs, particles, stack, write
from hypothesis import given, settings
from hypothesis import strategies as st

from cryodask.errors import StarError
from cryodask.formats import star
from cryodask.formats.star.numbers import floats, whole
from cryodask.vocabulary import LIMITS

A, B = {**MICROGRAPH, "MicrographName": "a.mrc"}, {**MICROGRAPH, "MicrographName": "b.mrc", "DefocusU": 9000}
OPTICS, TABLE = loop("optics", [GROUP]), loop("micrographs", [A, B])
ROW = "a.mrc 1 15000 14000 5\n"

READ = {
    "as RELION writes": OPTICS + TABLE,
    "optics last": TABLE + OPTICS,
    "optics as pairs": pairs("optics", GROUP) + TABLE,
    "optics as pairs with comments": pairs("optics", GROUP).replace("300", "300 # kV") + TABLE,
    "optics as pairs, last": TABLE + pairs("optics", GROUP),
    "byte-order mark": "\ufeff" + OPTICS + TABLE,
    "lines of Windows": (OPTICS + TABLE).replace("\n", "\r\n"),
    "lines of an old Macintosh": (OPTICS + TABLE).replace("\n", "\r"),
    "tabs": OPTICS + TABLE.replace(" ", "\t"),
    "blank lines everywhere": (OPTICS + TABLE).replace("\n", "\n\n \n"),
    "comments between labels": OPTICS + TABLE.replace("_rlnDefocusU", "# defocus\n_rlnDefocusU"),
    "comments between rows": OPTICS + TABLE.replace(ROW, "# first\n" + ROW + "   # next\n"),
    "a comment after loop_": OPTICS + TABLE.replace("loop_", "loop_ # of micrographs"),
    "a comment after data_": OPTICS + TABLE.replace("data_micrographs", "data_micrographs # of today"),
    "a comment after a row": OPTICS + TABLE.replace(ROW, ROW[:-1] + " # best\n"),
    "labels without numbers": (OPTICS + TABLE).replace(" #", " # "),
    "a quoted name": OPTICS + TABLE.replace("a.mrc", "'a.mrc'"),
    "a number in double quotes": OPTICS + TABLE.replace("15000", '"15000"'),
    "unknown tables": "data_more\n\nloop_\n_x\n_y\n1 True\n\n" + OPTICS + "data_job\n\n_rlnJobType 3\n_z yes\n\n" + TABLE,
    "an empty table before": "data_\n\n" + OPTICS + TABLE,
    "no newline at the end": (OPTICS + TABLE).rstrip(),
    "exponents": OPTICS + TABLE.replace("15000", "1.5E+4"),
    "leading zeros and plus": OPTICS + TABLE.replace("15000", "+015000."),
    "an unused group without numbers": loop("optics", [GROUP, {**GROUP, "OpticsGroup": 2, "Voltage": "nan"}]) + TABLE,
    "an unused group of 3 kV": loop("optics", [GROUP, {**GROUP, "OpticsGroup": 2, "Voltage": 3}]) + TABLE,
    "an unused group with words for numbers": loop(
        "optics", [GROUP, {**GROUP, "OpticsGroup": 2, "Voltage": "unknown", "ImageSize": "none", "ImagePixelSize": "x"}]
    )
    + TABLE,
    "keywords in capitals": (OPTICS + TABLE).replace("data_", "DATA_").replace("loop_", "LOOP_"),
    "data_ in capitals": (OPTICS + TABLE).replace("data_", "Data_"),
    "loop_ in capitals": (OPTICS + TABLE).replace("loop_", "Loop_"),
    "the second data_ in capitals": OPTICS + TABLE.replace("data_", "DATA_"),
    "the first data_ in capitals, optics last": TABLE.replace("data_", "DATA_") + OPTICS,
    "the first column in a folder called DATA_": OPTICS + TABLE.replace("b.mrc", "DATA_1/b.mrc"),
    "a movie called loop_": OPTICS + TABLE.replace("b.mrc", "LOOP_1/b.mrc"),
    "names of tables and columns in other cases": (OPTICS + TABLE)
    .replace("data_optics", "data_Optics")
    .replace("_rlnVoltage", "_RLNVOLTAGE")
    .replace("_rlnDefocusU", "_rlnDefocusu"),
    "group numbers out of order": loop("optics", [{**GROUP, "OpticsGroup": 7, "Voltage": 200}, GROUP]) + TABLE,
    "optics without names": loop("optics", [{k: v for k, v in GROUP.items() if k != "OpticsGroupName"}]) + TABLE,
    "the first column in a folder called data_": OPTICS + TABLE.replace("b.mrc", "data_1/b.mrc"),
}


@pytest.mark.parametrize("text", READ.values(), ids=READ)
def test_any_layout_is_read(tmp_path, text):
    columns = star.read_micrographs(write(tmp_path / "m.star", text))
    assert [n.rsplit("/")[-1] for n in columns["micrograph_name"]] == ["a.mrc", "b.mrc"]
    assert columns["defocus_u_angstrom"].tolist() == [15000, 9000]
    assert columns["voltage_kv"].tolist() == [300, 300]
    assert columns["pixel_size_angstrom"].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("label", "value", "ours"),
    [("PhaseShift", 90, "phase_shift_deg"), ("CtfDataAreCtfPremultiplied", 1, "ctf_premultiplied"), ("RandomSubset", 2, "half_set"),
     ("OriginX", 3, "origin_x_angstrom"), ("BeamTiltX", 0.5, "relion_optics")],
)  # fmt: skip
@pytest.mark.parametrize("change", [str.lower, str.upper, str.swapcase])
def test_names_of_columns_are_the_same_in_any_case(tmp_path, label, value, ours, change):
    """A column that is passed over changes what the images mean."""
    text = particles([{**PARTICLE, label: value}])
    usual = star.read_particles(write(tmp_path / "usual.star", text))
    other = star.read_particles(write(tmp_path / "other.star", text.replace(f"_rln{label}", change(f"_rln{label}"))))
    assert ours in usual
    assert {n: v.tolist() for n, v in other.items()} == {n: v.tolist() for n, v in usual.items()}
    both = text.replace(f"_rln{label}", f"_rln{label}\n_{change('rln' + label)}").replace(" 5 ", " 5 7 ")
    with pytest.raises(StarError, match=f"_rln{label} occurs twice"):
        star.read_particles(write(tmp_path / "both.star", both))


@pytest.mark.parametrize("label", ["CoordinateX", "CoordinateY"])
def test_a_coordinate_without_the_other_is_refused(tmp_path, label):
    with pytest.raises(StarError, match="no column rlnCoordinate"):
        star.read_particles(write(tmp_path / "p.star", particles([{**PARTICLE, label: 10}])))


@pytest.mark.parametrize("label", ["DefocusAngle", "AngleRot", "AngleTilt", "AnglePsi"])
@pytest.mark.parametrize(("value", "refused"), [(-180, False), (720.5, False), (1001, True), (15000, True)])
def test_an_angle_is_no_defocus(tmp_path, label, value, refused):
    path = write(tmp_path / "p.star", particles([{**PARTICLE, label: value}]))
    if refused:
        with pytest.raises(StarError, match=f"rln{label} of row 1 is {value}, which is not between -1000 and 1000 degrees"):
            star.read_particles(path)
    else:
        star.read_particles(path)


@pytest.mark.parametrize("capitals", ["data_", "loop_", "data_ loop_"])
def test_the_head_is_read_with_keywords_in_capitals(tmp_path, capitals):
    text = particles([PARTICLE])
    for word in capitals.split():
        text = text.replace(word, word.upper())
    path = write(tmp_path / "p.star", text)
    assert star.read_labels(path, "particles") == {f"rln{name}" for name in PARTICLE}
    assert star.read_optics(path) == [{"pixel_size_angstrom": 1.0, "particle_pixel_size_angstrom": 2.0, "box": 32.0}]


@pytest.mark.parametrize("irregular", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_plans_ask_only_groups_that_rows_use(tmp_path, irregular, last):
    """An unused group of another pixel size is none of the file's: a box in pixels has one length."""
    groups = [{**GROUP, "OpticsGroup": 4, "MicrographPixelSize": 3, "ImageSize": 64}, GROUP, {**GROUP, "OpticsGroup": 2, "ImageSize": 48}]
    rows = [PARTICLE, {**PARTICLE, "ImageName": "2@a.mrcs", "OpticsGroup": 2}]
    text = loop("optics", groups[1:] if last else groups) + loop("particles", rows[: 1 if last else 2])
    path = write(tmp_path / "p.star", text.replace("2@a.mrcs", "'2@a.mrcs'") if irregular else text)
    boxes = [(group["pixel_size_angstrom"], group["box"]) for group in star.read_optics(path)]
    assert boxes == ([(1.0, 32.0)] if last else [(1.0, 32.0), (1.0, 48.0)])


def test_plans_ask_all_groups_that_have_no_numbers(tmp_path):
    groups = [{n: v for n, v in {**GROUP, "ImageSize": size}.items() if n != "OpticsGroup"} for size in (32, 48)]
    assert [group["box"] for group in star.read_optics(write(tmp_path / "p.star", particles([PARTICLE], groups)))] == [32, 48]


@pytest.mark.parametrize("name", ["Data_001.mrc", "DATA_001.mrc", "dATA_1/x.mrc"])
def test_names_in_a_table_of_one_column_may_begin_like_a_keyword_in_capitals(tmp_path, name):
    """RELION takes nothing but ``data_`` in small letters for the next table."""
    path = write(tmp_path / "m.star", pairs("optics", GROUP) + loop("micrographs", [{"MicrographName": "a.mrc"}, {"MicrographName": name}]))
    assert star.read_micrographs(path)["micrograph_name"].tolist() == ["a.mrc", name]


@pytest.mark.parametrize(("label", "value"), [("Voltage", "unknown"), ("ImagePixelSize", "x"), ("ImageSize", "nan"), ("ImageSize", "32.5")])
def test_a_group_that_rows_use_is_refused_by_its_number_for_a_word(tmp_path, label, value):
    groups = [{**GROUP, "OpticsGroup": 7}, {**GROUP, "OpticsGroup": 5, label: value}]
    path = write(tmp_path / "p.star", particles([{**PARTICLE, "OpticsGroup": n} for n in (7, 5)], groups))
    with pytest.raises(StarError, match=rf"rln{label}.*(optics group 5|integers)"):
        star.read_particles(path)
    path = write(tmp_path / "q.star", particles([{**PARTICLE, "OpticsGroup": 7}], groups))
    assert star.read_particles(path)["voltage_kv"].tolist() == [300]


OLD = {k: v for k, v in PARTICLE.items() if k != "OpticsGroup"} | {
    "CoordinateX": 100, "CoordinateY": 120, "Voltage": 300, "SphericalAberration": 2.7, "AmplitudeContrast": 0.1, "OriginX": 1.5,
    "OriginY": -2, "DetectorPixelSize": 5, "Magnification": 25000,
}  # fmt: skip


def test_the_magnification_of_relion_3_0_particles_is_that_of_their_images(tmp_path):
    """5 um / 25,000 = 2 A; relion_preprocess --scale of RELION 3.0 writes the magnification of the scaled images."""
    read = star.read_particles(write(tmp_path / "old.star", loop("", [OLD])))
    assert read["particle_pixel_size_angstrom"].tolist() == [2.0]
    assert (read["origin_x_angstrom"].tolist(), read["origin_y_angstrom"].tolist()) == ([3.0], [-4.0])
    assert "pixel_size_angstrom" not in read
    rows = {k: v for k, v in OLD.items() if k != "ImageName"}
    assert star.read_micrographs(write(tmp_path / "mics.star", loop("", [rows])))["pixel_size_angstrom"].tolist() == [2.0]


@pytest.mark.skipif(shutil.which("relion_convert_star") is None, reason="needs RELION")
def test_relion_converts_its_old_tables_to_what_we_read(tmp_path):
    stack(tmp_path / "a.mrcs", 2)
    old = write(tmp_path / "old.star", loop("", [OLD, {**OLD, "ImageName": "2@a.mrcs", "CoordinateX": 90.25, "OriginX": -0.75}]))
    subprocess.run(["relion_convert_star", "--i", "old.star", "--o", "new.star"], cwd=tmp_path, check=True, capture_output=True)
    ours, theirs = star.read_particles(old), star.read_particles(tmp_path / "new.star")
    named = {"box", "image_dimensions", "optics_group", "optics_group_name"}
    assert set(theirs) - set(ours) == named
    assert not set(ours) - set(theirs)
    for name in ours:
        if ours[name].dtype == object:
            assert ours[name].tolist() == theirs[name].tolist()
        else:
            np.testing.assert_allclose(ours[name], theirs[name], atol=1e-6)


@pytest.mark.parametrize("value", ["nan", "NaN", "-nan", "inf", "-inf", "Inf", "1e999", "<NA>"])
@pytest.mark.parametrize("label", ["CtfMaxResolution", "CtfFigureOfMerit", "AccumMotionTotal", "DefocusU"])
def test_a_number_that_is_missing_concerns_its_row_only(tmp_path, label, value):
    rows = [{**A, label: 400}, {**B, label: value}]
    columns = star.read_micrographs(write(tmp_path / "m.star", OPTICS + loop("micrographs", rows)))
    ours = next(c.name for c in star.COLUMNS if c.relion == f"rln{label}")
    assert columns[ours][0] == 400
    assert np.isnan(columns[ours][1])
    assert columns["micrograph_name"].tolist() == ["a.mrc", "b.mrc"]


@pytest.mark.parametrize("word", ["True", "yes", "bad", "-", "1,5"])
def test_a_word_in_a_side_column_is_a_missing_number(tmp_path, word):
    text = OPTICS + loop("micrographs", [{**A, "CtfMaxResolution": word}, {**B, "CtfMaxResolution": 3.5}])
    resolution = star.read_micrographs(write(tmp_path / "m.star", text))["ctf_resolution_angstrom"]
    assert np.isnan(resolution[0])
    assert resolution[1] == 3.5


NO_NUMBERS = ["True", "false", "yes", "12_000", "1:30", "0x10", "1e", "1.2.3", "--5", "1,5", "\u0661\u0662", "\u00b2", "\uff11", "1d4", "."]


@pytest.mark.parametrize("word", NO_NUMBERS)
@pytest.mark.parametrize("label", ["DefocusU", "OpticsGroup"])
def test_words_are_no_numbers(tmp_path, label, word):
    path = write(tmp_path / "m.star", OPTICS + loop("micrographs", [A, {**B, label: word}]))
    with pytest.raises(StarError, match=f"rln{label}"):
        star.read_micrographs(path)


@given(st.one_of(st.floats(allow_nan=False, allow_infinity=False).map(repr), st.integers(-(2**70), 2**70).map(str), st.text(max_size=8)))
@settings(max_examples=300, deadline=None)
def test_what_is_a_number_is_what_c_and_python_both_read(text):
    numbers, bad = floats([text])
    try:
        value = float(text) if text.isascii() and "_" not in text and text == text.strip() else None
    except ValueError:
        value = None
    if value is None:
        assert len(bad) or np.isnan(numbers[0])
    elif np.isfinite(value):
        assert numbers[0] == value
    else:
        assert np.isnan(numbers[0])
    if whole([text]) is not None:
        assert whole([text])[0] == int(text)


REFUSED = {
    "a table twice": (OPTICS + TABLE + TABLE, "data_micrographs occurs twice"),
    "optics twice": (OPTICS + OPTICS + TABLE, "line 14: the table data_optics occurs twice"),
    "an unnamed table twice": ("data_\nloop_\n_x\n1\ndata_\nloop_\n_x\n1\n", "data_ occurs twice"),
    "a column twice": (OPTICS + TABLE.replace("DefocusAngle", "DefocusU"), "line 21: the column _rlnDefocusU occurs twice"),
    "a column of pairs twice": (pairs("optics", GROUP) + "_rlnVoltage 200\n" + TABLE, "_rlnVoltage occurs twice"),
    "a row before loop_": (OPTICS + TABLE.replace("loop_", "c.mrc 1 1 1 1\nloop_"), "line 16: the row 'c.mrc 1 1 1 1' stands before loop_"),
    "a row before the first table": ("c.mrc 1 1 1 1\n" + OPTICS + TABLE, "line 1"),
    "a row without loop_": (OPTICS + TABLE.replace("loop_\n", ""), "line 16"),
    "a label after the rows": (OPTICS + TABLE + "_rlnVoltage #6\n", "after the rows"),
    "two loops in a table": (OPTICS + TABLE + loop("x", [A]).replace("data_x\n", ""), "a second loop_"),
    "an open quote": (OPTICS + TABLE.replace("a.mrc", "'a.mrc"), "quot"),
    "a short row": (OPTICS + TABLE.replace("9000 14000 5", "9000 14000"), "4 values for 5 columns"),
    "a long row": (OPTICS + TABLE.replace("9000 14000 5", "9000 14000 5 5"), "6 values for 5 columns"),
    "a name with a blank": (OPTICS + TABLE.replace("b.mrc", "b c.mrc"), "6 values for 5 columns"),
    "text of several lines": (OPTICS + TABLE + "data_x\n_y\n;\ntext\n;\n", "line"),
    "zero bytes": (OPTICS + TABLE.replace("9000", "90\0\0"), "zero byte"),
    "a group number twice": (loop("optics", [GROUP, {**GROUP, "Voltage": 200}]) + TABLE, "optics group 1 is in data_optics twice"),
    "a group that is not there": (loop("optics", [{**GROUP, "OpticsGroup": 3}]) + TABLE, "optics group 1 is not in data_optics"),
    "a voltage that is missing": (loop("optics", [{**GROUP, "Voltage": "nan"}]) + TABLE, "rlnVoltage of optics group 1 is not a number"),
    "no optics": (TABLE, "no data_optics"),
    "another table": (OPTICS + loop("movies_of_mine", [A]), "no table data_micrographs"),
    "not text": ("\ud800", "UTF-8"),
}


@pytest.mark.parametrize(("text", "words"), REFUSED.values(), ids=REFUSED)
def test_what_is_ambiguous_is_refused_by_line_and_name(tmp_path, text, words):
    path = tmp_path / "m.star"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(StarError, match=words):
        star.read_micrographs(path)


OUTSIDE = {
    "Voltage": [3, 0, -300, 300000, 3e5], "SphericalAberration": [-2.7, 2.7e7, 2700], "AmplitudeContrast": [10, -0.1, 1.01],
    "MicrographPixelSize": [0, -1, 1e-10, 1000], "ImagePixelSize": [0, -2, 2e-10],
}  # fmt: skip


@pytest.mark.parametrize(("label", "value"), [(label, v) for label, some in OUTSIDE.items() for v in some])
def test_quantities_outside_their_limits_are_refused_by_name(tmp_path, label, value):
    path = write(tmp_path / "p.star", particles([PARTICLE], [{**GROUP, label: value}]))
    with pytest.raises(StarError, match=rf"rln{label} of optics group 1 is .* not between"):
        star.read_particles(path)


@pytest.mark.parametrize(("value", "words"), [(1.5e7, "not between"), (-6e5, "not between"), (1.5, "micrometres"), (0.8, "micrometres")])
def test_a_defocus_in_another_unit_is_refused(tmp_path, value, words):
    path = write(tmp_path / "p.star", particles([{**PARTICLE, "DefocusU": value}]))
    with pytest.raises(StarError, match=rf"rlnDefocusU.*{words}|(?s:rlnDefocusU.*{words})"):
        star.read_particles(path)


@given(st.sampled_from(sorted(LIMITS)), st.floats(-1e9, 1e9))
@settings(max_examples=60, deadline=None)
def test_the_project_file_has_the_same_limits(name, value):
    from pydantic import ValidationError

    from cryodask.run.recipe import Microscope

    usual = {"voltage_kv": 300.0, "spherical_aberration_mm": 2.7, "amplitude_contrast": 0.1, "pixel_size_angstrom": 1.0}
    if name not in usual:
        return
    try:
        Microscope(**{**usual, name: value})
        taken = True
    except ValidationError:
        taken = False
    assert taken == bool(LIMITS[name].hold(value))


@pytest.mark.parametrize(
    "name", ["<NA>", "nan", "None", "NULL", "True", "1", "1e5", "inf", "\u00c5ngstr\u00f6m.mrc", "d'Arc.mrc", "a#b.mrc"]
)
def test_names_stay_what_they_are(tmp_path, name):
    path = write(tmp_path / "m.star", OPTICS + loop("micrographs", [{**A, "MicrographName": name}]))
    assert star.read_micrographs(path)["micrograph_name"].tolist() == [name]


@pytest.mark.parametrize(
    "name", ["\u0661@s.mrcs", "\u00b2@s.mrcs", "1_0@s.mrcs", "+1@s.mrcs", "1.0@s.mrcs", "0@s.mrcs", "True@s.mrcs", "1@", "s.mrcs"]
)
def test_image_names_need_a_number(tmp_path, name):
    with pytest.raises(StarError, match="NUMBER@STACK"):
        star.read_particles(write(tmp_path / "p.star", particles([{**PARTICLE, "ImageName": name}])))


def test_names_are_those_beside_the_file_and_not_in_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "project/Import").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    for folder in ("project", "here"):
        (tmp_path / folder / "s.mrcs").write_text(folder)
    monkeypatch.chdir(tmp_path / "here")
    file = tmp_path / "project/Import/p.star"
    assert star.find_beside("s.mrcs", file) == tmp_path / "project/s.mrcs"
    assert star.find_beside("only_here.mrcs", file) is None
    (tmp_path / "project/Import/s.mrcs").write_text("nearest")
    assert star.find_beside("s.mrcs", file) == tmp_path / "project/Import/s.mrcs"


def test_optics_of_each_row_and_all_that_is_kept(tmp_path):
    other = {**GROUP, "OpticsGroup": 2, "Voltage": 200, "SphericalAberration": 1.4, "AmplitudeContrast": 0.07}
    kept = {"BeamTiltX": 0.25, "OddZernike": "[0.1,-2,0]", "MtfFileName": "mtf.star"}
    text = particles(
        [PARTICLE, {**PARTICLE, "ImageName": "2@a.mrcs", "OpticsGroup": 2}], [{**GROUP, **kept}, {**other, **kept, "BeamTiltX": -1}]
    )
    (tmp_path / "mtf.star").write_text("")
    columns = star.read_particles(write(tmp_path / "p.star", text))
    assert columns["voltage_kv"].tolist() == [300, 200]
    assert columns["spherical_aberration_mm"].tolist() == [2.7, 1.4]
    assert columns["amplitude_contrast"].tolist() == [0.1, 0.07]
    star.write_particles(tmp_path / "q.star", columns)
    again = star.read_particles(tmp_path / "q.star")
    assert again["relion_optics"].tolist() == columns["relion_optics"].tolist()
    assert f'"{tmp_path / "mtf.star"}"' in columns["relion_optics"][0]
    groups = star.read_tables(tmp_path / "q.star")["optics"]
    assert groups["rlnBeamTiltX"].tolist() == [0.25, -1]
    assert groups["rlnOddZernike"].tolist() == ["[0.1,-2,0]"] * 2
