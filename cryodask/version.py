"""The version, in a module that every layer may import."""

from __future__ import annotations

VERSION = "0.1.0"
