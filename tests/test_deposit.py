"""Exports for archives of data: each valid by the schema of those who read it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from _command import command
from _toy_session import MOVIES, finished
from distributed import Client
from jsonschema import Draft7Validator, Draft201909Validator

from cryodask.errors import InputError, ProjectFileError
from cryodask.interop import export
from cryodask.interop.about import EXAMPLE
from cryodask.store.project import Project
from cryodask.tiers.archive import archive
from cryodask.tiers.handover import hand_over

SCHEMAS = Path(__file__).with_name("schemas")


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    with Client(processes=False, n_workers=1, threads_per_worker=1, dashboard_address=None) as here:
        return finished(tmp_path_factory, here, tmp_path_factory.mktemp("deposit") / "s")


@pytest.fixture
def described(session):
    (session / "about.yaml").write_text(EXAMPLE)
    yield session
    (session / "about.yaml").unlink()


def problems(validator, name, document):
    schema = json.loads((SCHEMAS / name).read_text())
    return [f"{'/'.join(map(str, e.path))}: {e.message[:200]}" for e in validator(schema).iter_errors(document)]


def test_empiar(described, tmp_path):
    (path,) = export(Project(described / "toy"), "empiar", tmp_path)
    entry = json.loads(path.read_text())
    assert problems(Draft7Validator, "empiar_deposition.schema.json", entry) == []
    (images,) = entry["imagesets"]
    assert images["directory"] == "data/movies"
    assert (images["num_images_or_tilt_series"], images["frames_per_image"]) == (MOVIES, 3)
    assert (images["category"], images["header_format"], images["voxel_type"]) == ("('T2', '')", "('T1', '')", "('T2', '')")
    assert (images["image_width"], images["pixel_width"]) == (16, 1.0)
    assert entry["authors"] == [{"name": "('Lovelace', 'A.')", "order_id": 0, "author_orcid": "0000-0002-1825-0097"}]


def test_oscem(described, tmp_path):
    (path,) = export(Project(described / "toy"), "oscem", tmp_path)
    said = json.loads(path.read_text())
    assert problems(Draft201909Validator, "oscem_spa.schema.json", said) == []
    assert said["acquisition"]["pixel_size"] == {"value": 1.0, "unit": "Angstrom"}
    assert (said["acquisition"]["frames_per_movie"], said["acquisition"]["images_generated"]) == (3, MOVIES)
    assert said["instrument"]["acceleration_voltage"] == {"value": 300.0, "unit": "kV"}
    processing = said["processing"]
    assert processing["micrographs"] == {"number_micrographs": MOVIES}
    particles = Project(described / "toy").particles("toy_classify").sizes["particle"]
    assert processing["coordinates"] == {"number_particles": particles, "num_source_micrographs": MOVIES}
    assert processing["ctfs"]["defocus"]["output_min_defocus"]["unit"] == "nm"
    assert processing["volumes"][0]["volume_type"] == "final map"


def test_the_schemas_can_fail(described, tmp_path):
    (path,) = export(Project(described / "toy"), "empiar", tmp_path)
    entry = json.loads(path.read_text())
    entry["imagesets"][0]["category"] = "movies"
    assert problems(Draft7Validator, "empiar_deposition.schema.json", entry)
    assert problems(Draft201909Validator, "oscem_spa.schema.json", {"acquisition": {}})


def test_originals_that_are_away_are_described_all_the_same(tmp_path_factory, tmp_path):
    with Client(processes=False, n_workers=1, threads_per_worker=1, dashboard_address=None) as here:
        own = finished(tmp_path_factory, here, tmp_path / "s")
    (own / "about.yaml").write_text(EXAMPLE)
    before = [export(Project(own / "toy"), name, tmp_path / "a")[0].read_text() for name in ("empiar", "oscem")]
    archive(own / "toy", str(tmp_path / "archive"), ["originals", "shards"])
    assert [export(Project(own / "toy"), name, tmp_path / "b")[0].read_text() for name in ("empiar", "oscem")] == before


# --- RO-Crate -------------------------------------------------------------------------------------------------------------------
def test_a_hand_over_is_an_ro_crate(described, tmp_path):
    hand_over(described / "toy", tmp_path / "copy")
    graph = check_crate(tmp_path / "copy")
    files = {e["@id"]: e for e in graph.values() if e["@type"] == "File"}
    assert len(files) > MOVIES
    for name, entity in files.items():
        data = (tmp_path / "copy" / name).read_bytes()
        assert (entity["contentSize"], entity["sha256"]) == (str(len(data)), hashlib.sha256(data).hexdigest())
    assert graph["./"]["name"] == "Beta-galactosidase at 2.2 A"
    assert graph["https://orcid.org/0000-0002-1825-0097"]["familyName"] == "Lovelace"
    assert "toy_motion@" in graph["#step-toy_motion"]["name"]


def test_another_program_reads_the_crate(session, tmp_path):
    rocrate = pytest.importorskip("rocrate.rocrate")
    hand_over(session / "toy", tmp_path / "copy")
    read = rocrate.ROCrate(str(tmp_path / "copy"))
    assert read.name == "toy"
    assert {f"movies/m{n}.mrc" for n in range(MOVIES)} <= {entity.id for entity in read.data_entities}


def check_crate(folder):
    """The rules of RO-Crate 1.1 for a root, its descriptor, and references."""
    document = json.loads((folder / "ro-crate-metadata.json").read_text())
    assert document["@context"][0] == "https://w3id.org/ro/crate/1.1/context"
    graph = {entity["@id"]: entity for entity in document["@graph"]}
    assert len(graph) == len(document["@graph"])
    descriptor, root = graph["ro-crate-metadata.json"], graph["./"]
    assert descriptor["conformsTo"] == {"@id": "https://w3id.org/ro/crate/1.1"}
    assert descriptor["about"] == {"@id": "./"}
    assert root["@type"] == "Dataset"
    assert {"name", "description", "datePublished", "license"} <= set(root)
    assert all("@type" in entity for entity in graph.values())
    for entity in graph.values():
        for value in entity.values():
            for one in value if isinstance(value, list) else [value]:
                if isinstance(one, dict) and entity is not descriptor:
                    assert one["@id"] in graph
    return graph


# --- what is missing ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "needs"), [("empiar", "title, authors, contact, principal_investigator"), ("oscem", "microscope, detector")]
)
def test_what_no_file_says_is_asked_for(session, tmp_path, name, needs):
    with pytest.raises(ProjectFileError, match=f"needs {needs}"):
        export(Project(session / "toy"), name, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_wrong_description_is_refused(session, tmp_path):
    (session / "about.yaml").write_text("title: x\nauthor: y\n")
    try:
        with pytest.raises(ProjectFileError, match=r"about.yaml: author"):
            export(Project(session / "toy"), "empiar", tmp_path)
        with pytest.raises(ProjectFileError):
            hand_over(session / "toy", tmp_path / "copy")
        assert not (tmp_path / "copy").exists()
    finally:
        (session / "about.yaml").unlink()


def test_a_project_without_optics_is_refused(described, tmp_path):
    project = Project(described / "toy")
    project.state.constants = {}
    with pytest.raises(InputError):
        export(project, "oscem", tmp_path)


def test_the_command(described, tmp_path):
    assert command("export", described / "toy", "--to", "empiar", tmp_path / "out").stdout.strip() == str(tmp_path / "out" / "empiar.json")
