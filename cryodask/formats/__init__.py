"""Other people's files: movies, images, maps and tables. Readers return arrays in the MRC row frame, and raise before work begins."""
