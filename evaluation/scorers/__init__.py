"""Scorers of the field, each by its own project's loading code and with its own project's weights."""
