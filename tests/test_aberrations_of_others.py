"""Aberrations of optics groups in the words of RELION and cryoSPARC: the same phases at all frequencies."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cryodask.formats import cryosparc, cryosparc_optics

KX, KY = np.meshgrid(np.linspace(-0.4, 0.4, 33), np.linspace(-0.4, 0.4, 33))
K, THETA = np.hypot(KX, KY), np.arctan2(KY, KX)


def zernike(n, m):
    radial = {
        (0, 0): K**0, (2, 0): 2 * K**2 - 1, (2, 2): K**2, (4, 0): 6 * K**4 - 6 * K**2 + 1, (4, 2): 4 * K**4 - 3 * K**2, (4, 4): K**4,
    }[n, abs(m)]  # fmt: skip
    return radial * (np.sin(-m * THETA) if m < 0 else np.cos(m * THETA))


def relion_chi(optics, ctf):
    """Phase of RELION's CTF with its polynomials, radians, less that of the amplitude contrast."""
    even = [(0, 0), (2, -2), (2, 0), (2, 2), (4, -4), (4, -2), (4, 0), (4, 2), (4, 4)]
    return plain_chi(*ctf) + sum(c * zernike(*nm) for c, nm in zip(optics, even))


def cryosparc_chi(row):
    lam = 12.2643247 / np.sqrt(row["ctf/accel_kv"] * 1e3 * (1 + row["ctf/accel_kv"] * 0.978466e-3))
    names = ("accel_kv", "cs_mm", "df1_A", "df2_A", "df_angle_rad", "phase_shift_rad")
    a, b, c, d = row["ctf/tetra_A"].astype(float)
    twofold = 2 * np.pi * lam**3 * K**4 * (a * np.cos(2 * THETA) + b * np.sin(2 * THETA))
    fourfold = np.pi / 2 * lam**3 * K**4 * (c * np.cos(4 * THETA) + d * np.sin(4 * THETA))
    return plain_chi(*(float(row[f"ctf/{n}"]) for n in names)) + twofold + fourfold


def plain_chi(kv, cs, u, v, angle, shift):
    lam = 12.2643247 / np.sqrt(kv * 1e3 * (1 + kv * 0.978466e-3))
    defocus = (u + v) / 2 + (u - v) / 2 * np.cos(2 * (THETA - angle))
    return -np.pi * lam * defocus * K**2 + np.pi / 2 * cs * 1e7 * lam**3 * K**4 - shift


def columns(text, kv=300.0, cs=2.7, count=2):
    """Particles of one optics group."""
    return {
        "image_stack": np.array(["s.mrcs"] * count, dtype=object), "image_index": np.arange(count), "box": np.full(count, 64),
        "particle_pixel_size_angstrom": np.full(count, 1.2), "cryosparc_uid": np.arange(1, count + 1, dtype=np.uint64),
        "voltage_kv": np.full(count, kv), "spherical_aberration_mm": np.full(count, cs), "amplitude_contrast": np.full(count, 0.1),
        "defocus_u_angstrom": np.array([15000.0, 9000.0])[:count], "defocus_v_angstrom": np.array([14600.0, 8990.0])[:count],
        "defocus_angle_deg": np.array([30.0, 170.0])[:count], "phase_shift_deg": np.array([0.0, 80.0])[:count],
        "relion_optics": np.array([text] * count, dtype=object),
    }  # fmt: skip


def listed(values):
    return f"[{','.join(f'{v:.9g}' for v in values)}]"


def turned(angle):
    return np.abs(np.angle(np.exp(1j * angle))).max()


@settings(max_examples=40, deadline=None)
@given(
    even=st.lists(st.floats(-60, 60), min_size=9, max_size=9), kv=st.sampled_from([100.0, 200.0, 300.0]), cs=st.sampled_from([0.01, 2.7])
)
def test_relions_even_polynomials_are_the_same_phase_for_cryosparc(even, kv, cs):
    table = columns(json.dumps({"rlnEvenZernike": listed(even)}), kv, cs)
    fields = cryosparc_optics.fields(table, lambda name: np.asarray(table[name]))
    full = {"ctf/accel_kv": table["voltage_kv"], **fields}
    for row in range(2):
        ctf = [table[n][row] for n in ("voltage_kv", "spherical_aberration_mm", "defocus_u_angstrom", "defocus_v_angstrom")]
        ctf += [np.radians(table["defocus_angle_deg"][row]), np.radians(table["phase_shift_deg"][row])]
        if not any(even):
            assert not fields
            continue
        got = cryosparc_chi({name: values[row] for name, values in full.items()})
        # float32 is what the file holds: 60 x 1e-7 x a few terms
        assert turned(got - relion_chi(even, ctf)) < 1e-4
        assert fields["ctf/df1_A"][row] >= fields["ctf/df2_A"][row]


