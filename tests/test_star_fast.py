"""The fast way to read STAR files: the same columns as the general reader, for a fraction of its cost; exact particle ids."""

import resource
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cryodask.errors import StarError
from cryodask.formats import star
from cryodask.formats.star import blocks, read
from cryodask.formats.star.texts import split_image_names

OPTICS = """
# version 30001

data_optics

loop_
_rlnOpticsGroupName #1
_rlnOpticsGroup #2
_rlnMicrographOriginalPixelSize #3
_rlnVoltage #4
_rlnSphericalAberration #5
_rlnAmplitudeContrast #6
_rlnImagePixelSize #7
_rlnImageSize #8
_rlnImageDimensionality #9
opticsGroup1            1     0.885000   300.000000     2.700000     0.100000     3.540000           64            2
opticsGroup2            2     0.885000   200.000000     1.400000     0.100000     3.540000           64            2


# version 30001

data_particles

loop_
"""
FLOATS = (
    *("rlnCoordinateX", "rlnCoordinateY", "rlnDefocusU", "rlnDefocusV", "rlnDefocusAngle", "rlnPhaseShift", "rlnCtfBfactor"),
    *("rlnCtfScalefactor", "rlnCtfMaxResolution", "rlnCtfFigureOfMerit", "rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"),
    *("rlnOriginXAngst", "rlnOriginYAngst", "rlnNormCorrection", "rlnLogLikeliContribution", "rlnMaxValueProbDistribution"),
    *("rlnAutopickFigureOfMerit", "rlnHelicalTubeID"),
)
LABELS = (*FLOATS[:2], "rlnImageName", "rlnMicrographName", *FLOATS[2:], "rlnOpticsGroup", "rlnClassNumber")
LABELS = (*LABELS, "rlnRandomSubset", "rlnNrOfSignificantSamples")


def write_like_relion(path, particles, micrographs, seed=0, extra_label=None):
    """A refined particles.star of 26 columns, written in pieces so that its writer is no larger than its reader."""
    random = np.random.default_rng(seed)
    labels = [*LABELS, *([extra_label] if extra_label else [])]
    with open(path, "w", encoding="utf-8") as file:
        file.write(OPTICS + "".join(f"_{name} #{i}\n" for i, name in enumerate(labels, 1)))
        of = np.sort(random.integers(0, micrographs, particles))
        for begin in range(0, particles, 10_000):
            rows = of[begin : begin + 10_000]
            numbers = random.normal(0, 50, (len(rows), len(FLOATS)))
            whole = np.stack([1 + rows % 2, random.integers(1, 5, len(rows)), random.integers(1, 3, len(rows)), rows], axis=1)
            for i, (m, f, w) in enumerate(zip(rows.tolist(), numbers.tolist(), whole.tolist()), begin):
                names = f"{i % 999 + 1:06d}@Extract/job012/Movies/grid_{m:06d}_frames.mrcs MotionCorr/job002/Movies/grid_{m:06d}_frames.mrc"
                values = [f"{f[0]:12.6f} {f[1]:12.6f} {names}", *(f"{x:12.6f}" for x in f[2:]), *(f"{x:12d}" for x in w)]
                if extra_label:
                    values.append(str((1 << 50) + 8192 * m + 128 * i))
                file.write(" ".join(values) + " \n")
        file.write("\n")
    return path


def slowly(monkeypatch, function, path):
    """What the general reader gives."""
    with monkeypatch.context() as patch:
        patch.setattr(read, "scan", lambda *_, **__: None)
        return function(path)


def same(a, b):
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.fixture
def regular(monkeypatch):
    """Fails if a file goes the slow way."""

    def refuse(path):
        raise AssertionError(f"{path} was read slowly")

    monkeypatch.setattr(read, "read_blocks", refuse)


def test_many_particles_read_as_the_general_reader_reads_them(tmp_path, monkeypatch):
    path = write_like_relion(tmp_path / "p.star", 20_000, 100)
    monkeypatch.setattr(blocks, "_PIECE", 100_000)  # several pieces
    assert blocks.scan(path, ["rlnImageName"]) is not None
    same(star.read_particles(path), slowly(monkeypatch, star.read_particles, path))


