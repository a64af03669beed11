"""What a row's fields mean, the same in every container: parquet columns, tar members and their JSON, lists.

    fields {name: value}  --rows_of-->  how many rows it stands for  --items-->  Pair | Skipped, one for each of them

A reader hands over the values as its container stores them; here a boolean may be a bool, a number or a word, and an id
an integer, a float or text. A row has two images, or a list of images with their ranks or scores: then every two of
them are compared, and each comparison is a row of its own.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from decimal import Decimal
from difflib import get_close_matches
from itertools import combinations
from numbers import Integral, Real
from typing import Any

from inpo.common.pairs.pair import Pair, RowProblem, Skipped, check_id, check_image_bytes, check_text, preference
from inpo.common.printable import escaped, is_printable

Fields = Mapping[str, Any]
ReadImage = Callable[[Any, str], bytes | None]
"""The bytes of an image field's value, None if there are none; the second argument names it in a RowProblem."""

WIN, LOSE = ("win", "chosen"), ("lose", "rejected")
FIRST, SECOND = ("jpg_0",), ("jpg_1",)
LAYOUTS = ((WIN, LOSE), (FIRST, SECOND))
PROMPT = ("prompt", "caption")
ID = ("id", "pair_id", "ranking_id")
UIDS = ("image_0_uid", "image_1_uid")
LABELS = ("label", "label_0", "label_1", "has_label")
IMAGES = ("images", "image_path", "image_paths")
LOW_IS_BETTER = ("rank", "ranks")
HIGH_IS_BETTER = ("score", "scores", "human_preference")
ORDER = (*LOW_IS_BETTER, *HIGH_IS_BETTER)

IMAGE_FIELDS = (*WIN, *LOSE, *FIRST, *SECOND, *IMAGES)
SEEDS = "seeds"
KNOWN = (*IMAGE_FIELDS, *PROMPT, *ID, *UIDS, *LABELS, *ORDER, SEEDS)
"""Every field that is read. Names of one tuple mean the same."""

MAX_RANKED = 100
"""Most images of one ranking: 4,950 pairs."""

_MISSING = object()
_WORDS = {"true": 1.0, "false": 0.0, "yes": 1.0, "no": 0.0}
_EXACT_FLOATS = 2**53


def rows_of(fields: Fields) -> int:
    """How many rows these fields stand for: the comparisons of a ranking, else 1."""
    return comparisons_of(num_ranked(fields)) if is_ranking(fields) else 1


def comparisons_of(count: int) -> int:
    """Every two of so many images; 1, a row that gives no pair, where nothing or too much is to be compared."""
    return math.comb(count, 2) if 2 <= count <= MAX_RANKED else 1


def num_ranked(fields: Fields) -> int:
    """How many ranks or scores the row has: the length of the first field of ORDER that is a list, else 0."""
    return next((len(fields[name]) for name in ORDER if isinstance(fields.get(name), list)), 0)


def without_part(names: Iterable[str], *, is_ranking: bool) -> list[str]:
    """Those of a row's fields that no pair is made of: the unknown ones, and those that say nothing beside the others,
    as ranks do where there is no list of images.
    """
    names = list(names)
    void = {"label", "label_0", "label_1"} if is_ranking else {*IMAGES, *ORDER}
    if {*FIRST, *SECOND} & set(names):
        void.add("label")
    return [name for name in names if name not in KNOWN or name in void]


def prompts_of(fields: Fields) -> list[str]:
    """The prompt of a row, whatever else the row says; [] if it has none that could be a pair's."""
    try:
        return [_prompt(fields)]
    except RowProblem:
        return []


def items(
    fields: Fields, *, row: int, skip: int = 0, name: str, default_id: str | None, read: ReadImage
) -> Iterator[Pair | Skipped]:
    """One item for each row that `fields` stands for, without the first `skip`; the very first has number `row`.

    Where the fields have no id, a pair is named `default_id`, or after what the row says if that is None; a row too
    broken for that is `name`/row.
    """
    if not is_ranking(fields):
        yield _item(fields, None, row=row, name=name, default_id=default_id, read=read)
        return
    once = _remember(read)
    # What cannot be compared is one row, which says why.
    count = num_ranked(fields) if 2 <= num_ranked(fields) <= MAX_RANKED else 2
    for number, pairing in enumerate(combinations(range(count), 2)):
        if number >= skip:
            yield _item(fields, pairing, row=row + number, name=name, default_id=default_id, read=once)


