"""The version, alone: what every layer may ask for."""

from __future__ import annotations

VERSION = "0.1.0"
