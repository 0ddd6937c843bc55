"""Functions of stage ``classify2d``: expectation and maximisation over classes, and the score of a class."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cryodask.errors import InputError
from cryodask.kernels import classify2d as c2
from cryodask.kernels import expectation, polar
from cryodask.kernels.fourier import resize_images, soft_sphere
from cryodask.kernels.randomness import uniforms
from cryodask.stage import Columns, Context, Metrics, ParticleBlock, ParticleSet, State, Sums

if TYPE_CHECKING:
    from cryodask.stages.classify2d import Classify2DParams

FIRST_RESOLUTION_ANGSTROM = 32.0
FIRST_INVERSE_TEMPERATURE = 0.3
WARMING_ITERATIONS = 10
RESEED_ITERATIONS = 12
EMPTY_SHARE = 0.1
"""A class with less than this fraction of the mean class is empty: it takes over half of the largest one."""
SCORE_PARTICLES = 60
"""Class size to which the agreement of the halves is extrapolated for the score."""

halves = 1


def start(params: Classify2DParams, particles: ParticleSet, inputs: dict[str, Any]) -> State:
    """State before the first iteration; refuses invalid parameters and inputs."""
    length = particles.box * float(particles.pixel_size_angstrom)
    if particles.count < 20:
        raise InputError(
            f"{particles.count} particles are too few for 2D classification", "picking found hardly any", "check the picks first"
        )
    rings = max(4, min(particles.box // 2 - 2, int(length / params.resolution_angstrom), 34))
    classes = params.classes or int(np.clip(particles.count // 60, 6, 50))
    diameter = params.mask_diameter_angstrom or 0.75 * length
    return {
        "iteration": 0, "count": particles.count, "box": particles.box, "length_angstrom": length, "rings": rings,
        "working_box": min(particles.box, max(32, 2 * (rings + 3))), "classes": min(classes, max(1, particles.count // 5)),
        "mask_diameter_angstrom": diameter, "shift_range_angstrom": params.shift_range_angstrom or 0.1 * diameter,
        "samples": np.zeros(0, np.complex64), "prior": np.zeros(0), "noise_power": np.zeros(0), "done": False,
    }  # fmt: skip


def cache_key(params: Classify2DParams, state: State) -> int:
    """Constant, because blocks are loaded only once."""
    return 0


def load(params: Classify2DParams, state: State, block: ParticleBlock, context: Context) -> expectation.Particles:
    """Fourier transforms of a block's images."""
    # grey values as if the image had this box from the start: white noise keeps its variance; transforms of a whole leaf would take
    # nine times the memory of its images
    grey = state["box"] / state["working_box"]
    lots = (torch.from_numpy(np.ascontiguousarray(block.images[i : i + 256], np.float32)) for i in range(0, len(block.images), 256))
    small = torch.cat([resize_images(lot, state["working_box"]) * grey for lot in lots])
    return expectation.load_particles(
        small.numpy(),
        block.columns,
        block.index,
        pixel_size_angstrom=state["length_angstrom"] / state["working_box"],
        rings=state["rings"],
        mask_radius_angstrom=state["mask_diameter_angstrom"] / 2,
        device=context.device,
    )


def prepare(params: Classify2DParams, state: State, half: int, context: Context) -> torch.Tensor | None:
    """References of this iteration, made once per worker."""
    if state["iteration"] == 0:
        return None
    return c2.class_table(torch.from_numpy(state["samples"]).to(context.device), _rings(state))


