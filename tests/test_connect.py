"""What ``connect`` says at once where there is no scheduler, and what it takes besides a word: paths and invitations."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading

import pytest
import yaml
from _workers import workers_of

import cryodask
from cryodask.cluster import connect
from cryodask.cluster.connect import _folder_for_certificates
from cryodask.cluster.slurm.slurm import new_cluster_id
from cryodask.errors import ClusterError


@pytest.fixture
def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def refused(where, *, answered=False):
    """What connect says; where nobody answers it makes no client, which would try for long."""
    with pytest.MonkeyPatch.context() as patch:
        if not answered:
            patch.setattr(sys.modules["cryodask.cluster.connect"], "Client", None)
        with pytest.raises(ClusterError) as error:
            connect(where)

    assert error.value.way_out
    return error.value.what


@pytest.mark.parametrize("as_path", [False, True])
def test_a_scheduler_file_that_does_not_exist_is_said_at_once(as_path, tmp_path):
    absent = tmp_path / "absent.json"
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"kind": "address", "scheduler_file": str(absent)}))
    for where in (absent, tmp_path / "c.yaml"):
        assert refused(where if as_path else str(where)) == f"There is no scheduler file {absent}."


def test_a_scheduler_file_of_one_that_has_ended_is_said_at_once(tmp_path, free_port):
    stale = tmp_path / "stale.json"
    stale.write_text(json.dumps({"address": f"tcp://127.0.0.1:{free_port}"}))
    said = refused(stale)
    assert said.startswith(f"No scheduler answers at tcp://127.0.0.1:{free_port}, which {stale} names")
    assert f"No scheduler answers at tcp://127.0.0.1:{free_port}: " in refused(f"tcp://127.0.0.1:{free_port}")


def test_a_scheduler_file_that_is_none_and_an_address_without_port_are_said(tmp_path):
    (tmp_path / "other.json").write_text('{"name": "x"}')
    assert "is not a scheduler file" in refused(tmp_path / "other.json")
    assert "tcp://somewhere is not a valid address" in refused("tcp://somewhere")


def test_a_scheduler_file_that_is_just_being_written_is_read_when_it_is_whole(tmp_path, free_port):
    file = tmp_path / "s.json"
    file.write_text('{"addr')
    whole = threading.Timer(0.1, file.write_text, [json.dumps({"address": f"tcp://127.0.0.1:{free_port}"})])
    whole.start()
    assert "No scheduler answers" in refused(file)
    whole.join()


def test_a_scheduler_is_found_by_the_path_of_its_file_and_by_a_path_to_a_cluster_file(tmp_path, client):
    (tmp_path / "s.json").write_text(json.dumps({"address": client.scheduler.address}))
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"kind": "address", "scheduler_file": str(tmp_path / "s.json")}))
    for where in (tmp_path / "s.json", tmp_path / "c.yaml"):
        with connect(where) as found:
            assert found.submit(sum, [1, 2]).result(30) == 3


def test_a_scheduler_with_another_release_of_cryodask_is_refused_with_both_named(client, monkeypatch):
    monkeypatch.setattr(sys.modules["cryodask.cluster.connect"], "RELEASE", "0.0.9")
    assert (
        refused(client.scheduler.address, answered=True)
        == f"The scheduler has cryodask {cryodask.__version__}, but this process has 0.0.9."
    )
    assert len(workers_of(client)) == 2


def test_folders_of_certificates_that_a_killed_process_left_go_at_the_next_connect(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    host, pid, born, name = new_cluster_id().split(".")
    home = tmp_path / "cryodask" / "certificates"
    of_others = [f"cluster-{host}.{pid}.{born}.{name}", f"cluster-elsewhere.{ended.pid}.{born}.{name}", "batch"]
    for left in (f"cluster-{host}.{ended.pid}.{born}.{name}", *of_others):
        (home / left).mkdir(parents=True)
        (home / left / "ca-key.pem").touch()
    own = _folder_for_certificates()
    assert own.stat().st_mode & 0o077 == 0
    assert {path.name for path in home.iterdir()} == {own.name, *of_others}
