"""STAR files: round trips, translation into the vocabulary, and refusal of what is broken."""

import numpy as np
import pandas as pd
import pytest
import starfile
from hypothesis import given, settings
from hypothesis import strategies as st

from cryodask.errors import StarError
from cryodask.formats import star

NUMBERS = st.floats(-1e6, 1e6, allow_nan=False).map(lambda x: float(f"{x:.9g}"))
WORDS = st.text(st.characters(categories=("Lu", "Ll", "Nd"), include_characters="_-./@"), min_size=1, max_size=20).filter(
    lambda t: not t.startswith(("_", "data_", "loop_"))
)
# the stem of "..mrc" is ".", which names no exposure: the reader refuses it
NAMES = WORDS.filter(lambda t: t.rpartition("/")[2] != ".").map(lambda t: f"mic/{t}.mrc")


@st.composite
def particle_columns(draw):
    n = draw(st.integers(0, 8))

    def column(values):
        return np.array(draw(st.lists(values, min_size=n, max_size=n)))

    columns = {
        name: column(st.floats(20, 1e5) | st.floats(-1e5, -20)).astype(float) for name in ("defocus_u_angstrom", "defocus_v_angstrom")
    } | {name: column(NUMBERS).astype(float) for name in ("particle_y", "particle_x", "log_likelihood")}
    columns |= {f"{name}_deg": column(st.floats(-720, 720)).astype(float) for name in ("defocus_angle", "rot", "tilt", "psi")}
    columns |= {f"origin_{axis}_angstrom": column(st.floats(-1e3, 1e3)).astype(float) for axis in "yx"}
    columns["class_number"] = column(st.integers(0, 99)).astype(int)
    columns["half_set"] = column(st.integers(0, 1)).astype(int)
    columns["image_index"] = column(st.integers(0, 10**6)).astype(int)
    columns["micrograph_name"] = column(NAMES).astype(object)
    columns["image_stack"] = column(WORDS.map(lambda t: f"{t}s.mrcs")).astype(object)
    columns["voltage_kv"] = column(st.sampled_from([100.0, 200.0, 300.0])).astype(float)
    columns["spherical_aberration_mm"] = column(st.sampled_from([0.01, 1.4, 2.7])).astype(float)
    columns["amplitude_contrast"] = np.full(n, 0.1)
    columns["pixel_size_angstrom"] = np.full(n, 0.885)
    columns["particle_pixel_size_angstrom"] = np.full(n, 3.54)
    columns["box"] = np.full(n, 64)
    return columns


@settings(max_examples=60, deadline=None)
@given(columns=particle_columns())
def test_particles_come_back_as_they_were_written(columns, tmp_path_factory):
    path = tmp_path_factory.mktemp("star") / "p.star"
    star.write_particles(path, columns)
    back = star.read_particles(path)
    for name, values in columns.items():
        if values.dtype == object:
            assert back[name].tolist() == values.tolist()
        else:
            np.testing.assert_allclose(back[name], values, rtol=1e-8, err_msg=name)


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    rows=st.integers(1, 6),
    names=st.lists(st.from_regex(r"rln[A-Z][a-z]{1,10}", fullmatch=True), unique=True, min_size=1, max_size=5),
)
def test_any_table_of_numbers_and_names_survives(data, rows, names, tmp_path_factory):
    path = tmp_path_factory.mktemp("star") / "t.star"
    table = pd.DataFrame({n: data.draw(st.lists(NUMBERS, min_size=rows, max_size=rows)) for n in names})
    table["rlnMicrographName"] = data.draw(st.lists(NAMES, min_size=rows, max_size=rows))
    star.write_tables(path, {"general": {"rlnVoltage": 300.0}, "micrographs": table})
    back = star.read_tables(path)
    assert back["general"] == {"rlnVoltage": 300.0}
    assert back["micrographs"]["rlnMicrographName"].tolist() == table["rlnMicrographName"].tolist()
    np.testing.assert_allclose(back["micrographs"][names], table[names], rtol=1e-8)


def test_micrographs_written_with_two_optics_groups_come_back(tmp_path):
    columns = {
        "micrograph_name": ["a.mrc", "b.mrc", "c.mrc"],
        "defocus_u_angstrom": [1e4, 1.1e4, 1.2e4],
        "defocus_v_angstrom": [9e3, 1e4, 1.1e4],
        "defocus_angle_deg": [10.0, -80.0, 90.0],
        "voltage_kv": [300.0, 200.0, 300.0],
        "spherical_aberration_mm": 2.7,
        "amplitude_contrast": 0.07,
        "pixel_size_angstrom": 1.77,
    }
    star.write_micrographs_ctf(tmp_path / "m.star", columns)
    back = star.read_micrographs(tmp_path / "m.star")
    assert back["optics_group"].tolist() == [1, 2, 1]
    assert back["voltage_kv"].tolist() == [300.0, 200.0, 300.0]
    assert back["spherical_aberration_mm"].tolist() == [2.7] * 3
    assert star.read_tables(tmp_path / "m.star")["micrographs"]["rlnCtfAstigmatism"].tolist() == [1000.0] * 3


