"""Training: streams a cache and computes the preference loss. One network in memory, forward and backward."""
