"""Tiny pipelines, made once; tests that change one copy it."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from inpo.common.testing import save_tiny_pipeline


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = save_tiny_pipeline(tmp_path_factory.mktemp("model") / kind, kind)
        return made[kind]

    return get


@pytest.fixture
def model_copy(tiny, tmp_path) -> Path:
    """A pipeline folder of its own, to be changed."""
    return shutil.copytree(tiny("sd15"), tmp_path / "model")
