"""Stages that cost nothing, with the inputs and products of the real ones: what is recomputed depends on those alone."""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import Field

from cryodask.stage import InputFile, Output, Params, stage
from cryodask.vocabulary import Var, register

BOX = 4
register([Var("particle_brightness", ("slot",), "f8", "1", "what the toy polishing finds")], "particles.note")


class ToyParams(Params):
    """A number, so that there is a parameter to change."""

    number: float = Field(1.0, description="anything")


class ToyReferenceParams(ToyParams):
    """A number and a file."""

    reference: InputFile | None = Field(None, description="any map")


@stage(
    version=1,
    needs=["movie", "pixel_size_angstrom", "dose_per_frame"],
    optional=["gain"],
    gives=["micrograph_sum", "total_motion"],
    sizes=lambda params, sizes: {"y": sizes["y"], "x": sizes["x"]},
)
def toy_motion(params: ToyParams, *, movie, pixel_size_angstrom, dose_per_frame, gain=None, context) -> dict[str, Any]:
    """Sums the frames."""
    total = sum(np.asarray(movie[i], np.float32) for i in range(len(movie))) * (1 if gain is None else gain)
    return {"micrograph_sum": (total * params.number * dose_per_frame).astype(np.float32), "total_motion": pixel_size_angstrom}


@stage(
    version=1,
    needs=["micrograph_sum", "pixel_size_angstrom", "voltage_kv"],
    gives=["defocus_u_angstrom", "defocus_v_angstrom", "defocus_angle_deg", "phase_shift_deg"],
)
def toy_ctf(params: ToyParams, *, micrograph_sum, pixel_size_angstrom, voltage_kv, context) -> dict[str, Any]:
    """Calls the mean defocus."""
    value = float(micrograph_sum.mean()) * params.number * voltage_kv
    return {"defocus_u_angstrom": value, "defocus_v_angstrom": value, "defocus_angle_deg": 0.0, "phase_shift_deg": 0.0}


@stage(version=1, needs=["micrograph_sum"], gives=["pick_y", "pick_x"])
def toy_pick(params: ToyReferenceParams, *, micrograph_sum, context) -> dict[str, Any]:
    """Finds three particles everywhere."""
    place = np.array([4.0, 8.0, 10.0], np.float32)
    return {"pick_y": place, "pick_x": place}


@stage(
    version=1,
    needs=["micrograph_sum", "particle_id", "position_y_angstrom", "position_x_angstrom", "pixel_size_angstrom"],
    gives=["particle_id", "particle_image", "particle_y", "particle_x", "particle_count", "particle_pixel_size_angstrom"],
    outputs=[Output("particles", "particles", ("image",), on="particles", subset=True)],
    sizes=lambda params, sizes: {"y": BOX, "x": BOX},
)
def toy_extract(
    params: ToyParams, *, micrograph_sum, particle_id, position_y_angstrom, position_x_angstrom, pixel_size_angstrom, context
) -> dict[str, Any]:
    """Cuts them out."""
    pick_y, pick_x = (p / pixel_size_angstrom for p in (position_y_angstrom, position_x_angstrom))
    boxes = [micrograph_sum[int(y) - 2 : int(y) + 2, int(x) - 2 : int(x) + 2] for y, x in zip(pick_y, pick_x)]
    return {
        "particle_id": particle_id,
        "particle_image": np.array(boxes, np.float32).reshape(-1, BOX, BOX) * np.float32(params.number),
        "particle_y": pick_y,
        "particle_x": pick_x,
        "particle_count": len(boxes),
        "particle_pixel_size_angstrom": pixel_size_angstrom,
    }


class _Once:
    """One iteration that adds everything up."""

    halves = 1

    @staticmethod
    def start(params, particles, inputs):
        return {"iteration": 0, "sum": np.zeros(1)}

    @staticmethod
    def load(params, state, block, context):
        return block

    @staticmethod
    def cache_key(params, state):
        return 0

    @staticmethod
    def prepare(params, state, half, context):
        return None

    @staticmethod
    def expect(params, state, shared, block, previous, context):
        return {"sum": block.images.sum(dtype=np.float64).reshape(1)}, {"class_number": np.ones(len(block.index), np.int32)}

    @staticmethod
    def maximise(params, state, sums, context):
        return {"iteration": state["iteration"] + 1, "sum": sums[0]["sum"]}, {}

    @staticmethod
    def finished(params, state):
        return state["iteration"] > 0


@stage(
    version=1,
    shape="blocks",
    params=ToyParams,
    needs=["particle_image", "defocus_u_angstrom"],
    gives=["class_number", "class_probability", "class_score"],
)
class toy_classify(_Once):
    """One class for all."""

    @staticmethod
    def result(params, state, columns):
        count = len(columns["class_number"])
        return {**columns, "class_probability": np.ones(count, np.float32), "class_score": np.ones(1, np.float32)}


