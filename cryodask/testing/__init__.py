"""Tools for tests, shipped so that other projects and sites can use them."""
