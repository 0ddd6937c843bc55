"""Aberrations of cryoSPARC's exposure groups, and what RELION's optics groups call them.

With k in 1/Angstrom at an angle theta from x, an image shows ``sin(chi - ...) exp(i phi)``, where

    chi(k) = -pi lambda k^2 defocus(theta) + pi/2 lambda^3 Cs k^4 + even(k),    phi(k) = odd(k)

RELION 3.1 writes ``even`` as Zernike polynomials Z(n, m) of k (``rlnEvenZernike``; m < 0 a sine), cryoSPARC as the lengths of the usual
aberration coefficients (Uhlemann and Haider 1998): ``tetra_A`` = (a, b, c, d) stands for

    2 pi lambda^3 k^4 (a cos 2 theta + b sin 2 theta) + pi/2 lambda^3 k^4 (c cos 4 theta + d sin 4 theta).

Basis, factors and signs are those of public readers of its files (specter, teamtomo). What RELION's polynomials hold besides goes into
defocus, Cs and phase shift, where it is the same function. ``anisomag`` is the matrix in Fourier space less the identity, ``rlnMagMat`` the
whole matrix. ``tilt_A`` is Cs times the sine of the tilt (pyem). Trefoil and the linear terms are not converted: public readers differ in
the sign of cryoSPARC's odd terms.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cryodask.errors import InputError
from cryodask.formats.star import CRYOSPARC
from cryodask.formats.star.numbers import floats

FIELDS = dict(zip(CRYOSPARC, (("ctf/shift_A", 2), ("ctf/tilt_A", 2), ("ctf/trefoil_A", 2), ("ctf/tetra_A", 4), ("ctf/anisomag", 4))))
"""Column of an optics group -> field of cryoSPARC, and its length."""
_ANGSTROM_PER_MM = 1e7
_EVEN = ((0, 0), (2, -2), (2, 0), (2, 2), (4, -4), (4, -2), (4, 0), (4, 2), (4, 4))
"""(n, m) of RELION's even coefficients up to order 4."""
_MAGNIFICATION = ("rlnMagMat00", "rlnMagMat01", "rlnMagMat10", "rlnMagMat11")
_SAME = 2e-5
"""Relative difference of numbers that another program has written out again."""


class Even(NamedTuple):
    """An even phase error in cryoSPARC's terms; angles in radians, lengths in Angstrom."""

    tetra: np.ndarray
    spherical_aberration: float
    defocus: float
    astigmatism: tuple[float, float]
    """Half difference of the defocus times (cos, sin) of twice its angle."""
    phase_shift: float


def wavelength_angstrom(voltage_kv: float) -> float:
    """Relativistic electron wavelength."""
    volt = 1e3 * voltage_kv
    return float(12.2643247 / np.sqrt(volt * (1.0 + 0.978466e-6 * volt)))


def even_of_tetra(tetra: np.ndarray, voltage_kv: float) -> np.ndarray:
    """RELION's even coefficients `(9,)`, radians, of ``tetra_A`` `(4,)`, Angstrom."""
    cubed = np.pi * wavelength_angstrom(voltage_kv) ** 3
    a, b, c, d = (float(v) for v in tetra)
    twofold = {(4, 2): a * cubed / 2.0, (4, -2): b * cubed / 2.0}
    # 4 k^4 = Z(4, 2) + 3 Z(2, 2), by their angles
    values = {**twofold, **{(2, m): 3.0 * v for (_, m), v in twofold.items()}, (4, 4): c * cubed / 2.0, (4, -4): d * cubed / 2.0}
    return np.array([values.get(nm, 0.0) for nm in _EVEN])


def tetra_of_even(coefficients: np.ndarray, voltage_kv: float) -> Even:
    """Terms of cryoSPARC for RELION's even coefficients `(9,)`: together the same phase at all frequencies."""
    lam = wavelength_angstrom(voltage_kv)
    of = dict(zip(_EVEN, (float(v) for v in coefficients)))
    cubed = np.pi * lam**3 / 2.0
    return Even(
        tetra=np.array([of[4, 2], of[4, -2], of[4, 4], of[4, -4]]) / cubed,
        spherical_aberration=6.0 * of[4, 0] / cubed,
        defocus=-(2.0 * of[2, 0] - 6.0 * of[4, 0]) / (np.pi * lam),
        astigmatism=(-(of[2, 2] - 3.0 * of[4, 2]) / (np.pi * lam), -(of[2, -2] - 3.0 * of[4, -2]) / (np.pi * lam)),
        phase_shift=-(of[0, 0] - of[2, 0] + of[4, 0]),
    )


