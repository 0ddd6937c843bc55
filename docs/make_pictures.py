"""The picture in the README, from a finished demo: python docs/make_pictures.py demo docs/images/demo.png."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

import cryodask


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


if __name__ == "__main__":
    main(*sys.argv[1:3])
