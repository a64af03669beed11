"""Stands above the stages: models make their own preference data, train on it, and again."""
