"""Find, read and write image files."""
