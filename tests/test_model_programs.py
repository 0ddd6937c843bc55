"""Programs that build and refine models, by stand-ins that check their arguments and write files of the names and formats that are expected
of ModelAngelo 0.2 and 1.0 and of Phenix 1.21. Neither program has been run for these tests.
"""

from __future__ import annotations

import os
from pathlib import Path

import gemmi
import numpy as np
import pytest
import yaml
from _peptide import bundle, density_of

from cryodask.errors import InputError, ProgramError, ProgramMissingError
from cryodask.formats.mrc import write_mrc
from cryodask.run.recipe import draft_plan
from cryodask.stage import Context
from cryodask.stages import _models as md
from cryodask.stages.external.modelangelo import ModelAngeloParams, modelangelo
from cryodask.stages.external.phenix_real_space_refine import PhenixRealSpaceRefineParams, phenix_real_space_refine

BOX, VOXEL = 48, 1.5


@pytest.fixture(scope="module")
def structure() -> gemmi.Structure:
    return bundle(2, 1, residues=10, centre=35.0)


@pytest.fixture(scope="module")
def given(structure) -> dict:
    return {"final_map": density_of(structure, BOX, VOXEL), "map_pixel_size_angstrom": VOXEL}


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Put a script before all others on the PATH."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")

    def make(name: str, lines: str) -> None:
        path = tmp_path / "bin" / name
        path.write_text(f"#!/bin/bash\n{lines}\n")
        path.chmod(0o755)

    return make


def model_angelo(program, recorded: Path, version: str, words: str) -> None:
    """A stand-in that accepts these words only."""
    program(
        "model_angelo",
        f'[ "$1" = --version ] && {{ echo "UserWarning: torch 2.1.0 is old" >&2; echo "ModelAngelo {version}"; exit; }}\n'
        f'[ "$*" = "{words}" ] || {{ echo "usage: model_angelo build; error: unrecognized arguments: $*" >&2; exit 2; }}\n'
        "[ -s map.mrc ] || exit 3\n"
        f"mkdir out; echo '---------------------------- Sorting residues'; cp {recorded} out/out_raw.cif; cp {recorded} out/out.cif",
    )


@pytest.mark.parametrize(("version", "option"), [("1.0.12", "-pf"), ("0.2.4", "-f")])
def test_modelangelo_builds_a_model_in_the_frame_of_the_map(given, structure, program, tmp_path, version, option):
    recorded, fasta = tmp_path / "recorded.cif", tmp_path / "s.fasta"
    structure.make_mmcif_document().write_file(str(recorded))
    fasta.write_text(">all\nAAAAAAAAAA\n")
    model_angelo(program, recorded, version, f"build -v map.mrc {option} {fasta} -o out")
    result = modelangelo.process(ModelAngeloParams(fasta=str(fasta)), **given)
    assert modelangelo.says(result) == "30 residues in 3 chains"
    assert np.allclose(md.atoms_of(md.structure_of(result["model_file"])).positions, md.atoms_of(structure).positions, atol=1e-3)
    assert modelangelo.version_here() == f"1 with model_angelo {version}"
    model_angelo(program, recorded, version, "build_no_seq -v map.mrc -o out")
    assert modelangelo.process(ModelAngeloParams(), **given)["built_chains"] == 3
    assert modelangelo.resources.gpus == 1


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("echo 'CUDA out of memory'; exit 1", r"failed with exit status 1; (?s:.*)CUDA out of memory"),
        ("echo done", r"did not write out/out.cif"),
        ("mkdir out; echo data_x > out/out.cif", "a model"),
        ("mkdir out; echo hello > out/out.cif", "wrote a model that cannot be read|wrote a model without atoms"),
    ],
)
def test_what_modelangelo_fails_with_is_quoted(given, program, lines, said):
    program("model_angelo", f'[ "$1" = --version ] && {{ echo "ModelAngelo 1.0.12"; exit; }}\n{lines}')
    with pytest.raises(ProgramError, match=said):
        modelangelo.process(ModelAngeloParams(), **given)


def test_a_file_that_is_no_fasta_is_refused_before_the_program_runs(given, program, tmp_path):
    program("model_angelo", 'echo "ModelAngelo 1.0.12"')
    (tmp_path / "s.fasta").write_text("AAAA")
    with pytest.raises(InputError, match="is not a FASTA file"):
        modelangelo.process(ModelAngeloParams(fasta=str(tmp_path / "s.fasta")), **given)


# --- Phenix ------------------------------------------------------------------------------------------------------------------------
def phenix(program, lines: str) -> None:
    program("phenix.version", "echo 'Version: 1.21.2-5419'; echo 'Release tag: 5419'")
    program("phenix.real_space_refine", lines)


