"""What every test gets."""

import gc
import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import hypothesis
import jaxtyping
import pytest
from jaxtyping import install_import_hook

from tests.launching import Zygote

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).parents[1]


# A busy machine takes as long as it takes.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")

_jaxtyped = jaxtyping.jaxtyped


def check_annotated_modules() -> None:
    """Check shapes and types at run time where shapes are annotated.

    All other types mypy has checked, and checking them at every call again took two fifths of the time.
    Now, not in pytest_configure: where one folder is run, its conftest.py has imported some of them by then.
    """
    package = ROOT / "inpo"
    modules = [
        ".".join(["inpo", *file.relative_to(folder.parent).with_suffix("").parts]).removesuffix(".__init__")
        for folder in map(Path.resolve, package.iterdir())  # links to the folders at the top
        for file in folder.rglob("*.py")
        if "jaxtyping" in file.read_text(encoding="utf-8")
    ]
    jaxtyping.jaxtyped = _where_shapes_are  # type: ignore[assignment]
    install_import_hook(modules, "beartype.beartype")


def _where_shapes_are(fn: Any = None, *, typechecker: Any) -> Any:
    """The hook's decorator, for functions and dataclasses that annotate a shape: the others of a module are mypy's."""
    if fn is None:
        return partial(_where_shapes_are, typechecker=typechecker)
    told = [inspect.get_annotations(each) for each in (fn.__mro__ if isinstance(fn, type) else [fn])]
    return _jaxtyped(fn, typechecker=typechecker) if "jaxtyping." in repr(told) else fn


check_annotated_modules()


@pytest.fixture(autouse=True, scope="session")
def no_waiting_for_the_disk() -> Iterator[None]:
    """No test can cut the power, and a cache waits for the disk at every file. Programs that tests start by a command
    line wait as ever."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(autouse=True)
def fresh_accelerate_state() -> Iterator[None]:
    """accelerate keeps one state per process; a run in one test must not decide the precision of the next."""
    yield
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def frozen_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is imported stays. A run collects garbage twice, and half of a small run's time would go to looking through
    the libraries' objects. Whether any are frozen a run asks too, and counting walks through them all."""
    if len(sys.modules) > _frozen[0] + 100:  # diffusers and transformers import much at its first use
        import hypothesis  # noqa: F401  (whose plugins look at what is not frozen)

        gc.collect()
        gc.freeze()
        _frozen[0] = len(sys.modules)
    monkeypatch.setattr(gc, "get_freeze_count", lambda: _frozen[0])


_frozen = [0]
"""How many modules were imported when their objects were frozen last."""


@pytest.fixture(scope="session")
def child_environment() -> dict[str, str]:
    """For processes of the tests: this repository, one thread each, no network."""
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TOKENIZERS_PARALLELISM": "false",
    }


@pytest.fixture(scope="session")
def zygote(tmp_path_factory: pytest.TempPathFactory, child_environment: dict[str, str]) -> Iterator[Zygote]:
    """What starts processes of `inpo` fast."""
    folder = tmp_path_factory.mktemp("zygote")
    with (folder / "stderr.log").open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("zygote.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=child_environment,
            cwd=ROOT,
        )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n", (folder / "stderr.log").read_text()
    yield Zygote(process=process, folder=folder)
    assert process.stdin is not None
    process.stdin.close()
    process.wait()
    process.stdout.close()
