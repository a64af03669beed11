"""Tiny pipelines, made once; tests that change one copy it."""

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from inpo.common.testing import save_tiny_pipeline
from inpo.train.export import export_single_file


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = save_tiny_pipeline(tmp_path_factory.mktemp("model") / kind, kind)
        return made[kind]

    return get


@pytest.fixture
def exported(tiny, exports, tmp_path) -> Callable[[str], tuple[Path, Path]]:
    """exported(kind): (a pipeline folder, its single file: a copy to be changed)."""
    return lambda kind: (tiny(kind), Path(shutil.copy(exports(kind), tmp_path)))


@pytest.fixture(scope="session")
def exports(tiny, tmp_path_factory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("exports")
    return cache(lambda kind: export_single_file(tiny(kind), folder / f"{kind}.safetensors", dtype="float32"))


@pytest.fixture
def model_copy(tiny, tmp_path) -> Path:
    """A pipeline folder of its own, to be changed."""
    return shutil.copytree(tiny("sd15"), tmp_path / "model")
