"""Sizes in words."""

import pytest

from inpo.common.space import human_bytes


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (12_345, "12.3 kB"),
        (999_499, "999 kB"),
        (999_500, "1 MB"),
        (5_000_000_000_000_000, "5 PB"),
    ],
)
def test_decimal_units_and_three_digits(size: int, words: str) -> None:
    assert human_bytes(size) == words
