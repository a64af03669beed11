"""Single values of a row, of whatever type a container has stored them in: labels, flags, ids, numbers."""

import math
import re
from decimal import Decimal
from numbers import Integral, Real

from inpo.common.pairs.pair import RowProblem, check_id

_WORDS = {"true": 1.0, "false": 0.0, "yes": 1.0, "no": 0.0}
_EXACT_FLOATS = 2**53
_FLOAT32_END = 2.0**128 - 2.0**103
"""The least number that float32 rounds to infinity."""


def parse_label(value: object, *, what: str = "label") -> float:
    """`value` as a probability in [0, 1], else RowProblem: unlabelled for null and "", bad_label otherwise."""
    if is_blank(value):
        raise RowProblem(reason="unlabelled", detail=f"{what} is null")
    number = as_number(value)
    if number is None or not 0.0 <= number <= 1.0:
        raise RowProblem(reason="bad_label", detail=f"{what} is {cut(value)}, expected 0..1")
    return number


def parse_flag(value: object, *, what: str) -> bool | None:
    """`value` as a boolean: a bool, 0 or 1, or a word for one of them; None for null. RowProblem bad_metadata."""
    if is_null(value):
        return None
    number = as_number(value)
    if number not in (0.0, 1.0):
        raise RowProblem(reason="bad_metadata", detail=f"{what} is {cut(value)}, expected true or false")
    return number == 1.0


def parse_id(value: object, *, what: str) -> str | None:
    """`value` as text, None for null. A number is the same id whether its column was stored as integers, as floats
    (as a column with nulls often is) or as text. Raises RowProblem bad_metadata.
    """
    if value == "" or (is_null(value) and not isinstance(value, str)):
        return None
    if isinstance(value, str):
        whole = re.fullmatch(r"(-?\d+)\.0+", value)
        return check_id(whole[1] if whole else value, what=what)
    if isinstance(value, Integral) and not isinstance(value, bool):
        return str(int(value))
    if isinstance(value, Real | Decimal) and not isinstance(value, bool):
        number = float(value)
        if abs(number) > _EXACT_FLOATS:
            problem = f"{what} is {number!r}: floats of this size are not exact integers, so ids may have become one"
            raise RowProblem(reason="bad_metadata", detail=problem)
        return str(int(number)) if number.is_integer() else repr(number)
    raise RowProblem(reason="bad_metadata", detail=f"{what} is {type(value).__name__}, not text or a number")


def is_blank(value: object) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def is_null(value: object) -> bool:
    return is_blank(value) or (isinstance(value, float) and math.isnan(value))


def as_number(value: object) -> float | None:
    """A bool, number or text as a float that is finite as a cache keeps it, in float32; None for anything else."""
    try:
        if isinstance(value, str):
            text = value.strip().lower()
            number = _WORDS[text] if text in _WORDS else float(text)
        elif isinstance(value, Real | Decimal):
            number = float(value)
        else:
            return None
    except (ValueError, OverflowError):
        return None
    return number if abs(number) < _FLOAT32_END else None


def cut(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