def test_phenix_refines_the_given_model_at_the_resolution_of_the_map(given, structure, program, tmp_path):
    words = "model.cif map.mrc resolution=3.200 macro_cycles=5 nproc=1"
    phenix(
        program,
        f'[ "$*" = "{words}" ] || {{ echo "Sorry: Unused parameter definitions: $*"; exit 1; }}\n'
        f"cp model.cif {tmp_path}/got.cif; cp model.cif model_real_space_refined_000.cif; echo 'CC_mask: 0.8'",
    )
    model = {"model_file": md.bytes_of(structure.clone())}
    params = PhenixRealSpaceRefineParams()
    result = phenix_real_space_refine.process(params, **given, **model, resolution_angstrom=3.2)
    assert result["moved_angstrom"] < 2e-3
    cell = gemmi.read_structure(str(tmp_path / "got.cif")).cell
    assert (cell.a, cell.b, cell.c) == (BOX * VOXEL,) * 3, "Phenix refuses a model whose cell is not that of the map"
    assert phenix_real_space_refine.version_here() == "1 with phenix.real_space_refine 1.21.2-5419"
    # a PDB file is taken where there is no mmCIF file, and the movement is measured
    moved = structure.clone()
    moved[0].transform_pos_and_adp(gemmi.Transform(gemmi.Mat33(), gemmi.Vec3(0.3, 0.0, 0.4)))
    moved.write_pdb(str(tmp_path / "moved.pdb"))
    phenix(program, f"cp {tmp_path}/moved.pdb model_real_space_refined_000.pdb")
    result = phenix_real_space_refine.process(params, **given, **model, resolution_angstrom=3.2)
    assert phenix_real_space_refine.says(result) == "atoms moved by 0.50 A (root mean square)"


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("echo 'Sorry: Symmetry and/or box dimensions mismatch'; exit 1", r"exit status 1; (?s:.*)box dimensions mismatch"),
        ("echo all is well", "wrote no refined model"),
        ("cp {far} model_real_space_refined_000.cif", r"lies outside the map|lies \d+ A from the given one"),
    ],
)
def test_what_phenix_fails_with_is_quoted(given, structure, program, tmp_path, lines, said):
    far = structure.clone()
    far[0].transform_pos_and_adp(gemmi.Transform(gemmi.Mat33(), gemmi.Vec3(0, 0, 16)))
    far.make_mmcif_document().write_file(str(tmp_path / "far.cif"))
    phenix(program, lines.format(far=tmp_path / "far.cif"))
    with pytest.raises(ProgramError, match=said):
        phenix_real_space_refine.process(
            PhenixRealSpaceRefineParams(resolution_angstrom=3.0), **given, model_file=md.bytes_of(structure.clone())
        )


def test_a_model_in_the_mirror_image_is_refused(given, structure, program):
    phenix(program, "exit 9")
    with pytest.raises(InputError, match="map has the wrong hand"):
        phenix_real_space_refine.process(
            PhenixRealSpaceRefineParams(resolution_angstrom=3.0), **given, model_file=md.bytes_of(structure.clone()), dock_hand="mirrored"
        )


def test_an_unknown_resolution_is_refused(given, structure, program):
    phenix(program, "exit 9")
    with pytest.raises(InputError, match="resolution of the map is unknown"):
        phenix_real_space_refine.process(
            PhenixRealSpaceRefineParams(), **given, model_file=md.bytes_of(structure.clone()), resolution_angstrom=float("nan")
        )


# --- missing programs ----------------------------------------------------------------------------------------------------------------
def test_missing_programs_are_named_with_the_way_out(given, program, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(ProgramMissingError, match=r"model_angelo is not on the PATH (?s:.*)install ModelAngelo"):
        modelangelo.process(ModelAngeloParams(), **given)
    program("phenix.version", "echo 'Version: 1.21.2-5419'")
    with pytest.raises(ProgramMissingError, match=r"phenix.real_space_refine is not on the PATH (?s:.*)phenix_env.sh"):
        phenix_real_space_refine.version_here()


def test_their_models_are_in_the_frame_of_the_map(tmp_path, given, structure):
    for name in ("half1", "half2"):
        write_mrc(tmp_path / f"{name}.mrc", given["final_map"], VOXEL)
    structure.make_mmcif_document().write_file(str(tmp_path / "m.cif"))
    steps = ["external.modelangelo", "external.phenix_real_space_refine", "model_map"]
    (tmp_path / "p.yaml").write_text(yaml.safe_dump({"name": "p", "inputs": {"half_maps": ["half1.mrc", "half2.mrc"]}, "pipeline": steps}))
    graph = draft_plan(tmp_path / "p.yaml").graph
    assert [p for p in graph.problems if "model_angelo" not in str(p) and "phenix" not in str(p)] == []


def test_a_log_is_kept(given, structure, program, tmp_path):
    phenix(program, "cp model.cif model_real_space_refined_000.cif; echo 'Final validation'")
    versions = phenix_real_space_refine.program_versions()
    with Context(programs=versions, log=tmp_path / "result.log") as context:
        phenix_real_space_refine.process(
            PhenixRealSpaceRefineParams(resolution_angstrom=3.0), context=context, **given, model_file=md.bytes_of(structure.clone())
        )
    log = (tmp_path / "result.log").read_text()
    assert log.startswith("$ phenix.real_space_refine model.cif map.mrc resolution=3.000")
    assert "Final validation" in log