def expect(
    params: Classify2DParams, state: State, shared: torch.Tensor | None, block: expectation.Particles, previous: Columns, context: Context
) -> tuple[Sums, Columns]:
    """Sums and columns of one block."""
    count, classes = len(block.index), state["classes"]
    grid = block.grid
    if shared is None:
        return _random_sums(params, state, block, context.device)
    rings, iteration = _rings(state), state["iteration"]
    pixel = state["length_angstrom"] / state["working_box"]
    noise = torch.from_numpy(state["noise_power"]).float().to(context.device)
    samples = torch.from_numpy(state["samples"]).to(context.device)
    log_prior = torch.log(torch.from_numpy(state["prior"]).float() + 1e-3).to(context.device)
    warmth = FIRST_INVERSE_TEMPERATURE + (1.0 - FIRST_INVERSE_TEMPERATURE) * min(1.0, (iteration - 1) / WARMING_ITERATIONS)
    # first wide steps around the picks, then fine steps around the last shift
    step = state["length_angstrom"] / state["rings"] / 1.8
    centres = torch.zeros(count, 2, device=context.device)
    if not _is_wide(iteration):
        centres = torch.from_numpy(np.stack([previous["origin_y_angstrom"], previous["origin_x_angstrom"]], -1) / pixel).to(context.device)
        offsets = expectation.shift_grid(step / 2 / pixel, 0.75 * step / pixel, context.device)
    else:
        offsets = expectation.shift_grid(step / pixel, state["shift_range_angstrom"] / pixel, context.device)
    each = len(offsets) * classes * expectation.psi_count(rings)
    lots = torch.arange(count, device=context.device).split(max(1, min(32, c2.SCORES_TOGETHER // each)))
    residual = torch.zeros(classes, grid.rings + 1, dtype=torch.float64, device=context.device)
    poses: list[tuple[torch.Tensor, ...]] = []
    found_columns: list[tuple[torch.Tensor, ...]] = []
    for rows in lots:
        found = c2.classify_chunk(block, rows, centres[rows], offsets, shared, rings, noise, log_prior, warmth)
        shifts = centres[rows][:, None] + offsets[found["shift"]]
        residual.index_add_(0, found["class"][:, 0], c2.residual_power(block, rows, found, shifts[:, 0], samples))
        i, k = torch.nonzero(found["weight"] > 0, as_tuple=True)
        poses.append((rows[i], found["class"][i, k], shifts[i, k], found["angle"][i, k], found["weight"][i, k]))
        best = found["class"][:, 0]
        probability = found["class_probability"].gather(1, best[:, None])[:, 0]
        found_columns.append((best, probability, -torch.rad2deg(found["angle"][:, 0]), *(shifts[:, 0] * pixel).T, found["log_likelihood"]))
    rows, which, shifts, angles, weights = (torch.cat(p) for p in zip(*poses))
    numerator, weight = c2.class_sums(block, rows, which, shifts, angles, weights, classes)
    names = ("class_number", "class_probability", "psi_deg", "origin_y_angstrom", "origin_x_angstrom", "log_likelihood")
    values = (torch.cat(p).cpu().numpy() for p in zip(*found_columns))
    columns = {name: v.astype(np.int32 if name == "class_number" else np.float32) for name, v in zip(names, values)}
    share = torch.zeros(classes, dtype=torch.float64, device=context.device).index_add_(0, which, weights.double())
    sums = {
        "numerator": numerator.cpu().numpy(),
        "weight": weight.cpu().numpy(),
        "share": share.cpu().numpy(),
        "power": residual.cpu().numpy(),
        "log_likelihood": float(columns["log_likelihood"].astype(np.float64).sum()),
    }
    return sums, columns


def maximise(params: Classify2DParams, state: State, sums: list[Sums], context: Context) -> tuple[State, Metrics]:
    """The next state from the sums of all blocks."""
    new = {**state, "iteration": state["iteration"] + 1}
    total, count, classes, iteration = sums[0], state["count"], state["classes"], state["iteration"]
    power = total["power"].sum(0) / count
    power[0] = power[1]
    # the first averages explain nothing yet: the mean power, including signal, keeps the posterior soft
    new["noise_power"] = power if iteration == 0 else state["noise_power"] if iteration == 1 else 0.5 * (state["noise_power"] + power)
    numerator, weight, share = np.array(total["numerator"]), np.array(total["weight"]), np.array(total["share"])
    reseeded = 0
    if 0 < iteration <= min(RESEED_ITERATIONS, params.iterations - 3):
        reseeded = _fill_empty(numerator, weight, share, EMPTY_SHARE * count / classes)
    new["prior"] = share / share.sum()
    grid, mask = _grid(state, context.device), _mask(state, context.device)
    num, den = (torch.from_numpy(a).to(context.device) for a in (numerator, weight))
    noise = torch.from_numpy(new["noise_power"]).float().to(context.device)
    plain = c2.averages_from_sums(num.sum(0), den.sum(0), noise, grid)
    images, samples = c2.mask_averages(plain, grid, mask)
    new["done"] = new["iteration"] > params.iterations
    if _is_wide(new["iteration"]) or new["done"]:
        # particles are cut again at the centres of their classes: those must be the centres of the molecules
        centre = c2.centres_of_mass(images)
        images, samples = c2.mask_averages(c2.move_averages(plain, -centre, grid), grid, mask)
    new["samples"] = samples.cpu().numpy()
    metrics = {"log_likelihood": total["log_likelihood"] / count, "reseeded": reseeded, "used_classes": int((share > 0).sum())}
    if new["done"]:
        pixel = state["length_angstrom"] / state["working_box"]
        correlation = c2.ring_correlation(num, den, grid, mask)
        new["class_centre_angstrom"] = pixel * centre.double().cpu().numpy()
        new["class_average"] = resize_images(images, state["box"]).cpu().numpy()
        new["class_resolution_angstrom"] = c2.class_resolution(correlation, state["length_angstrom"])
        new["compactness"] = c2.compactness(images, pixel, state["mask_diameter_angstrom"]).cpu().numpy()
        new["ring_correlation"] = correlation.cpu().numpy()
        new["class_residual"] = total["power"]
    return new, metrics


def finished(params: Classify2DParams, state: State) -> bool:
    """Whether the last iteration is done."""
    return bool(state["done"])


def result(params: Classify2DParams, state: State, columns: Columns) -> dict[str, Any]:
    """The output of the stage."""
    number = np.bincount(columns["class_number"], minlength=state["classes"])
    columns = {**columns, **_centred(columns, state["class_centre_angstrom"])}
    renamed = {"psi_deg": "class_psi_deg", "log_likelihood": "class_log_likelihood"}
    renamed |= {f"origin_{axis}_angstrom": f"class_origin_{axis}_angstrom" for axis in "yx"}
    return {
        **{renamed.get(name, name): values for name, values in columns.items()},
        "class_number": columns["class_number"] + 1,
        "class_average": state["class_average"].astype(np.float32),
        "class_share": number / number.sum(),
        "class_pixel_size_angstrom": state["length_angstrom"] / state["box"],
        "class_resolution_angstrom": state["class_resolution_angstrom"],
        "class_score": class_scores(
            state["ring_correlation"],
            state["compactness"],
            columns["class_number"],
            columns["log_likelihood"].astype(np.float64),
            state["class_residual"],
        ),
    }


def _centred(columns: Columns, centre_angstrom: np.ndarray) -> Columns:
    """Origins that bring particles to the centre of mass `(class, 2)` (y, x) of their average as it came out of the last iteration."""
    y, x = centre_angstrom[columns["class_number"]].T
    psi = np.deg2rad(columns["psi_deg"].astype(np.float64))
    # from the average into the image: turned back by psi
    down, right = np.cos(psi) * y - np.sin(psi) * x, np.cos(psi) * x + np.sin(psi) * y
    return {
        "origin_y_angstrom": (columns["origin_y_angstrom"] - down).astype(np.float32),
        "origin_x_angstrom": (columns["origin_x_angstrom"] - right).astype(np.float32),
    }


def class_scores(
    correlation: np.ndarray, compact: np.ndarray, number: np.ndarray, log_likelihood: np.ndarray, residual: np.ndarray
) -> np.ndarray:
    """Quality `(class,)` from 0 to 1: agreement x compactness x gain x fit.

    Agreement is the ring correlation of the halves, weighted by ring and extrapolated to a class of ``SCORE_PARTICLES``, so that small
    classes are not penalised. Gain is low if particles gain much less likelihood from their average than the typical particle (empty
    images); fit is low if the average leaves more residual power at low resolution than usual (images that do not belong together).

    Parameters
    ----------
    correlation : `(class, ring)`
    compact : `(class,)`
    number, log_likelihood : `(particle,)`
        Class and likelihood gain of the particles.
    residual : `(class, ring + 1)`
        Sums over the particles of a class of the residual power of each ring.
    """
    classes, rings = correlation.shape
    count = np.bincount(number, minlength=classes)
    ring = np.arange(1, rings + 1)
    curve = np.clip(correlation, 0.0, 0.98)
    ssnr = curve / (1.0 - curve) * SCORE_PARTICLES / np.maximum(count, 1)[:, None]
    agreement = np.sqrt((ssnr / (1.0 + ssnr) * ring).sum(1) / ring.sum())
    mean_gain = np.bincount(number, weights=log_likelihood, minlength=classes) / np.maximum(count, 1)
    typical = max(float(np.median(log_likelihood)), 1.0)
    lack = -np.log(np.maximum(mean_gain / typical, 1e-2))
    low = slice(2, max(4, rings // 2 + 1))
    left = residual[:, low] / np.maximum(count, 1)[:, None]
    usual = np.array([_weighted_median(column, count) for column in left.T])
    misfit = (left / np.maximum(usual, 1e-30)).mean(1) - 1.0
    ordinary = np.exp(-((np.maximum(lack - 0.6, 0.0) / 0.3) ** 2)) * np.exp(-((np.maximum(misfit - 0.15, 0.0) / 0.25) ** 2))
    return np.where(count >= 2, agreement * compact * ordinary, 0.0)


def _weighted_median(values: np.ndarray, weights: np.ndarray) -> float:
    order = np.argsort(values)
    cumulated = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(cumulated, 0.5 * cumulated[-1])])


def _random_sums(params: Classify2DParams, state: State, block: expectation.Particles, device: str) -> tuple[Sums, Columns]:
    """Sums of random classes at random angles, for the first iteration."""
    count, classes = len(block.index), state["classes"]
    draws = torch.from_numpy(uniforms(params.seed, 0, block.index, 2)).to(device)
    which = (draws[:, 0] * classes).long()
    rows = torch.arange(count, device=device)
    zero = torch.zeros(count, 2, device=device)
    numerator, weight = c2.class_sums(
        block, rows, which, zero, (draws[:, 1] * 2.0 * math.pi).float(), torch.ones(count, device=device), classes
    )
    power = torch.zeros(classes, block.grid.rings + 1, dtype=torch.float64, device=device)
    power[:, 1:].index_add_(0, which, block.polar_images.abs().square().mean(-1).double())
    columns: Columns = {"class_number": which.cpu().numpy().astype(np.int32)}
    for name in ("class_probability", "psi_deg", "origin_y_angstrom", "origin_x_angstrom", "log_likelihood"):
        columns[name] = np.zeros(count, np.float32)
    share = torch.bincount(which, minlength=classes).double()
    return {
        "numerator": numerator.cpu().numpy(),
        "weight": weight.cpu().numpy(),
        "share": share.cpu().numpy(),
        "power": power.cpu().numpy(),
        "log_likelihood": 0.0,
    }, columns


def _fill_empty(numerator: np.ndarray, weight: np.ndarray, share: np.ndarray, least: float) -> int:
    """Give each empty class the even particles of the largest class, which keeps the odd ones (in place)."""
    empty = np.nonzero(share < least)[0]
    for k in empty:
        big = int(share.argmax())
        for sums in (numerator, weight):
            even, odd = sums[0, big].copy(), sums[1, big].copy()
            sums[:, k], sums[:, big] = even / 2, odd / 2
        share[k] = share[big] = share[big] / 2
    return len(empty)


def _is_wide(iteration: int) -> bool:
    """Whether an iteration looks for shifts all around the picks, not around the last ones."""
    return iteration <= WARMING_ITERATIONS


def _rings(state: State) -> int:
    """Number of rings scored in this iteration, one more each time."""
    first = max(4, round(state["length_angstrom"] / FIRST_RESOLUTION_ANGSTROM))
    return min(state["rings"], first + max(0, state["iteration"] - 1))


def _grid(state: State, device: str) -> polar.PolarGrid:
    return polar.polar_grid(state["working_box"], state["rings"], None, device)


def _mask(state: State, device: str) -> torch.Tensor:
    pixel = state["length_angstrom"] / state["working_box"]
    return soft_sphere(state["working_box"], pixel, state["mask_diameter_angstrom"] / 2, 15.0, dims=2, device=device)