def missing_field(wanted: Iterable[str], found: Iterable[str]) -> str:
    """Words for a field that is not there: what was looked for, what was found, and which of it may be meant."""
    wanted, found = list(wanted), [brief(name) for name in found]
    lower = {name.strip().lower(): name for name in found}
    close = [match for name in wanted for match in get_close_matches(name, lower, n=1, cutoff=0.7)]
    words = f"no field {' or '.join(wanted)}; found: {', '.join(found[:12]) or 'none'}"
    if len(found) > 12:
        words += f" and {len(found) - 12} more"
    return words + (f"; is {lower[close[0]]!r} meant?" if close else "")


def brief(name: str) -> str:
    """A name out of a user's file as one short piece of a line."""
    return escaped(name[:60], line=True)


def parse_label(value: object, *, what: str = "label") -> float:
    """`value` as a probability in [0, 1], else RowProblem: unlabelled for null and "", bad_label otherwise."""
    if _is_blank(value):
        raise RowProblem(reason="unlabelled", detail=f"{what} is null")
    number = as_number(value)
    if number is None or not 0.0 <= number <= 1.0:
        raise RowProblem(reason="bad_label", detail=f"{what} is {_cut(value)}, expected 0..1")
    return number


def parse_flag(value: object, *, what: str) -> bool | None:
    """`value` as a boolean: a bool, 0 or 1, or a word for one of them; None for null. RowProblem bad_metadata."""
    if _is_null(value):
        return None
    number = as_number(value)
    if number not in (0.0, 1.0):
        raise RowProblem(reason="bad_metadata", detail=f"{what} is {_cut(value)}, expected true or false")
    return number == 1.0


def parse_id(value: object, *, what: str) -> str | None:
    """`value` as text, None for null. A number is the same id whether its column was stored as integers, as floats
    (as a column with nulls often is) or as text. Raises RowProblem bad_metadata.
    """
    if value == "" or (_is_null(value) and not isinstance(value, str)):
        return None
    if isinstance(value, str):
        whole = re.fullmatch(r"(-?\d+)\.0+", value)
        return check_id(whole[1] if whole else value, what=what)
    if isinstance(value, Integral) and not isinstance(value, bool):
        return str(int(value))
    if isinstance(value, Real | Decimal) and not isinstance(value, bool):
        number = float(value)
        if abs(number) > _EXACT_FLOATS:
            problem = f"{what} is {number!r}: floats of this size are no exact integers, so ids may have become one"
            raise RowProblem(reason="bad_metadata", detail=problem)
        return str(int(number)) if number.is_integer() else repr(number)
    raise RowProblem(reason="bad_metadata", detail=f"{what} is {type(value).__name__}, not text or a number")


def _item(
    fields: Fields, pairing: tuple[int, int] | None, *, row: int, name: str, default_id: str | None, read: ReadImage
) -> Pair | Skipped:
    suffix = "" if pairing is None else f".{pairing[0]}-{pairing[1]}"
    pair_id = f"{name}/{row}" if default_id is None or not is_printable(default_id) else default_id + suffix
    try:
        given = _given_id(fields)
        if given is not None:
            pair_id = check_id(given + suffix)
        elif default_id is not None:
            pair_id = check_id(default_id + suffix, what="the name of the sample, which is its id,")
        sides = _sides(fields, pairing)
        if given is None and default_id is None:
            pair_id = _content_id(sides, _one_of(fields, PROMPT))
        prompt = _prompt(fields)
        if parse_flag(fields.get("has_label"), what="has_label") is False:
            raise RowProblem(reason="unlabelled", detail="has_label is false")
        label = _first_preferred(fields) if pairing is None else _ranked(fields, pairing)
        swap, label = preference(label)
        seeds = _seeds(fields, pairing)
        images = [check_image_bytes(None if value is None else read(value, what), what=what) for what, value in sides]
    except RowProblem as problem:
        return Skipped(pair_id=pair_id, reason=problem.reason, detail=problem.detail, row=row)
    win, lose = reversed(images) if swap else images
    if seeds is not None and swap:
        seeds = (seeds[1], seeds[0])
    return Pair(pair_id=pair_id, prompt=prompt, win=win, lose=lose, label=label, row=row, seeds=seeds)


