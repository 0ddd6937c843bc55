"""Facts in unusual places of other people's files are used, or refused by name; what is damaged is repaired."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from _star_tables import GROUP, MICROGRAPH, PARTICLE, imported, loop, pairs, particles, stack, write
from pydantic import ValidationError
from test_mrc_facts import mrc, written

from cryodask.cli import app
from cryodask.cluster.settings import parse_settings
from cryodask.errors import InputError, MicrographError, MovieError, ProjectFileError, StarError
from cryodask.formats import star
from cryodask.formats.mrc import read_mrc, write_mrc
from cryodask.run.recipe import ProjectFile, broken_links, make_plan
from cryodask.run.session import run_plan
from cryodask.run.sources import list_exposures
from cryodask.stage import load_stages


def some(count: int, **columns) -> list[dict]:
    rows = [{**PARTICLE, "ImageName": f"{i + 1}@a.mrcs"} for i in range(count)]
    return [{**row, **{k: v[i] if isinstance(v, list) else v for k, v in columns.items()}} for i, row in enumerate(rows)]


def project(folder: Path, *steps: dict) -> Path:
    return write(folder / "r.yaml", yaml.safe_dump({"name": "r", "pipeline": list(steps)}))


# --- optics in the rows, beside those of groups ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("label", "value", "ours", "read"),
    [
        ("CtfDataAreCtfPremultiplied", 1, "ctf_premultiplied", 1),
        ("DataAreCtfPremultiplied", 1, "ctf_premultiplied", 1),
        ("CtfDataArePhaseFlipped", 1, "phase_flipped", 1),
        ("ImageDimensionality", 3, "image_dimensions", 3),
        ("Voltage", 300.1, "voltage_kv", 300),
        ("OriginX", 1.5, "origin_x_angstrom", 3.0),
        ("OriginXAngst", 1.5, "origin_x_angstrom", 1.5),
    ],
)
def test_what_only_the_rows_say_of_their_optics_is_used(tmp_path, label, value, ours, read):
    table = star.read_particle_table(write(tmp_path / "p.star", particles(some(2, **{label: value}))))
    assert table.columns[ours].tolist() == [read, read]


@pytest.mark.parametrize(
    ("label", "value", "said"),
    [
        ("Voltage", [300, 200], "rlnVoltage of row 2 is 200, but 300 in its optics group"),
        ("ImagePixelSize", 1.0, "rlnImagePixelSize of row 1 is 1, but 2"),
        ("ImageSize", 64, "rlnImageSize of row 1 is 64, but 32"),
        ("MicrographOriginalPixelSize", 0.5, "rlnMicrographPixelSize of row 1 is 0.5, but 1"),
        ("SphericalAberration", 0.01, "rlnSphericalAberration of row 1"),
        ("Voltage", 3, "rlnVoltage of row 1 is 3, which is not"),
    ],
)
def test_rows_that_contradict_their_group_are_refused(tmp_path, label, value, said):
    with pytest.raises(StarError, match=said):
        star.read_particle_table(write(tmp_path / "p.star", particles(some(2, **{label: value}))))


def test_images_that_their_rows_call_premultiplied_are_refused(tmp_path):
    stack(tmp_path / "a.mrcs", 2)
    path = write(tmp_path / "p.star", particles(some(2, CtfDataAreCtfPremultiplied=[0, 1])))
    with pytest.raises(InputError, match=r"1 images .* were multiplied by their CTF"):
        imported(path)


def test_aberrations_of_the_rows_are_kept_where_the_group_has_none(tmp_path):
    stack(tmp_path / "a.mrcs", 2)
    path = write(tmp_path / "p.star", particles(some(2, BeamTiltX=0.5, BeamTiltY=0.1), [{**GROUP, "BeamTiltY": 0.2}]))
    kept = imported(path)["relion_optics"]
    assert yaml.safe_load(kept) == {"rlnBeamTiltX": "0.5", "rlnBeamTiltY": "0.2"}


@pytest.mark.parametrize("without", ["rows", "rows and group"])
def test_the_only_group_is_that_of_all_rows(tmp_path, without):
    rows = [{k: v for k, v in row.items() if k != "OpticsGroup"} for row in some(2)]
    group = {k: v for k, v in GROUP.items() if without == "rows" or k != "OpticsGroup"}
    assert star.read_particles(write(tmp_path / "p.star", particles(rows, [group])))["voltage_kv"].tolist() == [300, 300]


# --- tables in an unusual order -----------------------------------------------------------------------------------------------
PLACED = loop("particles", some(2, CoordinateX=[5, 9], CoordinateY=7))


@pytest.mark.parametrize(
    "before",
    ["", pairs("general", {"x": 1}), loop("micrographs", [MICROGRAPH]), loop("images", some(1)), loop("job", [{"x": 1, "y": 2}])],
    ids=["nothing", "pairs", "micrographs", "images", "another table"],
)
@pytest.mark.parametrize("optics_last", [False, True])
def test_parts_of_particles_are_those_of_their_own_table(tmp_path, before, optics_last):
    tables = [before, PLACED, loop("optics", [GROUP])] if optics_last else [loop("optics", [GROUP]), before, PLACED]
    path = write(tmp_path / "p.star", "".join(tables))
    stage = load_stages()["import_particles"]
    parts = {part for output in stage.outputs(stage.params(star=str(path))) for part in output.parts}
    assert parts == {"optics", "position", "score", "image", "ctf"}


@pytest.mark.parametrize(("kind", "other"), [("particles", "images"), ("images", ""), ("particles", "")])
def test_two_tables_of_images_are_refused(tmp_path, kind, other):
    path = write(tmp_path / "p.star", loop("optics", [GROUP]) + loop(kind, some(1)) + loop(other, some(2)))
    with pytest.raises(StarError, match=rf"has 2 tables: data_{kind} and data_{other}\."):
        star.read_particles(path)


def test_movies_beside_micrographs_are_refused(tmp_path):
    movie = {"MicrographMovieName": "a.tif", "OpticsGroup": 1}
    tables = [loop("optics", [GROUP]), loop("micrographs", [MICROGRAPH]), loop("movies", [movie])]
    with pytest.raises(StarError, match="has 2 tables: data_micrographs and data_movies"):
        star.read_micrographs(write(tmp_path / "m.star", "".join(tables)))
    assert len(star.read_micrographs(write(tmp_path / "m.star", "".join(tables[:2])))["micrograph_name"]) == 1


@pytest.mark.parametrize("columns", [{"TomoName": "TS_01"}, {"CoordinateX": 5, "CoordinateY": 7, "CoordinateZ": 9}])
def test_particles_of_tomograms_are_refused(tmp_path, columns):
    with pytest.raises(StarError, match="it is of tomograms"):
        star.read_particles(write(tmp_path / "p.star", particles(some(2, **columns))))
    picks = loop("", [{"CoordinateX": 5, "CoordinateY": 7, **columns}])
    with pytest.raises(StarError, match="it is of tomograms"):
        star.read_coordinates(write(tmp_path / "a.star", picks))


# --- names --------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "found"),
    [("a/b.c.mrc", "b.c"), ("D:\\x\\b.mrc", "b"), ("\\\\server\\x\\b.mrc", "b"), ("d:/x/b.mrc", "b"), ("a\\b.mrc", "a\\b"), (".b", ".b")],
)
def test_stems_of_paths_of_both_systems(name, found):
    assert star.stem(name) == found


@pytest.mark.parametrize("name", ["''", "/", ".", "..", "'D:\\'"])
def test_a_name_that_is_none_is_refused(tmp_path, name):
    with pytest.raises(StarError, match=r"rlnMicrographName .* is not the name of a file"):
        star.read_particle_table(write(tmp_path / "p.star", particles(some(2, MicrographName=["a.mrc", name]))))


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", " a", "a ", "~", "~anna", "$HOME", "a$b", "a\nb", "x" * 201, "ä" * 101])
def test_a_project_is_named_like_a_folder_of_any_shell(name):
    with pytest.raises(ValidationError, match="name"):
        ProjectFile(name=name, pipeline=["ingest"])


def test_a_micrograph_that_is_spelled_in_two_ways_is_one(tmp_path):
    names = ["m/a.mrc", "./m/a.mrc", "m//a.mrc", "m/b.mrc"]
    table = star.read_particle_table(write(tmp_path / "p.star", particles(some(4, MicrographName=names))))
    assert table.micrographs == ["m/a.mrc", "m/b.mrc"]
    assert table.micrograph.tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize("how", ["absolute", "link", "copy"])
def test_an_image_in_a_link_or_copy_of_its_stack_is_used_once(tmp_path, how):
    stack(tmp_path / "a.mrcs", 3)
    other = tmp_path / ("a.mrcs" if how == "absolute" else "c.mrcs")
    if how == "link":
        other.symlink_to("a.mrcs")
    elif how == "copy":
        other.write_bytes((tmp_path / "a.mrcs").read_bytes())
    names = ["1@a.mrcs", f"1@{other}", f"2@{other}", "3@a.mrcs"]
    write(tmp_path / "p.star", particles(some(4, ImageName=names)))
    plan = make_plan(project(tmp_path, {"import_particles": {"star": "p.star"}}))
    from cryodask.run.imports import TableImport

    taken = TableImport(plan.steps[0]).table
    assert taken.repeated.tolist() == [1]
    assert taken.rows_of(0).tolist() == [0, 2, 3]


def test_micrographs_are_never_looked_for_in_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "star").mkdir()
    write_mrc(tmp_path / "here/a.mrc", np.ones((8, 8), np.float32), 1.0)
    write(tmp_path / "star/m.star", loop("optics", [GROUP]) + loop("micrographs", [MICROGRAPH]))
    monkeypatch.chdir(tmp_path / "here")
    plan = make_plan(project(tmp_path, {"import_micrographs": {"star": "star/m.star"}}))
    with pytest.raises(InputError, match="None of the 1 micrographs"):
        list_exposures(plan, None)
    write_mrc(tmp_path / "star/a.mrc", np.ones((8, 8), np.float32), 1.0)
    assert [a.inputs["micrograph_path"] for a in list_exposures(plan, None)] == ["star/a.mrc"]


@pytest.mark.parametrize(
    ("columns", "group", "said"),
    [
        ({"ImageName": ["1@a.mrcs", f"{10**20}@a.mrcs"]}, {}, "is not NUMBER@STACK"),
        ({"MicrographName": "mic/a\x07.mrc"}, {}, "is not the name of a file"),
        ({}, {"ImageDimensionality": 1}, "2 rows of .* are not images"),
        ({}, {"ImageDimensionality": 0}, "2 rows of .* are not images"),
    ],
)
def test_names_numbers_and_dimensions_that_cannot_be_are_refused(tmp_path, columns, group, said):
    stack(tmp_path / "a.mrcs", 2)
    with pytest.raises((StarError, InputError), match=said):
        imported(write(tmp_path / "p.star", particles(some(2, **columns), [{**GROUP, **group}])))


@pytest.mark.parametrize("kind", ["micrographs", "particles"])
@pytest.mark.parametrize(("v", "refused"), [(14000, True), (15000, False), (15000.5, False), (None, False)])
def test_astigmatism_needs_an_angle_and_a_defocus_alone_has_none(tmp_path, kind, v, refused):
    row = {n: value for n, value in (MICROGRAPH if kind == "micrographs" else PARTICLE).items() if n not in ("DefocusAngle", "DefocusV")}
    path = write(tmp_path / "t.star", loop("optics", [GROUP]) + loop(kind, [row if v is None else {**row, "DefocusV": v}]))
    read = star.read_micrographs if kind == "micrographs" else star.read_particle_table
    if refused:
        with pytest.raises(StarError, match="has no column rlnDefocusAngle"):
            read(path)
    else:
        read(path)
    if kind == "micrographs" and v is None:
        columns = star.read_micrographs(path)
        assert [columns[f"defocus_{one}"].tolist() for one in ("u_angstrom", "v_angstrom", "angle_deg")] == [[15000], [15000], [0]]


@pytest.mark.parametrize("name", ["n" * 300 + ".mrcs", "a.mrcs/b.mrcs", "loop.mrcs"])
def test_a_stack_that_cannot_be_opened_quarantines_its_micrograph(tmp_path, name):
    stack(tmp_path / "a.mrcs", 3)
    (tmp_path / "loop.mrcs").symlink_to("loop.mrcs")
    path = write(tmp_path / "p.star", particles(some(1, ImageName=f"1@{name}")))
    with pytest.raises(MicrographError, match="does not exist"):
        imported(path)


@pytest.mark.parametrize("other", ["a.mrcs", "b.mrcs"])
def test_the_same_image_at_two_places_quarantines_its_micrograph(tmp_path, other):
    """A copy within one stack, or in a stack written anew with others: it would be in both half-sets."""
    images = stack(tmp_path / "a.mrcs", 3)
    fresh = stack(tmp_path / "b.mrcs", 2, seed=1)
    write_mrc(tmp_path / other, np.concatenate([images if other == "a.mrcs" else fresh, images[1:2]]), 2.0, stack=True)
    last = 4 if other == "a.mrcs" else 3
    path = write(tmp_path / "p.star", particles(some(4, ImageName=["1@a.mrcs", "2@a.mrcs", "3@a.mrcs", f"{last}@{other}"])))
    with pytest.raises(MicrographError, match=rf"1 of 4 images of mic/a\.mrc are there twice: 2@a\.mrcs and {last}@{other} are equal"):
        imported(path)


def test_a_row_that_comes_twice_is_called_that(tmp_path):
    write_mrc(tmp_path / "a.mrc", np.ones((8, 8), np.float32), 1.0)
    write(tmp_path / "m.star", loop("optics", [GROUP]) + loop("micrographs", [MICROGRAPH, MICROGRAPH]))
    with pytest.raises(InputError, match=r"a\.mrc is listed twice"):
        list_exposures(make_plan(project(tmp_path, {"import_micrographs": {"star": "m.star"}})), None)


@pytest.mark.parametrize(
    ("second", "made", "said"),
    [
        ("a.mrc", "", r"a\.mrc is an input of both import_micrographs and other\. Usual reason: their tables or patterns overlap"),
        ("x/a.mrc", "link", r"a\.mrc of import_micrographs and x/a\.mrc of other, which are the same image"),
        ("x/a.mrc", "other", r"Two inputs have the same name a: a\.mrc of import_micrographs and x/a\.mrc of other"),
    ],
)
def test_an_exposure_of_two_tables_is_the_same_file_a_copy_or_another(tmp_path, second, made, said):
    write_mrc(tmp_path / "a.mrc", np.ones((8, 8), np.float32), 1.0)
    (tmp_path / "x").mkdir()
    if made == "link":
        (tmp_path / "x/a.mrc").symlink_to(tmp_path / "a.mrc")
    elif made:
        write_mrc(tmp_path / "x/a.mrc", np.zeros((8, 8), np.float32), 1.0)
    for name, image in (("m.star", "a.mrc"), ("n.star", second)):
        write(tmp_path / name, loop("optics", [GROUP]) + loop("micrographs", [{**MICROGRAPH, "MicrographName": image}]))
    steps = [{"import_micrographs": {"star": "m.star"}}, {"import_micrographs as other": {"star": "n.star"}}]
    with pytest.raises(InputError) as error:
        list_exposures(make_plan(project(tmp_path, *steps)), None)
    assert re.search(said, str(error.value).replace("\n ", ""))


def test_links_to_no_movie_are_told(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m/a.tif").touch()
    for name, target in (("b.tif", "/nowhere/b.tif"), ("c.tif", "c.tif")):
        os.symlink(target, tmp_path / "m" / name)
    optics = {"voltage_kv": 300, "spherical_aberration_mm": 2.7, "pixel_size_angstrom": 1.0}
    content = {"name": "r", "inputs": {"movies": "m/*.tif"}, "microscope": optics, "pipeline": ["motion"]}
    plan = make_plan(write(tmp_path / "r.yaml", yaml.safe_dump(content)))
    assert broken_links(plan) == ["2 links among the movies m/*.tif lead to no file and are left out: b.tif, c.tif"]


# --- numbers ------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("value", "fits"), [(2147483647, True), (2147483648, False), (-3000000000, False), (0, True)])
def test_class_numbers_do_not_wrap(tmp_path, value, fits):
    path = write(tmp_path / "p.star", particles(some(2, ClassNumber=[1, value])))
    if fits:
        assert star.read_particle_table(path).columns["class_number"].tolist() == [1, value]
    else:
        with pytest.raises(StarError, match=f"rlnClassNumber of row 2 is {value}"):
            star.read_particle_table(path)


@pytest.mark.parametrize("label", ["DefocusU", "DefocusV"])
@pytest.mark.parametrize(
    ("values", "refused"), [([1.5, 1.4], 2), ([1.5, 15000], 1), ([1.5, 150], 0), ([0, 15000], 0), ([0, 0], 0), ([-1.5, -1.4], 2)]
)
def test_micrometres_among_angstrom_quarantine_their_micrograph(tmp_path, label, values, refused):
    stack(tmp_path / "a.mrcs", 4)
    mine = [{**row, label: value} for row, value in zip(some(2), values)]
    others = [{**PARTICLE, "ImageName": f"{i}@a.mrcs", "MicrographName": "mic/b.mrc"} for i in (3, 4)]
    path = write(tmp_path / "p.star", particles([*mine, *others]))
    if refused:
        with pytest.raises(MicrographError, match=f"rln{label} of {refused} of 2 particles of mic/a.mrc is at most 1.5 A"):
            imported(path)
    else:
        assert len(imported(path)["half_set"]) == 2
    assert len(imported(path, "mic/b.mrc")["half_set"]) == 2


@pytest.mark.parametrize(("y", "refused"), [([10, 300, 400], True), ([-9, -8, 5], True), ([10, 20, 400], False), ([63, 0, 5], False)])
def test_coordinates_of_another_frame_quarantine_their_micrograph(y, refused):
    stage = load_stages()["extract"]
    image = np.random.default_rng(0).normal(10, 1, (64, 64)).astype(np.float32)
    values = {"particle_id": np.arange(3), "position_y_angstrom": 2.0 * np.array(y), "position_x_angstrom": np.full(3, 60.0)}

    def extract() -> dict:
        return stage.process(stage.params(box=16), micrograph_dw=image, pixel_size_angstrom=2.0, **values)

    if refused:
        with pytest.raises(MicrographError, match="2 of 3 particles lie outside the micrograph, 64 x 64 pixels"):
            extract()
    else:
        extract()


@pytest.mark.parametrize(("told", "refused"), [(None, False), (1.0, False), (1.005, False), (2.0, True), (0.5, True)])
@pytest.mark.parametrize("where", ["MicrographPixelSize", "MicrographOriginalPixelSize", "optics"])
def test_picks_in_pixels_of_another_size_quarantine_their_micrograph(tmp_path, told, refused, where):
    rows = [{"CoordinateX": x, "CoordinateY": 5} for x in (3, 9)]
    own = told is not None and where != "optics"
    text = loop("coordinates", [{**row, where: told} if own else row for row in rows])
    optics = loop("optics", [{**GROUP, "MicrographPixelSize": told}]) if told is not None and where == "optics" else ""
    path = write(tmp_path / "a.star", optics + text)
    stage = load_stages()["import_picks"]
    values = {"coordinates_path": str(path), "micrograph_name": "a", "pixel_size_angstrom": 1.0}
    if refused:
        with pytest.raises(MicrographError, match=f"in pixels of {told:g} A"):
            stage.process(stage.params(folder=str(tmp_path)), **values)
    else:
        assert stage.process(stage.params(folder=str(tmp_path)), **values)["pick_x"].tolist() == [3, 9]


@pytest.mark.parametrize("order", ["<", ">"])
def test_unset_axes_are_those_of_old_files(tmp_path, order):
    data = np.arange(24, dtype="f4").reshape(2, 3, 4)
    assert np.array_equal(read_mrc(written(tmp_path, mrc(data, order, axes=(0, 0, 0))))[0], data)


@pytest.mark.parametrize(("values", "said"), [([-3.0, 1.0], "are not counts"), ([0.0, 0.0], "has no counts")])
def test_a_movie_without_counts_is_refused_for_its_own_reason(tmp_path, values, said):
    write_mrc(tmp_path / "m.mrc", np.stack([np.full((8, 8), v, np.float32) for v in values]), 1.0, stack=True)
    stage = load_stages()["ingest"]
    with pytest.raises(MovieError, match=said):
        stage.process(stage.params(), movie_path=str(tmp_path / "m.mrc"))


# --- project and cluster files ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("given", ["1e400GB", "\u0967\u096cGB", "nan GB", "inf", "16", "-1GB", "16,5GB", "100%"])
def test_what_is_no_memory_is_refused(given):
    with pytest.raises(ProjectFileError, match="memory needs a number with a unit"):
        parse_settings({"kind": "slurm", "interface": "lo", "pools": {"cpu": {"memory": given, "cores": 1}}}, folder="/tmp")


@pytest.mark.parametrize("given", ["0:00:00", "0-00:00:00", "00:00:00"])
def test_no_time_is_not_unlimited(given):
    pool = {"memory": "1GiB", "cores": 1, "walltime": given}
    with pytest.raises(ProjectFileError, match="a job needs some time"):
        parse_settings({"kind": "slurm", "interface": "lo", "pools": {"cpu": pool}}, folder="/tmp")


@pytest.mark.parametrize("weight", [0, -1])
def test_a_weight_is_positive(weight):
    pools = {"cpu": {"memory": "1GiB", "cores": 1}}
    with pytest.raises(ProjectFileError, match=r"lanes\.a"):
        parse_settings({"kind": "slurm", "interface": "lo", "pools": pools, "lanes": {"a": weight}}, folder="/tmp")


def test_a_name_that_no_folder_can_have_is_refused(tmp_path):
    with pytest.raises(ProjectFileError, match="longer than a file system allows"):
        make_plan(write(tmp_path / "r.yaml", yaml.safe_dump({"name": "\u00e9" * 101, "pipeline": ["motion"]})))


# --- repair -------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def finished(tmp_path_factory, client):
    folder = tmp_path_factory.mktemp("finished")
    rng = np.random.default_rng(0)
    (folder / "k").mkdir()
    for name in "ab":
        write_mrc(folder / f"{name}.mrc", rng.normal(10, 1, (64, 64)).astype(np.float32), 1.0)
        write(folder / f"k/{name}.star", loop("", [{"CoordinateX": x, "CoordinateY": 30} for x in (20, 40)]))
    rows = [{**MICROGRAPH, "MicrographName": f"{name}.mrc"} for name in "ab"]
    write(folder / "m.star", loop("optics", [GROUP]) + loop("micrographs", rows))
    steps = {"import_micrographs": {"star": "m.star"}}, {"import_picks": {"folder": "k"}}, {"extract": {"box": 16}}
    return make_plan(project(folder, *steps)), run_plan(make_plan(project(folder, *steps)), client)


def contents(done) -> tuple[list, bytes]:
    particles = done.particles("extract")
    return particles["particle_id"].values.tolist(), particles["particle_image"].values.tobytes()


DAMAGE = {
    "cut": lambda data: data[: len(data) // 2],
    "emptied": lambda data: b"",
    "zeros": lambda data: bytes(len(data)),
    "with a surplus": lambda data: data + b"surplus\n",
    "flipped": lambda data: data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 0x40]) + data[len(data) // 2 + 1 :],
}


@pytest.mark.parametrize(
    ("pattern", "how"),
    [
        *(("items.jsonl", how) for how in ("emptied", "flipped", "with a surplus")),
        *(("project.json", how) for how in ("cut", "zeros")),
        *(("stages/extract/*/zarr.json", how) for how in ("cut", "zeros")),
        *(("stages/import_picks/*/places.json", how) for how in ("emptied", "with a surplus")),
        ("stages/import_picks/*/journal/*", "flipped"),
        ("stages/extract/*/particle_image/c/*/0/0/0", "cut"),
    ],
)
def test_after_repair_and_a_rerun_everything_is_as_before(finished, client, capsys, pattern, how):
    plan, done = finished
    before = contents(done)
    file = sorted(done.path.glob(pattern))[0]
    file.write_bytes(DAMAGE[how](file.read_bytes()))

    def verify(*options: str) -> int:
        with pytest.raises(SystemExit) as ended:
            app(["verify", str(done.path), *options])
        return ended.value.code

    assert verify() == 1
    assert verify("--repair") == 0
    assert contents(run_plan(plan, client)) == before
    assert verify() == 0
