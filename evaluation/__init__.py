"""Evaluation: generates images, scores them, compares models, and relabels a cache's pairs."""