def test_the_table_groups_rows_by_micrograph(tmp_path, regular):
    path = write_like_relion(tmp_path / "p.star", 5_000, 37, extra_label="cryodaskParticleId")
    columns, table = star.read_particles(path), star.read_particle_table(path)
    assert len(table) == 5_000
    assert table.micrographs == list(dict.fromkeys(columns["micrograph_name"]))
    assert table.stacks == list(dict.fromkeys(columns["image_stack"]))
    assert (table.micrograph.dtype, table.stack.dtype, table.image_index.dtype) == (np.int32, np.int32, np.int64)
    assert (np.array(table.micrographs, object)[table.micrograph] == columns["micrograph_name"]).all()
    assert (np.array(table.stacks, object)[table.stack] == columns["image_stack"]).all()
    for k, name in enumerate(table.micrographs):
        np.testing.assert_array_equal(table.rows_of(k), np.flatnonzero(columns["micrograph_name"] == name))
    assert table.half_set.dtype == np.int8
    assert set(table.half_set.tolist()) == {0, 1}
    np.testing.assert_array_equal(table.particle_id, columns["particle_id"])
    assert table.columns["particle_id"].dtype == np.int64
    for name in ("particle_x", "rot_deg", "origin_x_angstrom", "class_number", "voltage_kv", "box"):
        np.testing.assert_array_equal(table.columns[name], columns[name])


def test_only_the_wanted_columns_are_read(tmp_path, regular):
    path = write_like_relion(tmp_path / "p.star", 50, 3)
    table = star.read_particle_table(path, ["particle_x", "voltage_kv", "particle_id"])
    assert set(table.columns) == {"particle_x", "voltage_kv"}
    assert table.particle_id is None
    assert table.half_set.tolist() == [-1] * 50
    with pytest.raises(StarError, match="particle_z"):
        star.read_particle_table(path, ["particle_z"])


ROW_HEAD = (
    "data_optics\nloop_\n_rlnOpticsGroup #1\n_rlnVoltage #2\n_rlnSphericalAberration #3\n_rlnAmplitudeContrast #4\n"
    "_rlnImagePixelSize #5\n1 300 2.7 0.1 1.5\n\ndata_particles\nloop_\n"
)


def small(path, rows, labels=("rlnImageName", "rlnOpticsGroup", "rlnDefocusAngle"), tail=""):
    path.write_text(ROW_HEAD + "".join(f"_{label} #{i}\n" for i, label in enumerate(labels, 1)) + rows + tail)
    return path


def test_without_micrograph_names_each_stack_is_one(tmp_path, regular):
    table = star.read_particle_table(small(tmp_path / "p.star", "2@b.mrcs 1 1\n1@a.mrcs 1 2\n0001@b.mrcs 1 3\n"))
    assert table.micrographs == table.stacks == ["b.mrcs", "a.mrcs"]
    assert table.micrograph.tolist() == [0, 1, 0]
    assert table.image_index.tolist() == [1, 0, 0]
    assert table.order.tolist() == [0, 2, 1]
    assert table.start.tolist() == [0, 2, 3]


def test_subsets_are_halves_or_none(tmp_path):
    labels = ("rlnImageName", "rlnOpticsGroup", "rlnRandomSubset")
    path = small(tmp_path / "p.star", "1@a 1 0\n2@a 1 1\n3@a 1 2\n", labels)
    assert star.read_particle_table(path).half_set.tolist() == [-1, 0, 1]
    with pytest.raises(StarError, match="rlnRandomSubset"):
        star.read_particle_table(small(tmp_path / "p.star", "1@a 1 3\n", labels))


