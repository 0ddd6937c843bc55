"""Text files of CTFFIND: a real one, and a folder of them as the start of a project."""

from __future__ import annotations

import numpy as np
import pytest

from cryodask.errors import InputError
from cryodask.formats import ctffind, star
from cryodask.formats.mrc import write_mrc
from cryodask.interop import project_from
from cryodask.run.recipe import make_plan

TEXT = """# Output from CTFFind version 4.1.14, run on 2024-08-30 16:05:30
# Input file: {image} ; Number of micrographs: 1
# Pixel size: 1.400 Angstroms ; acceleration voltage: 200.0 keV ; spherical aberration: 1.40 mm ; amplitude contrast: 0.10
# Box size: 512 pixels ; min. res.: 30.0 Angstroms ; max. res.: 5.0 Angstroms ; min. def.: 5000.0 um; max. def. 50000.0 um
# Columns: #1 - micrograph number; #2 - defocus 1 [Angstroms]; #3 - defocus 2; ...
{row}
"""
ROW = "1.000000 37034.929688 35846.542969 -14.849661 0.500000 0.017465 9.554261"


def test_a_real_file(shared):
    image, fit = ctffind.read_fit(shared / "data" / "metadata" / "ctf" / "ctffind4_20170629_00021.txt")
    assert image == "CtfFind/job005/Movies/20170629_00021_frameImage_PS.mrc"
    assert fit == {
        "pixel_size_angstrom": 1.4, "voltage_kv": 200.0, "spherical_aberration_mm": 1.4, "amplitude_contrast": 0.1,
        "defocus_u_angstrom": 37034.929688, "defocus_v_angstrom": 35846.542969, "defocus_angle_deg": -14.849661, "phase_shift_deg": 0.0,
        "ctf_figure_of_merit": 0.017465, "ctf_resolution_angstrom": 9.554261,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("", "has 0 rows"),
        (f"{ROW}\n{ROW}", "has 2 rows"),
        (ROW.rsplit(" ", 1)[0], "row of 6 numbers"),
        (ROW.replace("37034.929688", "nan"), "finite"),
        (ROW.replace("37034.929688", "deep"), "could not convert"),
    ],
)
def test_damaged_files_are_refused(tmp_path, row, message):
    (tmp_path / "a.txt").write_text(TEXT.format(image="a.mrc", row=row))
    with pytest.raises(InputError, match=message):
        ctffind.read_fit(tmp_path / "a.txt")


def test_other_text_and_no_text_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("hello\n")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    for name, message in (("a.txt", "does not say the input file"), ("b.txt", "cannot be read"), ("c.txt", "cannot be read")):
        with pytest.raises(InputError, match=message):
            ctffind.read_fit(tmp_path / name)


def test_a_folder_of_fits_starts_a_project(tmp_path):
    """One was made from the spectrum; one found no rings at all, which leaves out the resolutions."""
    (tmp_path / "fits").mkdir()
    for name, image, row in (("a", "a.mrc", ROW), ("b", "run/b_PS.mrc", ROW.replace("9.554261", "inf"))):
        (tmp_path / "fits" / f"{name}.txt").write_text(TEXT.format(image=image, row=row))
        (tmp_path / "fits" / f"{name}_avrot.txt").write_text("# no fit\n")
        write_mrc(tmp_path / f"{name}.mrc", np.ones((64, 64), np.float32), 1.4)
    plan = make_plan(project_from(tmp_path / "fits", tmp_path / "p.yaml"))
    assert [step.label for step in plan.steps][:2] == ["import_micrographs", "pick"]
    table = star.read_micrographs(tmp_path / "p_micrographs.star")
    assert table["micrograph_name"].tolist() == ["a.mrc", "b.mrc"]
    assert table["phase_shift_deg"] == pytest.approx(np.degrees(0.5))
    assert table["defocus_u_angstrom"] == pytest.approx(37034.929688)
    assert "ctf_resolution_angstrom" not in table
    (tmp_path / "b.mrc").unlink()
    with pytest.raises(InputError, match=r"is of run/b\.mrc, which does not exist"):
        project_from(tmp_path / "fits", tmp_path / "q.yaml")
