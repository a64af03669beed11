"""Preference alignment of text-to-image diffusion models in two stages with a cache between them (README.md).

The subpackages are the folders of the repository: `inpo.common` is common/, `inpo.train` is train/, and so on.
"""
