"""Short names of folders, by hand."""

from pathlib import Path

import pytest

from inpo.common.paths import short_names


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["/runs/a"], ["a"]),
        (["/runs/a", "/runs/b/../b"], ["a", "b"]),
        (["/one/run", "/two/run", "/two/other"], ["one/run", "two/run", "two/other"]),
        (["/none-such", "/a/none-such"], ["/none-such", "a/none-such"]),
        (["/runs/a", "/runs/../runs/a", "/runs/b"], ["a", "a", "b"]),
        (["/"], ["/"]),
    ],
)
def test_a_name_is_as_long_as_it_takes(folders, names):
    assert short_names([Path(folder) for folder in folders]) == names
