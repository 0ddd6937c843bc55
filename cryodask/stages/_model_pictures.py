"""Report figures of a model in its map."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from cryodask.stage import Picture
from cryodask.stages._map_pictures import resolution_axis

if TYPE_CHECKING:
    import xarray as xr

POOR = 0.5
"""Correlation below which a residue counts as not fitting."""
_MOST_CHAINS, _MOST_ELEMENTS = 8, 20
_CORRELATION, _Q, _EXPECTED = "#1f77b4", "#d95f02", "#999999"
_COLOURS = {"helix": "#c51b7d", "strand": "#4d9221"}


def draw_model_fsc(ds: xr.Dataset, sentence: str) -> Picture:
    """The map-model FSC."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(ds["model_frequency"].values[1:], ds["model_fsc"].values[1:], color="black")
    axes.axhline(0.5, color="black", lw=0.6, ls=":")
    axes.set(ylabel="map-model FSC", ylim=(-0.1, 1.03))
    resolution_axis(axes, float(ds["model_frequency"].values[-1]))
    return Picture("Model and map", f"{sentence[:1].upper()}{sentence[1:]}.{_left_out(ds)}", figure)


def _left_out(ds: xr.Dataset) -> str:
    names = {"waters": "waters_left_out", "hydrogens": "hydrogens_left_out", "atoms of further conformations": "alternates_left_out"}
    counts = [f"{int(ds[name])} {what}" for what, name in names.items() if name in ds and int(ds[name])]
    return f" Left out: {', '.join(counts)}." if counts else ""


def draw_chains(ds: xr.Dataset) -> Picture:
    """Correlation and Q-score of the residues of each chain, above its helices and strands."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    names = [str(n).rsplit(" ", 2) for n in ds["residue_name"].values]
    # results of version 1 have correlations only
    kinds = ds["residue_kind"].values if "residue_kind" in ds else np.full(len(names), "protein")
    chains = np.array([chain for chain, _, _ in names])
    polymers = [c for c in dict.fromkeys(chains[kinds != "other"].tolist()) if ((chains == c) & (kinds != "other")).sum() > 1]
    shown = polymers[:_MOST_CHAINS] or list(dict.fromkeys(chains.tolist()))[:1]
    figure = Figure(figsize=(9, 0.6 + 1.5 * len(shown)), layout="constrained")
    scored = "residue_q" in ds and np.isfinite(ds["residue_q"].values).any()
    for axes, chain in zip(np.atleast_1d(figure.subplots(len(shown), 1)), shown):
        rows = np.flatnonzero((chains == chain) & ((kinds != "other") if polymers else True))
        _draw_chain(axes, ds, rows, scored)
        ticks = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), 9)).round().astype(int))
        axes.set_xticks(ticks, [names[rows[t]][2] for t in ticks])
        axes.set_ylabel(f"chain {chain}" if chain else "")
    axes.set_xlabel("residue")
    handles: list[Any] = [Line2D([], [], color=_CORRELATION, label="local correlation")]
    if scored:
        handles += [Line2D([], [], color=_Q, label="Q-score"), Line2D([], [], color=_EXPECTED, label="Q-score if the map agreed")]
    if len(ds.get("element_kind", ())):
        handles += [Patch(color=colour, label=kind) for kind, colour in _COLOURS.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False, fontsize=8)
    return Picture("Along the chains", _said_of_chains(ds, len(shown), len(polymers), scored), figure)


def _draw_chain(axes: Any, ds: xr.Dataset, rows: np.ndarray, scored: bool) -> None:
    x = np.arange(len(rows))
    # a gap in the rows (another chain, a ligand) does not break the line: numbers along the axis show it
    if scored:
        axes.plot(x, ds["residue_q_expected"].values[rows], lw=0.9, color=_EXPECTED)
        axes.plot(x, ds["residue_q"].values[rows], lw=0.9, color=_Q)
    axes.plot(x, ds["residue_correlation"].values[rows], lw=0.9, color=_CORRELATION)
    axes.axhline(POOR, color="black", lw=0.6, ls=":")
    axes.set(ylim=(-0.7, 1.05), yticks=(0, 0.5, 1), xlim=(-0.5, len(rows) - 0.5))
    for kind, first, last in (
        zip(*(ds[name].values for name in ("element_kind", "element_first", "element_last"))) if "element_kind" in ds else ()
    ):
        at = np.flatnonzero((rows >= first) & (rows <= last))
        if len(at):
            axes.axvspan(at[0] - 0.5, at[-1] + 0.5, 0.03, 0.12, color=_COLOURS[str(kind)], lw=0)


def _said_of_chains(ds: xr.Dataset, shown: int, count: int, scored: bool) -> str:
    said = f"The first {shown} of {count} chains. " if shown < count else ""
    said += "Local correlation of map and model by residue (below the dotted line: does not fit)"
    if scored:
        said += (
            f", and Q-score (Pintilie et al. 2020) in the {ds['q_map'].item()} map, with what it would be in a map of the same sharpening "
            "that agreed with the model"
        )
    elif "q_missing" in ds:
        said += f". No Q-scores: {ds['q_missing'].item()}"
    source = {
        "file": "the model's file",
        "CA atoms": "the CA atoms (P-SEA)",
        "both": "the model's file, in chains without records the CA atoms",
    }
    if len(ds.get("element_kind", ())):
        said += f". Bars: helices and strands, from {source[ds['element_source'].item()]}"
    return f"{said}."


def draw_elements(ds: xr.Dataset) -> Picture:
    """Helices and strands, those that fit worst first."""
    from matplotlib.figure import Figure

    names, kinds = (ds[name].values.astype(str) for name in ("element_name", "element_kind"))
    correlation, q = ds["element_correlation"].values, ds["element_q"].values
    order = np.argsort(correlation, kind="stable")[:_MOST_ELEMENTS]
    figure = Figure(figsize=(7, 0.9 + 0.22 * len(order)), layout="constrained")
    axes = figure.subplots()
    y = np.arange(len(order))
    axes.barh(y, correlation[order], color=[_COLOURS[k] for k in kinds[order]], height=0.7, alpha=0.7)
    scored = bool(np.isfinite(q).any())
    if scored:
        axes.plot(q[order], y, "o", ms=6, color=_Q, mec="white")
    axes.set_yticks(y, [f"{k} {n}" for k, n in zip(kinds[order], names[order])], fontsize=8)
    axes.axvline(POOR, color="black", lw=0.6, ls=":")
    lowest = min(0.0, float(correlation.min()), float(q[order].min()) if scored else 0.0)
    axes.set(xlabel=f"mean local correlation{' (dots: Q-score)' if scored else ''}", xlim=(lowest - (0.03 if lowest < 0 else 0.0), 1.0))
    axes.invert_yaxis()
    poor = int((correlation < POOR).sum())
    count = f"{(kinds == 'helix').sum()} helices and {(kinds == 'strand').sum()} strands"
    which = f"the {len(order)} that fit worst of {count}" if len(order) < len(names) else count
    return Picture("Helices and strands", f"Mean over their residues: {which}. {poor} of {len(names)} do not fit.", figure)
