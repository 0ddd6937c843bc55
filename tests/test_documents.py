"""YAML files of people: nothing that is a word is taken for a number, no key comes twice, and paths mean one thing."""

import math

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError

from cryodask.blueprints import read_blueprint
from cryodask.cluster.settings import read_cluster_file
from cryodask.documents import StrictModel, expand, read_yaml
from cryodask.errors import ProjectFileError
from cryodask.run.recipe import make_plan, read_project_file

MICROSCOPE = {"voltage_kv": "300", "spherical_aberration_mm": "2.7", "pixel_size_angstrom": "1"}
WORDS = [
    "yes", "no", "on", "true", "True", "017", "-01", "0x1f", "0o17", "0b1", "1:30", "12_000", "1e", "ten", "0.82A", ".inf", ".nan", "inf",
    "nan", "Infinity", "'12_000'", "'017'", "' 1 '", "'inf'", "'\u0661'", "\u0661", "\u00b2", "'1_0.5'", "2026-11-30", "~", "[1]",
]  # fmt: skip


def project(where, **changes):
    optics = MICROSCOPE | {k: v for k, v in changes.items() if k in MICROSCOPE}
    rest = "".join(f"{k}: {v}\n" for k, v in changes.items() if k not in MICROSCOPE)
    microscope = ", ".join(f"{k}: {v}" for k, v in optics.items())
    name = "" if "name" in changes else "name: r\n"
    inputs = "" if "inputs" in changes else "inputs: {movies: '*.tif'}\n"
    pipeline = "" if "pipeline" in changes else "pipeline: [motion]\n"
    path = where / "p.yaml"
    path.write_text(f"{name}{inputs}microscope: {{{microscope}}}\n{pipeline}{rest}", encoding="utf-8")
    return path


@pytest.mark.parametrize("said", WORDS)
def test_a_word_is_not_a_pixel_size(said, tmp_path):
    with pytest.raises(ProjectFileError, match="pixel_size_angstrom"):
        read_project_file(project(tmp_path, pixel_size_angstrom=said))


@pytest.mark.parametrize("said", WORDS[:-2])
@pytest.mark.parametrize("name", ["workers", "item_limit_seconds"])
def test_a_word_is_not_a_number_of_workers_or_seconds(name, said, tmp_path):
    with pytest.raises(ProjectFileError, match=name):
        read_project_file(project(tmp_path, **{name: said}))


@pytest.mark.parametrize("said", ["yes", "017", "1:30", "'12_000'", ".nan", "true"])
def test_a_word_is_not_a_parameter_of_a_stage(said, tmp_path):
    with pytest.raises(ProjectFileError, match="diameter_angstrom"):
        make_plan(project(tmp_path, pipeline=f"[motion, {{pick: {{diameter_angstrom: {said}}}}}]"))


@pytest.mark.parametrize("said", ["yes", "017", "1:30", "true", "12_000"])
@pytest.mark.parametrize("line", ["pools: {{cpu: {{memory: 1GiB, cores: {}}}}}", "idle_minutes: {}\npools: {{cpu: {{memory: 1GiB}}}}",
                                  "lanes: {{live: {}}}\npools: {{cpu: {{memory: 1GiB}}}}"])  # fmt: skip
def test_a_word_is_not_a_number_in_a_cluster_file(said, line, tmp_path):
    (tmp_path / "c.yaml").write_text(f"kind: slurm\n{line.format(said)}\n")
    with pytest.raises(ProjectFileError, match=r"cores|idle_minutes|lanes"):
        read_cluster_file(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("said", "value"), [("0.82", 0.82), ("'0.82'", 0.82), ("1e0", 1.0), ("8.2e-1", 0.82), (".5", 0.5), ("+2.", 2.0), ("3", 3)]
)
def test_numbers_as_people_write_them_are_read(said, value, tmp_path):
    assert read_project_file(project(tmp_path, pixel_size_angstrom=said)).microscope.pixel_size_angstrom == value


@pytest.mark.parametrize("name", ["2026-11-30", "20261130", "-3", "017", "yes", "12_30", "1:30", "no", "grid 1"])
def test_what_looks_like_a_number_elsewhere_is_a_name_where_a_name_belongs(name, tmp_path):
    assert read_project_file(project(tmp_path, name=name)).name == name


@pytest.mark.parametrize("name", ["'.'", "'..'", "'...'", "a/b", "/tmp", "../x", "'~'", "' a'", "'a '", '"a\\nb"', "''", "~"])
def test_a_name_that_is_not_a_folder_beside_the_project_file_is_refused(name, tmp_path):
    with pytest.raises(ProjectFileError, match="name"):
        make_plan(project(tmp_path, name=name))


def test_results_never_lie_around_the_project_file(tmp_path):
    home = tmp_path / "data" / "session"
    home.mkdir(parents=True)
    (home / "up").symlink_to("..")
    for folder in ("..", "../..", "/", ".", str(tmp_path), "../../data", "x/.."):
        with pytest.raises(ProjectFileError, match="among your files"):
            make_plan(project(home, folder=folder))
    with pytest.raises(ProjectFileError, match="among your files"):
        make_plan(project(home, name="up"))
    assert make_plan(project(home, folder="../results")).folder == tmp_path / "data" / "results"


