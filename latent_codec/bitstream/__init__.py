"""Write and read the .lc file, and choose its rate."""
