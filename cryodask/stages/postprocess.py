"""Stage ``postprocess``: resolution of the masked half-maps, and the sharpened map."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from pydantic import Field

from cryodask.errors import InputError
from cryodask.stage import Context, Output, Params, Picture, Resources, Sizes, stage
from cryodask.stages._half_maps import check_half_maps, check_independent, doubt
from cryodask.stages._map_pictures import FSC_CURVES, resolution_axis

if TYPE_CHECKING:
    import xarray as xr


class PostprocessParams(Params):
    """Parameters of stage ``postprocess``."""

    b_factor_angstrom2: float | None = Field(None, description="B-factor to apply, A^2, negative sharpens; by default fitted")
    fit_from_angstrom: float = Field(10.0, description="lowest resolution of the B-factor fit, Angstrom", gt=0)
    fit_to_angstrom: float | None = Field(None, description="highest resolution of the fit, Angstrom; by default that of the map", gt=0)
    low_pass_angstrom: float | None = Field(None, description="low-pass of the sharpened map, Angstrom; by default its resolution", gt=0)
    randomise_below_fsc: float = Field(
        0.8, description="phases are randomised beyond the shell where the unmasked FSC falls below this", gt=0, lt=1
    )
    seed: int = Field(0, description="seed of the random phases", ge=0)


def _sizes(params: PostprocessParams, sizes: Sizes) -> Sizes:
    return {**sizes, "shell": sizes["x"] // 2 + 1}


def _memory(params: PostprocessParams, sizes: Sizes) -> float:
    return 60.0 * sizes["z"] * sizes["y"] * sizes["x"]


@stage(
    version=5,
    shape="whole",
    needs=["half_map", "solvent_mask", "map_pixel_size_angstrom"],
    optional=["succeeded", "fourier_coverage"],
    outputs=[Output("map", "map", ("fsc", "view"), on="map", frame="same")],
    gives=[
        "shell_resolution_angstrom",
        "fsc_unmasked",
        "fsc_masked",
        "fsc_randomised",
        "fsc_corrected",
        "resolution_angstrom",
        "b_factor_angstrom2",
        "sharpened_map",
        "noise_correlation",
        "log_amplitude",
        "log_amplitude_fitted",
    ],
    sizes=_sizes,
    resources=Resources(memory=_memory),
)
def postprocess(
    params: PostprocessParams,
    *,
    half_map: np.ndarray,
    solvent_mask: np.ndarray,
    map_pixel_size_angstrom: float,
    succeeded: bool | None = None,
    fourier_coverage: np.ndarray | None = None,
    context: Context,
) -> dict[str, Any]:
    """Measure the resolution of the masked half-maps and sharpen their mean.

    The masked FSC is corrected for the mask by phase randomisation (Chen et al. 2013), as relion_postprocess does; the resolution is
    the first interpolated crossing of 0.143, within the shells up to which the unmasked FSC exceeds noise by three standard
    deviations (a mask made from noise selects the regions where it agrees), and only if it persists when phases are randomised from the
    end of the strong shells on (a mask smears signal that ends abruptly). The mean map is weighted by sqrt(2 FSC / (1 + FSC)),
    sharpened by the B-factor of a line through its Guinier plot (Rosenthal & Henderson 2003) and low-pass filtered at the resolution.
    Where views leave a part of Fourier space empty, the map lacks it, and the resolution is lower than the correlation of the half-maps
    says (Baldwin & Lyumkis 2020); the share that they reach is known of maps of ``refine3d``.
    If the refinement of the half-maps has not succeeded, their correlation says nothing about the molecule, and no resolution is given.
    Half-maps that are not independent are refused: the noise of their solvent agrees, or they are the same up to the resolution.
    With fewer than three shells between ``fit_from_angstrom`` and the resolution no fit is possible, and the B-factor is 0. The detector
    MTF is not corrected.
    """
    import torch

    from cryodask.kernels.fsc import corrected_fsc, resolution_at, shell_resolutions, supported_resolution
    from cryodask.kernels.map_evidence import covered
    from cryodask.kernels.sharpening import fit_b_factor, sharpen

    check_half_maps(half_map)
    if solvent_mask.shape != half_map.shape[1:]:
        raise InputError(
            f"the mask is {solvent_mask.shape}, the half-maps are {half_map.shape[1:]}",
            "the mask was made for another box",
            "make the mask from these half-maps",
        )
    if not np.isfinite(solvent_mask).all() or solvent_mask.min() < -1e-3 or solvent_mask.max() > 1 + 1e-3 or not solvent_mask.any():
        raise InputError("the mask has values outside 0 to 1, or is empty", "it is a map, not a mask", "give a mask")
    pixel, n = float(map_pixel_size_angstrom), half_map.shape[-1]
    maps = torch.from_numpy(np.asarray(half_map, np.float32)).to(context.device)
    soft = torch.from_numpy(np.asarray(solvent_mask, np.float32)).to(context.device)
    curves = corrected_fsc(maps[0], maps[1], soft, seed=params.seed, randomise_below_fsc=params.randomise_below_fsc)
    resolution = supported_resolution(maps[0], maps[1], soft, curves, 0.143, pixel, seed=params.seed)
    if fourier_coverage is not None:
        known = np.asarray(fourier_coverage, float)
        coverage = torch.from_numpy(np.pad(known, (0, max(0, n // 2 + 1 - len(known))), "edge")[: n // 2 + 1])
        resolution = max(resolution, resolution_at(covered(curves.corrected.cpu(), coverage), 0.143, n, pixel))
    noise_correlation = float("nan")
    if succeeded is None or bool(succeeded):
        independence = check_independent(half_map, resolution_angstrom=resolution, pixel_size_angstrom=pixel)
        noise_correlation = independence.noise_correlation
    mean = maps.mean(0)
    last = params.fit_to_angstrom or resolution
    fit = fit_b_factor(mean, curves.corrected, pixel_size_angstrom=pixel, from_angstrom=params.fit_from_angstrom, to_angstrom=last)
    b_factor = fit.b_factor_angstrom2 if params.b_factor_angstrom2 is None else params.b_factor_angstrom2
    cut = params.low_pass_angstrom or resolution
    final = sharpen(mean, curves.corrected, pixel_size_angstrom=pixel, b_factor_angstrom2=b_factor, low_pass_angstrom=cut)
    return {
        "shell_resolution_angstrom": shell_resolutions(n, pixel).numpy(),
        "fsc_unmasked": curves.unmasked.cpu().numpy(),
        "fsc_masked": curves.masked.cpu().numpy(),
        "fsc_randomised": curves.randomised.cpu().numpy(),
        "fsc_corrected": curves.corrected.cpu().numpy(),
        "resolution_angstrom": resolution if succeeded is None or bool(succeeded) else float("nan"),
        "b_factor_angstrom2": float(b_factor),
        "sharpened_map": final.cpu().numpy(),
        "noise_correlation": noise_correlation,
        "log_amplitude": np.where(fit.log_amplitude > -600.0, fit.log_amplitude, np.nan),
        "log_amplitude_fitted": np.where(fit.fitted, fit.intercept + 0.25 * fit.b_factor_angstrom2 * fit.inverse_square, np.nan),
    }


@postprocess.sentence
def says(result: Mapping[str, Any]) -> str:
    """The most important figure."""
    resolution = float(result["resolution_angstrom"])
    if np.isnan(resolution):
        return "no resolution, because the refinement has not succeeded"
    return f"resolution {resolution:.2f} A{', the limit of the voxels' if _at_limit(result) else ''}{_but(result)}"


def _at_limit(result: Mapping[str, Any]) -> bool:
    """Whether the resolution is that of the last shell: the curve does not fall below 0.143."""
    return bool(float(result["resolution_angstrom"]) <= 1.0001 * float(np.asarray(result["shell_resolution_angstrom"])[-1]))


def _but(result: Mapping[str, Any]) -> str:
    # results of earlier versions lack it
    said = doubt(float(result["noise_correlation"])) if "noise_correlation" in result else ""
    return f", but {said}" if said else ""


@postprocess.figures
def draw(ds: xr.Dataset) -> Iterator[Picture]:
    """FSC curves; sections and projections of the sharpened map."""
    yield draw_fsc(
        ds,
        "the first crossing of 0.143 by the corrected curve, interpolated between shells, within the range where the curve without a mask "
        "is above noise (Chen et al. 2013: phases randomised beyond where the unmasked curve falls below the limit set).",
    )
    if "log_amplitude" in ds:  # results of earlier versions lack it
        yield draw_guinier(ds)
    yield draw_sharpened(ds)


def draw_guinier(ds: xr.Dataset) -> Picture:
    """Fall of the amplitudes, and the line from which the B-factor follows."""
    from matplotlib.figure import Figure

    square = ds["shell_resolution_angstrom"].values ** -2.0
    measured, fitted = ds["log_amplitude"].values, ds["log_amplitude_fitted"].values
    b_factor, resolution = float(ds["b_factor_angstrom2"]), float(ds["resolution_angstrom"])
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    shown = np.isfinite(measured) & (square > 0)
    axes.plot(square[shown], measured[shown], "o", ms=3, color="#1f77b4", label="mean amplitude of the map, weighted by its FSC")
    if np.isfinite(fitted).any():
        axes.plot(square, fitted, color="black", lw=1.2, label="fit")
    if np.isfinite(resolution):
        axes.axvline(resolution**-2.0, color="black", lw=0.6, ls=":")
    axes.set(xlabel="1/d², 1/Å²", ylabel="ln of the amplitude")
    axes.legend(frameon=False)
    slope = (
        4.0 * float(np.polyfit(square[np.isfinite(fitted)], fitted[np.isfinite(fitted)], 1)[0]) if np.isfinite(fitted).sum() > 1 else None
    )
    caption = "Guinier plot of the unmasked mean map (Rosenthal & Henderson 2003). "
    caption += "Too few shells for a fit. " if slope is None else f"The slope of the fit is a B-factor of {slope:.0f} Å². "
    return Picture("Guinier plot", f"{caption}The map was sharpened with {b_factor:.0f} Å².", figure)


def draw_fsc(ds: xr.Dataset, how: str) -> Picture:
    """The FSC curves; ``how`` the resolution was determined ends the caption."""
    from matplotlib.figure import Figure

    frequency = 1.0 / ds["shell_resolution_angstrom"].values
    resolution = float(ds["resolution_angstrom"])
    half = _crossing(ds["fsc_corrected"].values, frequency, 0.5)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, (label, colour) in FSC_CURVES.items():
        axes.plot(frequency, ds[name].values, label=label, color=colour, lw=1.8 if name == "fsc_corrected" else 1.2)
    for level in (0.143, 0.5):
        axes.axhline(level, color="black", lw=0.6, ls=":")
    if np.isfinite(resolution):
        axes.axvline(1.0 / resolution, color="black", lw=0.6, ls=":")
    axes.set(ylabel="FSC", ylim=(-0.1, 1.03))
    resolution_axis(axes, float(frequency[-1]))
    axes.legend(frameon=False)
    caption = "Fourier shell correlation of the two half-maps of this run, unmasked and under the soft mask of stage mask. "
    but = _but(cast("Mapping[str, Any]", ds))
    if np.isfinite(resolution):
        if _at_limit(cast("Mapping[str, Any]", ds)):
            how = "the limit of the voxels (Nyquist), up to which the corrected curve stays above 0.143; smaller voxels may show more."
        caption += f"Resolution {resolution:.2f} Å{but}: {how}"
        caption += f" The corrected curve falls to 0.5 at {1.0 / half:.2f} Å." if half is not None else ""
    else:
        caption += "No resolution: the refinement has not succeeded, and its half-maps may agree on a wrong map."
    return Picture("Fourier shell correlation", caption, figure)


def _crossing(curve: np.ndarray, frequency: np.ndarray, level: float) -> float | None:
    """Frequency at which a curve first falls to a level, interpolated between shells; None if it does not, or begins below it."""
    below = np.flatnonzero(curve[1:] < level) + 1
    if not len(below) or below[0] < 2:
        return None
    i = int(below[0])
    return float(np.interp(level, [curve[i], curve[i - 1]], [frequency[i], frequency[i - 1]]))


def draw_sharpened(ds: xr.Dataset) -> Picture:
    """Sections and projections of the sharpened map."""
    from matplotlib.figure import Figure

    volume = ds["sharpened_map"].values
    n = volume.shape[0]
    figure = Figure(figsize=(9, 6), layout="constrained")
    panels = figure.subplots(2, 3)
    for column, name in enumerate("zyx"):
        section = np.take(volume, n // 2, axis=column)
        projection = volume.sum(axis=column)
        for axes, image, what in ((panels[0, column], section, "section across"), (panels[1, column], projection, "projection along")):
            axes.imshow(image, cmap="gray", origin="lower", vmin=np.percentile(image, 1), vmax=np.percentile(image, 99.8))
            axes.set_title(f"{what} {name}", fontsize=9)
            axes.set_axis_off()
    b_factor = float(ds["b_factor_angstrom2"])
    caption = f"Mean of the half-maps, sharpened with a B-factor of {b_factor:.0f} Å² and low-pass filtered at its resolution; not masked."
    return Picture("Sharpened map", caption, figure)
