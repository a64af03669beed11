"""Training: streams a cache and computes the preference loss. One UNet in memory, forward and backward."""
