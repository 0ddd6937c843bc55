"""Storage: Zarr shards, journals of commits, and the project folder that contains them.

``files`` and ``lines`` access the disk, ``shards`` and ``journal`` make a commit, ``table`` collects commits as columns, a project
consists of ``generation`` and ``registry``, ``check`` finds and invalidates damaged results, ``datasets`` and ``particles`` present
everything.
"""