REGULAR = {
    "blanks": "   1@a.mrcs\t1   100 \n\n  \n2@a.mrcs 1 5\n \n",
    "comments": "1@a.mrcs 1 100\n# a comment\n2@a.mrcs 1 5\n",
    "no newline at the end": "1@a.mrcs 1 100\n2@a.mrcs 1 5",
    "whole numbers as decimals": "1@a.mrcs 1.000 100\n2@a.mrcs 1 5\n",
    "exponents": "1@a.mrcs 1 1e2\n2@a.mrcs 1 -5.5E-1\n",
    "numbers of several lengths": "1@a.mrcs 1 1\n12@a.mrcs 1 2\n000003@b/c@d.mrcs 1 3\n",
    "names like keywords": "1@data_1/a 1 1\n2@loop_ 1 2\n3@_rln 1 3\n",
}
UNUSUAL = {
    "a comment beside values": "1@a.mrcs 1 100\n2@a.mrcs 1 5 # another\n",
    "hash in a name": "1@a.mrcs 1 100\n2@a#1.mrcs 1 100\n",
    "missing numbers": "1@a.mrcs 1 2\n1@a.mrcs 1 nan\n2@a.mrcs 1 -inf\n",
    "quotes": "'1@a b.mrcs' 1 100\n2@a.mrcs 1 5\n",
    "double quotes": '"1@a.mrcs" 1 "100"\n',
    "letters outside ASCII": "1@Ångström.mrcs 1 100\n",
    "lines of Windows": "1@a.mrcs 1 100\r\n2@a.mrcs 1 5\r\n",
    "no rows": "",
}
BROKEN = {
    "short row": "1@a.mrcs 1 100\n2@a.mrcs 1\n",
    "short first row": "1@a.mrcs 1\n2@a.mrcs 1 5\n",
    "long row": "1@a.mrcs 1 100\n2@a.mrcs 1 5 6\n",
    "very long row": "1@a.mrcs 1 100 1 1 1 1\n2@a.mrcs 1 5\n",
    "all rows long": "1@a.mrcs 1 100 1\n2@a.mrcs 1 5 1\n",
    "text for a number": "1@a.mrcs 1 eleven\n",
    "no stack": "1@a.mrcs 1 2\n12 1 2\n",
    "image nought": "1@a.mrcs 1 2\n000@a.mrcs 1 2\n",
    "image without number": "1@a.mrcs 1 2\n@a.mrcs 1 2\n",
    "image of no stack": "1@a.mrcs 1 2\n5@ 1 2\n",
    "negative image": "1@a.mrcs 1 2\n-5@a.mrcs 1 2\n",
    "unknown group": "1@a.mrcs 1 2\n5@a.mrcs 3 2\n",
    "half a group": "1@a.mrcs 1 2\n5@a.mrcs 1.5 2\n",
    "open quote": "1@a.mrcs 1 2\n'5@a.mrcs 1 2\n",
    "second loop": "1@a.mrcs 1 2\nloop_\n_rlnX\n1\n",
    "control character": "1@a\x0b.mrcs 1 2\n",
}


@pytest.mark.parametrize("rows", REGULAR.values(), ids=REGULAR)
def test_regular_rows_go_the_fast_way(tmp_path, monkeypatch, rows):
    for tail in ("", "\n# version 30001\n\ndata_general\n\n_rlnX 1\n_rlnY b\n\n", "\ndata_more\nloop_\n_rlnA\n_rlnB\n1 2\n"):
        path = small(tmp_path / "p.star", rows + ("" if rows.endswith("\n") or not tail else "\n"), tail=tail)
        assert blocks.scan(path, ["rlnImageName"]) is not None
        same(star.read_particles(path), slowly(monkeypatch, star.read_particles, path))


@pytest.mark.parametrize("rows", UNUSUAL.values(), ids=UNUSUAL)
def test_unusual_rows_read_the_same(tmp_path, monkeypatch, rows):
    path = small(tmp_path / "p.star", rows)
    same(star.read_particles(path), slowly(monkeypatch, star.read_particles, path))


