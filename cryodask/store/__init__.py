"""What is kept: Zarr shards, journals of commits, and the project folder that holds them.

files and lines touch the disk, shards and journal make a commit, table gathers commits as columns, generation and registry are what a
project consists of, check finds and takes back what is damaged, datasets and particles show it all.
"""
