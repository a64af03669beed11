"""Ratios from one interleaved run: ours against the alternative, medians and spread. `make bench` runs them all."""
