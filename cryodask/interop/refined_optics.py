"""Refined aberrations of optics groups in the words of RELION and cryoSPARC.

RELION 3.1 has Zernike polynomials of k in 1/Angstrom: the odd ones up to order 3 are (n, m) = (1, -1), (1, 1), (3, -3), (3, -1), (3, 1),
(3, 3), the even ones up to order 4 (0, 0), (2, -2), (2, 0), (2, 2), (4, -4) ... (4, 4); m < 0 is a sine. Its even terms are subtracted from
the argument of the CTF as it is written here. What cryoSPARC calls them: :mod:`cryodask.formats.cryosparc_optics`.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping

import numpy as np

from cryodask.formats import cryosparc_optics

_REPLACED = ("cryosparcShift", "cryosparcTilt", "cryosparcTrefoil", "cryosparcTetrafoil", "rlnEvenZernike")
"""What earlier programs knew of aberrations that were refined here."""


class ExportWarning(UserWarning):
    """Something of a project that another program's files cannot hold, or not in words that were tested."""


def warn_of_unconverted(texts: np.ndarray, to: str) -> None:
    """Warn of aberrations in the texts of optics groups that are not written for ``to``, "RELION" or "cryoSPARC"."""
    for sentence in cryosparc_optics.unconverted(texts, to):
        warnings.warn(sentence, ExportWarning, stacklevel=3)


def with_refined_optics(texts: np.ndarray, columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """Texts of optics groups (``relion_optics``), `(particle,)`, with refined aberrations in place of earlier ones.

    ``columns`` are those of the particles; particles without refined aberrations keep their text.
    """
    if not columns:
        return texts
    known = {name: np.nan_to_num(np.asarray(values, np.float64), nan=np.inf) for name, values in columns.items()}
    words, of_word = np.unique(texts.astype(str), return_inverse=True)
    table = np.column_stack([of_word.reshape(-1), *known.values()])
    rows, of = np.unique(table, axis=0, return_inverse=True)
    out = [words[int(row[0])] if np.isinf(row[1:]).any() else _text(words[int(row[0])], dict(zip(known, row[1:].tolist()))) for row in rows]
    return np.array(out, dtype=object)[of.reshape(-1)]


def _text(text: str, values: Mapping[str, float]) -> str:
    group = {name: value for name, value in (json.loads(text) if text else {}).items() if name not in _REPLACED}
    for axis in "xy":
        group[f"rlnBeamTilt{axis.upper()}"] = f"{values.get(f'beam_tilt_{axis}_mrad', 0.0):.6g}"
    trefoil = [values.get(f"trefoil_{axis}_angstrom3", 0.0) for axis in "xy"]
    group["rlnOddZernike"] = _list([0.0, 0.0, trefoil[1], 0.0, 0.0, trefoil[0]])
    tetrafoil = [values.get(f"tetrafoil_{axis}_angstrom4", 0.0) for axis in "xy"]
    if any(tetrafoil):
        group["rlnEvenZernike"] = _list([0.0, 0.0, 0.0, 0.0, -tetrafoil[1], 0.0, 0.0, 0.0, -tetrafoil[0]])
    xx, xy, yy = (values.get(f"magnification_{name}", float(name != "xy")) for name in ("xx", "xy", "yy"))
    group |= {"rlnMagMat00": f"{xx:.7g}", "rlnMagMat01": f"{xy:.7g}", "rlnMagMat10": f"{xy:.7g}", "rlnMagMat11": f"{yy:.7g}"}
    group["cryosparcAnisomag"] = _list([xx - 1.0, xy, xy, yy - 1.0])
    return json.dumps(group)


def _list(values: list[float]) -> str:
    return f"[{','.join(f'{value:.7g}' for value in values)}]"
