"""The command line as a user meets it."""

from __future__ import annotations

import errno
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from _command import command
from typer.testing import CliRunner

from cryodask import errors
from cryodask.cli import app, main
from cryodask.formats.mrc import write_mrc
from cryodask.store.project import Project


def test_help_lists_every_command_and_loads_neither_torch_nor_distributed():
    shown = subprocess.run([sys.executable, "-m", "cryodask.cli", "--help"], capture_output=True, text=True, check=True)
    for name in ("demo", "simulate", "run", "info", "verify", "gc", "import", "export", "report", "stages"):
        assert name in shown.stdout
    imports = [sys.executable, "-X", "importtime", "-c", "import cryodask.cli"]
    loaded = subprocess.run(imports, capture_output=True, text=True, check=True).stderr
    assert "torch" not in loaded
    assert "distributed" not in loaded


def test_errors_are_sentences_not_tracebacks(tmp_path):
    shown = command("info", str(tmp_path))
    assert shown.returncode == 2
    assert "is not a cryodask project" in shown.stderr
    assert "What to do" in shown.stderr
    assert "Traceback" not in shown.stderr


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.ProjectFileError("a"), 2),
        (errors.GainError("a"), 2),
        (errors.LockedError("a"), 2),
        (errors.StoreError("a"), 2),
        (errors.TakenOverError("a"), 5),
        (errors.ClusterError("a"), 3),
        (errors.DiskError("a"), 4),
        (errors.DiskFullError("a"), 4),
        (OSError(errno.ENOSPC, "No space left"), 4),
        (OSError(errno.EIO, "Input/output error"), 4),
        (FileNotFoundError(errno.ENOENT, "No such file"), 2),
    ],
)
def test_the_exit_status_says_whose_fault_it_was(monkeypatch, capsys, error, status):
    def fail(**options) -> None:
        raise error

    monkeypatch.setattr("cryodask.cli.app", fail)
    for name, expected in (("run", status), ("info", 2)):
        monkeypatch.setattr(sys, "argv", ["cryodask", name, "p"])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == expected
    assert "Traceback" not in capsys.readouterr().err


def test_a_scheduler_that_does_not_answer_ends_with_the_status_of_the_cluster(tmp_path):
    (tmp_path / "movies").mkdir()
    (tmp_path / "p.yaml").write_text(
        "name: p\ninputs: {movies: movies/*.mrc}\nmicroscope: {voltage_kv: 300, spherical_aberration_mm: 2.7, pixel_size_angstrom: 1}\n"
        "pipeline: [motion]\n"
    )
    write_mrc(tmp_path / "movies" / "m.mrc", np.ones((3, 64, 64), np.float32), 1.0, stack=True)
    shown = command("run", str(tmp_path / "p.yaml"), "--cluster", "tcp://127.0.0.1:9")
    assert (shown.returncode, "No scheduler answers" in shown.stderr) == (3, True), shown.stderr
    (tmp_path / "p.yaml").write_text((tmp_path / "p.yaml").read_text().replace("motion", "moton"))
    assert command("run", str(tmp_path / "p.yaml")).returncode == 2


def test_unknown_stage_is_answered_with_the_nearest():
    shown = command("stages", "moton")
    assert shown.returncode == 2
    assert "Did you mean 'motion'" in shown.stderr


def test_stages_are_listed_and_explained():
    result = CliRunner().invoke(app, ["stages", "ctf"])
    assert result.exit_code == 0
    assert re.search(r"^takes +exposures\[micrograph, optics\]$", result.stdout, re.M)
    assert re.search(r"^gives +exposures\[ctf, ctf_quality\]$", result.stdout, re.M)
    assert "least_defocus_angstrom" in result.stdout


