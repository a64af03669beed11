"""Looks at preference pairs without a model: checks a source, packs it into tars."""