def test_images_and_halves_count_from_one_in_relion_and_from_nought_here_classes_from_one_in_both(tmp_path):
    columns = {
        "image_index": [0, 4],
        "image_stack": "x.mrcs",
        "class_number": [1, 3],
        "half_set": [0, 1],
        "box": 64,
        "voltage_kv": 300.0,
        "spherical_aberration_mm": 2.7,
        "amplitude_contrast": 0.1,
        "particle_pixel_size_angstrom": 2.0,
    }
    star.write_particles(tmp_path / "p.star", columns)
    table = starfile.read(tmp_path / "p.star")["particles"]
    assert table.rlnImageName.tolist() == ["000001@x.mrcs", "000005@x.mrcs"]
    assert table.rlnClassNumber.tolist() == [1, 3]
    assert table.rlnRandomSubset.tolist() == [1, 2]
    back = star.read_particles(tmp_path / "p.star")
    assert [back[name].tolist() for name in ("image_index", "class_number", "half_set")] == [[0, 4], [1, 3], [0, 1]]


def test_motion_is_the_correction_from_the_first_frame_in_pixels(tmp_path):
    shift = np.array([[-1.0, 2.0], [0.0, 0.0], [1.0, -2.0]])  # (y, x) Angstrom, displacement of the specimen
    star.write_motion(
        tmp_path / "m.star",
        movie_name="a.tif",
        width=100,
        height=80,
        frame_shift=shift,
        pixel_size_angstrom=2.0,
        voltage_kv=300.0,
        dose_per_frame=1.0,
        motion_polynomial=np.arange(36) / 10,
        hot_pixel=np.array([[3, 4]]),
    )
    tables = star.read_tables(tmp_path / "m.star")
    assert tables["global_shift"]["rlnMicrographShiftX"].tolist() == [0.0, 1.0, 2.0]
    assert tables["global_shift"]["rlnMicrographShiftY"].tolist() == [0.0, -0.5, -1.0]
    assert tables["general"]["rlnMotionModelVersion"] == 1
    assert len(tables["local_motion_model"]) == 36
    assert tables["hot_pixels"]["rlnCoordinateX"].tolist() == [4.0]


def test_postprocess_table_has_relions_columns(tmp_path):
    curve = np.array([1.0, 0.9, 0.1])
    star.write_postprocess(
        tmp_path / "p.star",
        shell_resolution_angstrom=np.array([np.inf, 20.0, 10.0]),
        fsc_unmasked=curve,
        fsc_masked=curve,
        fsc_randomised=curve,
        fsc_corrected=curve,
        resolution_angstrom=12.0,
        b_factor_angstrom2=-80.0,
    )
    tables = star.read_tables(tmp_path / "p.star")
    assert tables["general"]["rlnFinalResolution"] == 12.0
    assert tables["fsc"]["rlnAngstromResolution"].tolist() == [999.0, 20.0, 10.0]
    assert tables["fsc"]["rlnFourierShellCorrelationCorrected"].tolist() == curve.tolist()


def test_two_tables_of_coordinates_in_one_file_are_refused(tmp_path):
    table = "loop_\n_rlnCoordinateX #1\n_rlnCoordinateY #2\n"
    path = tmp_path / "picks.star"
    path.write_text(f"data_first\n\n{table}10 20\n\ndata_second\n\n{table}30 40\n")
    with pytest.raises(StarError, match="2 tables of coordinates: data_first, data_second"):
        star.read_coordinates(path)
    path.write_text(f"data_first\n\n{table}10 20\n\ndata_empty\n\n{table}")
    assert star.read_coordinates(path)["particle_x"].tolist() == [10.0]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (["0.5 0.25 0", "0.1 0.9 0"], "between 0 and 1 only"), (["0.5 0.25 0"], ""), (["0 1 0", "1 0 0"], ""),
        (["0.5 0.25 0", "7 9 0"], ""), (["-5 2000 0"], ""),
        (["5 5 7", "6 6 7"], "in three dimensions"), (["1e12 5 0"], "rlnCoordinateX of row 1 is 1e\\+12"),
    ],
)  # fmt: skip
def test_coordinates_that_are_no_pixels_of_a_micrograph_are_refused(tmp_path, rows, said):
    """Fractions of the micrograph, positions in a tomogram, and columns that are shifted."""
    path = tmp_path / "picks.star"
    path.write_text("data_\n\nloop_\n_rlnCoordinateX #1\n_rlnCoordinateY #2\n_rlnCoordinateZ #3\n" + "\n".join(rows) + "\n")
    if said:
        with pytest.raises(StarError, match=said):
            star.read_coordinates(path)
    else:
        assert len(star.read_coordinates(path)["particle_x"]) == len(rows)