def _seeds(fields: Fields, pairing: tuple[int, int] | None) -> tuple[int, int] | None:
    """The seeds of the two images, in the order of the images; None if the row has none."""
    given = fields.get(SEEDS)
    if _is_null(given):
        return None
    wanted = num_ranked(fields) if pairing is not None else 2
    if not isinstance(given, list) or len(given) != wanted:
        raise RowProblem(reason="bad_metadata", detail=f"{SEEDS} is {_cut(given)}, expected a list of {wanted}")
    first, second = (given[place] for place in pairing or (0, 1))
    for value in (first, second):
        if isinstance(value, bool) or not isinstance(value, Integral) or not 0 <= int(value) < 2**63:
            raise RowProblem(reason="bad_metadata", detail=f"{SEEDS} has {_cut(value)}, expected 0..2^63 - 1")
    return int(first), int(second)


def _prompt(fields: Fields) -> str:
    prompt = _one_of(fields, PROMPT)
    if prompt is _MISSING:
        raise RowProblem(reason="missing_prompt", detail=missing_field(PROMPT, fields))
    return check_text(prompt, what="prompt", missing="missing_prompt")


def _given_id(fields: Fields) -> str | None:
    for name in ID:
        given = parse_id(fields.get(name), what=name)
        if given is not None:
            return given
    # One pair of images may be ranked by several people, so their ids come second.
    uids = [parse_id(fields.get(name), what=name) for name in UIDS]
    return None if None in uids else ".".join(map(str, uids))


def _content_id(sides: list[tuple[str, Any]], prompt: object) -> str:
    """A digest of what the row says: inserting or sorting rows changes no id."""
    content = json.dumps([value for _, value in sides] + [None if prompt is _MISSING else prompt], ensure_ascii=True)
    return hashlib.blake2b(content.encode("ascii"), digest_size=8).hexdigest()


def is_ranking(fields: Fields) -> bool:
    """Whether there is a list of images, or a field for one and ranks, whose images are missing then."""
    return any(isinstance(fields.get(name), list) for name in IMAGES) or (
        num_ranked(fields) > 0 and any(fields.get(name, "") is None for name in IMAGES)
    )


def _sides(fields: Fields, pairing: tuple[int, int] | None) -> list[tuple[str, Any]]:
    """(name, value) of the two image fields, the first one first."""
    found = [name for name in IMAGE_FIELDS if fields.get(name) is not None]
    if pairing is None and not found:
        found = [name for name in IMAGE_FIELDS if name in fields]
    layouts = [layout for layout in LAYOUTS if any(name in found for name in sum(layout, ()))]
    if len(layouts) + (pairing is not None) > 1:
        words = "images of two layouts" if pairing is None else "a ranking and a pair in one row"
        raise RowProblem(reason="bad_metadata", detail=f"{words}: {', '.join(found)}")
    if pairing is not None:
        name = next((name for name in IMAGES if isinstance(fields.get(name), list)), None)
        images, count = fields[name] if name else [], num_ranked(fields)
        if name is None or len(images) != count or not 2 <= count <= MAX_RANKED:
            words = f"{name or ' or '.join(IMAGES)} has {len(images)} images, {' or '.join(ORDER)} has {count} values"
            words += f"; 2..{MAX_RANKED}"
            raise RowProblem(reason="bad_metadata", detail=f"{words} of both are needed")
        return [(f"{name}[{i}]", images[i]) for i in pairing]
    if not layouts:
        if found:
            detail = f"{found[0]} is {type(fields[found[0]]).__name__}, not a list of images with their ranks or scores"
        else:
            detail = missing_field((*WIN, *LOSE), fields)
        raise RowProblem(reason="bad_metadata", detail=detail)
    sides = []
    for names in layouts[0]:
        value = _one_of(fields, names)
        if value is _MISSING:
            raise RowProblem(reason="bad_metadata", detail=missing_field(names, fields))
        sides.append((next(name for name in names if name in fields), value))
    return sides


