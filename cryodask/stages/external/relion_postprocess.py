"""Stage ``external.relion_postprocess``: resolution and sharpening by RELION."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import Field

from cryodask.errors import ProgramError, StarError
from cryodask.formats.mrc import read_mrc, write_mrc
from cryodask.stage import Context, EffortMark, InputFile, Output, Params, Picture, Program, Resources, Sizes, stage
from cryodask.stages._half_maps import check_half_maps, check_independent
from cryodask.stages.postprocess import draw_fsc, draw_sharpened

if TYPE_CHECKING:
    import xarray as xr

RELION = Program(
    "relion_postprocess",
    version_pattern=r"RELION version: (\S+)",
    install="install RELION (Debian: apt-get install relion; elsewhere: module load relion) where cryodask and its workers start",
)
_CURVES = {
    "fsc_unmasked": "rlnFourierShellCorrelationUnmaskedMaps",
    "fsc_masked": "rlnFourierShellCorrelationMaskedMaps",
    "fsc_randomised": "rlnCorrectedFourierShellCorrelationPhaseRandomizedMaskedMaps",
    "fsc_corrected": "rlnFourierShellCorrelationCorrected",
}


class RelionPostprocessParams(Params):
    """Parameters of stage ``external.relion_postprocess``."""

    b_factor_angstrom2: float | None = Field(None, description="B-factor to apply, A^2, negative sharpens; by default fitted")
    fit_from_angstrom: float = Field(10.0, description="lowest resolution of the B-factor fit, Angstrom", gt=0)
    lowpass_angstrom: float | None = Field(None, description="low-pass of the sharpened map, Angstrom; by default its resolution", gt=0)
    mtf: InputFile | None = Field(None, description="STAR file with the MTF of the detector")
    randomise_below_fsc: float = Field(
        0.8, description="phases are randomised beyond the shell where the unmasked FSC falls below this", gt=0, lt=1
    )
    seed: int = Field(0, description="seed of the random phases", ge=0)
    timeout_seconds: Annotated[float, EffortMark] = Field(3600.0, description="time after which the program is killed, s", gt=0)


def _sizes(params: RelionPostprocessParams, sizes: Sizes) -> Sizes:
    return {**sizes, "shell": sizes["x"] // 2 + 1}


def _memory(params: RelionPostprocessParams, sizes: Sizes) -> float:
    # RELION computes in double precision; input and output maps are float32
    return 120.0 * sizes["z"] * sizes["y"] * sizes["x"]


@stage(
    version=1,
    name="external.relion_postprocess",
    shape="whole",
    programs=[RELION],
    needs=["half_map", "solvent_mask", "map_pixel_size_angstrom"],
    outputs=[Output("map", "map", ("fsc", "view"), on="map", frame="same")],
    gives=["shell_resolution_angstrom", *_CURVES, "resolution_angstrom", "b_factor_angstrom2", "sharpened_map"],
    sizes=_sizes,
    resources=Resources(memory=_memory),
)
def relion_postprocess(
    params: RelionPostprocessParams, *, context: Context, half_map: np.ndarray, solvent_mask: np.ndarray, map_pixel_size_angstrom: float
) -> dict[str, Any]:
    """Measure the resolution of the masked half-maps and sharpen their mean with ``relion_postprocess``.

    The mask is always used (``--force_mask``). Curves, resolution and B-factor are RELION's own: its resolution is that of the last
    shell above 0.143, not interpolated, and its random phases depend on ``seed``.
    """
    check_half_maps(half_map)
    check_independent(half_map)
    pixel = float(map_pixel_size_angstrom)
    for name, volume in (("half1.mrc", half_map[0]), ("half2.mrc", half_map[1]), ("mask.mrc", solvent_mask)):
        write_mrc(context.scratch / name, np.asarray(volume, np.float32), pixel)
    # without a separate output folder RELION fails at the last step if Ghostscript is not installed
    (context.scratch / "out").mkdir()
    options: dict[str, str | float | Path] = {
        "--i": "half1.mrc",
        "--i2": "half2.mrc",
        "--mask": "mask.mrc",
        "--o": "out/relion",
        "--angpix": pixel,
        "--randomize_at_fsc": params.randomise_below_fsc,
        "--random_seed": params.seed,
        "--autob_lowres": params.fit_from_angstrom,
    }
    if params.b_factor_angstrom2 is not None:
        options["--adhoc_bfac"] = params.b_factor_angstrom2
    if params.lowpass_angstrom is not None:
        options["--low_pass"] = params.lowpass_angstrom
    if params.mtf is not None:
        options["--mtf"] = Path(params.mtf).resolve()
    switches = ["--force_mask", *(["--auto_bfac"] if params.b_factor_angstrom2 is None else [])]
    context.run(
        RELION.name,
        [*switches, *(word for option in options.items() for word in option)],
        outputs=["out/relion.star", "out/relion.mrc"],
        timeout_seconds=params.timeout_seconds,
    )
    sharpened, _ = read_mrc(context.scratch / "out" / "relion.mrc", ProgramError)
    return {**_read_star(context.scratch / "out" / "relion.star"), "sharpened_map": sharpened}


def _read_star(path: Path) -> dict[str, Any]:
    """Curves and figures of a ``postprocess.star``."""
    from cryodask.formats.star.tables import read_tables

    try:
        tables: dict[str, Any] = read_tables(path)
        general, curves = tables["general"], tables["fsc"]
        resolution = np.array(curves["rlnAngstromResolution"], np.float64)
        resolution[0] = np.inf  # RELION writes 999
        return {
            "shell_resolution_angstrom": resolution,
            **{name: np.array(curves[relion], np.float64) for name, relion in _CURVES.items()},
            "resolution_angstrom": float(general["rlnFinalResolution"]),
            "b_factor_angstrom2": float(general["rlnBfactorUsedForSharpening"]),
        }
    except (StarError, KeyError, ValueError, TypeError) as error:
        raise ProgramError(
            f"relion_postprocess wrote a STAR file that cannot be read: {type(error).__name__}: {error}",
            "this version of RELION has not been tested with cryodask",
            "check its output in the folder logs of the result; this step was tested with RELION 3.1",
        ) from error


@relion_postprocess.sentence
def says(result: Mapping[str, Any]) -> str:
    """The most important figure."""
    return f"resolution {float(result['resolution_angstrom']):.2f} A"


@relion_postprocess.figures
def draw(ds: xr.Dataset) -> Iterator[Picture]:
    """RELION's FSC curves; sections and projections of its sharpened map."""
    yield draw_fsc(ds, "that of the last shell before RELION's corrected curve falls below 0.143.")
    yield draw_sharpened(ds)