def test_dry_run_shows_the_plan_and_makes_nothing(tmp_path):
    (tmp_path / "movies").mkdir()
    (tmp_path / "movies" / "a.tif").write_bytes(b"x")
    (tmp_path / "p.yaml").write_text(
        "name: p\ninputs: {movies: 'movies/*.tif'}\n"
        "microscope: {voltage_kv: 300, spherical_aberration_mm: 2.7, pixel_size_angstrom: 1}\npipeline: [motion, ctf]\n"
    )
    result = CliRunner().invoke(app, ["run", str(tmp_path / "p.yaml"), "--dry-run"])
    assert result.exit_code == 0
    steps = {line.split()[0]: line for line in result.stdout.splitlines() if line.startswith("  ")}
    assert list(steps) == ["ingest", "motion", "ctf"]
    assert all("1 exposures, new" in line for line in steps.values())
    assert "exposures of ingest" in steps["motion"]
    assert "exposures of motion" in steps["ctf"]
    assert not (tmp_path / "p").exists()
    as_json = CliRunner().invoke(app, ["run", str(tmp_path / "p.yaml"), "--dry-run", "--json"])
    assert as_json.exit_code == 0
    assert all(label in json.dumps(json.loads(as_json.stdout)) for label in steps)
    assert not (tmp_path / "p").exists()


_WITHOUT_TORCH = """
import sys

class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "scipy", "matplotlib", "xarray", "pandas"):
            raise RuntimeError(f"{name} was imported")

sys.meta_path.insert(0, Refused())
from cryodask.cli import main

main()
"""


@pytest.mark.parametrize(
    "words", ["--help", "stages", "stages motion", "stages refine3d", "run p.yaml --dry-run", "run p.yaml --dry-run --json"]
)
def test_commands_that_only_look_import_nothing_that_computes(tmp_path, words):
    (tmp_path / "movies").mkdir()
    write_mrc(tmp_path / "movies" / "m.mrc", np.ones((3, 64, 64), np.float32), 1.0, stack=True)
    (tmp_path / "p.yaml").write_text(
        "name: p\ninputs: {movies: movies/*.mrc}\nmicroscope: {voltage_kv: 300, spherical_aberration_mm: 2.7, pixel_size_angstrom: 1}\n"
        "pipeline: [motion, ctf, {pick: {diameter_angstrom: 20}}, {extract: {box_angstrom: 32, pixel_size_angstrom: 1.1}}, classify2d,"
        " curate, ab_initio, {refine3d: {symmetry: D2}}, mask, postprocess, {expand: {symmetry: D2, from: {particles: refine3d}}}]\n"
    )
    shown = subprocess.run(
        [sys.executable, "-c", _WITHOUT_TORCH, *words.split()], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert shown.returncode == 0, shown.stderr
    assert len(shown.stdout.splitlines()) > (0 if "--json" in words else 8)


def test_verify_says_whether_all_is_intact(tmp_path):
    Project.create(tmp_path / "p", "p")
    result = CliRunner().invoke(app, ["verify", str(tmp_path / "p")])
    assert result.exit_code == 0
    assert "intact" in result.stdout


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "m.tif").write_bytes(b"x")
    (tmp_path / "p.yaml").write_text(
        "name: p\nfolder: file/p\ninputs: {movies: 'm.tif'}\n"
        "microscope: {voltage_kv: 300, spherical_aberration_mm: 2.7, pixel_size_angstrom: 1}\npipeline: [motion]\n"
    )
    monkeypatch.setattr(sys, "argv", ["cryodask", "run", str(tmp_path / "p.yaml")])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "file/p" in capsys.readouterr().err


def test_a_heartbeat_that_fails_at_the_end_prints_no_traceback(client):
    def fail() -> str:
        import io
        import logging

        logger, shown = logging.getLogger("distributed.worker"), io.StringIO()
        handler = logging.StreamHandler(shown)
        logger.addHandler(handler)
        try:
            raise OSError("closed")
        except OSError:
            logger.exception("Failed to communicate with scheduler during heartbeat.")
            logger.exception("Something else.")
        finally:
            logger.removeHandler(handler)
        return shown.getvalue()

    for said in client.run(fail).values():
        heartbeat, other = said.split("Something else.")
        assert "Failed to communicate" in heartbeat
        assert "Traceback" not in heartbeat
        assert "Traceback" in other
