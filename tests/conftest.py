"""What every test gets."""

import gc
import os
import sys
from collections.abc import Iterator

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def fresh_accelerate_state() -> Iterator[None]:
    """accelerate keeps one state per process; a run in one test must not decide the precision of the next."""
    yield
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def frozen_libraries() -> None:
    """What is imported stays. A run collects garbage twice, and half of a small run's time would go to looking through
    the libraries' objects."""
    if len(sys.modules) > _frozen[0] + 100:  # diffusers and transformers import much at its first use
        import hypothesis  # noqa: F401  (whose plugins look at what is not frozen)

        gc.collect()
        gc.freeze()
        _frozen[0] = len(sys.modules)


_frozen = [0]
"""How many modules were imported when their objects were frozen last."""
