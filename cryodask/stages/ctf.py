"""Stage ``ctf``: defocus and astigmatism of a micrograph."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field, model_validator

from cryodask.errors import MicrographError
from cryodask.products import Product
from cryodask.stage import Context, Params, Picture, Resources, Sizes, stage

if TYPE_CHECKING:
    import xarray as xr

    from cryodask.kernels.spectrum import Spectrum

SHELLS = 192
_COARSEST_PIXELS = 1.5 * 2.7
"""Least coarse end of the fitted range, pixels: it ends at 2.7 and spans a factor of 1.5."""
IMAGE = 256
ICE_RING = 0.2
"""Strength above which a ring of ice is counted in the report; 0.02 and less is seen without one."""


class CtfParams(Params):
    """Parameters of stage ``ctf``."""

    coarsest_angstrom: float = Field(30.0, description="coarse end of the fitted range, Angstrom", gt=0)
    finest_angstrom: float = Field(3.5, description="fine end of the fitted range, Angstrom; at least 2.7 pixels", gt=0)
    least_defocus_angstrom: float = Field(3000.0, description="smallest mean defocus to search, Angstrom", gt=0)
    largest_defocus_angstrom: float = Field(50000.0, description="largest mean defocus to search, Angstrom", gt=0)
    largest_astigmatism_angstrom: float = Field(2000.0, description="largest difference of defocus u and v, Angstrom", ge=0)
    expected_astigmatism_angstrom: float = Field(
        300.0, description="expected difference of defocus u and v, Angstrom: a weak prior where the rings are faint", gt=0
    )
    phase_shift_deg: float = Field(0.0, description="known phase shift of a phase plate, degrees; not fitted", ge=0, lt=180)
    tile_angstrom: float = Field(
        900.0, description="edge length of the tiles whose spectra are averaged, Angstrom; increased if needed", gt=0
    )

    @model_validator(mode="after")
    def _ranges(self) -> CtfParams:
        if self.coarsest_angstrom <= 1.5 * self.finest_angstrom:
            raise ValueError("coarsest_angstrom must be at least 1.5 times finest_angstrom")
        if self.largest_defocus_angstrom < self.least_defocus_angstrom + 1000.0:
            raise ValueError("largest_defocus_angstrom must be 1000 Angstrom or more above least_defocus_angstrom")
        return self


def _sizes(params: CtfParams, sizes: Sizes) -> Sizes:
    return {"shell": SHELLS, "ky": IMAGE, "kx": IMAGE}


def _memory(params: CtfParams, sizes: Sizes) -> float:
    # the micrograph, one row of tiles with their transforms, and the search table
    return 4.0 * sizes["y"] * sizes["x"] + 2.0e8


def _check(params: CtfParams, inputs: dict[str, list[Product]]) -> Iterator[str]:
    for pixel in sorted(inputs["exposures"][0].pixel_sizes):
        if params.coarsest_angstrom < _COARSEST_PIXELS * pixel:
            yield (
                f"no rings between {params.coarsest_angstrom:g} and {params.finest_angstrom:g} A are visible with pixels of {pixel:g} A. "
                "Check the pixel size, or set a larger coarsest_angstrom."
            )


@stage(
    version=4,
    check=_check,
    needs=["micrograph_sum", "pixel_size_angstrom", "voltage_kv", "spherical_aberration_mm", "amplitude_contrast"],
    gives=[
        "defocus_u_angstrom",
        "defocus_v_angstrom",
        "defocus_angle_deg",
        "phase_shift_deg",
        "ctf_resolution_angstrom",
        "ctf_figure_of_merit",
        "ctf_alternative_defocus_angstrom",
        "ctf_alternative_score",
        "ice_ring_excess",
        "spectrum_frequency",
        "spectrum_average",
        "spectrum_fit",
        "spectrum_image",
    ],
    sizes=_sizes,
    resources=Resources(memory=_memory),
)
def ctf(
    params: CtfParams,
    *,
    micrograph_sum: np.ndarray,
    pixel_size_angstrom: float,
    voltage_kv: float,
    spherical_aberration_mm: float,
    amplitude_contrast: float,
    context: Context,
) -> dict[str, Any]:
    """Fit defocus and astigmatism to the rings of the micrograph's power spectrum.

    The sum without dose weighting is used, because its rings reach furthest. Its spectrum (Welch's method) is compared with every mean
    defocus in the range and every astigmatism. In each of several frequency bands the rings must stand out from a local background,
    and a band in which they are inverted counts against the fit, which keeps it from slipping by one ring. The best fit is
    refined by Whittle's likelihood of the whole spectrum, with one smooth background and a flexible ring strength, so that the lobes of the
    particles' own form factor are not mistaken for rings. Underfocus is positive; the angle is measured from +x to +y.

    ``ice_ring_excess`` is the power about 3.90 or 3.66 A, where crystalline ice has its strongest rings, over its smooth background,
    minus 1; NaN if pixels are too large to show them.
    """
    import torch

    from cryodask.kernels.ctf_cells import lens_of
    from cryodask.kernels.ctf_fit import fit_ctf
    from cryodask.kernels.ice import FINEST_ANGSTROM, ice_ring_excess
    from cryodask.kernels.spectrum import cropped, log_power_image, power_spectrum

    image = np.asarray(micrograph_sum, np.float32)
    check_micrograph(image)
    pixel = float(pixel_size_angstrom)
    # beyond three quarters of Nyquist the interpolation in motion correction colours the noise, differently along x, y and the diagonal:
    # mistaken for astigmatism, it doubled the error on simulated movies (RMS 108 A with 2.2 pixels, 57 A with 2.7)
    finest = max(params.finest_angstrom, 2.7 * pixel)
    if min(image.shape) < 128 or min(image.shape) * pixel < 8.0 * params.coarsest_angstrom or finest * 1.5 > params.coarsest_angstrom:
        raise MicrographError(
            f"a micrograph of {image.shape[0]} x {image.shape[1]} pixels of {pixel:g} A is too small or too coarse for a CTF fit",
            "it was binned, or is a test image",
            "bin less, or exclude the micrograph",
        )
    lens = lens_of(float(voltage_kv), float(spherical_aberration_mm), float(amplitude_contrast), math.radians(params.phase_shift_deg))
    tensor = torch.from_numpy(image).to(context.device)

    def fitted(tile: float) -> tuple[Spectrum, float, Any]:
        # rings of ice lie beyond what is fitted; half a step of it more than their background
        end = min(finest, FINEST_ANGSTROM - 0.02)
        spectrum = power_spectrum(tensor, pixel_size_angstrom=pixel, tile_angstrom=tile, finest_angstrom=end)
        spectrum = spectrum._replace(power=spectrum.power.cpu())
        ice = ice_ring_excess(spectrum)
        spectrum = cropped(spectrum, finest)
        return (
            spectrum,
            ice,
            fit_ctf(
                spectrum,
                lens,
                coarsest_angstrom=params.coarsest_angstrom,
                finest_angstrom=finest,
                least_defocus_angstrom=params.least_defocus_angstrom,
                largest_defocus_angstrom=params.largest_defocus_angstrom,
                largest_astigmatism_angstrom=params.largest_astigmatism_angstrom,
                expected_astigmatism_angstrom=params.expected_astigmatism_angstrom,
                ring_step=1.0 / tile,
                shells=SHELLS,
            ),
        )

    spectrum, ice, fit = fitted(params.tile_angstrom)
    # two samples per ring at the fine end
    needed = 4.0 * lens.wavelength_angstrom * fit.defocus_u_angstrom / finest
    if needed > 1.2 * params.tile_angstrom:
        spectrum, ice, fit = fitted(needed)
    return {
        "defocus_u_angstrom": fit.defocus_u_angstrom,
        "defocus_v_angstrom": fit.defocus_v_angstrom,
        "defocus_angle_deg": math.degrees(fit.defocus_angle_rad),
        "phase_shift_deg": params.phase_shift_deg,
        "ctf_resolution_angstrom": fit.resolution_angstrom,
        "ctf_figure_of_merit": fit.figure_of_merit,
        "ctf_alternative_defocus_angstrom": fit.alternative_defocus_angstrom,
        "ctf_alternative_score": fit.alternative_score,
        "ice_ring_excess": ice,
        "spectrum_frequency": fit.frequency.float().numpy(),
        "spectrum_average": fit.average.float().numpy(),
        "spectrum_fit": fit.fitted.float().numpy(),
        "spectrum_image": log_power_image(spectrum, IMAGE, 1.0 / finest).half().numpy(),
    }


def check_micrograph(image: np.ndarray) -> None:
    """Refuse a micrograph with NaN or infinite pixels, or without any contrast."""
    if image.ndim != 2 or not image.size:
        raise MicrographError(f"a micrograph of shape {image.shape} is not an image", "it is a movie", "run stage motion first")
    bad = int(image.size - np.isfinite(image).sum())
    if bad:
        raise MicrographError(
            f"{bad} pixels are NaN or infinite", "the gain reference has zeros or infinities", "fix the gain reference and rerun"
        )
    if image.min() == image.max():
        raise MicrographError(f"every pixel is {image.flat[0]:g}", "the beam was blanked, or the movie is empty", "exclude it")


# --- report


@ctf.figures
def draw(ds: xr.Dataset) -> Iterator[Picture]:
    """Distribution of defocus and resolution; spectra of the best, median and worst micrograph."""
    from matplotlib.figure import Figure

    defocus = 0.5e-4 * (ds["defocus_u_angstrom"].values + ds["defocus_v_angstrom"].values)
    resolution = ds["ctf_resolution_angstrom"].values
    astigmatism = ds["defocus_u_angstrom"].values - ds["defocus_v_angstrom"].values
    count = len(defocus)
    figure = Figure(figsize=(9, 2.8), layout="constrained")
    panels = figure.subplots(1, 3)
    for axes, values, label in zip(panels, (defocus, astigmatism, resolution), ("mean defocus, µm", "astigmatism, Å", "fit to, Å")):
        axes.hist(values, bins=min(30, max(5, count // 2)), color="#4878a8")
        axes.set(xlabel=label, ylabel="micrographs")
    caption = (
        f"{count} micrographs: median defocus {np.median(defocus):.2f} µm (underfocus positive), median resolution to which rings and fit "
        f"agree {np.median(resolution):.1f} Å."
    )
    doubtful = int((ds["ctf_alternative_score"].values > 0.9).sum())
    if doubtful:
        caption += f" In {doubtful} another defocus fits nearly as well: check them."
    icy = int((ds["ice_ring_excess"].values > ICE_RING).sum()) if "ice_ring_excess" in ds else 0
    if icy:
        caption += f" {icy} have rings of crystalline ice, more than {100 * ICE_RING:.0f} % above the background at 3.90 or 3.66 Å."
    yield Picture("Defocus", caption, figure)
    order = np.argsort(resolution)
    chosen = list(dict.fromkeys([int(order[0]), int(order[count // 2]), int(order[-1])]))
    figure = Figure(figsize=(9, 2.9 * len(chosen)), layout="constrained")
    panels = figure.subplots(len(chosen), 2, width_ratios=(1, 2.2), squeeze=False)
    for (left, right), i in zip(panels, chosen):
        item = ds.isel(micrograph=i)
        left.imshow(_data_and_fit(item), cmap="gray", origin="lower", vmin=0, vmax=1)
        left.set_axis_off()
        left.set_title(f"{item['micrograph'].item()}", fontsize=8)
        _draw_curves(right, item)
    caption = (
        "Micrographs with the best, median and worst fit. Left: power spectrum with the background removed, right half the fitted CTF "
        "squared; the edge is the fine end of the fit. Right: spectrum averaged along the fitted ellipses, divided by its strength over "
        "two rings (black), fitted CTF squared (red), and the resolution to which they agree (dotted)."
    )
    yield Picture("Spectra and fits", caption, figure)


def _data_and_fit(item: xr.Dataset) -> np.ndarray:
    """Spectrum with the fit in its right half, both scaled to 0..1."""
    from scipy.ndimage import gaussian_filter

    image = gaussian_filter(item["spectrum_image"].values.astype(np.float32), 1.0)
    low, high = np.percentile(image, (2, 98))
    data = np.clip((image - low) / max(high - low, 1e-6), 0, 1)
    n = image.shape[0]
    frequency = item["spectrum_frequency"].values
    width = 0.5 * float(frequency[1] - frequency[0])
    k = (np.arange(n) - n // 2) / (n // 2) * (float(frequency[-1]) + width)
    ky, kx = np.meshgrid(k, k, indexing="ij")
    radius = np.hypot(ky, kx)
    u, v = float(item["defocus_u_angstrom"]), float(item["defocus_v_angstrom"])
    theta = np.arctan2(ky, kx) - math.radians(float(item["defocus_angle_deg"]))
    z = 0.5 * (u + v) + 0.5 * (u - v) * np.cos(2 * theta)
    # the fit is stored at the mean defocus: look it up at the frequency of equal phase (to first order in the astigmatism)
    fit = np.interp(radius * np.sqrt(np.maximum(2 * z / (u + v), 0.0)), frequency, item["spectrum_fit"].values, left=0.5, right=0.5)
    return np.where(np.arange(n)[None] > n // 2, fit, data)


def _draw_curves(axes: Any, item: xr.Dataset) -> None:
    from scipy.ndimage import maximum_filter1d, uniform_filter1d

    k, average, fit = (item[name].values for name in ("spectrum_frequency", "spectrum_average", "spectrum_fit"))
    smooth = uniform_filter1d(average, 3)
    envelope = uniform_filter1d(maximum_filter1d(np.abs(smooth), 25), 25)
    axes.plot(k, smooth / np.maximum(envelope, 1e-9), color="black", lw=1)
    axes.plot(k, fit, color="#d62728", lw=0.9)
    resolution = float(item["ctf_resolution_angstrom"])
    axes.axvline(1.0 / resolution, color="black", lw=0.8, ls=":")
    mean = 0.5e-4 * (float(item["defocus_u_angstrom"]) + float(item["defocus_v_angstrom"]))
    axes.set(xlabel="spatial frequency, 1/Å", ylim=(-0.6, 1.25), xlim=(float(k[0]), float(k[-1])))
    axes.set_title(f"defocus {mean:.2f} µm, fit to {resolution:.1f} Å", fontsize=9)
