"""Movies with known ground truth: molecules in moving ice, recorded by an imperfect counting detector."""

from cryodask.simulate.particles import simulate_particles
from cryodask.simulate.scene import Micrograph, Optics, simulate_micrograph
from cryodask.simulate.session import (
    DEMO,
    SessionParams,
    Truth,
    load_truth,
    prepare_session,
    simulate_movie,
    simulate_one,
    simulate_session,
)

__all__ = [
    "DEMO",
    "Micrograph",
    "Optics",
    "SessionParams",
    "Truth",
    "load_truth",
    "prepare_session",
    "simulate_micrograph",
    "simulate_movie",
    "simulate_one",
    "simulate_particles",
    "simulate_session",
]
