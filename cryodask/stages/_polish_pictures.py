"""Figures of stage ``polish``, and what a session as a whole says about damage."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from cryodask.kernels.damage import Damage, b_factors, fit_damage
from cryodask.stage import Picture

if TYPE_CHECKING:
    import xarray as xr

_GREY = "#888888"
_LEAST_CORRELATION = 0.05
"""Share of the largest correlation below which a shell is not shown: the references were made from these particles with the motion from
before, and where their noise is strong it agrees with the noise of the images from before."""


def session_damage(ds: xr.Dataset) -> tuple[Damage, np.ndarray, np.ndarray, np.ndarray] | None:
    """Damage, power of the reference `(shell,)`, frequencies `(shell,)` and exposures `(frame,)` of a session.

    Sums over the exposures with the number of frames and the exposure of most; None if there is none with particles.
    """
    used = _alike(ds)
    if not len(used):
        return None
    exposure, k = ds["frame_exposure"].values[used[0]], ds["refinement_frequency"].values[used[0]]
    there, shells = np.isfinite(exposure), np.isfinite(k)
    cross = ds["frame_correlation"].values[used].sum(0, dtype=np.float64)[there][:, shells]
    power = ds["reference_power"].values[used].sum(0)[shells]
    decay = ds["expected_decay"].values[used[0]][there][:, shells].astype(np.float64)
    return fit_damage(cross, power, decay), power, k[shells], exposure[there]


def _alike(ds: xr.Dataset) -> np.ndarray:
    """Exposures with particles that have the exposure, frames and shells of most."""
    used = np.flatnonzero(ds["polish_particles"].values > 0)
    if not len(used):
        return used
    about = np.concatenate([np.nan_to_num(ds[n].values[used], nan=-1.0) for n in ("frame_exposure", "refinement_frequency")], 1)
    _, kind, counts = np.unique(about.round(6), axis=0, return_inverse=True, return_counts=True)
    return used[kind.ravel() == counts.argmax()]


def gained(ds: xr.Dataset, name: str) -> np.ndarray:
    """Spectral signal-to-noise ratio of the particles over that before polishing, `(shell,)`, for ``signal_NAME``."""
    used = _alike(ds)
    before, after = (ds[f"signal_{n}"].values[used].sum(0) for n in ("before", name))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.where(before > _LEAST_CORRELATION * np.nanmax(before, initial=0.0), after / before, np.nan) ** 2)


def draw_session(ds: xr.Dataset) -> Picture:
    """Change of motion with its expected error, and the amounts of the particles."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    number = np.arange(1, ds.sizes["micrograph"] + 1)
    left.plot(number, ds["motion_change_angstrom"].values, "o", ms=3, label="change of motion")
    left.plot(number, ds["motion_deviation_angstrom"].values, "o", ms=3, label="expected error")
    left.set(xlabel="micrograph", ylabel="Å at the particles, rms", ylim=(0, None))
    left.legend(frameon=False)
    amount = ds["signal_amount"].values.ravel()
    amount = amount[np.isfinite(amount)]
    right.hist(np.clip(amount, -0.5, 2.5), bins=60, color="steelblue")
    right.axvline(0.4, color="black", lw=0.7, ls=":")
    right.set(xlabel="share of the expected signal", ylabel="particles")
    voting, kinds = int(ds["polish_particles"].sum()), [str(k) for k in ds["polish_prior"].values]
    kept = kinds.count("that of motion")
    caption = f"{voting} of {len(amount)} particles look like the map and decide the motion; the others (left of the line) have no say. "
    caption += f"{kinds.count('residual')} micrographs have fewer than ten of them and differ little from before"
    return Picture("Polishing", f"{caption}; {kept} kept their motion." if kept else f"{caption}.", figure)