@pytest.mark.parametrize(
    ("read", "text"),
    [
        (read_project_file, "name: r\npipeline: [motion]\nname: s\n"),
        (
            read_project_file,
            "name: r\nmicroscope:\n  voltage_kv: 300\n  pixel_size_angstrom: 0.8\n  pixel_size_angstrom: 1.6\npipeline: [motion]\n",
        ),
        (read_project_file, "name: r\npipeline: [{pick: {diameter_angstrom: 1, diameter_angstrom: 2}}]\n"),
        (read_project_file, "name: r\npipeline: [motion]\n'name': s\n"),
        (read_cluster_file, "kind: local\nworkers: 1\nworkers: 2\n"),
        (read_cluster_file, "kind: slurm\npools: {cpu: {memory: 1GiB}, cpu: {memory: 2GiB}}\n"),
        (read_blueprint, "cluster: {kind: local}\nstorage: {}\nstorage: {}\n"),
    ],
)
def test_a_key_given_twice_is_refused_by_name_and_line(read, text, tmp_path):
    (tmp_path / "f.yaml").write_text(text)
    with pytest.raises(ProjectFileError, match=r"'\w+' is given twice, in lines \d and \d"):
        read(tmp_path / "f.yaml")


def test_a_merged_mapping_may_be_changed(tmp_path):
    (tmp_path / "f.yaml").write_text("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\n")
    assert read_yaml(tmp_path / "f.yaml", "test file")["b"] == {"x": 3, "y": 2}


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe",
        b"a: \xfc",
        b"a: [",
        b"\t",
        b"[" * 3000,
        b"!!python/object:os.system {}",
        b"a: 1\n---\nb: 2",
        b"a: *x",
        b"a: \x00",
        b"? {a: 1}\n: 2",
        b"workers: &x [*x]",
        b"inputs: &x {movies: {deeper: [1, *x]}}",
    ],
)
def test_what_is_not_yaml_is_refused_in_a_sentence(content, tmp_path):
    (tmp_path / "p.yaml").write_bytes(content)
    with pytest.raises(ProjectFileError, match=r"p\.yaml") as refused:
        read_project_file(tmp_path / "p.yaml")
    assert len(str(refused.value)) < 400


def test_files_are_utf8_with_and_without_a_mark(tmp_path, monkeypatch):
    text = "name: Größe\npipeline: [motion]\n"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        (tmp_path / "p.yaml").write_text(text, encoding=encoding)
        assert read_project_file(tmp_path / "p.yaml").name == "Größe"


TEXT = st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp")))  # what else breaks lines PyYAML does not write exactly


@given(st.floats(allow_nan=False, allow_infinity=False) | st.integers() | TEXT | st.booleans() | st.none())
def test_what_pyyaml_writes_is_read_back(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("y") / "f.yaml"
    path.write_text(yaml.safe_dump({"a": value}, allow_unicode=True), encoding="utf-8")
    assert read_yaml(path, "test file") == {"a": value}


class Sizes(StrictModel):
    """Some forms of numbers."""

    box: int = Field(1, ge=1)
    threshold: float | str | None = None
    flag: bool = False
    scale: float | tuple[float, ...] = 1.0
    many: dict[str, float] = {}  # noqa: RUF012


@pytest.mark.parametrize(
    "given",
    [
        {"box": True},
        {"box": "1_0"},
        {"scale": [1.0, True]},
        {"scale": math.inf},
        {"many": {"a": False}},
        {"many": {"a": "\u0661"}},
        {"box": 1.5},
    ],
)
def test_models_refuse_words_at_any_depth(given):
    with pytest.raises(ValidationError, match=next(iter(given))):
        Sizes.model_validate(given)


@pytest.mark.parametrize(
    "given",
    [{"box": 2}, {"box": "2"}, {"threshold": "auto"}, {"threshold": "12_0"}, {"flag": True}, {"scale": [1, 2.5]}, {"many": {"a": 1}}],
)
def test_models_take_what_is_meant(given):
    assert Sizes.model_validate(given)


def test_paths_expand_or_are_refused(monkeypatch):
    monkeypatch.setenv("HOME", "/home/anna")
    monkeypatch.setenv("DATA", "/data")
    assert [expand(p) for p in ("~/a", "$DATA/a", "${DATA}/a", "a/~b", "cost$5/a", "a")] == [
        "/home/anna/a",
        "/data/a",
        "/data/a",
        "a/~b",
        "cost$5/a",
        "a",
    ]
    for wrong in ("$NOT_SET_HERE/a", "${NOT_SET_HERE}/a", "~nobody_of_this_name/a"):
        with pytest.raises(ValueError, match=r"not set|not the home"):
            expand(wrong)


@pytest.mark.parametrize("inputs", ["{movies: '$NOT_SET_HERE/*.tif'}", "{particles: ~nobody_of_this_name/p.star}"])
def test_a_project_with_an_unset_variable_is_refused_by_name(inputs, tmp_path):
    with pytest.raises(ProjectFileError, match=r"NOT_SET_HERE|nobody_of_this_name"):
        read_project_file(project(tmp_path, inputs=inputs))


def test_an_alias_that_is_used_twice_contains_nothing_of_itself(tmp_path):
    (tmp_path / "p.yaml").write_text("a: &x [1, 2]\nb: [*x, *x]\nc: {d: *x}\n")
    assert read_yaml(tmp_path / "p.yaml", "file") == {"a": [1, 2], "b": [[1, 2], [1, 2]], "c": {"d": [1, 2]}}


def test_a_path_with_a_zero_byte_is_refused(tmp_path):
    with pytest.raises(ProjectFileError, match=r"inputs\.movies: a path cannot contain a zero byte"):
        read_project_file(project(tmp_path, inputs='{movies: "movies/\\0*"}'))


@pytest.mark.parametrize("kind", ["[slurm]", "{local: 1}", "5"])
def test_a_kind_of_cluster_is_a_word(kind, tmp_path):
    (tmp_path / "c.yaml").write_text(f"kind: {kind}\n")
    with pytest.raises(ProjectFileError, match="there is no kind of cluster"):
        read_cluster_file(tmp_path / "c.yaml")
