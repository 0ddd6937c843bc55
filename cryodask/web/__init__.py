"""The pages of a facility: a server that follows projects and shows them in a browser.

``follow`` reads projects from their journals, ``sessions`` are those that a server shows, ``people`` and ``login`` decide who may do
what, ``app`` puts the ``routes`` together, ``serving`` listens. No page needs anything from another host, and nothing here imports xarray,
Dask, torch or matplotlib: a server that shows twenty projects stays small.
"""
