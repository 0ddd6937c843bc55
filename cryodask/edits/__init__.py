"""Edits that people make by eye: picks, chosen classes, excluded exposures, masks, regions of components, ratings, tags and notes.

::

    <project>/edits/<kind>/*.jsonl              operations, one file per process that takes them (see store/journal.py)
    <project>/edits/<kind>/frozen/<hash>.json   a state that somebody said to use

An edit is an operation with an id of its own. The state is what all operations give together, in whatever order they arrive and
however often: two people, two servers, and a browser that was off-line for a day agree as soon as they know the same operations.
Where two operations contradict each other, the one with the higher (counter, id) counts, never the later clock. A run never reads
operations, only a frozen state, so a step does not change under a person who is still working.
"""
