"""The picture in the README, from a finished demo, and the two of docs/map.md, which take some minutes of one core::

python docs/make_pictures.py demo docs/images/demo.png
python docs/make_pictures.py --verdicts FOLDER docs/images
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import yaml
from matplotlib.figure import Figure

import cryodask

COUNT, BOX, PIXEL = 500, 64, 4.0


def main(folder: str, output: str) -> None:
    """Draw the picture from a demo folder."""
    project = cryodask.open(Path(folder) / "betagal")
    motion, picks = project["motion"].isel(micrograph=3), project["pick"].isel(micrograph=3)
    classes, post = project["classify2d"].load(), project["postprocess"].load()
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    left, middle, right, curve = figure.subfigures(1, 4, width_ratios=[1.15, 1, 1, 1.05])

    ax = left.subplots()
    image = motion["micrograph_dw"].values
    image = image.reshape(256, 4, 256, 4).mean((1, 3))
    ax.imshow(image, cmap="gray", vmin=np.percentile(image, 1), vmax=np.percentile(image, 99))
    good = picks["pick_accepted"].values > 0
    ax.scatter(picks["pick_x"].values[good] / 4, picks["pick_y"].values[good] / 4, s=150, facecolors="none", edgecolors="#39c5bb", lw=1)
    ax.set_title("corrected micrograph, picks")
    ax.set_axis_off()

    order = np.argsort(-classes["class_score"].values)[:9]
    for ax, k in zip(middle.subplots(3, 3).ravel(), order):
        ax.imshow(classes["class_average"].values[k], cmap="gray")
        ax.set_axis_off()
    middle.suptitle("class averages")

    volume = post["sharpened_map"].values
    for ax, axis in zip(right.subplots(2, 2).ravel(), (0, 1, 2, None)):
        picture = volume[volume.shape[0] // 2 + 6] if axis is None else volume.sum(axis)
        ax.imshow(picture[14:-14, 14:-14], cmap="gray", vmin=0 if axis is None else None)
        ax.set_axis_off()
    right.suptitle("sharpened map: three projections, a section")

    ax = curve.subplots()
    frequency = 1.0 / post["shell_resolution_angstrom"].values[1:]
    for name, style in (("fsc_unmasked", "#9aa5b1"), ("fsc_masked", "#e0a030"), ("fsc_corrected", "#c0392b")):
        ax.plot(frequency, post[name].values[1:], color=style, label=name.removeprefix("fsc_"))
    ax.axhline(0.143, color="gray", lw=0.7)
    ax.set(xlabel="1/Å", ylabel="FSC of the half-maps", ylim=(-0.1, 1.02), title=f"resolution {float(post['resolution_angstrom']):.1f} Å")
    ax.legend(frameon=False)
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=90)


def verdicts(folder: str, output: str) -> None:
    """Draw the evidence of a refinement that succeeded and of one that did not, for 500 simulated particles without symmetry."""
    from cryodask.cluster.connect import close, connect
    from cryodask.formats.mrc import read_mrc, write_mrc
    from cryodask.run.recipe import make_plan
    from cryodask.run.session import run_plan
    from cryodask.simulate import simulate_particles
    from cryodask.simulate.model import beta_galactosidase, density_map
    from cryodask.stages._verdict_pictures import draw_evidence
    from cryodask.stages.refine3d import says

    here = Path(folder)
    simulate_particles(here, molecule="clpb", count=COUNT, box=BOX, pixel_size_angstrom=PIXEL)
    images, _ = read_mrc(here / "particles.mrcs")
    (here / "noise").mkdir(exist_ok=True)
    noise = np.random.default_rng(0).standard_normal(images.shape, dtype=np.float32)
    write_mrc(here / "noise" / "particles.mrcs", noise, PIXEL, stack=True)
    (here / "noise" / "particles.star").write_text((here / "particles.star").read_text())
    write_mrc(here / "other.mrc", density_map(beta_galactosidase(), BOX, PIXEL), PIXEL)
    first = {"ab_initio": {"mask_diameter_angstrom": 200}}
    runs = {
        "right": ("particles.star", [first, {"refine3d": {"mask_diameter_angstrom": 200}}]),
        "wrong": (
            "noise/particles.star",
            [{"refine3d": {"mask_diameter_angstrom": 200, "symmetry": "C1", "reference": "other.mrc"}}],
        ),
    }
    client = connect("local", workers=1)
    try:
        for name, (star, pipeline) in runs.items():
            path = here / f"{name}.yaml"
            path.write_text(yaml.safe_dump({"name": name, "inputs": {"particles": star}, "pipeline": pipeline}))
            project = run_plan(make_plan(path), client)
            refined = project["refine3d"].load()
            angles = project.particles("refine3d")
            refined = refined.assign({n: ("particle", angles[n].values) for n in ("rot_deg", "tilt_deg")})
            drawn = draw_evidence(refined, says(refined))
            drawn.figure.savefig(Path(output) / f"verdict-{name}.png", dpi=75)
            print(name, says(refined))
    finally:
        close(client)


if __name__ == "__main__":
    verdicts(*sys.argv[2:4]) if sys.argv[1] == "--verdicts" else main(*sys.argv[1:3])
