"""File formats of movies, images, maps and tables. Readers return arrays in MRC row order, and raise before work begins."""
