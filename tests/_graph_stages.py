"""Declarations of all stages that pipelines are made of, those to come included, for tests of the graph. Nothing is registered.

What the product has is taken from it (:func:`existing`). By hand stands only what it does not have yet: stages to come, and the inputs,
outputs and parameters that an existing stage is to get.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationError, create_model, model_validator
from pydantic.fields import FieldInfo

from cryodask.errors import ProjectFileError
from cryodask.products import Product
from cryodask.run.recipe import marked_fields
from cryodask.stage import Output, Params, Port, SourceFileMark, Stage, load_stages, port
from cryodask.stages import NAMES

PRODUCT = dict(load_stages())
STAGES: dict[str, Stage] = {}
Inputs = dict[str, list[Product]]


def existing(
    name: str,
    fields: str = "",
    *,
    files: str = "",
    ports: Sequence[str | Port] = (),
    outputs: Callable[[Any], tuple[Output, ...]] | None = None,
    **more: Any,
) -> Stage:
    """A stage of the product. ``fields``, ``files``, ``ports`` (new, or in place of the one of that name) and so on are still to come.

    Parameters that it requires may be left out, for most pipelines here are about sources; of its source files one must be said.
    """
    stage = PRODUCT[name]
    new = [port(p) if isinstance(p, str) else p for p in ports]
    made = replace(
        stage,
        params=_relaxed(stage.params, name, fields.split(), files.split()),
        ports=tuple({p.name: p for p in (*stage.ports, *new)}.values()),
        outputs=outputs or stage.outputs,
        **more,
    )
    STAGES[name] = made
    return made


def _relaxed(model: type[Params], name: str, fields: list[str], files: list[str]) -> type[Params]:
    required: dict[str, Any] = {n: f for n, f in model.model_fields.items() if f.is_required()}
    optional: Any = {n: (f.annotation | None, FieldInfo.merge_field_infos(f, default=None)) for n, f in required.items()}
    sources = [n for n in marked_fields(model, SourceFileMark) if n in required]
    more: Any = dict.fromkeys((*fields, *files), (Any, None))
    return create_model(model.__name__, __base__=model, __validators__=_one_is_said(name, [*sources, *files]), **optional, **more)


def _one_is_said(name: str, files: list[str]) -> Any:
    def a_file_is_said(self: Any) -> Any:
        if files and not any(getattr(self, n) for n in files):
            raise ValueError(f"say which {'project' if files[0] == 'project' else 'file'}: {name}: {{{files[0]}: ...}}")
        return self

    return {"a_file_is_said": model_validator(mode="after")(a_file_is_said)}


def _group(name: Any) -> Any:
    if name is not None and not re.fullmatch(r"C[1-9]\d?|D[1-9]\d?|T|O|I[1-4]?", str(name)):
        raise ValueError(f"{name!r} is not a point group. Known: C1, C2, ..., D2, ..., T, O, I, I1 to I4")
    return name


Group = Annotated[Any, AfterValidator(_group)]


def _params(name: str, fields: str, files: str) -> type[Params]:
    """A permissive model: any value for each named field; of ``files`` one must be given."""
    found: Any = {n: (Group if n == "symmetry" else Any, Field(None)) for n in (*fields.split(), *files.split())}
    return create_model(f"{name.title()}Params", __base__=Params, __validators__=_one_is_said(name, files.split()), **found)


def declare(
    name: str,
    ports: Sequence[str | Port],
    outputs: Sequence[Output] | Callable[[Any], tuple[Output, ...]],
    fields: str = "",
    *,
    files: str = "",
    shape: Any = "whole",
    into: dict[str, Stage] = STAGES,
    **more: Any,
) -> Stage:
    """A stage that does not exist yet."""
    if name in NAMES:
        raise ValueError(f"the product has {name} by now: take it with existing()")
    made = Stage(name, 1, shape, (), (), (), _params(name, fields, files), None, name)
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


# --- checks to come; what exists has its own ------------------------------------------------------------------------------------------


def check_pick(params: Any, inputs: Inputs) -> Iterator[str]:
    product = PRODUCT["pick"].check
    if product is not None and params.diameter_angstrom is not None:
        yield from product(params, inputs)
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


# --- parts of declarations ----------------------------------------------------------------------------------------------------------------


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


def besides(outputs: tuple[Output, ...], *parts: str) -> tuple[Output, ...]:
    """The only output of a stage, with further parts."""
    (made,) = outputs
    return (replace(made, parts=(*made.parts, *parts)),)


def port_of(name: str, port_name: str) -> Port:
    """A port of a stage of the product."""
    found = PRODUCT[name].port(port_name)
    assert found is not None
    return found


WITH_CTF = "exposures[ctf, optics, aberrations?]"
POSED = port("particles[image, pose, ctf?]", copies=True, subtracted=True)
MASK = "mask?!:mask[mask]"
RELATED_MASK = port("mask[mask]", default="related")

# --- exposures -------------------------------------------------------------------------------------------------------------------------
existing("ingest")
existing("motion", outputs=lambda params: besides(PRODUCT["motion"].outputs(params), "halves"))
existing("import_micrographs")
existing("ctf")
declare("import_ctf", ["exposures[optics]"], [E("ctf")], files="star", shape="map")
declare("train_denoiser", ["exposures[halves]"], [Output("weights", "weights", ("weights",))], "epochs seed", purpose="denoise")
declare("denoise", ["exposures[micrograph]", "weights[weights]"], [E("denoised")], shape="map", purpose="denoise")
declare("clean_edges", ["exposures[micrograph]"], [E("mask2d")], shape="map")
existing("select_exposures")

# --- births ----------------------------------------------------------------------------------------------------------------------------
existing(
    "pick",
    "image",
    ports=[
        replace(port_of("pick", "exposures"), also=("denoised",), also_if="image"),
        "templates?!:classes[averages]",
        "weights?!:weights[weights]",
        "reference?!:map[final]",
    ],
    check=check_pick,
)
existing("import_picks", files="star")
existing("edit_picks")


def imported_particles(params: Any) -> tuple[Output, ...]:
    """Those of the product for a table with all columns, or with those that ``has`` names: there is no file here."""
    exposures, particles = PRODUCT["import_particles"].outputs(SimpleNamespace(star="", images=True))
    parts = tuple(params.has.split(",")) if params.has else particles.parts
    return exposures, replace(particles, parts=parts, frame="unknown" if "pose" in parts else "")


existing("import_particles", "unmatched pixel_size_angstrom has", files="cs", outputs=imported_particles)
existing("import_project")

# --- sets of particles -----------------------------------------------------------------------------------------------------------------
# pipelines here select by columns of stages to come, which the vocabulary does not have yet
existing("select", check=None)
for name in ("extract", "classify2d", "curate", "select_classes", "deduplicate", "merge", "consensus", "match"):
    existing(name)
existing("annotate", "name")
existing("expand")
existing("contract")
declare("junk", ["particles[image]", "weights[weights]"], [P("quality")], shape="blocks", purpose="junk")
declare("train_junk", ["particles[image, note]"], [Output("weights", "weights", ("weights",))], "epochs seed", purpose="junk")
existing("subtract")

# --- maps ------------------------------------------------------------------------------------------------------------------------------


existing("ab_initio")
existing(
    "refine3d",
    "local",
    ports=[replace(port_of("refine3d", "particles"), also=("ctf", "pose"), also_if={"pose": "local"}), MASK],
    check=check_refine3d,
)
declare("reconstruct", [WITH_CTF, POSED], [M()], "symmetry", shape="blocks")
existing("classify3d")
declare(
    "align_classify3d",
    [WITH_CTF, "particles[image, ctf?]", "maps*:map[final]"],
    of_classes("class3d pose", "final half_maps", "same", 3),
    "classes seed symmetry decoys",
    shape="blocks",
)
existing("variability")
existing("ctf_refine")
existing("polish")
existing("mask", ports=["model?!:model[atoms]"])
existing("import_mask")


def imported_map(params: Any) -> tuple[Output, ...]:
    """That of the product, with the FSC of its half-maps besides; of a file that is missing nothing is known."""
    if isinstance(params.file, str) and params.file.startswith("missing"):
        raise ProjectFileError(f"{params.file} cannot be read.", "the name is wrong", "Correct the name.")
    found = PRODUCT["import_map"].outputs(params)
    return besides(found, "fsc") if params.half_maps else found


existing("import_map", outputs=imported_map)
existing("postprocess")
existing("reslog")
existing("local_resolution")
existing("align_maps", "symmetry", ports=[port("map[final]")])
existing("hand")
existing("import_model")
existing("dock")
existing("model_map")

# --- adapters and others -----------------------------------------------------------------------------------------------------------------
existing("external.relion_postprocess")
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
