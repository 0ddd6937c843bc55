"""Sizes known before any work: from the header of the first movie, from boxes in the plan, from sets of the last run."""

from __future__ import annotations

import os

from cryodask.errors import CryodaskError
from cryodask.formats.movies import CheckedMovie, open_movie
from cryodask.formats.mrc import open_mrc
from cryodask.products import Product
from cryodask.run.graph.chain import is_pinned, label_of
from cryodask.run.inputs import step_inputs
from cryodask.run.recipe import Plan, Step, fractions_of
from cryodask.run.refs import pinned_place
from cryodask.stage import Sizes
from cryodask.store.project import Arrival, Project
from cryodask.vocabulary import SLOTS, VARIABLES


def movie_header(plan: Plan, listing: list[Arrival]) -> tuple[Arrival, CheckedMovie] | None:
    """The first movie, as it will be read; None if it cannot be."""
    home = plan.path.parent.resolve()
    movies = ((a, os.path.join(home, str(a.inputs["movie_path"]))) for a in listing if "movie_path" in a.inputs)
    # others may be away
    first, path = next(((a, path) for a, path in movies if os.path.exists(path)), (None, ""))
    if first is None:
        return None
    try:
        return first, open_movie(path, fractions_of(plan, str(first.inputs.get("data_set", ""))))
    except (CryodaskError, OSError):
        return None  # its stage reports the error


def step_sizes(plan: Plan, project: Project | None, step: Step, movie: tuple[int, int, int] | None) -> Sizes:
    """Known lengths of the dimensions of a step's inputs."""
    if step.stage.shape == "map":
        return {} if movie is None else {"frame": movie[0], "y": movie[1], "x": movie[2], "slot": SLOTS // 4}
    dims = {d for name in (*step.stage.needs, *step.stage.optional) for d in VARIABLES[name].dims}
    sizes: Sizes = {}
    edge = image_edge(plan, project, step)
    if edge is None and "z" in dims:
        edge = next((e for p in step.inputs.get("map", ()) if (e := map_edge(plan, project, p)) is not None), None)
    if edge is not None:
        sizes |= {d: edge for d in ("z", "y", "x") if d in dims}
    if dims & {"particle", "slot"} and (count := particle_count(plan, project, step)) is not None:
        sizes |= {d: count for d in ("particle", "slot") if d in dims}
    return sizes


def particle_count(plan: Plan, project: Project | None, step: Step) -> int | None:
    """Current number of particles of a step; None if unknown, or if it takes none."""
    if project is None:
        return None
    try:
        ids = step_inputs(plan, project, step).ids
    except (KeyError, CryodaskError):  # an earlier step has no result, or an error that the run will report
        return None
    return None if ids is None else len(ids)


def image_edge(plan: Plan, project: Project | None, step: Step) -> int | None:
    """Box size of a step's particle images, pixels."""
    found = {_edge(plan, project, p) for p in step.inputs.get("particles", ())}
    return found.pop() if len(found) == 1 else None


def _edge(plan: Plan, project: Project | None, particles: Product) -> int | None:
    if "image" not in particles.parts:
        return None
    ref = particles.parts["image"]
    if is_pinned(ref):
        sizes = project.generation_at(pinned_place(ref)).meta["sizes"] if project is not None else {}
        edge = sizes.get("particle_image.y", sizes.get("y"))
        return None if edge is None else int(edge)
    giver = plan.graph.step(label_of(ref))
    if "particle_image" not in giver.stage.gives:  # a union
        return image_edge(plan, project, giver)
    try:
        settled = giver.stage.sizes(giver.params, {}).get("y")
    except KeyError:
        settled = None
    if settled is not None or project is None or giver.label not in project.stages:
        return settled
    sizes = project.generation(giver.label).meta["sizes"]
    edge = sizes.get("particle_image.y", sizes.get("y"))
    return None if edge is None else int(edge)


def map_edge(plan: Plan, project: Project | None, product: Product) -> int | None:
    """Edge of a map, voxels: from its file, from the particles it is made from, or from the map before it."""
    giver = plan.graph.step(product.step)
    if giver.inputs.get("particles"):
        return image_edge(plan, project, giver)
    if giver.inputs.get("map"):
        return map_edge(plan, project, giver.inputs["map"][0])
    for path in (path for paths in plan.input_files(giver).values() for path in paths):
        try:
            return int(open_mrc(path).shape[-1])
        except (CryodaskError, OSError):  # its stage reports the error
            return None
    return None