def draw_signal(ds: xr.Dataset) -> Picture:
    """Signal-to-noise ratio gained by shell."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.4), layout="constrained")
    axes = figure.subplots()
    k = ds["refinement_frequency"].values[0]
    axes.plot(k, gained(ds, "after"), color="black", label="motion and centres")
    axes.plot(k, gained(ds, "recentred"), color=_GREY, label="centres alone")
    with np.errstate(invalid="ignore", divide="ignore"):
        blind = gained(ds, "blind") / gained(ds, "recentred")
    axes.plot(k, blind, color="#1f77b4", label="motion alone, from the other half-set")
    axes.axhline(1.0, color="black", lw=0.6, ls=":")
    axes.set(xlabel="spatial frequency, 1/Å", ylabel="SSNR, relative to before")
    axes.legend(frameon=False)
    return Picture(
        "Signal gained",
        "Spectral signal-to-noise ratio of the particles against their references, relative to before polishing. What a particle gains "
        "from motion that it helped to find includes its own noise. The blue curve has motion from the particles of the other half-set "
        "alone, so it is free of that, but of half the particles. The references were made with the motion from before, which favours it "
        "the more, the higher the resolution; only shells of strong signal are shown. The FSC of half-maps that are refined anew decides.",
        figure,
    )


def draw_field(ds: xr.Dataset) -> Picture:
    """Field of the micrograph with the median change, before and after."""
    from matplotlib.figure import Figure

    change = ds["motion_change_angstrom"].values
    row = int(np.argsort(change)[len(change) // 2])
    place = np.asarray(ds["patch_position"].values[row])
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    largest = 1e-6
    panels = list(zip(figure.subplots(1, 2), ("patch_shift_before", "patch_shift"), ("before", "after")))
    for _, name, _ in panels:
        field = np.asarray(ds[name].values[row])
        largest = max(largest, float(np.nanmax(np.abs(field - field[:, :1]))))
    length = 0.9 * place[:, 1].max() / 8 / largest
    for axes, name, title in panels:
        for (y, x), path in zip(place, np.asarray(ds[name].values[row])):
            axes.plot(x + length * (path[:, 1] - path[0, 1]), y + length * (path[:, 0] - path[0, 0]), lw=0.9, color="C0")
            axes.plot(x, y, "k.", ms=2)
        axes.set(xlabel="x (pixel)", ylabel="y (pixel)", aspect="equal", title=title)
    name = str(ds["micrograph"].values[row]) if "micrograph" in ds.coords else f"micrograph {row + 1}"
    return Picture("Motion before and after", f"{name}: tracks of the specimen (dots: first frame), at most {largest:.2f} Å.", figure)


def draw_damage(ds: xr.Dataset) -> Iterator[Picture]:
    """Amplitude by exposure in some shells with the fitted damage, and B factors of the frames."""
    from matplotlib.figure import Figure

    found = session_damage(ds)
    if found is None or not np.isfinite(found[0].scale):
        return
    damage, power, k, exposure = found
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    usable = np.flatnonzero(np.isfinite(damage.falloff) & (damage.falloff > 0))
    for number, shells in enumerate(np.array_split(usable, min(4, len(usable)))):
        weight = power[shells] * damage.falloff[shells] ** 2
        mean = (damage.amplitude[:, shells] * weight).sum(1) / weight.sum()
        model = (damage.model[:, shells] * weight).sum(1) / weight.sum()
        left.plot(exposure, mean, "o", ms=3, color=f"C{number}")
        left.plot(exposure, model, lw=1, color=f"C{number}", label=f"{1 / k[shells[-1]]:.1f} to {1 / k[shells[0]]:.1f} Å")
    left.set(xlabel="exposure (e/Å²)", ylabel="amplitude", ylim=(0, None))
    left.legend(frameon=False, fontsize=8)
    factor = b_factors(damage, power, k)[0]
    right.plot(exposure, factor, "o-", ms=3, color="black")
    right.set(xlabel="exposure (e/Å²)", ylabel="B factor (Å²), mean 0")
    yield Picture("Radiation damage", damage_caption(damage), figure)


def damage_caption(damage: Damage) -> str:
    """The scale in words."""
    return (
        f"Left: correlation of the frames with the reference (dots) and fitted damage (lines). The damage is {damage.scale:.2f} ± "
        f"{damage.deviation:.2f} of that published for this voltage and exposure; set damage_scale to it if the difference matters. "
        "Right: B factors of the frames, to be compared with those of RELION; the weights do not use them."
    )