@pytest.mark.parametrize("rows", BROKEN.values(), ids=BROKEN)
def test_broken_rows_give_the_same_error(tmp_path, monkeypatch, rows):
    path = small(tmp_path / "p.star", rows)
    with pytest.raises(StarError) as general:
        slowly(monkeypatch, star.read_particles, path)
    for function in (star.read_particles, star.read_particle_table):
        with pytest.raises(StarError) as fast:
            function(path)
        assert str(fast.value) == str(general.value)


def test_short_rows_show_where_the_last_column_is_text_or_not_wanted(tmp_path):
    for last in ("rlnMicrographName", "rlnOther"):
        path = small(tmp_path / "p.star", "1@a 1 x\n2@a 1\n", ("rlnImageName", "rlnOpticsGroup", last))
        with pytest.raises(StarError, match="line 16: 2 values for 3 columns"):
            star.read_particles(path)


@pytest.mark.parametrize(
    "text",
    [
        "data_particles\n\n_rlnImageName 1@a.mrcs\n_rlnOpticsGroup 1\n",
        "data_particles\nloop_\n",
        "data_particles\nloop_\n_rlnImageName #1\n1@a.mrcs\n",
        "data_particles\nloop_\n_rlnImageName #1\n# c\n_rlnDefocusU\n1@a.mrcs 1\n",
        "data_particles\nloop_\n_rlnImageName #1\n_rlnDefocusU a#2\n1@a.mrcs 1\n",
        "data_particles\n\ndata_b\nloop_\n_rlnImageName\n_rlnX\n1@a 1\n",
        "data_particles\nloop_\n_rlnImageName\n_rlnImageName\n1@a 1@a\n",
        "loop_\n_rlnImageName\n_rlnX\n1@a 1\ndata_x\n",
        "data_a\nloop_\n_rlnImageName\n_rlnX\n1@a 1\ndata_a\nloop_\n_rlnImageName\n_rlnX\n2@b 2\n",
    ],
)
def test_odd_layouts_give_the_same_error(tmp_path, monkeypatch, text):
    path = tmp_path / "p.star"
    path.write_text(text)
    with pytest.raises(StarError) as general:
        slowly(monkeypatch, star.read_particles, path)
    with pytest.raises(StarError) as fast:
        star.read_particles(path)
    assert str(fast.value) == str(general.value)


def test_optics_of_a_table_without_rows(tmp_path):
    path = tmp_path / "p.star"
    path.write_text(
        OPTICS.replace(
            "opticsGroup2            2     0.885000   200.000000     1.400000     0.100000     3.540000           64            2\n", ""
        )
        + "_rlnImageName #1\n_rlnOpticsGroup #2\n"
    )
    assert {len(values) for values in star.read_particles(path).values()} == {0}


def test_a_long_table_before_the_optics_is_read_up_to_them(tmp_path, monkeypatch):
    rows = "".join(f"{i}@data_{i % 7}/stack.mrcs 1 {i}.25\n" for i in range(1, 30_000))
    optics, particles = ROW_HEAD.split("data_particles")
    path = tmp_path / "p.star"
    path.write_text(f"data_particles{particles}_rlnImageName #1\n_rlnOpticsGroup #2\n_rlnDefocusU #3\n{rows}\n# next\n{optics}")
    assert blocks.scan(path, ["rlnImageName"]) is not None
    same(star.read_particles(path), slowly(monkeypatch, star.read_particles, path))


@pytest.mark.parametrize("file", ["betagal_10204/particles.star", "metadata/relion/relion31.star", "metadata/relion/relion5.star"])
def test_real_particles_go_the_fast_way(shared, monkeypatch, file):
    path = shared / "data" / file
    assert blocks.scan(path, ["rlnImageName"]) is not None
    same(star.read_particles(path), slowly(monkeypatch, star.read_particles, path))


def test_real_micrographs_and_picks_go_the_fast_way(shared, tmp_path, monkeypatch):
    path = shared / "data/betagal_10204/micrographs_ctf_official.star"
    same(star.read_micrographs(path), slowly(monkeypatch, star.read_micrographs, path))
    star.write_coordinates(tmp_path / "c.star", np.array([1.5, 2.0]), np.array([3.0, 4.0]), np.array([0.1, 0.2]))
    same(star.read_coordinates(tmp_path / "c.star"), slowly(monkeypatch, star.read_coordinates, tmp_path / "c.star"))