def test_coordinates_are_read_by_starfile(tmp_path):
    star.write_coordinates(tmp_path / "c.star", np.array([1.5, 2.0]), np.array([3.0, 4.0]), np.array([0.1, 0.2]))
    table = starfile.read(tmp_path / "c.star")
    assert table.rlnCoordinateY.tolist() == [1.5, 2.0]
    star.write_coordinates(tmp_path / "none.star", np.zeros(0), np.zeros(0))
    assert len(star.read_tables(tmp_path / "none.star")[""]) == 0


def test_real_tables_of_relion_3_1_and_5_are_read(shared):
    data = shared / "data"
    official = star.read_micrographs(data / "betagal_10204/micrographs_ctf_official.star")
    assert len(official["defocus_u_angstrom"]) == 11
    assert set(official["pixel_size_angstrom"]) == {0.885}
    betagal = star.read_particles(data / "betagal_10204/particles.star")
    assert len(betagal["image_index"]) == 2374  # counted in data/README.md
    assert betagal["image_index"].tolist() == list(range(2374))
    for name in ("relion31.star", "relion5.star"):
        assert star.read_particles(data / "metadata/relion" / name)["half_set"].max() <= 1


def test_relion_3_0_without_optics_is_refused_by_name(shared):
    with pytest.raises(StarError, match=r"rlnAmplitudeContrast(.|\n)*RELION 3\.0") as caught:
        star.read_particles(shared / "data/metadata/relion/FinalRefinement-OriginalParticles-PfCRT.star")
    assert "relion_convert_star" in caught.value.way_out


def test_relion_3_0_with_its_own_optics_is_read_with_origins_in_angstrom(tmp_path):
    table = {
        "rlnImageName": ["1@a.mrcs"],
        "rlnVoltage": [300.0],
        "rlnSphericalAberration": [2.7],
        "rlnAmplitudeContrast": [0.1],
        "rlnDetectorPixelSize": [5.0],
        "rlnMagnification": [25000.0],
        "rlnOriginX": [1.5],
        "rlnOriginY": [-2.0],
    }
    star.write_tables(tmp_path / "old.star", {"": pd.DataFrame(table)})
    columns = star.read_particles(tmp_path / "old.star")
    assert columns["particle_pixel_size_angstrom"].tolist() == [2.0]
    assert columns["origin_x_angstrom"].tolist() == [3.0]
    assert columns["origin_y_angstrom"].tolist() == [-4.0]


HEAD = """data_optics

loop_
_rlnOpticsGroup #1
_rlnVoltage #2
_rlnSphericalAberration #3
_rlnAmplitudeContrast #4
_rlnMicrographPixelSize #5
1 300 2.7 0.1 1.0

data_micrographs

loop_
_rlnMicrographName #1
_rlnOpticsGroup #2
_rlnDefocusU #3
"""


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("a.mrc 1 10000\nb.mrc 1\n", "2 values for 3 columns"),
        ("a.mrc 1 10000\nb c.mrc 1 10000\n", "4 values for 3 columns"),
        ("a.mrc nan 10000\n", "not a number in row 1"),
        ("a.mrc inf 10000\n", "not a number in row 1"),
        ("a.mrc 1 10000\nb.mrc 1 eleven\n", "not numeric"),
        ("a.mrc 2 10000\n", "optics group 2 is not in"),
        ("a.mrc 1.5 10000\n", "not integers"),
        ("'a.mrc 1 10000\n", "closing quotation|unclosed"),
    ],
)
def test_broken_rows_are_refused(tmp_path, rows, message):
    path = tmp_path / "m.star"
    path.write_text(HEAD + rows)
    with pytest.raises(StarError, match=f"(?i){message}"):
        star.read_micrographs(path)


def test_a_corrected_file_is_reread(tmp_path):
    path = tmp_path / "m.star"
    path.write_text(HEAD + "a.mrc 1 ten\n")
    with pytest.raises(StarError):
        star.read_micrographs(path)
    path.write_text(HEAD + "a.mrc 1 10000\n")
    assert star.read_micrographs(path)["defocus_u_angstrom"].tolist() == [1e4]


@pytest.mark.parametrize("text", ["", "no blocks here\n", "data_\n", "data_other\n\nloop_\n_rlnX #1\n1\n"])
def test_files_that_are_no_tables_of_micrographs_are_refused(tmp_path, text):
    path = tmp_path / "m.star"
    path.write_text(text)
    with pytest.raises(StarError):
        star.read_micrographs(path)


def test_missing_file_missing_columns_and_unwritable_text_are_refused(tmp_path):
    with pytest.raises(StarError, match="cannot be read"):
        star.read_tables(tmp_path / "absent.star")
    with pytest.raises(StarError, match="without"):
        star.write_particles(tmp_path / "p.star", {"image_index": [0]})
    for name in ("a b.mrc", "", "a'b.mrc"):
        with pytest.raises(StarError, match="cannot contain"):
            star.write_tables(tmp_path / "t.star", {"": pd.DataFrame({"rlnMicrographName": [name]})})
    with pytest.raises(StarError, match="NaN"):
        star.write_tables(tmp_path / "t.star", {"": pd.DataFrame({"rlnDefocusU": [np.nan]})})
