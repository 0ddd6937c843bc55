"""Certificates: who may connect, what a refused one is told, who can pose as whom, and that nothing is open without TLS."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from _lanes import attempt, until
from _secure import OWNER, authority, guarded, person, warned
from _workers import workers_of
from distributed import Client, Scheduler, Security, Worker, get_client, worker_client
from distributed.core import rpc

from cryodask.cluster.access import tls
from cryodask.cluster.guard import GuardedWorker
from cryodask.errors import ClusterError

SENTENCES = ("Usual reason: ", "What to do: ")


def _mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


# --- files -----------------------------------------------------------------------------------------------------------------------
def test_every_file_of_an_authority_is_for_its_account_alone(tmp_path):
    before = os.umask(0)  # the loosest umask there is
    try:
        folder = authority(tmp_path / "deep" / "a", anna=["hpda"]).folder
    finally:
        os.umask(before)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {p.name for p in files} >= {
        "ca-key.pem",
        "scheduler-key.pem",
        "worker-key.pem",
        "anna-key.pem",
        "testing-anna.invite",
        "people.json",
    }
    assert {p.name: oct(_mode(p)) for p in files} == {p.name: oct(0o600) for p in files}
    assert [oct(_mode(p)) for p in (folder, folder / "invitations")] == [oct(0o700)] * 2


@pytest.mark.parametrize("name", ["ca-key.pem", "ca.pem"])
def test_authority_whose_files_others_can_read_is_refused(tmp_path, name):
    folder = authority(tmp_path / "a").folder
    (folder / name).chmod(0o640)
    with pytest.raises(ClusterError, match=r"is readable by others \(mode 640\)") as error:
        tls.Authority.open(folder)
    assert f"chmod 600 {folder / name}" in str(error.value)


def test_certificate_invitation_and_people_that_others_can_read_are_refused(tmp_path):
    made = authority(tmp_path / "a", anna=[])
    invitation = made.folder / "invitations" / "testing-anna.invite"
    for path, read in (
        (made.folder / "anna-key.pem", lambda: tls.security(made.folder, "anna")),
        (made.folder / "people.json", made.people),
        (invitation, lambda: tls.Invitation.read(invitation)),
    ):
        path.chmod(0o604)
        with pytest.raises(ClusterError, match="is readable by others"):
            read()
        path.chmod(0o600)
        read()


def test_authority_is_not_made_twice_and_opens_as_it_was(tmp_path):
    made = authority(tmp_path / "a", anna=["hpda"])
    with pytest.raises(ClusterError, match="already contains an authority"):
        tls.Authority.create(made.folder, owner="other")
    again = tls.Authority.open(made.folder)
    assert again.cluster == "testing"
    assert list(again.people()) == ["anna"]
    again.certificate("bert")
    tls.security(made.folder, "bert")


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("worker", "user"),
        ("scheduler", "owner"),
        ("ca", "user"),
        ("../x", "user"),
        ("", "user"),
        ("anna", "worker"),
        ("ca-key", "user"),
        ("scheduler-key", "user"),
        ("anna-key", "user"),
        ("anna-key", "owner"),
    ],
)
def test_no_person_gets_the_name_of_a_service_or_of_another_file(tmp_path, name, role):
    with pytest.raises(ClusterError, match="cannot be the name"):
        authority(tmp_path / "a").certificate(name, role)


def test_nothing_is_made_for_an_owner_whose_name_cannot_be(tmp_path):
    with pytest.raises(ClusterError, match="cannot be the name of an owner"):
        tls.Authority.create(tmp_path / "a", owner="scheduler-key")
    assert not (tmp_path / "a").exists()


def test_inviting_the_owner_is_refused_and_leaves_the_owners_certificate_as_it_was(tmp_path):
    made = authority(tmp_path / "a", anna=[])
    before = {path.name: path.read_bytes() for path in made.folder.glob("*.pem")}
    with pytest.raises(ClusterError, match="is the owner of testing and cannot become its user"):
        made.invite(OWNER, [], address="tls://127.0.0.1:1")
    with pytest.raises(ClusterError, match="anna is the user of testing and cannot become its owner"):
        made.certificate("anna", "owner")
    assert {path.name: path.read_bytes() for path in made.folder.glob("*.pem")} == before
    assert list(made.people()) == ["anna"]


def test_invitations_and_revocations_at_the_same_time_lose_none(tmp_path):
    made = tls.Authority.create(tmp_path / "a", owner="owner")
    for number in range(8):
        made.invite(f"old{number}", [], address="tls://here:1")

    def change(number: int) -> None:
        own = tls.Authority.open(tmp_path / "a")
        own.invite(f"new{number}", [], address="tls://here:1")
        own.revoke(f"old{number}")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(change, range(8)))
    assert sorted(made.people()) == [f"new{number}" for number in range(8)]


def test_missing_expired_foreign_and_broken_certificates_are_named_before_anything_connects(tmp_path):
    made, other = authority(tmp_path / "a", anna=[]), authority(tmp_path / "b", anna=[])
    made.certificate("old", days=-1 / 24)
    expired = made.invite("late", [], address="tls://127.0.0.1:1", days=-1 / 24)
    for name in ("anna.pem", "anna-key.pem"):
        (made.folder / f"foreign{name[4:]}").write_bytes((other.folder / name).read_bytes())
        (made.folder / f"foreign{name[4:]}").chmod(0o600)
        (made.folder / f"broken{name[4:]}").write_text("-----BEGIN CERT")
        (made.folder / f"broken{name[4:]}").chmod(0o600)
    for read, words in (
        (lambda: tls.security(made.folder, "nobody"), "There is no certificate for nobody"),
        (lambda: tls.security(made.folder, "old"), "the certificate expired on "),
        (lambda: tls.Invitation.read(expired).security(), "the certificate expired on "),
        (lambda: tls.security(made.folder, "foreign"), "was signed by another authority"),
        (lambda: tls.security(made.folder, "broken"), "has no valid certificate"),
        (lambda: tls.Invitation.read("nowhere"), "There is no "),
        (lambda: made.invite("anna", [], address="tcp://127.0.0.1:1"), "Nobody can be invited to tcp://"),
        (lambda: made.revoke("bert"), "bert is not invited"),
    ):
        with pytest.raises(ClusterError, match=words) as error:
            read()
        assert all(s in str(error.value) for s in SENTENCES)


def test_invitation_is_one_file_that_is_found_by_the_clusters_name(tmp_path, monkeypatch):
    folder = authority(tmp_path / "a", anna=["hpda", "live"]).folder
    home = tmp_path / "config" / "cryodask"
    home.mkdir(parents=True)
    (folder / "invitations" / "testing-anna.invite").rename(home / "testing.invite")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    invitation = tls.Invitation.read("testing")
    assert (invitation.user, invitation.lanes, invitation.address) == ("anna", ["hpda", "live"], "tls://127.0.0.1:1")

    async def run():
        async with guarded(folder) as scheduler:
            async with Client(scheduler.address, security=invitation.security(), asynchronous=True, set_as_default=False) as client:
                assert await client.submit(sum, [1, 2]) == 3

    asyncio.run(run())


# --- who gets in -----------------------------------------------------------------------------------------------------------------
def _mixed(folder: Path, authority_of: Path, name: str, roles: str = "client") -> Security:
    """Security put together by hand, as somebody would who gets around our checks."""
    pair = {f"tls_{r}_{k}": str(folder / f"{name}{s}.pem") for r in roles.split() for k, s in (("cert", ""), ("key", "-key"))}
    return Security(require_encryption=True, tls_ca_file=str(authority_of / "ca.pem"), **pair)


def test_a_scheduler_that_ends_while_somebody_comes_is_told_as_one_that_hung_up():
    # in the words of tornado, where a connection is closed just before its encryption begins
    error = ValueError("IOStream is not idle; cannot convert to SSL")
    with pytest.raises(ClusterError, match="tls://x:1 closed the connection"), tls.connection_errors("tls://x:1"):
        raise error
    with pytest.raises(ValueError, match="something else"), tls.connection_errors("tls://x:1"):
        raise ValueError("something else")


def test_whoever_cannot_connect_is_told_why_at_once(tmp_path):
    made, other = authority(tmp_path / "a", anna=[]), authority(tmp_path / "b", anna=[])
    made.certificate("old", days=-1 / 24)

    async def refused(address: str, security: Security | None) -> str:
        with pytest.raises(ClusterError) as error, tls.connection_errors(address):
            # it is not tried again for as long
            await attempt(Client(address, security=security, asynchronous=True, timeout="1h", set_as_default=False))
        assert all(s in str(error.value) for s in SENTENCES)
        return error.value.what

    async def run():
        async with guarded(made.folder) as scheduler, Scheduler(host="127.0.0.1", port=0, dashboard_address="127.0.0.1:0") as plain:
            open_address = scheduler.address.replace("tls", "tcp")
            assert "requires a certificate" in await refused(scheduler.address, None)
            assert "closed an unencrypted connection" in await refused(open_address, None)
            assert "is not encrypted, but this cluster is encrypted" in await refused(open_address, tls.security(made.folder, "anna"))
            assert "does not belong to the cluster of your certificate" in await refused(
                scheduler.address, tls.security(other.folder, "anna")
            )
            assert "certificate has expired" in await refused(scheduler.address, _mixed(made.folder, made.folder, "old"))
            foreign = await refused(scheduler.address, _mixed(other.folder, made.folder, "anna"))
            assert "does not recognise the authority of your certificate" in foreign
            assert "does not speak TLS" in await refused(plain.address.replace("tcp", "tls"), tls.security(made.folder, "anna"))
            async with person(scheduler, made.folder, "anna") as anna:
                assert await anna.submit(sum, [1, 2]) == 3

    asyncio.run(run())


def test_revoked_and_replaced_invitations_are_refused_by_name_and_open_connections_end(tmp_path):
    made = authority(tmp_path / "a", anna=[], bert=[])

    async def run():
        async with guarded(made.folder) as scheduler, person(scheduler, made.folder, "bert") as bert:
            stolen = tls.Invitation.read(made.folder / "invitations" / "testing-bert.invite").security()
            made.revoke("anna")
            with warned("bert is not invited") as said:
                made.invite("bert", [], address=scheduler.address)  # another certificate for bert: the first is worthless
                await until(lambda: said and bert.id not in scheduler.clients)
            for security in (tls.security(made.folder, "anna"), stolen):
                with pytest.raises(ClusterError, match="is not invited to this cluster with that certificate"), tls.connection_errors("x"):
                    await attempt(Client(scheduler.address, security=security, asynchronous=True, set_as_default=False))
            async with person(scheduler, made.folder, "bert") as again:
                assert await again.submit(sum, [1, 2]) == 3

    asyncio.run(run())


def test_certificate_of_a_person_can_pose_neither_as_a_scheduler_nor_as_a_worker(tmp_path):
    made = authority(tmp_path / "a", anna=[])
    as_everything = _mixed(made.folder, made.folder, "anna", "client scheduler worker")

    async def run():
        async with Scheduler(host="127.0.0.1", port=0, protocol="tls", security=as_everything, dashboard_address="127.0.0.1:0") as false:
            with pytest.raises(ClusterError, match="does not belong to the cluster"), tls.connection_errors(false.address):
                await attempt(Client(false.address, security=tls.security(made.folder, OWNER), asynchronous=True, set_as_default=False))
        async with guarded(made.folder, workers=1) as scheduler:
            false = Worker(scheduler.address, security=as_everything, host="127.0.0.1", dashboard_address="127.0.0.1:0")
            with pytest.raises(RuntimeError) as refused:
                await asyncio.wait_for(false, 5)
            assert "register-worker is refused to anna" in str(refused.value.__cause__)
            assert [ws.name for ws in scheduler.workers.values()] == ["w0"]
            async with person(scheduler, made.folder, "anna") as anna:
                assert await anna.submit(sum, [1, 2]) == 3

    asyncio.run(run())


def _nested() -> int:
    with worker_client() as client:
        return client.submit(sum, [1, 1]).result()


def _restarts() -> str:
    try:
        get_client().restart()
    except PermissionError as error:
        return str(error)
    return "done"


def test_tasks_submit_tasks_with_the_workers_certificate_and_have_no_more_rights_than_a_guest(tmp_path):
    made = authority(tmp_path / "a", anna=[])

    async def run():
        async with guarded(made.folder) as scheduler, person(scheduler, made.folder, "anna") as anna:
            assert await anna.submit(_nested) == 2
            assert "restart is refused to worker" in await anna.submit(_restarts)

    asyncio.run(run())


# --- a cluster of processes, from the command line -------------------------------------------------------------------------------
def _listening(process: psutil.Process) -> list[tuple[int, str, int]]:
    family = [process, *process.children(recursive=True)]
    return [(p.pid, c.laddr.ip, c.laddr.port) for p in family for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN]


async def _speaks_plainly(host: str, port: int) -> bool:
    """Whether a server answers a connection without TLS with distributed's greeting or with a web page."""
    try:
        async with asyncio.timeout(3):
            reader, writer = await asyncio.open_connection(host, port)
            writer.write(b"GET / HTTP/1.0\r\n\r\n")
            answer = await reader.read(8)
            writer.close()
            return bool(answer) and answer[:1] != b"\x15"  # a TLS alert
    except (OSError, TimeoutError):
        return False


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_processes_started_from_the_command_line_listen_beyond_loopback_with_tls_only(tmp_path, host):
    folder = authority(tmp_path / "a", anna=["hpda"]).folder
    options = {"cryodask": {"guard": {"owner": OWNER, "users": str(folder / "people.json")}, "fairshare": {"lanes": {"hpda": 1}}}}
    (tmp_path / "dask").mkdir()
    (tmp_path / "dask" / "guard.yaml").write_text(json.dumps(options))
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])  # tasks of this module are found by name
    environment = {
        **os.environ,
        "PYTHONPATH": path,
        "DASK_CONFIG": str(tmp_path / "dask"),
        "OMP_NUM_THREADS": "1",
        **tls.worker_environment(folder),
    }
    file = tmp_path / "scheduler.json"
    dask = [sys.executable, "-m", "dask"]
    certificate = ["--tls-ca-file", folder / "ca.pem", "--tls-cert", folder / "scheduler.pem", "--tls-key", folder / "scheduler-key.pem"]
    scheduler = [*dask, "scheduler", "--preload", "cryodask.cluster.guard", "--protocol", "tls", "--host", host, "--port", "0"]
    pages = ["--dashboard-address", "127.0.0.1:0", "--no-dashboard"]
    guards_nanny = ["--preload-nanny", "cryodask.cluster.guard"]
    processes: list[subprocess.Popen] = []
    try:
        processes.append(subprocess.Popen([*scheduler, *pages, *certificate, "--scheduler-file", file], env=environment, cwd=tmp_path))
        _wait_for(lambda: file.exists() and file.stat().st_size > 0)
        address = json.loads(file.read_text())["address"]
        worker = [
            *dask,
            "worker",
            address,
            "--nthreads",
            "1",
            *pages,
            *guards_nanny,
            "--host",
            "127.0.0.1" if host == "127.0.0.1" else _own_address(),
        ]
        processes.append(subprocess.Popen(worker, env=environment, cwd=tmp_path))
        with Client(address, security=tls.security(folder, "anna"), name="hpda/anna", set_as_default=False, timeout="30s") as anna:
            anna.wait_for_workers(1, timeout=60)
            assert anna.submit(sum, [1, 2]).result() == 3
            assert anna.submit(_nested).result() == 2
            for call in (
                anna.restart,
                lambda: anna.run(os.getpid),
                lambda: anna.run_on_scheduler(os.getpid),
                lambda: anna.sync(anna.scheduler.terminate),
            ):
                with pytest.raises(PermissionError, match="is refused to anna"):
                    call()
            ((of_worker, worker_said),) = workers_of(anna).items()
            for target, kind in ((worker_said["nanny"], "nanny"), (of_worker, "worker")):
                with pytest.raises(ImportError, match=f"anna may not connect to a {kind}"):
                    anna.sync(_terminate, target, tls.security(folder, "anna"))
            assert anna.submit(sum, [3, 4]).result() == 7
            listening = [found for p in processes for found in _listening(psutil.Process(p.pid))]
            assert len(listening) >= 5  # the scheduler's and the worker's port and page, the nanny's port
            ports = {int(a.rsplit(":", 1)[1]) for a in (address, worker_said["nanny"], of_worker)}
            assert ports <= {port for _, _, port in listening}
            for _, ip, port in listening:
                if ip in ("127.0.0.1", "::1"):
                    assert port not in ports or not asyncio.run(_speaks_plainly(ip, port))
                else:
                    assert port in ports, f"{ip}:{port} is open beyond loopback"
                    assert not asyncio.run(_speaks_plainly("127.0.0.1" if ip in ("0.0.0.0", "::") else ip, port))
        with Client(address, security=tls.security(folder, OWNER), set_as_default=False) as owner:
            assert len(owner.run(os.getpid)) == 1
    finally:
        for process in reversed(processes):
            process.send_signal(signal.SIGTERM)
        for process in processes:
            process.wait(30)