def _one_of(fields: Fields, names: tuple[str, ...]) -> Any:
    """The value of the one field that goes by several names; _MISSING if there is none. Two that differ are a
    RowProblem: whichever were taken, the other would be lost without a word.
    """
    given = {name: fields[name] for name in names if name in fields}
    values = [value for value in given.values() if value is not None]
    if len({value.strip() if isinstance(value, str) else repr(value) for value in values}) > 1:
        raise RowProblem(reason="bad_metadata", detail=f"{' and '.join(given)} are both there and differ: keep one")
    return values[0] if values else None if given else _MISSING


def _first_preferred(fields: Fields) -> float:
    """P(first image preferred). The names win and lose say 1.0 where no label does."""
    two = [name for name in ("label_0", "label_1") if name in fields]
    if "label" in fields and not any(name in fields for name in (*FIRST, *SECOND)):
        label = parse_label(fields["label"])
        if two and abs(label - _from_two(fields)) > 1e-4:
            raise RowProblem(reason="bad_label", detail=f"label and {' and '.join(two)} contradict each other")
        return label
    if two:
        return _from_two(fields)
    if any(name in fields for name in (*WIN, *LOSE)):
        return 1.0
    raise RowProblem(reason="unlabelled", detail=missing_field(("label_0",), fields))


def _from_two(fields: Fields) -> float:
    """P(first image preferred) from label_0 and label_1, which must add up to 1 where both are there."""
    if "label_0" not in fields:
        return 1.0 - parse_label(fields["label_1"], what="label_1")
    label_0 = parse_label(fields["label_0"], what="label_0")
    if _is_blank(fields.get("label_1")):
        return label_0
    label_1 = parse_label(fields["label_1"], what="label_1")
    if abs(label_0 + label_1 - 1.0) > 1e-4:
        raise RowProblem(reason="bad_label", detail=f"label_0 {label_0!r} and label_1 {label_1!r} do not add up to 1")
    return label_0


def _ranked(fields: Fields, pairing: tuple[int, int]) -> float:
    """P(first image preferred), 1.0, 0.5 or 0.0, from every order that the row gives."""
    said: dict[str, float] = {}
    for name in ORDER:
        values = fields.get(name)
        if not isinstance(values, list):
            continue
        if len(values) != num_ranked(fields):
            raise RowProblem(reason="bad_metadata", detail=f"{name} has {len(values)} values")
        numbers = []
        for i in pairing:
            if _is_null(values[i]):
                raise RowProblem(reason="unlabelled", detail=f"{name}[{i}] is null")
            number = as_number(values[i])
            if number is None:
                raise RowProblem(reason="bad_label", detail=f"{name}[{i}] is {_cut(values[i])}, no number")
            numbers.append(number)
        first, second = numbers if name in HIGH_IS_BETTER else reversed(numbers)
        said[name] = 0.5 if first == second else float(first > second)
    if {0.0, 1.0} <= set(said.values()):
        raise RowProblem(reason="bad_label", detail=f"{' and '.join(said)} contradict each other")
    return next((value for value in said.values() if value != 0.5), 0.5)


def _remember(read: ReadImage) -> ReadImage:
    """Read each image of a ranking once, though it is in several pairs."""
    known: dict[str, bytes | None] = {}

    def once(value: Any, what: str) -> bytes | None:
        if what not in known:
            known[what] = read(value, what)
        return known[what]

    return once


def _is_blank(value: object) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _is_null(value: object) -> bool:
    return _is_blank(value) or (isinstance(value, float) and math.isnan(value))


def as_number(value: object) -> float | None:
    """A bool, number or text as a finite float; None for anything else."""
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
    return number if math.isfinite(number) else None


def _cut(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
