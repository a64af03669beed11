"""What every test gets."""

import gc
import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def fresh_accelerate_state() -> Iterator[None]:
    """accelerate keeps one state per process; a run in one test must not decide the precision of the next."""
    yield
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


def pytest_collection_finish() -> None:
    """What is imported by now stays. A run collects garbage twice, and half of a small run's time would go to looking
    through the libraries' objects."""
    import hypothesis  # noqa: F401  (whose plugins look at what is not frozen)

    gc.collect()
    gc.freeze()