async def _terminate(address: str, security: Security) -> None:
    async with rpc(address, connection_args=security.get_connection_args("client")) as straight:
        await straight.terminate()


def _own_address() -> str:
    from distributed.utils import get_ip

    return get_ip()


def _wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_worker_and_scheduler_with_open_pages_do_not_start(tmp_path):
    folder = authority(tmp_path / "a").folder

    async def run():
        async with guarded(folder, workers=0) as scheduler:
            with pytest.raises(RuntimeError) as refused:
                await GuardedWorker(
                    scheduler.address, security=tls.security(folder, "worker"), host="127.0.0.1", dashboard_address="0.0.0.0:0"
                )
            assert "would be reachable from other machines without TLS" in str(refused.value.__cause__)
            assert not scheduler.workers

    asyncio.run(run())


def test_process_whose_guard_cannot_be_set_up_ends_instead_of_going_on_without(tmp_path):
    folder = authority(tmp_path / "a").folder
    certificate = ["--tls-ca-file", folder / "ca.pem", "--tls-cert", folder / "scheduler.pem", "--tls-key", folder / "scheduler-key.pem"]
    scheduler = [
        sys.executable,
        "-m",
        "dask",
        "scheduler",
        "--preload",
        "cryodask.cluster.guard",
        "--host",
        "127.0.0.1",
        "--port",
        "0",
    ]
    ended = subprocess.run([*scheduler, *certificate, "--dashboard-address", "0.0.0.0:0"], capture_output=True, text=True, timeout=60)
    assert ended.returncode != 0
    assert "The guard could not be installed" in ended.stderr
    assert "would be reachable from other machines without TLS" in ended.stderr
