"""What is kept: Zarr shards, journals of commits, and the project folder that holds them."""
