"""Simulated particle stacks of known molecules with physical noise, kept as RELION files under benchmarks/out/stacks.

Physical noise: one microscope for every molecule, so weakly scattering ones get weak signal. Its noise is such that beta-galactosidase
(5a1a) has var(signal) / var(noise) = 0.05 in 64 pixels of 3.54 A; in units of projected voxels it grows as 1 / pixel^2. Images are
divided by the noise, whose standard deviation is then 1 per pixel. Slices come from a projector of this file, padded four times,
not from the product's.

A stack is NAME.mrcs, NAME.star (RELION 3.1, with the true poses), NAME_truth.mrc (on the grey scale of the images) and NAME.json, written
last. Run this file to make the stacks of all known molecules and to print their signal-to-noise ratios.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import gemmi
import mrcfile
import numpy as np
import pandas as pd
import starfile
import torch

sys.path.insert(0, str(Path(__file__).parent))
from _stacks import OUT, SHARED, read_map

from cryodask.formats.mrc import write_mrc
from cryodask.kernels.expectation import ctf_values
from cryodask.kernels.orientations import euler_to_matrix, matrix_to_euler, random_rotations
from cryodask.stage import ParticleSet
from cryodask.stages._models import Atoms
from cryodask.stages._models import density as electron_density

STACKS = OUT / "stacks"
REFERENCE_BOX, REFERENCE_PIXEL, REFERENCE_SNR = 64, 3.54, 0.05
VOLTAGE_KV, SPHERICAL_ABERRATION_MM, AMPLITUDE_CONTRAST = 300.0, 2.7, 0.1
MICROGRAPHS = 24
B_FACTOR_A2 = 100.0
SHIFT_SD_ANGSTROM = 4.0
POSE_LABELS = ("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi", "rlnOriginYAngst", "rlnOriginXAngst")
JUNK_LABEL = "cryodaskJunk"


@dataclass(frozen=True)
class Molecule:
    """An atomic model: its file, which part of it, its point group and the diameter of its spherical mask.

    With ``copies`` a ring is made of the part, about z, with its centre ``ring_radius_angstrom`` from the axis.
    """

    file: Path
    mask_diameter_angstrom: float | None
    symmetry: str = "C1"
    chains: tuple[str, ...] = ()
    assembly: bool = False
    copies: int = 1
    ring_radius_angstrom: float = 0.0


_MODELS = SHARED / "data" / "models"
MOLECULES = {
    "9be6": Molecule(_MODELS / "9be6.cif.gz", 150.0),
    "6bqn": Molecule(_MODELS / "6bqn.cif.gz", 190.0),
    "7yc8": Molecule(_MODELS / "7yc8.cif.gz", 160.0),
    "6rn2": Molecule(_MODELS / "6rn2.cif.gz", 190.0),
    "4jsv": Molecule(_MODELS / "4jsv.pdb.gz", 160.0, chains=("B", "D")),
    "5a1a": Molecule(_MODELS / "5a1a.cif.gz", 200.0, symmetry="D2"),
    "7a4m": Molecule(_MODELS / "7a4m.cif.gz", 150.0, symmetry="O", assembly=True),
    "ring4": Molecule(_MODELS / "4jsv.pdb.gz", 150.0, symmetry="C4", chains=("D",), copies=4, ring_radius_angstrom=38.0),
    "ring7": Molecule(_MODELS / "4jsv.pdb.gz", 190.0, symmetry="C7", chains=("D",), copies=7, ring_radius_angstrom=60.0),
}


def molecule(name: str) -> Molecule:
    """A known molecule, or the one of a PDB or mmCIF file, whole and without symmetry."""
    return MOLECULES.get(name) or Molecule(Path(name), None)


# --- atoms and density -----------------------------------------------------------------------------------------------------
def read_atoms(model: Molecule) -> tuple[np.ndarray, list[str]]:
    """Coordinates `(atom, 3)` (x, y, z), Angstrom, about their mean, and elements; no hydrogens, waters, or second conformations."""
    structure = gemmi.read_structure(str(model.file))
    structure.remove_hydrogens()
    structure.remove_waters()
    atoms = [
        atom
        for chain in structure[0]
        if not model.chains or chain.name in model.chains
        for residue in chain
        for atom in residue
        if atom.altloc in ("\0", "A")
    ]
    positions = np.array([atom.pos.tolist() for atom in atoms])
    elements = [atom.element.name for atom in atoms]
    if model.assembly:
        transforms = [operator.transform for part in structure.assemblies[0].generators for operator in part.operators]
        positions = np.concatenate([positions @ np.array(t.mat.tolist()).T + np.array(t.vec.tolist()) for t in transforms])
        elements = elements * len(transforms)
    positions = positions - positions.mean(0)
    if model.copies > 1:
        angles = 2.0 * np.pi * np.arange(model.copies) / model.copies
        turns = np.array([[[np.cos(a), np.sin(a), 0.0], [-np.sin(a), np.cos(a), 0.0], [0.0, 0.0, 1.0]] for a in angles])
        off = positions + np.array([model.ring_radius_angstrom, 0.0, 0.0])
        positions, elements = np.concatenate([off @ turn for turn in turns]), elements * model.copies
    return positions, elements


def density(positions: np.ndarray, elements: list[str], box: int, pixel: float, b_factor_a2: float = B_FACTOR_A2) -> np.ndarray:
    """Electron scattering of the atoms minus a smooth solvent, `(z, y, x)` float32, one absolute scale for all molecules."""
    return electron_density(Atoms(positions, elements, np.zeros(len(positions), np.int64), []), positions, box, pixel, b_factor_a2)


# --- sampling the transform of a map ----------------------------------------------------------------------------------------
class MapTransform:
    """Transform of a cubic map `(z, y, x)` (plain sum over voxels, origin n // 2) at any frequency up to ``highest`` (1/Angstrom).

    Trilinear on a grid that is padded four times for boxes up to 64, three times up to 128, else twice.
    """

    def __init__(self, volume: np.ndarray, voxel_angstrom: float, highest: float | None = None) -> None:
        n = volume.shape[0]
        padding = 4 if n <= 64 else 3 if n <= 128 else 2
        self.wide = wide = padding * n + (padding * n) % 2
        self.voxel = voxel_angstrom
        axis = torch.sinc((torch.arange(n) - n // 2).float() / wide) ** 2
        padded = torch.zeros((wide,) * 3)
        at = slice(wide // 2 - n // 2, wide // 2 - n // 2 + n)
        padded[at, at, at] = torch.as_tensor(np.ascontiguousarray(volume, np.float32)) / (
            axis[:, None, None] * axis[None, :, None] * axis[None, None, :]
        )
        spectrum = torch.fft.rfftn(torch.fft.ifftshift(padded))
        limit = wide // 2 - 2
        self.half = half = limit if highest is None else min(limit, int(highest * wide * voxel_angstrom) + 2)
        k = torch.arange(-half, half + 1) % wide
        # kx from 0: points on the other side are mirrored through the origin
        cut = spectrum[k][:, k][:, :, : half + 1]
        self.grid = torch.view_as_real(cut).permute(3, 0, 1, 2)[None].contiguous()

    def at(self, points: torch.Tensor) -> torch.Tensor:
        """Complex64 `(...)` at frequencies `(..., 3)` (x, y, z) in 1/Angstrom; zero beyond the map's."""
        p = points.reshape(-1, 3).float() * (self.wide * self.voxel)
        flip = p[:, 0] < 0
        p = torch.where(flip[:, None], -p, p)
        scale = torch.tensor([2.0 / self.half, 1.0 / self.half, 1.0 / self.half])
        where = p * scale - torch.tensor([1.0, 0.0, 0.0])
        values = torch.nn.functional.grid_sample(
            self.grid, where[None, None, None], mode="bilinear", padding_mode="zeros", align_corners=True
        )  # fmt: skip
        real, imaginary = values[0, :, 0, 0]
        return torch.complex(real, torch.where(flip, -imaginary, imaginary)).reshape(points.shape[:-1])


def project(
    truth: np.ndarray, pixel: float, rotations: torch.Tensor, origins_px: np.ndarray, columns: dict[str, np.ndarray], chunk: int = 200
) -> np.ndarray:
    """Noise-free images `(n, y, x)` of a map: sums of voxels along the views times the CTF.

    ``origins_px`` `(n, 2)` (y, x) move a particle TO the centre of its image, as RELION's origins do.
    """
    box = truth.shape[0]
    length = box * pixel
    transform = MapTransform(truth, pixel, 0.5 / pixel)
    ky, kx = torch.meshgrid(torch.fft.fftfreq(box, 1 / box), torch.arange(box // 2 + 1).float(), indexing="ij")
    inside = ky**2 + kx**2 <= (box // 2 - 1) ** 2
    ky, kx = ky[inside], kx[inside]
    plane = torch.stack([kx, ky], -1) / length
    out = np.empty((len(rotations), box, box), np.float32)
    for start in range(0, len(rotations), chunk):
        rows = slice(start, start + chunk)
        values = transform.at(torch.einsum("nji,pj->npi", rotations[rows, :2].float(), plane))
        values = values * ctf_values({name: column[rows] for name, column in columns.items()}, ky, kx, length)
        shift = torch.as_tensor(origins_px[rows], dtype=torch.float32)
        turns = (shift[:, :1] * ky + shift[:, 1:] * kx) * (2.0 * np.pi / box)
        spectrum = torch.zeros(len(values), *inside.shape, dtype=torch.complex64)
        spectrum[:, inside] = values * torch.polar(torch.ones_like(turns), turns)
        out[rows] = torch.fft.fftshift(torch.fft.irfft2(spectrum, s=(box, box)), dim=(-2, -1)).numpy()
    return out


# --- stacks -----------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Recipe:
    """What a simulated stack is made of. ``noise`` multiplies the physical noise; ``junk`` is a share of the particles.

    ``preferred``: 70 % of the views lie within 25 degrees of one axis.
    """

    model: str
    particles: int = 2000
    box: int = REFERENCE_BOX
    pixel: float | None = None
    noise: float = 1.0
    junk: float = 0.0
    preferred: bool = False
    seed: int = 11

    @property
    def pixel_angstrom(self) -> float:
        """Pixel size; by default the box spans as much as 64 pixels of 3.54 A."""
        return self.pixel or REFERENCE_PIXEL * REFERENCE_BOX / self.box

    @property
    def name(self) -> str:
        """Name of the stack's files."""
        parts = [Path(self.model).name.split(".")[0], f"n{self.particles}", f"b{self.box}"]
        parts += [f"px{self.pixel:g}"] if self.pixel else []
        parts += [f"noise{self.noise:g}"] if self.noise != 1.0 else []
        parts += [f"junk{self.junk:g}"] if self.junk else []
        parts += ["preferred"] if self.preferred else []
        return "_".join([*parts, f"s{self.seed}"])


@dataclass(frozen=True)
class Poses:
    """True poses: rotations `(n, 3, 3)`, origins `(n, 2)` (y, x) in Angstrom, and which particles are `junk` `(n,)`."""

    rotations: torch.Tensor
    origins_angstrom: np.ndarray
    junk: np.ndarray


@dataclass(frozen=True)
class Stack:
    """Particles with what is known of them; ``truth`` is `(z, y, x)`, of any box and voxel size."""

    name: str
    images: np.ndarray
    particles: ParticleSet
    poses: Poses | None
    truth: np.ndarray | None
    truth_voxel_angstrom: float
    facts: dict[str, Any]


def random_columns(count: int, seed: int) -> dict[str, np.ndarray]:
    """CTF of particles in 24 micrographs at 0.8 to 2.5 um, 200 A defocus spread within one, astigmatism up to 300 A."""
    rng = np.random.default_rng(seed)
    micrograph = np.sort(rng.integers(0, MICROGRAPHS, count))
    mean = rng.uniform(8000.0, 25000.0, MICROGRAPHS)[micrograph] + rng.normal(0.0, 200.0, count)
    half = rng.uniform(0.0, 300.0, MICROGRAPHS)[micrograph] / 2
    angle = rng.uniform(0.0, 180.0, MICROGRAPHS)[micrograph]
    constants = (("phase_shift_deg", 0.0), ("voltage_kv", VOLTAGE_KV), ("spherical_aberration_mm", SPHERICAL_ABERRATION_MM))
    return {
        "defocus_u_angstrom": mean + half,
        "defocus_v_angstrom": mean - half,
        "defocus_angle_deg": angle,
        **{name: np.full(count, value) for name, value in constants},
        "amplitude_contrast": np.full(count, AMPLITUDE_CONTRAST),
        "micrograph": micrograph,
        "half_set": np.arange(count) % 2,
    }


@lru_cache(maxsize=1)
def reference_noise() -> float:
    """Noise per pixel of the one microscope, in projected voxels of 64 pixels of 3.54 A."""
    kept = STACKS / "reference_noise.json"
    if not kept.exists():
        truth = density(*read_atoms(MOLECULES["5a1a"]), REFERENCE_BOX, REFERENCE_PIXEL)
        views = random_rotations(200, torch.Generator().manual_seed(5))
        images = project(truth, REFERENCE_PIXEL, views, np.zeros((200, 2)), random_columns(200, 5))
        STACKS.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(float(np.sqrt(images.var(axis=(1, 2)).mean() / REFERENCE_SNR))))
    return float(json.loads(kept.read_text()))


def _views(recipe: Recipe) -> torch.Tensor:
    views = random_rotations(recipe.particles, torch.Generator().manual_seed(recipe.seed))
    if recipe.preferred:
        rng = np.random.default_rng(recipe.seed + 77)
        many = int(0.7 * recipe.particles)
        cosine = rng.uniform(np.cos(np.radians(25.0)), 1.0, many)
        turn = lambda: torch.from_numpy(rng.uniform(-np.pi, np.pi, many))  # noqa: E731
        near = euler_to_matrix(turn(), torch.from_numpy(np.arccos(cosine)), turn())
        axis = random_rotations(1, torch.Generator().manual_seed(5))[0].double()
        views[torch.from_numpy(rng.permutation(recipe.particles)[:many])] = (near @ axis).float()
    return views


def _add_junk(images: np.ndarray, recipe: Recipe) -> np.ndarray:
    """Replace some noise-free images in place: a third is empty, the others are smooth blobs of the particles' power. Which ones."""
    box, pixel = recipe.box, recipe.pixel_angstrom
    rng = np.random.default_rng(recipe.seed + 78)
    junk = np.zeros(len(images), bool)
    power = float(images.var(axis=(1, 2)).mean())
    y, x = np.mgrid[:box, :box] - box // 2
    for turn, row in enumerate(rng.permutation(len(images))[: round(recipe.junk * len(images))]):
        junk[row] = True
        images[row] = 0.0
        if turn % 3:
            for _ in range(rng.integers(3, 8)):
                cy, cx = rng.normal(0.0, 35.0 / pixel, 2)
                width = rng.uniform(8.0, 25.0) / pixel
                images[row] += rng.normal() * np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / (2 * width**2))
            images[row] *= np.sqrt(power / images[row].var())
    return junk


def _write_star(path: Path, recipe: Recipe, columns: dict[str, np.ndarray], poses: Poses) -> None:
    optics = {
        "rlnOpticsGroupName": "og1", "rlnOpticsGroup": 1, "rlnVoltage": VOLTAGE_KV, "rlnSphericalAberration": SPHERICAL_ABERRATION_MM,
        "rlnAmplitudeContrast": AMPLITUDE_CONTRAST, "rlnImagePixelSize": recipe.pixel_angstrom, "rlnImageSize": recipe.box,
        "rlnImageDimensionality": 2, "rlnMicrographOriginalPixelSize": recipe.pixel_angstrom,
    }  # fmt: skip
    angles = [np.degrees(a.numpy()) for a in matrix_to_euler(poses.rotations.double())]
    rows = pd.DataFrame({
        "rlnImageName": [f"{i + 1:06d}@{recipe.name}.mrcs" for i in range(recipe.particles)],
        "rlnMicrographName": [f"mic{m:03d}.mrc" for m in columns["micrograph"]],
        "rlnOpticsGroup": 1,
        "rlnDefocusU": columns["defocus_u_angstrom"],
        "rlnDefocusV": columns["defocus_v_angstrom"],
        "rlnDefocusAngle": columns["defocus_angle_deg"],
        "rlnRandomSubset": 1 + columns["half_set"],
        **dict(zip(POSE_LABELS, (*angles, *poses.origins_angstrom.T))),
        JUNK_LABEL: poses.junk.astype(int),
    })  # fmt: skip
    starfile.write({"optics": pd.DataFrame([optics]), "particles": rows}, path, overwrite=True)


def make_stack(recipe: Recipe) -> Path:
    """STAR file of a recipe's stack, made unless it exists."""
    star = STACKS / f"{recipe.name}.star"
    finished = star.with_suffix(".json")
    if finished.exists():
        return star
    STACKS.mkdir(parents=True, exist_ok=True)
    box, pixel, count, seed = recipe.box, recipe.pixel_angstrom, recipe.particles, recipe.seed
    positions, elements = read_atoms(molecule(recipe.model))
    noise = reference_noise() * (REFERENCE_PIXEL / pixel) ** 2 * recipe.noise
    truth = density(positions, elements, box, pixel) / noise
    rotations, columns = _views(recipe), random_columns(count, seed + 20)
    origins = np.random.default_rng(seed + 10).normal(0.0, SHIFT_SD_ANGSTROM / pixel, (count, 2))
    images = project(truth, pixel, rotations, origins, columns)
    snr = float(images.var())
    junk = _add_junk(images, recipe) if recipe.junk else np.zeros(count, bool)
    images += np.random.default_rng(seed + 30).standard_normal(images.shape, dtype=np.float32)
    radius = np.sqrt((positions**2).sum(1))
    write_mrc(star.with_suffix(".mrcs"), images, pixel, stack=True)
    write_mrc(star.with_name(f"{recipe.name}_truth.mrc"), truth, pixel)
    _write_star(star, recipe, columns, Poses(rotations, origins * pixel, junk))
    facts = {
        "signal_to_noise": snr,
        "atoms": len(elements),
        "rms_radius_angstrom": float(np.sqrt((radius**2).mean())),
        "largest_radius_angstrom": float(radius.max()),
    }
    part = finished.with_suffix(".part")
    part.write_text(json.dumps(facts))
    os.replace(part, finished)
    return star


def read_images(star: Path, names: list[str]) -> np.ndarray:
    """Images `(n, y, x)` float32 named ``index@file``; files are looked for from the STAR file's folder, then from here."""
    found = [(int(index) - 1, file) for index, file in (name.split("@", 1) for name in names)]
    stacks: dict[str, np.ndarray] = {}
    for file in dict.fromkeys(file for _, file in found):
        path = next((p for p in (star.parent / file, Path(file), star.parent / Path(file).name) if p.exists()), None)
        if path is None:
            raise SystemExit(f"{star} names {file}, which does not exist beside it or here")
        with mrcfile.open(path, permissive=True) as f:
            stacks[file] = np.asarray(f.data).reshape(-1, *f.data.shape[-2:])
    return np.stack([stacks[file][index] for index, file in found]).astype(np.float32)


def read_rows(star: Path) -> tuple[list[str], ParticleSet, Poses | None]:
    """Names of the images, their set (halves by parity) and, where the file has them, their poses, of a RELION 3.1 STAR file."""
    blocks = starfile.read(star, always_dict=True)
    if "optics" not in blocks or "particles" not in blocks:
        raise SystemExit(f"{star} has no optics table and particle table: it is not a RELION 3.1 particle file")
    rows = blocks["particles"].merge(blocks["optics"].drop(columns="rlnOpticsGroupName", errors="ignore"), on="rlnOpticsGroup", how="left")
    if rows["rlnImagePixelSize"].nunique() != 1:
        raise SystemExit(f"{star} has images of several pixel sizes")
    count = len(rows)
    value = lambda label, default=0.0: rows[label].to_numpy(float) if label in rows else np.full(count, default)  # noqa: E731
    columns = {
        "defocus_u_angstrom": value("rlnDefocusU"),
        "defocus_v_angstrom": value("rlnDefocusV"),
        "defocus_angle_deg": value("rlnDefocusAngle"),
        "phase_shift_deg": value("rlnPhaseShift"),
        "voltage_kv": value("rlnVoltage"),
        "spherical_aberration_mm": value("rlnSphericalAberration"),
        "amplitude_contrast": value("rlnAmplitudeContrast"),
        "micrograph": np.unique(rows["rlnMicrographName"], return_inverse=True)[1] if "rlnMicrographName" in rows else np.zeros(count, int),
        "half_set": np.arange(count) % 2,
    }
    particles = ParticleSet(count, int(rows["rlnImageSize"].iloc[0]), float(rows["rlnImagePixelSize"].iloc[0]), columns)
    names = rows["rlnImageName"].tolist()
    if not set(POSE_LABELS) <= set(rows):
        return names, particles, None
    rot, tilt, psi, y, x = (rows[label].to_numpy(float) for label in POSE_LABELS)
    rotations = euler_to_matrix(*(torch.deg2rad(torch.from_numpy(a.copy())) for a in (rot, tilt, psi)))
    return names, particles, Poses(rotations, np.stack([y, x], -1), value(JUNK_LABEL) > 0)


def read_particles(star: Path) -> tuple[np.ndarray, ParticleSet, Poses | None]:
    """What :func:`read_rows` reads, with the images."""
    names, particles, poses = read_rows(star)
    return read_images(star, names), particles, poses


def simulated_stack(recipe: Recipe) -> Stack:
    """The stack of a recipe, made on first use."""
    star = make_stack(recipe)
    images, particles, poses = read_particles(star)
    truth, voxel = read_map(star.with_name(f"{recipe.name}_truth.mrc"))
    return Stack(recipe.name, images, particles, poses, truth, voxel, json.loads(star.with_suffix(".json").read_text()))


def given_stack(star: Path, truth: Path | None) -> Stack:
    """A stack from elsewhere and, if there is one, its true map."""
    images, particles, poses = read_particles(star)
    true_map, voxel = read_map(truth) if truth else (None, particles.pixel_size_angstrom)
    return Stack(star.stem, images, particles, poses, true_map, voxel, {})


# --- controls ---------------------------------------------------------------------------------------------------------------
def noise_only(images: np.ndarray, seed: int) -> np.ndarray:
    """Images of pure noise in place of others."""
    return np.random.default_rng(77 + seed).standard_normal(images.shape).astype(np.float32)


def random_phases(images: np.ndarray, pixel: float, beyond_angstrom: float, seed: int) -> np.ndarray:
    """Images whose phases are those of noise beyond a resolution; amplitudes are kept."""
    box = images.shape[-1]
    rng = np.random.default_rng(5 + seed)
    frequency = np.hypot(np.fft.fftfreq(box)[:, None], np.fft.rfftfreq(box)[None]) / pixel
    out = np.empty_like(images, np.float32)
    for row, image in enumerate(images):
        spectrum, noise = np.fft.rfft2(image), np.fft.rfft2(rng.standard_normal(image.shape))
        out[row] = np.fft.irfft2(
            np.where(frequency > 1 / beyond_angstrom, np.abs(spectrum) * noise / np.abs(noise), spectrum), s=image.shape
        )
    return out


def main() -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    for name in sys.argv[1:] or MOLECULES:
        star = make_stack(Recipe(name))
        facts = json.loads(star.with_suffix(".json").read_text())
        print(name, {key: round(value, 4) for key, value in facts.items()}, star, flush=True)


if __name__ == "__main__":
    main()
