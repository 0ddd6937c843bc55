"""The store: shards that plain zarr reads, commits that are whole or not there, keys, locks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from cryodask import vocabulary
from cryodask.errors import DiskFullError, LockedError, MicrographError, StoreError
from cryodask.store.generation import Generation, disk_errors, generation_key
from cryodask.store.journal import Journal, content_crc, decode_value, encode_value
from cryodask.store.layouts import Grid
from cryodask.store.project import Arrival, Project
from cryodask.store.shards import Layout, ShardReader, file_crc, write_shard
from cryodask.store.table import Column

COLUMNS = {
    "numbers": ([1, 2.5], 0),
    "arrays": ([np.arange(3.0), np.zeros(0), np.ones(1)], 1),
    "pictures": ([np.arange(6.0).reshape(2, 3), np.zeros((2, 3))], 2),
    "one dtype each": ([np.arange(3), np.arange(2.0)], 1),
    "none": ([], 1),
}


@pytest.mark.parametrize(("values", "ndim"), COLUMNS.values(), ids=COLUMNS)
def test_a_column_of_encoded_values_is_that_of_the_values(values, ndim):
    found, expected = Column.of_encoded([encode_value(v) for v in values], "f4", ndim), Column.of(values, "f4", ndim)
    assert found.flat.dtype == expected.flat.dtype
    assert found.flat.tolist() == expected.flat.tolist()
    assert found.shapes.tolist() == expected.shapes.tolist()
    assert found.shapes.shape == expected.shapes.shape


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    chunk=st.lists(st.integers(0, 5), min_size=3, max_size=3),
    dtype=st.sampled_from(["u1", "i2", "f4", "f2"]),
    seed=st.integers(0, 99),
)
def test_plain_zarr_reads_every_shard_that_we_write(tmp_path_factory, shape, chunk, dtype, seed):
    folder = tmp_path_factory.mktemp("shard")
    layout = Layout.of(tuple(shape), tuple(chunk[: len(shape)]), dtype)
    data = np.random.default_rng(seed).integers(0, 50, shape).astype(dtype)
    array = zarr.create_array(
        folder / "a",
        shape=(3, *layout.shape),
        shards=(1, *layout.padded),
        chunks=(1, *layout.chunk),
        dtype=dtype,
        compressors=layout.zarr_codecs() or None,
        filters=None,
    )
    path = folder / "a" / "c" / "1" / "/".join("0" * len(shape))
    assert write_shard(path, layout, data).crc == file_crc(path)
    np.testing.assert_array_equal(array[1], data)
    np.testing.assert_array_equal(ShardReader(path, layout).read(), data)


def test_movie_is_streamed_frame_by_frame_into_a_shard(tmp_path):
    frames = np.random.default_rng(0).poisson(1.0, (5, 33, 47)).astype(np.uint8)
    layout = Layout.of(frames.shape, (1, 0, 0), "u1")

    class Stream:
        shape, dtype = frames.shape, frames.dtype

        def __len__(self):
            return len(frames)

        def __getitem__(self, i):
            return frames[i]

    write_shard(tmp_path / "movie", layout, Stream())
    reader = ShardReader(tmp_path / "movie", layout)
    np.testing.assert_array_equal(np.stack(list(reader)), frames)
    assert not list(tmp_path.glob("*.part"))


@settings(max_examples=50, deadline=None)
@given(st.one_of(st.floats(allow_nan=False), st.integers(-(2**60), 2**60), st.lists(st.floats(width=32), max_size=5)))
def test_columns_come_back_bit_by_bit(value):
    array = np.asarray(value)
    back = np.asarray(decode_value(json.loads(json.dumps(encode_value(array)))))
    np.testing.assert_array_equal(back, array)
    assert back.dtype == array.dtype or back.ndim == 0


def test_torn_and_flipped_journal_lines_are_no_commits(tmp_path):
    journal = Journal(tmp_path)
    for row in range(4):
        journal.append({"row": row, "ok": True})
    journal.close()
    file = next(tmp_path.glob("*.jsonl"))
    lines = file.read_bytes().split(b"\n")
    lines[1] = lines[1].replace(b"true", b"trve")
    file.write_bytes(b"\n".join(lines)[:-9])
    contents = journal.read()
    assert sorted(contents.records) == [0, 2]
    assert (len(contents.torn_lines), len(contents.damaged_lines)) == (1, 1)


def test_success_beats_failure_and_the_latest_attempt_wins(tmp_path):
    first, second = Journal(tmp_path), Journal(tmp_path)
    first.append({"row": 0, "ok": True, "attempt": 1, "time": 5.0, "columns": {"a": 1}})
    second.append({"row": 0, "ok": False, "attempt": 3, "time": 9.0})
    second.append({"row": 0, "ok": True, "attempt": 2, "time": 6.0, "columns": {"a": 2}})
    assert first.read().records[0]["columns"] == {"a": 2}


def test_a_pickled_journal_never_carries_an_open_file(tmp_path):
    import pickle

    journal = Journal(tmp_path)
    journal.append({"row": 0, "ok": True})
    assert pickle.loads(pickle.dumps(journal))._fd is None


def _generation(path: Path, sizes=(6, 8)) -> Generation:
    return Generation.create(
        path,
        meta={"stage": "motion", "version": 1, "params": {}, "recipes": {"": "recipe"}, "inputs": {}},
        gives=("micrograph_sum", "total_motion"),
        per_item=True,
        grids={"": Grid({"y": sizes[0], "x": sizes[1]}, {})},
    )


def test_committed_items_are_read_back_and_uncommitted_ones_do_not_exist(tmp_path):
    generation = _generation(tmp_path / "k")
    image = np.arange(48, dtype=np.float32).reshape(6, 8)
    generation.commit(2, "b", {"micrograph_sum": image, "total_motion": 1.5})
    write_shard(generation.shard_path("micrograph_sum", 0, 2), generation.layout(generation.gives[0]), image)
    dataset = generation.dataset()
    assert dataset["micrograph"].values.tolist() == ["b"]
    np.testing.assert_array_equal(dataset["micrograph_sum"].values[0], image)
    assert float(dataset["total_motion"][0]) == 1.5
    assert dataset["total_motion"].attrs["units"] == "angstrom"


def test_damaged_and_missing_shards_are_found(tmp_path):
    generation = _generation(tmp_path / "k")
    image = np.ones((6, 8), np.float32)
    for row in range(3):
        generation.commit(row, f"m{row}", {"micrograph_sum": image, "total_motion": 0.0})
    assert generation.damaged() == []
    first = generation.shard_path("micrograph_sum", 0, 2)
    raw = bytearray(first.read_bytes())
    raw[5] ^= 1
    first.write_bytes(raw)
    generation.shard_path("micrograph_sum", 1, 2).unlink()
    assert ["damaged" in p or "missing" in p for p in generation.damaged()] == [True, True]


def _result(path: Path, count: int = 300_000) -> tuple[Generation, dict[str, np.ndarray]]:
    """A generation with one result: columns of more than one chunk, a stack of images, and what is empty."""
    rng = np.random.default_rng(0)
    values = {
        "particle_id": np.cumsum(rng.integers(1, 999, count)),
        "class_number": rng.integers(0, 9, count).astype(np.int32),
        "class_psi_deg": rng.normal(size=count).astype(np.float32),
        "class_centre_y_angstrom": rng.normal(size=count),
        "class_average": rng.normal(size=(3, 6, 5)).astype(np.float32),
        "dropped_id": np.zeros(0, np.int64),
    }
    meta = {"stage": "classify2d", "version": 1, "params": {}, "recipe": "k"}
    generation = Generation.create(path, meta=meta, gives=tuple(values), per_item=False)
    generation.commit_result(values)
    return Generation(path), values


def test_one_result_is_read_as_plain_zarr_reads_it(tmp_path):
    generation, values = _result(tmp_path / "k")
    record = generation.committed()[0]
    for name, value in values.items():
        found = generation.read(record, name)
        assert (found.dtype, found.shape) == (value.dtype, value.shape)
        np.testing.assert_array_equal(found, value)
        if value.size:
            np.testing.assert_array_equal(found, zarr.open_array(generation.path / name, mode="r")[...])


def test_reading_one_result_does_not_load_zarr(tmp_path):
    generation, values = _result(tmp_path / "k", 50)
    code = (
        "import sys; from cryodask.store.generation import Generation; g = Generation(sys.argv[1]); r = g.committed()[0]\n"
        "print(len(g.read(r, 'particle_id')), g.read(r, 'class_average').shape, 'zarr' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(generation.path)], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[0] == f"{len(values['particle_id'])} (3, 6, 5) False"


@pytest.mark.parametrize("name", ["particle_id", "class_number", "class_psi_deg", "class_average"])
@pytest.mark.parametrize("at", [0.0, 0.3, 0.7, 1.0])
def test_a_flipped_byte_in_a_column_is_an_error_and_never_other_numbers(tmp_path, name, at):
    generation, values = _result(tmp_path / "k")
    record = generation.committed()[0]
    shard = generation.shard_path(name, 0, values[name].ndim)
    whole = shard.read_bytes()
    raw = bytearray(whole)
    raw[int(at * (len(raw) - 1))] ^= 4
    shard.write_bytes(raw)
    with pytest.raises(StoreError, match=r"is damaged: (?s:.*)verify --repair") as caught:
        generation.read(record, name)
    assert str(shard) in str(caught.value)
    shard.write_bytes(whole[:-3])
    with pytest.raises(StoreError, match="is damaged"):
        generation.read(record, name)
    shard.unlink()
    with pytest.raises(StoreError, match="missing"):
        generation.read(record, name)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "",
        lambda text: "{}",
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"int32"', '"int64"'),
        lambda text: text.replace('"int32"', '"float32"'),
        lambda text: text.replace("300000", "900000"),
        lambda text: text.replace("262144", "0"),
        lambda text: text.replace("262144", "131072"),
        lambda text: text.replace('"blosc"', '"gzip"'),
    ],
)
def test_damaged_metadata_of_a_column_is_an_error_that_names_the_file(tmp_path, change):
    generation, _ = _result(tmp_path / "k")
    path = generation.path / "class_number" / "zarr.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(StoreError, match=f"{path.parent}.* is damaged: "):
        generation.read(generation.committed()[0], "class_number")


def test_a_shard_whose_chunk_has_another_length_is_damaged(tmp_path):
    short, long = Layout.of((8,), (8,), "i4"), Layout.of((16,), (16,), "i4")
    write_shard(tmp_path / "s", short, np.arange(8, dtype=np.int32))
    with pytest.raises(StoreError, match="cannot be decoded"):
        ShardReader(tmp_path / "s", long).read()


def test_an_item_of_another_shape_is_refused_with_both_shapes(tmp_path):
    generation = _generation(tmp_path / "k")
    with pytest.raises(MicrographError, match=r"\(5, 8\), not \(6, 8\)"):
        generation.commit(0, "m", {"micrograph_sum": np.zeros((5, 8), np.float32), "total_motion": 0.0})


def test_content_of_a_record_does_not_depend_on_when_and_where(tmp_path):
    a, b = _generation(tmp_path / "a"), _generation(tmp_path / "b")
    values = {"micrograph_sum": np.ones((6, 8), np.float32), "total_motion": 0.25}
    one, two = a.commit(0, "m", values, seconds=1.0), b.commit(0, "m", values, seconds=2.0)
    assert content_crc(one) == content_crc(two)
    assert content_crc(one) != content_crc(a.commit(0, "m", {**values, "total_motion": 0.5}))


def test_key_changes_with_every_part_and_with_nothing_else():
    base = {"stage": "motion", "version": 1, "params": {"patches": (5, 5)}, "upstream": {"movie": "abc"}}
    keys = {generation_key(base), generation_key({**base, "version": 2}), generation_key({**base, "params": {"patches": (3, 3)}})}
    keys.add(generation_key({**base, "upstream": {"movie": "abd"}}))
    assert len(keys) == 4
    assert generation_key(dict(reversed(base.items()))) == generation_key(base)


def test_full_disk_and_missing_permission_become_errors_that_say_what_to_do(tmp_path):
    with pytest.raises(DiskFullError, match="resumes"), disk_errors(tmp_path):
        raise OSError(28, "No space left on device")
    with pytest.raises(StoreError, match="another folder"), disk_errors(tmp_path):
        raise OSError(13, "Permission denied")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_really_full_device_stops_the_journal(tmp_path):
    journal = Journal(tmp_path)
    journal.append({"row": 0, "ok": True})
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, journal._fd)
    journal._file = Path("/dev/full")
    with pytest.raises(DiskFullError), disk_errors(tmp_path):
        journal.append({"row": 1, "ok": True})
    assert sorted(journal.read().records) == [0]
    journal.append({"row": 1, "ok": True})
    assert sorted(journal.read().records) == [0, 1]


def test_registry_keeps_rows_for_ever_and_survives_a_torn_line(tmp_path):
    project = Project.create(tmp_path / "p", "p")
    a, b, c = (Arrival(name, f"content of {name}", {"defocus_u_angstrom": n}) for name, n in (("a", 1), ("b", 2), ("c", 4)))
    assert [i.row for i in project.update_exposures([a, b], complete=True).items] == [0, 1]
    with open(tmp_path / "p" / "items.jsonl", "ab") as file:
        file.write(b'{"row": 2, "na')
    changed = Arrival("b", b.content, {"defocus_u_angstrom": 3})
    again = project.update_exposures([changed, c], complete=False).items
    assert [(i.row, i.name) for i in again] == [(1, "b"), (2, "c")]
    assert [(i.row, i.inputs["defocus_u_angstrom"]) for i in project.items()] == [(0, 1), (1, 3), (2, 4)]


def test_a_second_driver_is_refused_and_a_dead_one_is_replaced(tmp_path):
    project = Project.create(tmp_path / "p", "p")
    with project.lock(), pytest.raises(LockedError, match="is working on"), project.lock():
        pass
    code = f"import os; from cryodask.store.project import Project; Project({str(tmp_path / 'p')!r}).lock().__enter__(); os._exit(9)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert (tmp_path / "p" / "driver.lock").exists()
    with project.lock():
        pass
    assert not (tmp_path / "p" / "driver.lock").exists()


def test_a_folder_that_is_no_project_is_named(tmp_path):
    with pytest.raises(StoreError, match=r"no project\.json"):
        Project(tmp_path)


def test_crc_of_a_shard_covers_its_index(tmp_path):
    layout = Layout.of((4, 4), (2, 2), "f4")
    crc = write_shard(tmp_path / "s", layout, np.eye(4, dtype=np.float32)).crc
    raw = (tmp_path / "s").read_bytes()
    assert crc == google_crc32c.value(raw)
    (tmp_path / "s").write_bytes(raw[:-10] + bytes([raw[-10] ^ 1]) + raw[-9:])
    with pytest.raises(StoreError, match="checksum"):
        ShardReader(tmp_path / "s", layout).read()


def test_the_log_of_an_item_is_taken_over_with_it(tmp_path):
    one, other = _generation(tmp_path / "one"), _generation(tmp_path / "other")
    values = {"micrograph_sum": np.ones((6, 8), np.float32), "total_motion": 1.0}
    records = []
    for row in range(2):
        (one.path / "logs").mkdir(exist_ok=True)
        (one.path / f"logs/m{row}.log").write_text(f"of {row}")
        records.append(one.commit(row, f"m{row}", values, log=f"logs/m{row}.log"))
    (one.path / "logs" / "m0.log").unlink()  # somebody tidied up
    other.link(one, records)
    assert {row: r["log"] for row, r in other.committed().items()} == {0: "logs/m0.log", 1: "logs/m1.log"}
    assert [path.read_text() for path in (other.path / "logs").iterdir()] == ["of 1"]


def test_a_generation_describes_its_variables_for_those_who_do_not_know_them(tmp_path):
    """As it is where the package with the stage is not installed; a definition of a package goes first, whenever it comes."""
    vocabulary.register([vocabulary.Var("ice_thickness", (), "f8", "nm", "thickness of the ice")], "exposures.ctf_quality")
    try:
        made = Generation.create(tmp_path / "g", meta={"stage": "ice", "version": 1, "params": {}}, gives=("ice_thickness",), per_item=True)
        made.commit(0, "m0", {"ice_thickness": 30.0})
    finally:
        known = vocabulary.VARIABLES.pop("ice_thickness")
    try:
        again = Generation(tmp_path / "g").dataset()["ice_thickness"]
        assert (again.attrs, again.values.tolist()) == ({"units": "nm", "long_name": "thickness of the ice"}, [30.0])
        assert vocabulary.VARIABLES["ice_thickness"] == known
        vocabulary.register(
            [vocabulary.Var("ice_thickness", (), "f8", "nm", "thickness, as a later release says")], "exposures.ctf_quality"
        )
        assert Generation(tmp_path / "g").dataset()["ice_thickness"].attrs["long_name"] == "thickness, as a later release says"
        with pytest.raises(ValueError, match="already defined differently"):
            vocabulary.register([vocabulary.Var("ice_thickness", (), "f4", "nm", "")])
    finally:
        del vocabulary.VARIABLES["ice_thickness"]