NAMES = st.tuples(st.integers(1, 10**9), st.integers(0, 8), st.text("ab@/._", min_size=1, max_size=20))


@settings(max_examples=100, deadline=None)
@given(st.lists(NAMES, min_size=1, max_size=30))
def test_image_names_split_as_one_by_one(parts):
    names = np.array([f"{number:0{width}d}@{stack}" for number, width, stack in parts], dtype=object)
    index, codes, stacks = split_image_names(names)
    assert index.tolist() == [number - 1 for number, _, _ in parts]
    assert [stacks[c] for c in codes] == [stack for _, _, stack in parts]
    assert stacks == list(dict.fromkeys(stack for _, _, stack in parts))


# --- ids

IDS = st.lists(st.one_of(st.integers(0, 2**62), st.integers(2**53, 2**53 + 9), st.integers(2**62 - 9, 2**63 - 1)), min_size=1, max_size=20)
FLOATING = st.floats(-1e30, 1e30, allow_nan=False, allow_subnormal=False)


def columns_of(ids):
    n = len(ids)
    lens = {"voltage_kv": 300.0, "spherical_aberration_mm": 2.7, "amplitude_contrast": 0.1, "particle_pixel_size_angstrom": 2.0}
    return {"image_index": np.arange(n), "image_stack": "x.mrcs", "box": 64, **lens, "particle_id": np.array(ids, dtype=np.int64)}


@settings(max_examples=60, deadline=None)
@given(ids=IDS, data=st.data())
def test_ids_come_back_exactly_and_floats_to_nine_digits(ids, data, tmp_path_factory):
    path = tmp_path_factory.mktemp("ids") / "p.star"
    values = np.array(data.draw(st.lists(FLOATING, min_size=len(ids), max_size=len(ids))))
    star.write_particles(path, columns_of(ids) | {"log_likelihood": values})
    for columns in (star.read_particles(path), star.read_particle_table(path).columns):
        assert columns["particle_id"].dtype == np.int64
        assert columns["particle_id"].tolist() == ids
        np.testing.assert_allclose(columns["log_likelihood"], values, rtol=1e-8, atol=1e-300)


def test_ids_are_exact_for_the_general_reader_too(tmp_path, monkeypatch):
    ids = [2**53 + 1, 2**62 + 3, 5]
    star.write_particles(tmp_path / "p.star", columns_of(ids))
    assert "_cryodaskParticleId" in (tmp_path / "p.star").read_text()
    assert slowly(monkeypatch, star.read_particles, tmp_path / "p.star")["particle_id"].tolist() == ids


@pytest.mark.parametrize("text", ["9007199254740993.0", "1e18", "5.0", "9223372036854775808", "seven", "1_000"])
def test_ids_that_are_not_whole_numbers_are_refused(tmp_path, text):
    path = small(tmp_path / "p.star", f"1@a 1 5\n2@a 1 {text}\n", ("rlnImageName", "rlnOpticsGroup", "cryodaskParticleId"))
    with pytest.raises(StarError, match="cryodaskParticleId"):
        star.read_particles(path)


def test_ids_that_went_through_floats_are_not_written(tmp_path):
    with pytest.raises(StarError, match="float64"):
        star.write_particles(tmp_path / "p.star", columns_of([1, 2]) | {"particle_id": np.array([1.0, 2.0])})


if __name__ == "__main__":  # measure: FILE PARTICLES writes one, FILE WAY reads it
    if sys.argv[2].isdigit():
        write_like_relion(sys.argv[1], int(sys.argv[2]), 5_000)
    else:
        result = getattr(star, sys.argv[2])(sys.argv[1])
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"{sys.argv[2]}: {time.process_time():.2f} CPU s with imports, peak {peak:.2f} GiB")
