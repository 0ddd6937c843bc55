"""Lane scheduling: owners, weights, charging, reserved threads, memory. ``fairshare.py`` combines them."""
