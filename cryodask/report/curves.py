"""FSC curves of several results in one plot."""

from __future__ import annotations

from pathlib import Path

from cryodask.errors import StoreError
from cryodask.store.files import disk_errors
from cryodask.store.history import curves
from cryodask.store.project import Project


def plot_curves(project: Project, output: str | Path, *which: str) -> Path:
    """Save the corrected FSC curves of generations (``STEP`` or ``STEP@KEY``) in one plot; returns its path."""
    from matplotlib.figure import Figure

    found = curves(project, *which)
    if not found:
        raise StoreError(f"None of {', '.join(which)} has an FSC curve.", "", "compare refinements or post-processed maps")
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, (frequency, correlation) in found.items():
        axes.plot(frequency[1:], correlation[1:], label=name)
    axes.axhline(0.143, color="black", lw=0.5)
    axes.set(xlabel="spatial frequency, 1/Å", ylabel="FSC", ylim=(-0.1, 1.05))
    axes.legend(frameon=False)
    with disk_errors(Path(output)):
        figure.savefig(output, dpi=120)
    return Path(output).resolve()
