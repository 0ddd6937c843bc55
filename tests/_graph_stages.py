"""Declarations of all stages that pipelines are made of, those to come included, for tests of the graph. Nothing is registered."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationError, create_model, model_validator

from cryodask.errors import ProjectFileError
from cryodask.products import Product
from cryodask.stage import Output, Params, Port, Stage, find_stage, port

STAGES: dict[str, Stage] = {}
Inputs = dict[str, list[Product]]


def _group(name: Any) -> Any:
    if name is not None and not re.fullmatch(r"C[1-9]\d?|D[1-9]\d?|T|O|I[1-4]?", str(name)):
        raise ValueError(f"{name!r} is not a point group. Known: C1, C2, ..., D2, ..., T, O, I, I1 to I4")
    return name


Group = Annotated[Any, AfterValidator(_group)]


def _params(name: str, fields: str, defaults: dict[str, Any], files: str) -> type[Params]:
    """A permissive model: any value for each named field; of ``files`` one must be given."""
    names = files.split()

    def a_file_is_said(self: Any) -> Any:
        if names and not any(getattr(self, n) for n in names):
            raise ValueError(f"say which file: {name}: {{{names[0]}: ...}}")
        return self

    validators: Any = {"a_file_is_said": model_validator(mode="after")(a_file_is_said)}
    found = {n: (Group if n == "symmetry" else Any, Field(defaults.get(n))) for n in (*fields.split(), *names)}
    return create_model(f"{name.title()}Params", __base__=Params, __validators__=validators, **found)


def declare(
    name: str,
    ports: Sequence[str | Port],
    outputs: Sequence[Output] | Callable[[Any], tuple[Output, ...]],
    fields: str = "",
    *,
    files: str = "",
    shape: Any = "whole",
    defaults: dict[str, Any] | None = None,
    into: dict[str, Stage] = STAGES,
    **more: Any,
) -> Stage:
    made = Stage(name, 1, shape, (), (), (), _params(name, fields, defaults or {}, files), None, name)
    made.ports = tuple(port(p) if isinstance(p, str) else p for p in ports)
    fixed = () if callable(outputs) else tuple(outputs)
    made.outputs = outputs if callable(outputs) else lambda params: fixed
    for key, value in more.items():
        setattr(made, key, value)
    into[name] = made
    return made


def make_params(stage: Stage, label: str, values: dict[str, Any]) -> Any:
    for name in values:
        if name not in stage.params.model_fields:
            near = difflib.get_close_matches(name, list(stage.params.model_fields), 1, 0.5)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ProjectFileError(f"{label}: {stage.name} has no parameter {name!r}.{hint}")
    try:
        return stage.params(**values)
    except ValidationError as error:
        raise ProjectFileError(f"{label}: {error.errors()[0]['msg'].removeprefix('Value error, ')}.") from error


# --- checks of stages to come; the others use their own -----------------------------------------------------------------------------


def check_pick(params: Any, inputs: Inputs) -> Iterator[str]:
    exposures = inputs["exposures"][0]
    if params.image == "denoised" and "denoised" not in exposures.parts:
        yield f"image: denoised, but {exposures.ref} has no denoised micrographs. Add train_denoiser and denoise before it."


def check_refine3d(params: Any, inputs: Inputs) -> Iterator[str]:
    particles = inputs["particles"][0]
    if getattr(params, "local", None) and "pose" not in particles.parts:
        yield f"local: true starts from poses, and {particles.ref} has none. Refine globally first."


def check_relion_refine3d(params: Any, inputs: Inputs) -> Iterator[str]:
    if params.symmetry is None and inputs["map"][0].point_group is None:
        yield f"say the symmetry; {inputs['map'][0].ref} does not have one."


# --- exposures -------------------------------------------------------------------------------------------------------------------------


def E(parts: str, **more: Any) -> Output:
    return Output("exposures", "exposures", tuple(parts.split()), **{"on": "exposures", **more})


def P(parts: str = "", **more: Any) -> Output:
    return Output("particles", "particles", tuple(parts.split()), **{"on": "particles", **more})


def M(parts: str = "final half_maps fsc", frame: str = "same", **more: Any) -> Output:
    return Output("map", "map", tuple(parts.split()), frame=frame, **more)


def of_classes(parts: str, maps: str, frame: str, default: int) -> Callable[[Any], tuple[Output, ...]]:
    """All particles with their class, and for each class its particles and its map."""

    def outputs(params: Any) -> tuple[Output, ...]:
        found = [P(parts, partition=True, frame="same" if "pose" in parts else "")]
        for k in range(1, int(params.classes or default) + 1):
            found.append(Output(f"class{k}", "particles", on="particles", subset=True))
            found.append(Output(f"class{k}", "map", tuple(maps.split()), frame=frame))
        return tuple(found)

    return outputs


WHOLE: dict[str, Any] = {"copies": True, "subtracted": True, "whole": True}
WITH_CTF = "exposures[ctf, optics, aberrations?]"
EVERY_PART = "position? score? image? ctf? alignment2d? class2d? class3d? pose? components? quality? note?".replace(" ", ", ")

declare("ingest", [], [E("frames optics dose", on=None)], "storage dataset", shape="map")
declare(
    "motion",
    ["exposures[frames, optics, dose]"],
    [E("micrograph halves field")],
    "patches alignment_resolution_angstrom",
    shape="map",
)
declare("import_micrographs", [], [E("micrograph optics", on=None)], files="star", shape="map")
declare("ctf", ["exposures[micrograph, optics]"], [E("ctf ctf_quality")], "finest_angstrom phase_shift_deg tilt_plane", shape="map")
declare("import_ctf", ["exposures[optics]"], [E("ctf")], files="star", shape="map")
declare("train_denoiser", ["exposures[halves]"], [Output("weights", "weights", ("weights",))], "epochs seed", purpose="denoise")
declare("denoise", ["exposures[micrograph]", "weights[weights]"], [E("denoised")], shape="map", purpose="denoise")
declare("clean_edges", ["exposures[micrograph]"], [E("mask2d")], shape="map")
declare(
    "select_exposures",
    ["exposures[ctf_quality]"],
    [E("kept", subset=True)],
    "worst_ctf_resolution_angstrom largest_motion_angstrom by_hand",
)

# --- births ----------------------------------------------------------------------------------------------------------------------------
declare(
    "pick",
    ["exposures[micrograph, optics, denoised?]", "templates?!:classes[averages]", "weights?!:weights[weights]", "reference?!:map[final]"],
    [P("position score", on=None, births=True)],
    "diameter_angstrom threshold rounds image",
    shape="map",
    check=check_pick,
)
STAGES["pick"].ports = (replace(STAGES["pick"].ports[0], also_if="image"), *STAGES["pick"].ports[1:])
declare("import_picks", ["exposures[micrograph]"], [P("position score", on=None, births=True)], files="folder star", shape="map")
declare(
    "edit_picks",
    ["exposures[micrograph]", "particles[position]"],
    [P("position", births=True)],
    shape="map",
    person=True,
)


def imported_particles(params: Any) -> tuple[Output, ...]:
    parts = (params.has or "image ctf position pose score").replace(",", " ")
    return E("optics", on=None), P(parts, on=None, births=True, frame="unknown")


BESIDE = "exposures?:exposures"
declare("import_particles", [BESIDE], imported_particles, "unmatched pixel_size_angstrom has", files="star cs", shape="map")

# --- sets of particles -----------------------------------------------------------------------------------------------------------------
declare(
    "extract",
    ["exposures[micrograph, optics]", port("particles[position, pose?, alignment2d?]", also_if="recentre", subtracted=True)],
    [P("image", subset=True)],
    shape="map",
    params=find_stage("extract").params,
    check=find_stage("extract").check,
)
declare(
    "classify2d",
    [WITH_CTF, "particles[image, ctf?]"],
    [P("alignment2d class2d"), Output("classes", "classes", ("averages", "scores"))],
    "classes iterations seed resolution_angstrom mask_diameter_angstrom",
    shape="blocks",
)
declare(
    "curate",
    [port("exposures?:exposures[ctf_quality?]", also_if="worst_ctf_resolution_angstrom"), "particles[class2d]", "classes[scores]"],
    [P(subset=True), Output("classes", "classes", ("averages", "scores"), on="classes")],
    "keep least_class_score least_class_probability worst_ctf_resolution_angstrom likelihood_deviations",
    check=find_stage("curate").check,
)
declare(
    "select_classes",
    [port("particles[class2d]", whole=True), "classes[averages]"],
    [P(subset=True), Output("classes", "classes", ("averages",), on="classes")],
    person=True,
)
declare("select", [port(f"particles[{EVERY_PART}]", **WHOLE)], [P(subset=True)], "where")
declare("annotate", [port("particles", **WHOLE)], [P("note")], "name", person=True)
declare("junk", ["particles[image]", "weights[weights]"], [P("quality")], shape="blocks", purpose="junk")
declare("train_junk", ["particles[image, note]"], [Output("weights", "weights", ("weights",))], "epochs seed", purpose="junk")
declare("deduplicate", ["particles[position]"], [P(subset=True)], "nearer_than_angstrom")
declare(
    "merge",
    [port("particles*", copies=True, subtracted=True), "exposures?!:exposures"],
    [P()],
    "prefer nearer_than_angstrom",
    check=find_stage("merge").check,
)
declare(
    "consensus",
    ["particles[pose]", "other!:particles[pose]"],
    [P(subset=True)],
    "largest_degrees largest_angstrom",
    check=find_stage("consensus").check,
)
declare("match", ["particles[position]", "to!:particles[position]"], [P(on="to", subset=True)], "nearer_than_angstrom")
declare(
    "expand", ["particles[pose]", "map[final]"], [P("pose", copies="expand", frame="same")], "symmetry", check=find_stage("expand").check
)
declare(
    "contract",
    [port("particles[pose]", copies=True, subtracted=True)],
    [P(subset=True, copies="contract", drops=("pose",))],
    "keep",
)
declare(
    "subtract",
    [WITH_CTF, port("particles[image, pose, ctf?]", copies=True), "map[final]", "mask!:mask[mask]"],
    [P("image", subtracted=True)],
    shape="blocks",
)

# --- maps ------------------------------------------------------------------------------------------------------------------------------
POSED = port("particles[image, pose, ctf?]", copies=True, subtracted=True)
MASK = "mask?!:mask[mask]"


def ab_initio_outputs(params: Any) -> tuple[Output, ...]:
    if int(params.classes or 1) == 1:
        return (M("final", "new"),)
    return of_classes("class3d", "final", "new", 1)(params)


declare(
    "ab_initio",
    [WITH_CTF, "particles[image, ctf?]"],
    ab_initio_outputs,
    "symmetry restarts particles resolution_angstrom steps seed mask_diameter_angstrom classes",
    shape="tournament",
    defaults={"symmetry": "C1"},
)
declare(
    "refine3d",
    [
        WITH_CTF,
        port("particles[image, ctf?, pose?]", subtracted=True, also_if={"pose": "local"}),
        port("map[final]", unless="reference"),
        MASK,
    ],
    [P("pose", frame="same"), M()],
    "symmetry lowpass_angstrom iterations seed local mask_diameter_angstrom reference",
    shape="blocks",
    check=check_refine3d,
)
declare("reconstruct", [WITH_CTF, POSED], [M()], "symmetry", shape="blocks")
declare(
    "classify3d",
    [WITH_CTF, POSED, "map[final]", MASK],
    of_classes("class3d", "final half_maps", "same", 3),
    "classes seed symmetry restarts",
    shape="blocks",
)
declare(
    "align_classify3d",
    [WITH_CTF, "particles[image, ctf?]", "maps*:map[final]"],
    of_classes("class3d pose", "final half_maps", "same", 3),
    "classes seed symmetry decoys",
    shape="blocks",
)
declare(
    "variability",
    [WITH_CTF, replace(POSED, whole=True), "map[final]", MASK],
    [P("components"), Output("series", "map", ("view",), frame="same")],
    "components",
    shape="blocks",
)
declare(
    "ctf_refine",
    [WITH_CTF, "particles[image, pose, ctf?]", "map[final, half_maps, fsc]", MASK],
    [E("aberrations"), P("ctf")],
    "defocus tilt magnification trefoil tetrafoil",
    shape="map",
)
declare(
    "polish",
    ["exposures[frames, field, ctf, optics, dose, aberrations?]", "particles[pose, ctf?]", "map[final, half_maps, fsc]", MASK],
    [E("micrograph field"), P("image pose", frame="same")],
    "box scale_to",
    shape="map",
)
declare(
    "mask",
    ["map[final, half_maps]", "model?!:model[atoms]"],
    [Output("mask", "mask", ("mask",), frame="same")],
    "threshold extend_angstrom edge_angstrom low_pass_angstrom",
)
declare("import_mask", ["map[final]"], [Output("mask", "mask", ("mask",), frame="same")], files="file")


def imported_map(params: Any) -> tuple[Output, ...]:
    if isinstance(params.file, str) and params.file.startswith("missing"):
        raise ProjectFileError(f"{params.file} cannot be read.", "the name is wrong", "Correct the name.")
    parts = "final half_maps fsc" if params.half_maps else "final"
    return (M(parts, f"as:{params.frame_of}" if params.frame_of else "unknown"),)


declare("import_map", [], imported_map, "symmetry frame_of", files="file half_maps")
RELATED_MASK = port("mask[mask]", default="related")
declare(
    "postprocess",
    ["map[final, half_maps]", RELATED_MASK],
    [M("fsc view", on="map")],
    "b_factor_angstrom2 low_pass_angstrom seed",
)
declare("local_resolution", ["map[half_maps]", replace(RELATED_MASK, optional=True)], [M("view")])
declare(
    "align_maps",
    [port("particles[pose]", copies=True), "map[final]", "to!:map[final]"],
    [P("pose", frame="to"), M(frame="to")],
    "symmetry",
)
declare(
    "hand",
    ["map[final]", "particles?:particles[pose]", "model!:model[atoms]"],
    [P("pose", frame="flipped"), M(frame="flipped")],
)
declare("import_model", [], [Output("model", "model", ("atoms",), frame="unknown")], files="file")
declare("dock", ["map[final]", "model[atoms]"], [Output("model", "model", ("atoms",), frame="same")], "resolution_angstrom")
declare("model_map", ["map[fsc]", "model[atoms]"], [])

# --- adapters and others -----------------------------------------------------------------------------------------------------------------
declare("external.relion_postprocess", ["map[half_maps]", RELATED_MASK], [M("fsc view", on="map")])
declare(
    "external.relion_refine3d",
    [WITH_CTF, "particles[image, ctf?]", "map[final]", MASK],
    [P("pose", frame="same"), M()],
    "symmetry",
    check=check_relion_refine3d,
)
declare(
    "external.topaz",
    ["exposures[micrograph]", "weights?!:weights[weights]"],
    [P("position score", on=None, births=True)],
    "threshold",
    shape="map",
)


def imported_project(params: Any) -> tuple[Output, ...]:
    if not params.project:
        raise ProjectFileError("say which project: import_project: {project: ../other}.")
    return (
        E("frames micrograph optics dose field ctf ctf_quality", on=None),
        P("position score image pose class2d", on=None, births=True, frame="unknown"),
    )


declare("import_project", [], imported_project, "project step")
