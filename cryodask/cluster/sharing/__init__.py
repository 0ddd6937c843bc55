"""How lanes share the workers of one scheduler: owners, weights, charges, reserved threads, memory. ``fairshare.py`` puts them together."""
