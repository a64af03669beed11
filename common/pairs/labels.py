"""Which image a row prefers: from labels, votes, ranks and scores, or from the images' names. And the images' seeds
and noise.
"""

import json
from numbers import Integral
from typing import Any

from inpo.common.pairs.columns import ORDERS, SIDE_NOISE, RowFields, missing_field
from inpo.common.pairs.pair import RowProblem
from inpo.common.pairs.values import as_number, cut, is_blank, is_null, parse_label


def orders_of(row: RowFields) -> list[tuple[str, str, list[Any]]]:
    """(role, column, values) of every list of ranks or scores."""
    return [(role, name, value) for role in ORDERS for name, value in row.given(role) if isinstance(value, list)]


def num_ranked(row: RowFields) -> int:
    """How many ranks or scores the row has: the length of the first list of them, else 0."""
    return next((len(values) for _, _, values in orders_of(row)), 0)


def first_preferred(row: RowFields, scores: tuple[float, float] | None) -> float:
    """P(first image preferred). The names win and lose say 1.0 where neither label nor votes do; scores decide where
    the names do not."""
    votes = _from_votes(row)
    told = _from_labels(row, needed=votes is None)
    if votes is not None:
        if told is not None and (told > 0.5, told < 0.5) != (votes > 0.5, votes < 0.5):
            raise RowProblem(reason="bad_label", detail=f"the votes, {votes:.3g}, and the label contradict each other")
        return votes
    if told is not None:
        return told
    if not row.is_open:
        return 1.0
    if scores is not None:
        return 0.5 if scores[0] == scores[1] else float(scores[0] > scores[1])
    raise RowProblem(reason="unlabelled", detail=missing_field(row.names("label1"), row.fields))


def _from_labels(row: RowFields, *, needed: bool) -> float | None:
    """What labels say; None if there are none, or only null ones that are not `needed`."""
    two = row.columns("label1") or row.columns("label2")
    label = row.columns("label")
    # A plain "label" does not say of which image, unless the user says that it does.
    if row.is_open and "label" not in row.chosen:
        label = ()
    if not needed and all(is_blank(row.get(role)) for role in ("label", "label1", "label2")):
        return None
    if label:
        found = parse_label(row.get("label"), what=label[0])
        if two and abs(found - _from_two(row)) > 1e-4:
            raise RowProblem(reason="bad_label", detail=f"{label[0]} and {two[0]} contradict each other")
        return found
    return _from_two(row) if two else None


def _from_two(row: RowFields) -> float:
    """P(first image preferred) from the labels of both, which must add up to 1 where both are there."""
    first, second = row.columns("label1"), row.columns("label2")
    if not first:
        return 1.0 - parse_label(row.get("label2"), what=second[0])
    label_1 = parse_label(row.get("label1"), what=first[0])
    if is_blank(row.get("label2")):
        return label_1
    label_2 = parse_label(row.get("label2"), what=second[0])
    if abs(label_1 + label_2 - 1.0) > 1e-4:
        detail = f"{first[0]} {label_1!r} and {second[0]} {label_2!r} do not add up to 1"
        raise RowProblem(reason="bad_label", detail=detail)
    return label_1


def _from_votes(row: RowFields) -> float | None:
    """The first image's share of the votes; None where nobody was asked."""
    name, both = row.name("votes"), row.get("votes")
    if isinstance(both, str):  # as CSV has a list
        try:
            both = json.loads(both) if both.strip() else None
        except (ValueError, RecursionError):
            raise RowProblem(reason="bad_label", detail=f"{name} is {cut(both)}, not two numbers") from None
    if both is None:
        both = [row.get("votes1"), row.get("votes2")]
        name = f"{row.name('votes1')}, {row.name('votes2')}"
        if all(is_blank(each) for each in both):
            return None
    counts = [as_number(each) for each in both] if isinstance(both, list) else []
    if len(counts) != 2 or any(count is None or count < 0 for count in counts):
        raise RowProblem(reason="bad_label", detail=f"{name} is {cut(both)}, not two numbers of votes")
    first, second = (float(count or 0) for count in counts)
    if first + second == 0:
        raise RowProblem(reason="unlabelled", detail=f"{name}: nobody voted")
    return first / (first + second)


