"""Ratios from one interleaved run: ours against the alternative, medians and spread. `make bench` runs them all."""

import os

# transformers warns about image processors that nothing here uses, unless told otherwise before it is imported.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
