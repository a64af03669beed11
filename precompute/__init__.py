"""Stage 1: invert both images of every preference pair with the frozen reference model and write the cache."""
