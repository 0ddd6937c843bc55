"""``docs/images/components-page.png``: the page of components, for particles one of whose four subunits swings about their centre.

``python docs/make_heterogeneity_picture.py``; needs ``chromium`` and the extras ``facility`` and ``test``. About a minute of CPU.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from _shown import dashboard, run
from PIL import Image
from playwright.sync_api import Page

from cryodask.formats.mrc import write_mrc
from cryodask.formats.star import write_particles
from cryodask.kernels.expectation import ctf_values
from cryodask.kernels.fourier import centred_ifft2
from cryodask.kernels.orientations import matrix_to_euler, random_rotations
from cryodask.kernels.projection import fourier_volume, half_plane, slices
from cryodask.simulate.model import Molecule, beta_galactosidase, density_map

OUT = Path(__file__).parent / "images" / "components-page.png"
READY = "document.body.dataset.ready === 'yes' && !chosen.busy() && !chosen.queue.pending().length"
COUNT, BOX, PIXEL_ANGSTROM, MICROGRAPHS, STATES, SWING_DEG = 3000, 48, 5.0, 12, 9, 16.0
PROJECT = """\
name: hinge
pipeline:
  - import_particles: {star: particles.star}
  - import_map: {file: mean.mrc, symmetry: C1, frame_of: import_particles}
  - variability: {components: 2, symmetry: C1, mask_diameter_angstrom: 200}
  - select_region
"""


def main() -> None:
    """Simulate, analyse, and choose a region."""
    with tempfile.TemporaryDirectory() as folder:
        simulate(Path(folder))
        run(Path(folder) / "hinge.yaml")
        with dashboard(Path(folder), 1500, 1180) as (page, address):
            picture(page, address)
    print(OUT)


def swung(degrees: float) -> np.ndarray:
    """The map with its last subunit turned about the z axis."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    fixed, moved = {}, {}
    for element, atoms in beta_galactosidase().positions.items():
        quarter = len(atoms) // 4
        fixed[element], moved[element] = atoms[:-quarter], atoms[-quarter:]
    turned = Molecule(moved).placed(np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]), np.zeros(3))
    whole = {element: np.concatenate([fixed[element], turned.positions[element]]) for element in fixed}
    return density_map(Molecule(whole), BOX, PIXEL_ANGSTROM, 300.0)


def simulate(folder: Path) -> None:
    """Write particles at known poses, their mean map, and the project file."""
    rng = np.random.default_rng(0)
    states = [torch.from_numpy(swung(a)) for a in np.linspace(-SWING_DEG, SWING_DEG, STATES)]
    which = np.clip(np.round(rng.normal(0.5 * (STATES - 1), 2.0, COUNT)), 0, STATES - 1).astype(int)
    rotations = random_rotations(COUNT, torch.Generator().manual_seed(0))
    ctf = {
        **dict.fromkeys(("defocus_u_angstrom", "defocus_v_angstrom"), rng.uniform(8e3, 2e4, COUNT)),
        **{name: np.zeros(COUNT) for name in ("defocus_angle_deg", "phase_shift_deg")},
        "voltage_kv": np.full(COUNT, 300.0),
        "spherical_aberration_mm": np.full(COUNT, 2.7),
        "amplitude_contrast": np.full(COUNT, 0.1),
    }
    plane, images = half_plane(BOX // 2 - 1), np.zeros((COUNT, BOX, BOX), np.float32)
    for k, state in enumerate(states):
        here = np.flatnonzero(which == k)
        values = slices(fourier_volume(state, BOX // 2 - 1), rotations[here], plane.ky, plane.kx)
        values = values * ctf_values({n: v[here] for n, v in ctf.items()}, plane.ky, plane.kx, BOX * PIXEL_ANGSTROM)
        spectrum = torch.zeros(len(here), BOX, BOX, dtype=torch.complex64)
        spectrum[:, plane.ky % BOX, plane.kx] = values
        spectrum[:, (-plane.ky) % BOX, (-plane.kx) % BOX] = values.conj()
        images[here] = centred_ifft2(spectrum).numpy()
    images = images / images.std() + 1.5 * rng.standard_normal(images.shape).astype(np.float32)
    write_mrc(folder / "particles.mrcs", images, PIXEL_ANGSTROM, stack=True)
    write_mrc(folder / "mean.mrc", np.mean([states[k].numpy() for k in which], 0), PIXEL_ANGSTROM)
    angles = dict(zip(("rot_deg", "tilt_deg", "psi_deg"), (np.degrees(a.numpy()) for a in matrix_to_euler(rotations.double()))))
    columns = {
        **ctf,
        **angles,
        **{name: np.zeros(COUNT) for name in ("origin_y_angstrom", "origin_x_angstrom")},
        "micrograph_name": np.array([f"micrograph_{1 + n * MICROGRAPHS // COUNT:02d}.mrc" for n in range(COUNT)], object),
        "particle_y": 100.0 + np.arange(COUNT) % 250,
        "particle_x": np.full(COUNT, 100.0),
        "half_set": np.arange(COUNT) % 2,
        "image_index": np.arange(COUNT),
        "image_stack": "particles.mrcs",
        "particle_pixel_size_angstrom": PIXEL_ANGSTROM,
        "box": BOX,
    }
    write_particles(folder / "particles.star", columns)
    (folder / "hinge.yaml").write_text(PROJECT)


def picture(page: Page, address: str) -> None:
    """Save a screenshot of the page with a region and a series."""
    page.goto(f"{address}/s/hinge/components")
    ready(page)
    page.click("#series")
    page.locator("#along").evaluate("slider => { slider.value = 8; slider.dispatchEvent(new Event('input')); }")
    page.check("[name=tool][value=lasso]")
    box, mouse = page.locator("#plane").bounding_box(), page.mouse
    assert box is not None
    turns = np.linspace(0, 2 * np.pi, 40)
    for n, (a, b) in enumerate(zip(0.79 + 0.12 * np.cos(turns), 0.45 + 0.25 * np.sin(turns))):
        mouse.move(box["x"] + a * box["width"], box["y"] + b * box["height"])
        if not n:
            mouse.down()
    mouse.up()
    page.fill("#reason", "swung out")
    page.wait_for_timeout(2500)
    ready(page)
    page.screenshot(path=OUT)
    # a median cut would give the few pixels of the region the grey of their neighbours
    Image.open(OUT).convert("RGB").quantize(160, method=Image.Quantize.FASTOCTREE).save(OUT, optimize=True)


def ready(page: Page) -> None:
    """Wait until everything is drawn."""
    while not page.evaluate(READY):
        page.wait_for_timeout(100)
    page.wait_for_timeout(700)


if __name__ == "__main__":
    main()
