"""What is known of a step's sizes before any work: the header of the first movie, boxes that the plan settles, sets of the last run."""

from __future__ import annotations

import os

from cryodask.errors import CryodaskError
from cryodask.formats.movies import open_movie
from cryodask.formats.mrc import open_mrc
from cryodask.products import Product
from cryodask.run.graph_chain import is_pinned, label_of
from cryodask.run.inputs import step_inputs
from cryodask.run.recipe import Plan, Step
from cryodask.run.refs import pinned_place
from cryodask.stage import Sizes
from cryodask.store.project import Arrival, Project
from cryodask.vocabulary import SLOTS, VARIABLES


def movie_header(plan: Plan, listing: list[Arrival]) -> tuple[Arrival, tuple[int, int, int], float | None] | None:
    """The first movie, its shape (frame, y, x), and the pixel size that it states, Angstrom; None without one that can be read."""
    first = next((a for a in listing if "movie_path" in a.inputs), None)
    if first is None:
        return None
    try:
        movie = open_movie(os.path.join(plan.path.parent.resolve(), str(first.inputs["movie_path"])))
    except (CryodaskError, OSError):
        return None  # its stage says what is wrong with it
    frames, y, x = movie.shape
    return first, (frames, y, x), movie.pixel_size_angstrom


def step_sizes(plan: Plan, project: Project | None, step: Step, movie: tuple[int, int, int] | None) -> Sizes:
    """Lengths of the dimensions of what a step needs, as far as they are known; what is not known is left out."""
    if step.stage.shape == "map":
        return {} if movie is None else {"frame": movie[0], "y": movie[1], "x": movie[2], "slot": SLOTS // 4}
    dims = {d for name in (*step.stage.needs, *step.stage.optional) for d in VARIABLES[name].dims}
    sizes: Sizes = {}
    edge = image_edge(plan, project, step)
    if edge is None and "z" in dims:
        edge = next((e for p in step.inputs.get("map", ()) if (e := _map_edge(plan, project, p)) is not None), None)
    if edge is not None:
        sizes |= {d: edge for d in ("z", "y", "x") if d in dims}
    if dims & {"particle", "slot"} and (count := particle_count(plan, project, step)) is not None:
        sizes |= {d: count for d in ("particle", "slot") if d in dims}
    return sizes


def particle_count(plan: Plan, project: Project | None, step: Step) -> int | None:
    """Particles that a step works on, as the project has them; None where they are not known, or it takes none."""
    if project is None:
        return None
    try:
        ids = step_inputs(plan, project, step).ids
    except (KeyError, CryodaskError):  # a step before it has no result, or what is wrong with it the run says
        return None
    return None if ids is None else len(ids)


def image_edge(plan: Plan, project: Project | None, step: Step) -> int | None:
    """Edge of the images of a step's particles, pixels."""
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


def _map_edge(plan: Plan, project: Project | None, product: Product) -> int | None:
    """Edge of a map, voxels: that of its file, of the particles that it is made of, or of the map before it."""
    giver = plan.graph.step(product.step)
    if giver.inputs.get("particles"):
        return image_edge(plan, project, giver)
    if giver.inputs.get("map"):
        return _map_edge(plan, project, giver.inputs["map"][0])
    for path in (path for paths in plan.input_files(giver).values() for path in paths):
        try:
            return int(open_mrc(path).shape[-1])
        except (CryodaskError, OSError):  # its stage says what is wrong with it
            return None
    return None
