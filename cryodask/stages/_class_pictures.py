"""Report figures of the stages that compare maps: classes, their course and confusion, and series along components."""

from __future__ import annotations

import numpy as np

from cryodask.stage import Picture

_COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22")


def _shown(volume: np.ndarray, axis: int) -> np.ndarray:
    return np.asarray(np.take(volume, volume.shape[axis] // 2, axis))


def draw_class_maps(maps: np.ndarray, shares: np.ndarray, resolutions: np.ndarray, pixel_angstrom: float, sentence: str) -> Picture:
    """Central sections of the maps of all classes, and of their differences from the largest."""
    from matplotlib.figure import Figure

    count = min(len(maps), 10)
    figure = Figure(figsize=(1.6 * count + 0.8, 6.4), layout="constrained")
    panels = figure.subplots(4, count, squeeze=False)
    low, high = np.percentile(maps[0], (1.0, 99.9))
    largest = float(np.abs(maps[1:count] - maps[0]).max()) if count > 1 else 1.0
    for k in range(count):
        for row, axis in enumerate((0, 1)):
            panels[2 * row, k].imshow(_shown(maps[k], axis), cmap="gray", origin="lower", vmin=low, vmax=high)
            difference = _shown(maps[k] - maps[0], axis)
            panels[2 * row + 1, k].imshow(difference, cmap="RdBu_r", origin="lower", vmin=-0.7 * largest, vmax=0.7 * largest)
        panels[0, k].set_title(f"class {k + 1}\n{100 * shares[k]:.1f} %, {resolutions[k]:.1f} Å", fontsize=8)
    for panel in panels.ravel():
        panel.set(xticks=[], yticks=[])
    for row, name in enumerate(("across z", "less class 1", "across y", "less class 1")):
        panels[row, 0].set_ylabel(name, fontsize=8)
    bar = 50.0 / pixel_angstrom
    panels[0, 0].plot([2, 2 + bar], [2, 2], color="white", linewidth=3)
    panels[0, 0].text(2, 4, "50 Å", color="white", fontsize=7)
    caption = (
        f"{sentence[:1].upper()}{sentence[1:]}. Central sections of the maps of the classes, largest class first, and below them the "
        "difference from class 1 (red: density that class 1 lacks)."
    )
    return Picture("3D classes", caption, figure)


def draw_course(shares: np.ndarray, changed: np.ndarray | None = None) -> Picture:
    """Sizes of the classes, and the share of particles that change class where it is known, over the iterations."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0 if changed is not None else 4.0, 2.8), layout="constrained")
    panels = figure.subplots(1, 1 if changed is None else 2, squeeze=False)[0]
    steps = np.arange(1, len(shares) + 1)
    for k in range(shares.shape[1]):
        panels[0].plot(steps, 100 * shares[:, k], color=_COLOURS[k % len(_COLOURS)], label=str(k + 1))
    panels[0].set(xlabel="iteration", ylabel="share of the class, %", ylim=(0, None))
    panels[0].legend(title="class", fontsize=7, title_fontsize=7, ncols=2)
    if changed is None:
        return Picture("Course of the classification", "Mean share of each class in each step, from the start that won.", figure)
    panels[1].semilogy(steps[1:], 100 * np.maximum(changed[1:], 1e-5), color="0.2")
    panels[1].set(xlabel="iteration", ylabel="particles that change class, %")
    return Picture("Course of the classification", "Size of each class and particles that changed class, from the start that won.", figure)


def draw_initial_classes(maps: np.ndarray, shares: np.ndarray) -> Picture:
    """Projections of unrelated maps along the three axes, each with its own grey scale."""
    from matplotlib.figure import Figure

    count = len(maps)
    figure = Figure(figsize=(1.6 * count + 0.6, 5.0), layout="constrained")
    panels = figure.subplots(3, count, squeeze=False)
    for k in range(count):
        for axis in range(3):
            panels[axis, k].imshow(maps[k].sum(axis), cmap="gray", origin="lower")
            panels[axis, k].set(xticks=[], yticks=[])
        panels[0, k].set_title(f"class {k + 1}\n{100 * shares[k]:.0f} %", fontsize=8)
    caption = "Projections of the initial maps along z, y and x. Each is in a frame of its own, and its handedness is undetermined."
    return Picture("Initial maps", caption, figure)


def draw_aligned_classes(maps: np.ndarray, shares: np.ndarray, resolutions: np.ndarray, pixel_angstrom: float, sentence: str) -> Picture:
    """Central sections and projections of maps that are each in a frame of their own."""
    from matplotlib.figure import Figure

    count = min(len(maps), 10)
    figure = Figure(figsize=(1.6 * count + 0.8, 6.4), layout="constrained")
    panels = figure.subplots(4, count, squeeze=False)
    rows = [(name, axis, projected) for axis, name in ((0, "z"), (1, "y")) for projected in (False, True)]
    for row, (name, axis, projected) in enumerate(rows):
        panels[row, 0].set_ylabel(f"{'along' if projected else 'across'} {name}", fontsize=8)
        shown = [maps[k].sum(axis) if projected else _shown(maps[k], axis) for k in range(count)]
        # one grey scale: an empty class would otherwise show noise as bright as a molecule
        low, high = min(float(np.percentile(one, 1.0)) for one in shown), max(float(np.percentile(one, 99.9)) for one in shown)
        for k, image in enumerate(shown):
            panels[row, k].imshow(image, cmap="gray", origin="lower", vmin=low, vmax=high)
            panels[row, k].set(xticks=[], yticks=[])
    for k in range(count):
        panels[0, k].set_title(f"class {k + 1}\n{100 * shares[k]:.1f} %, {resolutions[k]:.1f} Å", fontsize=8)
    panels[0, 0].plot([2, 2 + 50.0 / pixel_angstrom], [2, 2], color="white", linewidth=3)
    panels[0, 0].text(2, 4, "50 Å", color="white", fontsize=7)
    caption = (
        f"{sentence[:1].upper()}{sentence[1:]}. Central sections and projections of the maps of the classes, in the order of the given "
        "maps, decoys last. All share one grey scale."
    )
    return Picture("3D classes", caption, figure)


def draw_confusion(confusion: np.ndarray, separation: np.ndarray, *, aligned: bool = False) -> Picture:
    """Expected confusion of the classes; ``aligned``: measured with the maps of the other half-set."""
    from matplotlib.figure import Figure

    count = len(confusion)
    figure = Figure(figsize=(0.55 * count + 2.2, 0.5 * count + 1.6), layout="constrained")
    axes = figure.subplots()
    axes.imshow(confusion, cmap="Blues", vmin=0, vmax=1)
    for a in range(count):
        for b in range(count):
            axes.text(
                b, a, f"{100 * confusion[a, b]:.0f}", ha="center", va="center", fontsize=8, color="w" if confusion[a, b] > 0.6 else "k"
            )
    names = [str(k + 1) for k in range(count)]
    axes.set(
        xticks=range(count), yticks=range(count), xticklabels=names, yticklabels=names, xlabel="put into class", ylabel="belongs to class"
    )
    between = separation[~np.eye(count, dtype=bool)]
    apart = f"d² from {between.min():.1f} to {between.max():.1f}"
    source = f"from the distance of the maps in units of the noise ({apart})"
    if aligned:
        source = f"as the maps of the other half-set see it, in which particles have no part ({apart})"
    caption = (
        f"Expected share, in %, of the particles of each class (row) that end in each class (column), {source}. 50 % is chance for a pair."
    )
    return Picture("Expected confusion", caption, figure)


def draw_series(series: np.ndarray, strength: np.ndarray, sentence: str) -> Picture:
    """Central sections of maps along each component, and of the component itself."""
    from matplotlib.figure import Figure

    count, steps = series.shape[:2]
    figure = Figure(figsize=(1.5 * (steps + 1) + 0.6, 1.6 * count + 0.7), layout="constrained")
    panels = figure.subplots(count, steps + 1, squeeze=False)
    middle = series[0, steps // 2]
    low, high = np.percentile(middle, (1.0, 99.9))
    for j in range(count):
        difference = series[j, -1] - series[j, 0]
        # the axis along which the component is seen best
        axis = int(np.argmax([np.square(_shown(difference, a)).sum() for a in range(3)]))
        for k in range(steps):
            panels[j, k].imshow(_shown(series[j, k], axis), cmap="gray", origin="lower", vmin=low, vmax=high)
        shown = _shown(difference, axis)
        largest = float(np.abs(difference).max()) or 1.0
        panels[j, steps].imshow(shown, cmap="RdBu_r", origin="lower", vmin=-0.7 * largest, vmax=0.7 * largest)
        panels[j, 0].set_ylabel(f"component {j + 1}\nstrength {strength[j]:.2g}", fontsize=8)
    for panel in panels.ravel():
        panel.set(xticks=[], yticks=[])
    for k, z in enumerate(np.linspace(-2, 2, steps)):
        panels[0, k].set_title(f"{z:+.0f} sd", fontsize=8)
    panels[0, steps].set_title("last - first", fontsize=8)
    caption = f"{sentence[:1].upper()}{sentence[1:]}. Central sections of the maps along each component, and the difference of the ends."
    return Picture("Variability", caption, figure)


def draw_coordinates(z: np.ndarray) -> Picture:
    """Histogram of the first coordinate, or density of the first two."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4, 3.6), layout="constrained")
    axes = figure.subplots()
    if z.shape[1] == 1:
        axes.hist(z[:, 0], bins=60, color="0.4")
        axes.set(xlabel="component 1, sd", ylabel="particles")
    else:
        axes.hexbin(z[:, 0], z[:, 1], gridsize=40, cmap="viridis", mincnt=1)
        axes.set(xlabel="component 1, sd", ylabel="component 2, sd")
    which = "components" if z.shape[1] > 1 else "component"
    caption = f"Coordinates of {len(z)} particles along the first {which}; select and select_region keep a region."
    return Picture("Coordinates of the particles", caption, figure)