def kept(path: Path, table: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Aberrations that are not 0, one JSON text per row: cryoSPARC's numbers, and RELION's words for those that have some."""
    there = {label: table[name] for label, (name, _) in FIELDS.items() if name in table}
    if bad := next((label for label, values in there.items() if not np.isfinite(values).all()), None):
        raise InputError(f"{path}: {FIELDS[bad][0]} has NaN or infinite values.", "the job that wrote it has failed", "remove these rows")
    there = {label: values for label, values in there.items() if values.any()}
    if not there:
        return {}
    zeros = np.zeros(len(table["uid"]), np.float32)
    optics = [table.get(name, zeros) for name in ("ctf/accel_kv", "ctf/cs_mm")]
    rows, of = np.unique(np.column_stack([*there.values(), *optics]), axis=0, return_inverse=True)
    texts = []
    for row in rows:
        numbers = np.split(row[:-2], np.cumsum([values.shape[1] for values in there.values()])[:-1])
        group = {label: f"[{','.join(str(v) for v in own)}]" for label, own in zip(there, numbers) if own.any()}
        texts.append(json.dumps(group | _relion_words(group, float(row[-2]), float(row[-1]))) if group else "")
    return {"relion_optics": np.array(texts, dtype=object)[of.reshape(-1)]}


def fields(columns: Mapping[str, np.ndarray], column: Callable[[str], np.ndarray]) -> dict[str, np.ndarray]:
    """Fields of aberrations from the texts of optics groups, and the fields of the CTF that they change.

    ``column`` gives a column for all rows. cryoSPARC's own numbers are written bit for bit if RELION's words still say the same, as they
    do unless a program has refined them.
    """
    optics = [column(name).astype(np.float64) for name in ("voltage_kv", "spherical_aberration_mm")]
    words, of_word = np.unique(column("relion_optics").astype(str), return_inverse=True)
    rows, of = np.unique(np.column_stack([of_word.reshape(-1), *optics]), axis=0, return_inverse=True)
    of = of.reshape(-1)
    groups = [(json.loads(words[int(word)]) if words[int(word)] else {}, kv, cs) for word, kv, cs in rows.tolist()]
    out: dict[str, np.ndarray] = {}
    for label, (name, size) in FIELDS.items():
        known = [_numbers_of(label, size, *group) for group in groups]
        if any(one is not None for one in known):
            out[name] = np.array([np.zeros(size) if one is None else one for one in known], np.float32)[of]
    evens = [
        tetra_of_even(_even(group), kv) if kv > 0 and not _unchanged("cryosparcTetrafoil", group, kv, cs) else None
        for group, kv, cs in groups
    ]
    for number, even in enumerate(evens):
        if even is not None and any((even.spherical_aberration, even.defocus, *even.astigmatism, even.phase_shift)):
            out = {**{name: out.get(name, values) for name, values in _ctf(columns, column).items()}, **out}
            _fold(out, of == number, even)
    return out


def unconverted(texts: np.ndarray, to: str) -> list[str]:
    """Sentences about aberrations in the texts of optics groups for which ``to``, "RELION" or "cryoSPARC", has no tested words."""
    groups = [json.loads(text) for text in np.unique(texts.astype(str)).tolist() if text]
    sign = "Public readers differ in the sign of cryoSPARC's odd terms, so they are left out: fit them in {to} again"
    found = []
    if to == "RELION" and any(_is_set(g, "cryosparcTrefoil") and not _is_set(g, "rlnOddZernike") for g in groups):
        found.append(f"The trefoil that cryoSPARC has fitted is written as _cryosparcTrefoil only. {sign.format(to=to)}.")
    if to == "cryoSPARC" and any(_is_set(g, "rlnOddZernike") and not _is_set(g, "cryosparcTrefoil") for g in groups):
        found.append(f"rlnOddZernike (trefoil) is not written for cryoSPARC. {sign.format(to=to)}.")
    if to == "cryoSPARC" and any(len(_list(g.get("rlnEvenZernike", ""))) > len(_EVEN) for g in groups):
        found.append("Terms of rlnEvenZernike beyond the fourth order are not written for cryoSPARC, which has none.")
    return found


def _relion_words(group: Mapping[str, str], voltage_kv: float, spherical_aberration_mm: float) -> dict[str, str]:
    """Beam tilt in mrad, even coefficients and magnification of cryoSPARC's numbers of an optics group."""
    out: dict[str, str] = {}
    if (own := _vector(group, "cryosparcTilt", 2)) is not None and spherical_aberration_mm > 0:
        tilt = np.arcsin(np.clip(own / (spherical_aberration_mm * _ANGSTROM_PER_MM), -1.0, 1.0)) * 1e3
        out |= {f"rlnBeamTilt{axis}": f"{mrad:.6g}" for axis, mrad in zip("XY", tilt)}
    if (own := _vector(group, "cryosparcTetrafoil", 4)) is not None and voltage_kv > 0:
        out["rlnEvenZernike"] = f"[{','.join(f'{v:.9g}' for v in even_of_tetra(own, voltage_kv))}]"
    if (own := _vector(group, "cryosparcAnisomag", 4)) is not None:
        out |= {label: f"{v:.9g}" for label, v in zip(_MAGNIFICATION, own + np.eye(2).ravel())}
    return out


def _numbers_of(label: str, size: int, group: Mapping[str, str], voltage_kv: float, cs_mm: float) -> np.ndarray | None:
    """Numbers of a field of one optics group; None where it has none."""
    own = _vector(group, label, size)
    if own is not None and (label in ("cryosparcShift", "cryosparcTrefoil") or _unchanged(label, group, voltage_kv, cs_mm)):
        return own
    if label == "cryosparcTilt" and ("rlnBeamTiltX" in group or "rlnBeamTiltY" in group):
        mrad = np.array([_single(group, f"rlnBeamTilt{axis}") for axis in "XY"])
        return np.sin(mrad * 1e-3) * cs_mm * _ANGSTROM_PER_MM
    if label == "cryosparcTetrafoil" and _is_set(group, "rlnEvenZernike") and voltage_kv > 0:
        return tetra_of_even(_even(group), voltage_kv).tetra
    if label == "cryosparcAnisomag" and all(name in group for name in _MAGNIFICATION):
        matrix = np.array([_single(group, name) for name in _MAGNIFICATION]) - np.eye(2).ravel()
        return matrix if np.linalg.det(matrix.reshape(2, 2) + np.eye(2)) > 0 else None
    return None


def _unchanged(label: str, group: Mapping[str, str], voltage_kv: float, cs_mm: float) -> bool:
    """Whether cryoSPARC's numbers of a group still mean what RELION's words of it say, if it has such words."""
    if label not in group:
        return not _is_set(group, "rlnEvenZernike") if label == "cryosparcTetrafoil" else False
    for name, text in _relion_words({label: group[label]}, voltage_kv, cs_mm).items():
        now, then = _list(group.get(name, text)), _list(text)
        if len(now) != len(then) or not np.allclose(now, then, rtol=_SAME, atol=_SAME * float(np.abs(then).max(initial=0.0))):
            return False
    return True


_CTF_FIELDS = {
    "ctf/cs_mm": ("spherical_aberration_mm", 1.0),
    "ctf/df1_A": ("defocus_u_angstrom", 1.0),
    "ctf/df2_A": ("defocus_v_angstrom", 1.0),
    "ctf/df_angle_rad": ("defocus_angle_deg", np.pi / 180.0),
    "ctf/phase_shift_rad": ("phase_shift_deg", np.pi / 180.0),
}


def _ctf(columns: Mapping[str, np.ndarray], column: Callable[[str], np.ndarray]) -> dict[str, np.ndarray]:
    zeros = np.zeros(len(column("relion_optics")))
    return {
        theirs: column(ours).astype(np.float64) * factor if ours in columns else zeros.copy()
        for theirs, (ours, factor) in _CTF_FIELDS.items()
    }


def _fold(out: dict[str, np.ndarray], some: np.ndarray, even: Even) -> None:
    """Add what cryoSPARC's aberrations cannot hold to the defocus, Cs and phase shift of some rows."""
    u, v, angle = (out[f"ctf/{name}"][some] for name in ("df1_A", "df2_A", "df_angle_rad"))
    mean = (u + v) / 2.0 + even.defocus
    cosine = (u - v) / 2.0 * np.cos(2.0 * angle) + even.astigmatism[0]
    sine = (u - v) / 2.0 * np.sin(2.0 * angle) + even.astigmatism[1]
    half = np.hypot(cosine, sine)
    out["ctf/df1_A"][some], out["ctf/df2_A"][some] = mean + half, mean - half
    out["ctf/df_angle_rad"][some] = np.arctan2(sine, cosine) / 2.0 % np.pi
    out["ctf/cs_mm"][some] += even.spherical_aberration / _ANGSTROM_PER_MM
    phase = out["ctf/phase_shift_rad"][some] + even.phase_shift
    out["ctf/phase_shift_rad"][some] = (phase + np.pi) % (2.0 * np.pi) - np.pi


def _even(group: Mapping[str, str]) -> np.ndarray:
    values = _list(group.get("rlnEvenZernike", ""))[: len(_EVEN)]
    return np.pad(values, (0, len(_EVEN) - len(values)))


def _is_set(group: Mapping[str, str], label: str) -> bool:
    return bool(_list(group.get(label, "")).any())


def _vector(group: Mapping[str, str], label: str, count: int) -> np.ndarray | None:
    values = _list(group.get(label, ""))
    return values if len(values) == count else None


def _single(group: Mapping[str, str], label: str) -> float:
    values = _list(group.get(label, ""))
    return float(values[0]) if len(values) == 1 else 0.0


def _list(text: str) -> np.ndarray:
    """Numbers of a list in a text; none where it holds anything else: no stage depends on it."""
    found, bad = floats(text.strip("[]").split(","))
    return found if not len(bad) and np.isfinite(found).all() else np.zeros(0)