@settings(max_examples=40, deadline=None)
@given(tetra=st.lists(st.floats(-5e5, 5e5, width=32), min_size=4, max_size=4), kv=st.sampled_from([200.0, 300.0]))
def test_cryosparcs_tetrafoil_is_the_same_phase_for_relion_and_comes_back(tetra, kv):
    even = cryosparc_optics.even_of_tetra(np.array(tetra), kv)
    row = {f"ctf/{n}": v for n, v in zip(("accel_kv", "cs_mm", "df1_A", "df2_A", "df_angle_rad", "phase_shift_rad"), (kv, 0, 0, 0, 0, 0))}
    np.testing.assert_allclose(
        relion_chi(even, (kv, 0, 0, 0, 0, 0)), cryosparc_chi({**row, "ctf/tetra_A": np.array(tetra)}), atol=1e-9 * max(1, *np.abs(tetra))
    )
    back = cryosparc_optics.tetra_of_even(even, kv)
    np.testing.assert_allclose(back.tetra, tetra, rtol=1e-9, atol=1e-6)
    assert (back.spherical_aberration, back.phase_shift) == (0.0, 0.0)
    assert np.abs([back.defocus, *back.astigmatism]).max() < 1e-6 * max(1, *np.abs(tetra))


def written(tmp_path, group, **kwargs):
    """Fields that are written for one optics group."""
    cryosparc.write_particles(tmp_path / "p.cs", columns(json.dumps(group), **kwargs))
    return np.load(tmp_path / "p.cs")


def read(tmp_path):
    texts = cryosparc.read_particles(tmp_path / "p.cs")["relion_optics"]
    assert len(set(texts)) == 1
    return json.loads(texts[0])


def test_known_values(tmp_path):
    """1 micrometre of four-fold and 0.5 of two-fold aberration at 300 kV: pi/2 lambda^3 1e4 and pi/2 lambda^3 5e3, lambda 0.0196875 A."""
    group = {"cryosparcTetrafoil": "[0,5000,10000,0]", "cryosparcAnisomag": "[0.01,0.002,0.004,-0.01]"}
    table = written(tmp_path, group)
    assert table["ctf/tetra_A"][0].tolist() == [0.0, 5000.0, 10000.0, 0.0]
    said = read(tmp_path)
    even = json.loads(said["rlnEvenZernike"])
    assert even == pytest.approx([0, 3 * 0.0599306, 0, 0, 0, 0.0599306, 0, 0, 0.1198612], rel=1e-4)
    assert [said[f"rlnMagMat{i}"] for i in ("00", "01", "10", "11")] == pytest.approx(["1.01", "0.002", "0.004", "0.99"])
    assert "rlnOddZernike" not in said


def test_numbers_that_relion_has_refined_replace_cryosparcs(tmp_path):
    group = {"cryosparcTetrafoil": "[0,5000,10000,0]", "cryosparcAnisomag": "[0.01,0.002,0.004,-0.01]", "cryosparcTilt": "[2000,0]"}
    written(tmp_path, group)
    said = read(tmp_path)
    # written out again with six digits: still cryoSPARC's
    rounded = said | {"rlnEvenZernike": listed(np.round(json.loads(said["rlnEvenZernike"]), 6)), "rlnMagMat00": "1.010000"}
    assert written(tmp_path, rounded)["ctf/tetra_A"][0].tolist() == [0.0, 5000.0, 10000.0, 0.0]
    assert written(tmp_path, rounded)["ctf/df1_A"][0] == 15000.0
    refined = said | {"rlnEvenZernike": "[0,0,0,0,0.2,0,0,0,0]", "rlnMagMat00": "1.02", "rlnBeamTiltX": "0", "rlnBeamTiltY": "0"}
    table = written(tmp_path, refined)
    assert table["ctf/tetra_A"][0] == pytest.approx([0, 0, 0, 0.2 / 0.1198612e-4], rel=1e-4)
    assert table["ctf/anisomag"][0] == pytest.approx([0.02, 0.002, 0.004, -0.01])
    assert not table["ctf/tilt_A"].any()


@pytest.mark.parametrize("text", ["x", "[nan,0,0,0,0,0,0,0,1]", "[]", "", "[0,0,0,0,0,0,0,0,0]"])
def test_even_terms_that_are_none_change_nothing(tmp_path, text):
    table = written(tmp_path, {"rlnEvenZernike": text, "rlnMagMat00": "0", "rlnMagMat01": "0", "rlnMagMat10": "0", "rlnMagMat11": "0"})
    assert not {"ctf/tetra_A", "ctf/anisomag"} & set(table.dtype.names)
    assert table["ctf/df1_A"].tolist() == [15000.0, 9000.0]


@pytest.mark.parametrize(
    ("group", "to", "said"),
    [
        ({"cryosparcTrefoil": "[300,1]"}, "RELION", "trefoil that cryoSPARC"), ({"cryosparcTrefoil": "[0,0]"}, "RELION", ""),
        ({"cryosparcTrefoil": "[300,1]"}, "cryoSPARC", ""), ({"rlnOddZernike": "[0,0,0,0,0,9]"}, "cryoSPARC", "rlnOddZernike"),
        ({"rlnOddZernike": "[0,0,0,0,0,9]"}, "RELION", ""), ({"rlnEvenZernike": listed(range(16))}, "cryoSPARC", "fourth order"),
        ({"rlnBeamTiltX": "1", "rlnEvenZernike": listed(range(9))}, "cryoSPARC", ""),
    ],
)  # fmt: skip
def test_what_has_no_tested_words_is_said(group, to, said):
    found = cryosparc_optics.unconverted(np.array([json.dumps(group), ""], dtype=object), to)
    assert bool(found) == bool(said)
    assert said in " ".join(found)
