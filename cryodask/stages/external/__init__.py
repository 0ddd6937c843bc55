"""Stages that run programs of others, one file each; ``external.NAME`` in a pipeline."""