@stage(
    version=1,
    shape="blocks",
    params=ToyReferenceParams,
    needs=["particle_image"],
    gives=["half_map", "final_map", "map_pixel_size_angstrom"],
)
class toy_refine(_Once):
    """A map that is the sum."""

    @staticmethod
    def result(params, state, columns):
        halves = np.full((2, BOX, BOX, BOX), state["sum"][0] * params.number, np.float32)
        return {"half_map": halves, "final_map": halves[0], "map_pixel_size_angstrom": 1.0}


@stage(version=1, shape="whole", needs=["half_map"], gives=["solvent_mask"])
def toy_mask(params: ToyReferenceParams, *, half_map, context) -> dict[str, Any]:
    """All is molecule."""
    return {"solvent_mask": np.ones((BOX, BOX, BOX), np.float32)}


@stage(
    version=1,
    shape="whole",
    needs=["half_map", "solvent_mask"],
    gives=["sharpened_map"],
    outputs=[Output("map", "map", ("view",), on="map", frame="same")],
)
def toy_postprocess(params: ToyParams, *, half_map, solvent_mask, context) -> dict[str, Any]:
    """The mean of the half-maps."""
    return {"sharpened_map": half_map.mean(0) * solvent_mask * np.float32(params.number)}


class ToySeedParams(ToyParams):
    """A number and what a person would choose."""

    leave_out_above: float = Field(1e9, description="particles that lie higher are left out")
    leave_out: tuple[int, ...] = Field((), description="particles that are left out, by id")


@stage(
    version=1,
    shape="whole",
    needs=["class_number", "position_y_angstrom", "particle_id"],
    gives=[],
    ports=["particles[class2d, position]"],
    outputs=[Output("particles", "particles", on="particles", subset=True)],
    reasons={1: "it lies too low"},
)
def toy_curate(params: ToySeedParams, *, class_number, position_y_angstrom, particle_id, context) -> dict[str, Any]:
    """Keeps what lies high enough, without some: a curation by a limit and by hand."""
    kept = (np.asarray(position_y_angstrom) <= params.leave_out_above) & ~np.isin(particle_id, params.leave_out)
    return {"particle_kept": kept, "removal_reason": (~kept).astype(np.int8)}


class _OnceWithPoses(_Once):
    halves = 2

    @staticmethod
    def expect(params, state, shared, block, previous, context):
        count = len(block.index)
        columns = {n: np.zeros(count, np.float32) for n in ("rot_deg", "tilt_deg", "psi_deg", "log_likelihood")}
        columns |= {"origin_y_angstrom": np.full(count, 0.75, np.float32), "origin_x_angstrom": np.full(count, -0.5, np.float32)}
        return {"sum": block.images.sum(dtype=np.float64).reshape(1)}, columns

    @staticmethod
    def maximise(params, state, sums, context):
        return {"iteration": state["iteration"] + 1, "sum": sums[0]["sum"] + sums[1]["sum"]}, {}


@stage(
    version=1,
    shape="blocks",
    params=ToyParams,
    needs=["particle_image"],
    gives=["half_map", "final_map", "map_pixel_size_angstrom", "rot_deg", "tilt_deg", "psi_deg", "centre_y_angstrom", "centre_x_angstrom",
           "log_likelihood"],
    ports=["exposures[ctf]", "particles[image]"],
    outputs=[
        Output("particles", "particles", ("pose",), on="particles", frame="new"),
        Output("map", "map", ("final", "half_maps"), frame="new"),
    ],
)  # fmt: skip
class toy_poses(_OnceWithPoses):
    """A map and poses: every particle sits 0.75 A above and 0.5 A beside the middle of its box."""

    @staticmethod
    def result(params, state, columns):
        halves = np.full((2, BOX, BOX, BOX), state["sum"][0] * params.number, np.float32)
        return {**columns, "half_map": halves, "final_map": halves[0], "map_pixel_size_angstrom": 1.0}


@stage(
    version=1,
    needs=["movie", "particle_id", "centre_y_angstrom", "centre_x_angstrom", "final_map"],
    gives=["particle_id", "particle_brightness"],
    ports=["exposures[frames]", "particles[pose]", "map[final]"],
    outputs=[Output("particles", "particles", ("note",), on="particles")],
)
def toy_polish(params: ToyParams, *, movie, particle_id, centre_y_angstrom, centre_x_angstrom, final_map, context) -> dict[str, Any]:
    """One number per particle from the frames, its refined centre and the map."""
    total = sum(np.asarray(movie[i], np.float64) for i in range(len(movie)))
    y, x = (np.clip(np.round(c).astype(int), 0, n - 1) for c, n in zip((centre_y_angstrom, centre_x_angstrom), total.shape))
    return {"particle_id": particle_id, "particle_brightness": total[y, x] * params.number + float(final_map.mean())}
