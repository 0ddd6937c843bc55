"""Project files that start from another program's results."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from cryodask.errors import ProjectFileError, StarError
from cryodask.formats import star
from cryodask.store.files import disk_errors


def project_from_star(path: str | Path, output: str | Path) -> Path:
    """Write a short project file that starts from a RELION STAR file of micrographs or of particles."""
    path, output = Path(path), Path(output)
    if output.exists():
        raise ProjectFileError(
            f"{output} exists and is not overwritten.",
            "an earlier import wrote it",
            "choose another name with --output, or remove it",
        )
    tables = star.read_tables(path)
    content: dict[str, Any] = {"name": path.stem, "inputs": {}}
    relative = os.path.relpath(path.resolve(), output.resolve().parent)
    if "particles" in tables:
        columns = star.read_particles(path)
        content["inputs"]["particles"] = relative
        content["pipeline"] = [{"classify2d": {"classes": 20}}, {"curate": {"keep": "auto"}}, {"ab_initio": {"symmetry": "C1"}}]
        content["pipeline"] += [{"refine3d": {"symmetry": "C1"}}, {"mask": {}}, {"postprocess": {}}]
        count = f"{len(columns['image_index'])} particles"
    elif "micrographs" in tables:
        columns = star.read_micrographs(path)
        content["inputs"]["micrographs"] = relative
        first: list[dict[str, Any]] = [] if "defocus_u_angstrom" in columns else [{"ctf": {}}]
        content["pipeline"] = [*first, {"pick": {"diameter_angstrom": 150}}, {"extract": {"box": 256, "scale_to": 64}}]
        content["pipeline"] += [{"classify2d": {"classes": 20}}, {"curate": {"keep": "auto"}}]
        count = f"{len(columns['micrograph_name'])} micrographs"
    else:
        raise StarError(
            f"{path} lists neither micrographs nor particles.",
            "it is another kind of STAR file",
            "give one that lists micrographs or particles",
        )
    content["cluster"] = "local"
    with disk_errors(output.parent):
        output.write_text(f"# {count} from {path.name}\n" + yaml.safe_dump(content, sort_keys=False))
    return output
