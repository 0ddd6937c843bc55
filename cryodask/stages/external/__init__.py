"""Stages that run external programs, one module each; ``external.NAME`` in a pipeline."""
