"""Stage ``pick``: particles found from their diameter alone, or with templates."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field

from cryodask.errors import InputError, MicrographError
from cryodask.products import Product
from cryodask.stage import Context, Params, Picture, Resources, Sizes, ThresholdMark, port, stage
from cryodask.stages.ctf import check_micrograph
from cryodask.vocabulary import PROFILE_REACH_DIAMETERS, SLOTS

if TYPE_CHECKING:
    import xarray as xr

PROFILE_POINTS = 32
MASK_CELLS = 32
_LEAST_WIDTH_PX = 4.0
_LENS = (
    "defocus_u_angstrom", "defocus_v_angstrom", "defocus_angle_deg", "phase_shift_deg", "voltage_kv", "spherical_aberration_mm",
    "amplitude_contrast",
)  # fmt: skip


class PickParams(Params):
    """Parameters of stage ``pick``."""

    diameter_angstrom: float = Field(description="diameter of the particle, Angstrom; accurate to about 20 %", gt=0)
    threshold: Annotated[float | Literal["auto"], ThresholdMark] = Field(
        "auto", description="score above which peaks are accepted, or auto"
    )
    rounds: int = Field(3, description="number of times the radial template is relearned", ge=1, le=10)
    template_count: int = Field(12, ge=1, le=100, description="with templates: class averages to use, the largest first, or views of a map")
    exclude_regions: bool = Field(True, description="pick nothing on contamination, crystals and carbon, nor half a diameter around them")


def _sizes(params: PickParams, sizes: Sizes) -> Sizes:
    return {"radius": PROFILE_POINTS, "cell_y": MASK_CELLS, "cell_x": MASK_CELLS}


def _memory(params: PickParams, sizes: Sizes) -> float:
    # the micrograph, a sorted copy for its median, and its transform
    return 24.0 * sizes["y"] * sizes["x"] + 1.2e8


def _check(params: PickParams, inputs: dict[str, list[Product]]) -> Iterator[str]:
    given = [name for name in ("templates", "reference") if inputs.get(name)]
    if len(given) == 2:
        yield "templates come from class averages (templates) or from a map (reference), not from both. Leave out one of them in from."
    if given and "ctf" not in inputs["exposures"][0].parts:
        yield "templates are compared with the CTF of each exposure, but no step gives it. Add ctf before this step."
    for pixel in sorted(inputs["exposures"][0].pixel_sizes):
        width = params.diameter_angstrom / pixel
        if width < _LEAST_WIDTH_PX:
            yield (
                f"a diameter of {params.diameter_angstrom:g} A is {width:.1f} pixels of {pixel:g} A, which is too small to pick. Give "
                "diameter_angstrom in Angstrom, and check the pixel size."
            )


@stage(
    version=3,
    needs=["micrograph_dw", "pixel_size_angstrom"],
    optional=[*_LENS, "class_average", "class_share", "class_pixel_size_angstrom", "final_map", "map_pixel_size_angstrom"],
    gives=[
        "pick_y", "pick_x", "pick_score", "pick_threshold", "pick_profile", "pick_chance", "pick_excess_skew", "excluded_regions",
        "excluded_share", "pick_excluded_count",
    ],
    ports=[
        port("exposures[micrograph, optics, ctf?]", also_with={"ctf": ("templates", "reference")}),
        "templates?!:classes[averages]",
        "reference?!:map[final]",
    ],
    check=_check,
    sizes=_sizes,
    resources=Resources(memory=_memory),
)  # fmt: skip
def pick(
    params: PickParams,
    *,
    micrograph_dw: np.ndarray,
    pixel_size_angstrom: float,
    defocus_u_angstrom: float | None = None,
    defocus_v_angstrom: float | None = None,
    defocus_angle_deg: float | None = None,
    phase_shift_deg: float | None = None,
    voltage_kv: float | None = None,
    spherical_aberration_mm: float | None = None,
    amplitude_contrast: float | None = None,
    class_average: np.ndarray | None = None,
    class_share: np.ndarray | None = None,
    class_pixel_size_angstrom: float | None = None,
    final_map: np.ndarray | None = None,
    map_pixel_size_angstrom: float | None = None,
    context: Context,
) -> dict[str, Any]:
    """Pick particles: with a radial profile learnt from each micrograph, starting from the diameter alone, or with templates.

    The micrograph, reduced until the particle is 16 pixels wide, band-passed and locally normalised, is correlated with a disk and a
    ring of the diameter in either contrast; the mean of the best patches, averaged over directions, becomes the next template, and the
    family whose score map is most skewed is kept. All peaks are stored with their scores: the identity of a particle does not depend on
    the threshold, which decides which of them are accepted and can be changed later without picking again. ``pick_threshold`` is the
    value of "auto" for this micrograph: it parts particles from other peaks, also where a crowded micrograph has hardly any others.
    Where the score map is no more skewed than that of noise, only peaks above the highest one of noise (``pick_chance``) are accepted;
    the run says so if that leaves out many. Contamination, crystals and carbon, found by their mean and texture, are left out with half
    a diameter around them: ``excluded_regions`` shows them on a coarse grid. The dose-weighted sum is used because particles are
    extracted from it, and because it shows them best; the resolution used, an eighth of the diameter, is the same in both sums.

    With templates (``from: {templates: curate}`` for class averages, ``from: {reference: refine3d}`` for views of a map) the score of a
    place is the best of all templates at in-plane angles 15 degrees apart, with the CTF of the exposure, against its noise, in either
    contrast. Acceptance and excluded regions are the same.
    """
    import torch

    from cryodask.kernels.picking import DIAMETER_PX, pick_particles
    from cryodask.kernels.template_matching import Lens, Templates, views

    image = np.asarray(micrograph_dw, np.float32)
    check_micrograph(image)
    diameter = params.diameter_angstrom / float(pixel_size_angstrom)
    if diameter < _LEAST_WIDTH_PX or 2.0 * diameter > min(image.shape):
        raise MicrographError(
            f"a diameter of {params.diameter_angstrom:g} A is {diameter:.1f} pixels in a micrograph of {image.shape[0]} x {image.shape[1]}",
            "the diameter was given in pixels or nanometres, or the pixel size is wrong",
            "give pick.diameter_angstrom in Angstrom and check the pixel size",
        )
    templates = None
    if phase_shift_deg is None or not np.isfinite(phase_shift_deg):
        phase_shift_deg = 0.0  # tables without phase plate do not give it
    lens = (
        defocus_u_angstrom, defocus_v_angstrom, defocus_angle_deg, phase_shift_deg, voltage_kv, spherical_aberration_mm, amplitude_contrast
    )  # fmt: skip
    if class_average is not None or final_map is not None:
        if any(value is None or not np.isfinite(value) for value in lens):
            raise MicrographError("its CTF is unknown, which templates need", "the fit of the CTF failed", "exclude it, or add a ctf step")
        if final_map is not None and map_pixel_size_angstrom is not None:
            volume = torch.from_numpy(np.asarray(final_map, np.float32)).to(context.device)
            finest = 2.0 * max(params.diameter_angstrom / DIAMETER_PX, float(map_pixel_size_angstrom))
            shown, pixel = views(volume, params.template_count, finest / float(map_pixel_size_angstrom)), float(map_pixel_size_angstrom)
        else:
            shown, pixel = _largest(params.template_count, class_average, class_share, class_pixel_size_angstrom)
            shown = shown.to(context.device)
        templates = Templates(shown, pixel, Lens(*(float(value) for value in lens if value is not None)))
    picks = pick_particles(
        torch.from_numpy(image).to(context.device),
        diameter,
        rounds=params.rounds,
        profile_points=PROFILE_POINTS,
        pixel_size_angstrom=float(pixel_size_angstrom),
        exclude_regions=params.exclude_regions,
        templates=templates,
    )
    mask = picks.mask.float()
    y, x, score = (t[:SLOTS].cpu().numpy().astype(np.float32) for t in (picks.y, picks.x, picks.score))
    return {
        "pick_y": y,
        "pick_x": x,
        "pick_score": score,
        "pick_threshold": picks.threshold,
        "pick_profile": picks.profile.cpu().numpy().astype(np.float32),
        "pick_chance": picks.chance,
        "pick_excess_skew": picks.skew - picks.null_skew,
        "excluded_regions": (torch.nn.functional.adaptive_avg_pool2d(mask[None], MASK_CELLS)[0] > 0.5).cpu().numpy().astype(np.int8),
        "excluded_share": float(mask.mean()),
        "pick_excluded_count": picks.left_out,
    }


def _largest(count: int, averages: Any, share: Any, pixel_angstrom: float | None) -> tuple[Any, float]:
    """The averages of the largest classes as a tensor, and their pixel size."""
    import torch

    if averages is None or pixel_angstrom is None:
        raise InputError(
            "The templates have no pixel size.", "the classification was computed by an earlier version", "rerun it, and the steps after it"
        )
    averages = np.asarray(averages, np.float32)
    order = np.argsort(-np.asarray(share, float), kind="stable") if share is not None else np.arange(len(averages))
    chosen = [k for k in order if averages[k].any()][:count]
    if not chosen:
        raise InputError("There are no templates.", "all class averages are empty", "choose other classes, or pick without templates")
    return torch.from_numpy(averages[chosen]), float(pixel_angstrom)


@pick.figures
def draw(ds: xr.Dataset) -> Iterator[Picture]:
    """Scores of all peaks, picks per micrograph, learnt profiles, and picks on some micrographs."""
    from matplotlib.figure import Figure

    counts = ds["pick_count"].values
    scores, accepted = _flat(ds["pick_score"]), _flat(ds["pick_accepted"])
    good = np.isfinite(scores)
    figure = Figure(figsize=(9, 2.9), layout="constrained")
    panels = figure.subplots(1, 3)
    edges = np.linspace(0.0, float(scores[good].max()) if good.any() else 1.0, 50)
    for chosen, colour, label in ((accepted == 1, "#2ca02c", "accepted"), (accepted == 0, "#bbbbbb", "left")):
        panels[0].hist(scores[good & chosen], bins=edges, color=colour, label=label)
    panels[0].legend(frameon=False, fontsize=8)
    panels[0].set(xlabel="score, s.d. of the score map", ylabel="peaks")
    panels[1].hist(counts, bins=min(30, max(5, len(counts) // 2)), color="#4878a8")
    panels[1].set(xlabel="particles per micrograph", ylabel="micrographs")
    profiles = ds["pick_profile"].values
    radius = np.linspace(0.0, PROFILE_REACH_DIAMETERS, profiles.shape[1])
    panels[2].plot(radius, profiles[:: max(1, len(profiles) // 50)].T, color="#4878a8", alpha=0.3, lw=0.8)
    panels[2].plot(radius, np.median(profiles, 0), color="black", lw=1.5)
    panels[2].axhline(0.0, color="black", lw=0.5)
    panels[2].set(xlabel="radius, diameters", ylabel="learnt profile")
    caption = (
        f"{int(counts.sum())} particles in {len(counts)} micrographs (median {int(np.median(counts))}), of {int(good.sum())} peaks. "
        "Each micrograph has its own threshold. Profiles that differ from the median (black) point to ice, carbon or a wrong diameter."
    )
    if "excluded_share" in ds and (ds["excluded_share"].values > 0).any():
        share = ds["excluded_share"].values
        caption += (
            f" Contamination, crystals or carbon cover {share.mean():.1%} of the area, in {int((share > 0).sum())} micrographs (at most "
            f"{share.max():.0%}); {int(ds['pick_excluded_count'].values.sum())} peaks on them are not accepted."
        )
    yield Picture("Picks", caption, figure)
    if "micrograph_dw" in ds:
        yield _draw_places(ds)


def _draw_places(ds: xr.Dataset) -> Picture:
    """Picks on the micrographs with the most, the median and the fewest picks, and on the one with the largest excluded regions."""
    from matplotlib.figure import Figure

    order = np.argsort(ds["pick_count"].values, kind="stable")
    chosen = [int(order[-1]), int(order[len(order) // 2]), int(order[0])]
    shown = "Micrographs with the most, the median and the fewest picks above the threshold (circles)"
    if "excluded_share" in ds and (ds["excluded_share"].values > 0).any():
        chosen.append(int(np.argmax(ds["excluded_share"].values)))
        shown += ", and with the largest excluded regions (red: nothing is picked there, nor half a diameter around)"
    chosen = list(dict.fromkeys(chosen))
    figure = Figure(figsize=(4.4 * len(chosen), 4.6), layout="constrained")
    for ax, i in zip(figure.subplots(1, len(chosen), squeeze=False)[0], chosen):
        one = ds.isel(micrograph=i)
        image = one["micrograph_dw"].values
        step = max(1, max(image.shape) // 400)
        rows, columns = (n // step * step for n in image.shape)
        small = image[:rows, :columns].reshape(rows // step, step, columns // step, step).mean((1, 3))
        low, high = np.percentile(small, [1, 99])
        ax.imshow(small, cmap="gray", vmin=low, vmax=high, origin="lower", extent=(0, columns, 0, rows))
        title = f"{one['micrograph'].item()}: {int(one['pick_count'])}"
        if "excluded_share" in ds and one["excluded_share"] > 0:
            excluded = np.ma.masked_equal(one["excluded_regions"].values, 0)
            extent = (0, image.shape[1], 0, image.shape[0])
            ax.imshow(excluded, cmap="autumn", alpha=0.35, vmin=0, vmax=2, origin="lower", extent=extent, interpolation="nearest")
            title += f", {float(one['excluded_share']):.1%} excluded"
        accepted = one["pick_accepted"].values > 0
        ax.scatter(one["pick_x"].values[accepted], one["pick_y"].values[accepted], s=90, facecolors="none", edgecolors="#2ca02c", lw=1)
        ax.set_title(title, fontsize=9)
        ax.set_axis_off()
    return Picture("Picks on micrographs", f"{shown}.", figure)


def _flat(column: xr.DataArray) -> np.ndarray:
    """Values of a ragged column as one flat array of floats, whether padded, nested or flat."""
    values = column.values
    parts = [np.asarray(v, np.float64).reshape(-1) for v in values] if values.dtype == object else [values.astype(np.float64).reshape(-1)]
    return np.concatenate(parts) if parts else np.zeros(0)