def scores_of_sides(row: RowFields) -> tuple[float, float] | None:
    """The scores of both images; None if there are none."""
    found = []
    for role in ("score1", "score2"):
        value = row.get(role)
        if is_null(value):
            return None
        number = as_number(value)
        if number is None:
            raise RowProblem(reason="bad_label", detail=f"{row.name(role)} is {cut(value)}, no number")
        found.append(number)
    return found[0], found[1]


def ranks_of(row: RowFields, pairing: tuple[int, int]) -> tuple[float, float] | None:
    """Scores of two images of a ranking, higher is better: a rank is negated. None where one is not a number."""
    for role, _, values in orders_of(row):
        numbers = [as_number(values[i]) if i < len(values) else None for i in pairing]
        if None not in numbers:
            first, second = (float(number or 0) * (-1 if role == "rank" else 1) for number in numbers)
            return first, second
    return None


def ranked(row: RowFields, pairing: tuple[int, int]) -> float:
    """P(first image preferred), 1.0, 0.5 or 0.0, from every order that the row gives."""
    said: dict[str, float] = {}
    for role, name, values in orders_of(row):
        if len(values) != num_ranked(row):
            raise RowProblem(reason="bad_metadata", detail=f"{name} has {len(values)} values")
        numbers = []
        for i in pairing:
            if is_null(values[i]):
                raise RowProblem(reason="unlabelled", detail=f"{name}[{i}] is null")
            number = as_number(values[i])
            if number is None:
                raise RowProblem(reason="bad_label", detail=f"{name}[{i}] is {cut(values[i])}, no number")
            numbers.append(number)
        first, second = reversed(numbers) if role == "rank" else numbers
        said[name] = 0.5 if first == second else float(first > second)
    if {0.0, 1.0} <= set(said.values()):
        raise RowProblem(reason="bad_label", detail=f"{' and '.join(said)} contradict each other")
    return next((value for value in said.values() if value != 0.5), 0.5)


def seeds_of(row: RowFields, pairing: tuple[int, int] | None) -> tuple[int, int] | None:
    """The seeds of the two images, in the order of the images; None if the row has none."""
    values = _of_images(row, "seeds", pairing)
    for name, value in values or ():
        if isinstance(value, bool) or not isinstance(value, Integral) or not 0 <= int(value) < 2**63:
            raise RowProblem(reason="bad_metadata", detail=f"{name} is {cut(value)}, expected 0..2^63 - 1")
    return None if values is None else (int(values[0][1]), int(values[1][1]))


def noise_of(row: RowFields, pairing: tuple[int, int] | None) -> list[tuple[str, Any]] | None:
    """(name, value) of the fields with the two images' noise, in the order of the images; None if there are none."""
    if pairing is not None:
        return _of_images(row, "noise", pairing)
    ways = [roles for roles in (("noise",), *SIDE_NOISE) if any(row.columns(role) for role in roles)]
    mine = SIDE_NOISE[row.is_open]
    if len(ways) > 1 or (ways and ways[0] not in (("noise",), mine)):
        found = ", ".join(row.name(role) for roles in ways for role in roles if row.columns(role))
        detail = (
            f"the noise is given as {found}, expected {' and '.join(row.names(*mine))}, or a list {row.name('noise')}"
        )
        raise RowProblem(reason="bad_metadata", detail=detail)
    if ways == [mine]:
        given = [(row.name(role), row.get(role)) for role in mine]
        return None if all(is_null(value) for _, value in given) else given
    return _of_images(row, "noise", None)


def _of_images(row: RowFields, role: str, pairing: tuple[int, int] | None) -> list[tuple[str, Any]] | None:
    """(name, value) for the two images out of a list with a value for each; None if there is no list."""
    given, name = row.get(role), row.name(role)
    if is_null(given):
        return None
    wanted = num_ranked(row) if pairing is not None else 2
    if not isinstance(given, list) or len(given) != wanted:
        raise RowProblem(reason="bad_metadata", detail=f"{name} is {cut(given)}, expected a list of {wanted}")
    return [(f"{name}[{place}]", given[place]) for place in pairing or (0, 1)]
