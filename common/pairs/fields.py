"""What a row says, the same in every container: parquet columns, tar members and their JSON, lists.

    RowFields --rows_of--> how many rows it stands for    RowFields --items--> Pair | Skipped, one for each of them

A reader hands over the values as its container stores them; here a boolean may be a bool, a number or a word, and an id
an integer, a float or text. A row has two images, or a list of images with their ranks or scores: then they are
compared two by two, and each comparison is a row of its own. Rows of one image each become such a list first.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import combinations, pairwise
from typing import Any

from inpo.common.choices import PairsFrom
from inpo.common.pairs.columns import (
    IMAGE_ROLES,
    LABEL_ROLES,
    MISSING,
    NOISE_ROLES,
    ORDERS,
    SIDES,
    RowFields,
    missing_field,
)
from inpo.common.pairs.labels import (
    first_preferred,
    noise_of,
    num_ranked,
    orders_of,
    ranked,
    ranks_of,
    scores_of_sides,
    seeds_of,
)
from inpo.common.pairs.pair import Pair, RowProblem, Skipped, check_id, check_image_bytes, check_text, id_or, preference
from inpo.common.pairs.values import as_number, is_null, parse_flag, parse_id

ReadImage = Callable[[Any, str], bytes | None]
"""The bytes of an image field's value, None if there are none; the second argument names it in a RowProblem."""

MAX_RANKED = 100
"""Most images of one ranking: 4,950 pairs."""


def rows_of(row: RowFields, pairs_from: PairsFrom) -> int:
    """How many rows this one stands for: the comparisons of a ranking, else 1."""
    return comparisons_of(num_ranked(row), pairs_from) if is_ranking(row) else 1


def comparisons_of(count: int, pairs_from: PairsFrom) -> int:
    """Comparisons of so many images; 1, a row that gives no pair, where nothing or too much is to be compared."""
    if not 2 <= count <= MAX_RANKED:
        return 1
    return {"all": math.comb(count, 2), "adjacent": count - 1, "best-worst": 1}[pairs_from]


def without_part(row: RowFields, *, ranking: bool) -> list[str]:
    """Those of a row's fields that no pair is made of: the unknown ones, and those that say nothing beside the others,
    as ranks do where there is no list of images.
    """
    of_pairs = {*LABEL_ROLES, "score1", "score2", "scores_of", *NOISE_ROLES[1:]}
    void = of_pairs if ranking else {"images", *ORDERS}
    if holds_singles(row):
        void = {*of_pairs, "id", "uid1", "uid2"}
    elif row.is_open and "label" not in row.chosen:
        void.add("label")
    used = {name for role, names in row.layout.items() if role not in void for name in names}
    return [name for name in row.fields if name not in used]


def prompts_of(row: RowFields) -> list[str]:
    """The prompt of a row, whatever else the row says; [] if it has none that could be a pair's."""
    try:
        return [_prompt(row)]
    except RowProblem:
        return []


def items(
    row: RowFields,
    *,
    number: int,
    skip: int = 0,
    name: str,
    default_id: str | None,
    read: ReadImage,
    with_noise: bool = False,
    pairs_from: PairsFrom = "all",
    problem: RowProblem | None = None,
) -> Iterator[Pair | Skipped]:
    """One item for each row that `row` stands for, without the first `skip`; the very first has number `number`.

    Where the fields have no id, a pair is named `default_id`, or after what the row says if that is None; a row too
    broken for that is `name`/number. With a `problem` none of them is a pair.
    """
    told: dict[str, Any] = {"name": name, "default_id": default_id, "with_noise": with_noise, "problem": problem}
    if not is_ranking(row):
        yield _item(row, None, number=number, read=read, **told)
        return
    once = _remember(read)
    for place, pairing in enumerate(_pairings(row, pairs_from)):
        if place >= skip:
            yield _item(row, pairing, number=number + place, read=once, scores_of=f"{name}/{number}", **told)


def _pairings(row: RowFields, pairs_from: PairsFrom) -> Iterable[tuple[int, int]]:
    """Places of the images that are compared with each other, the lower place first."""
    count = num_ranked(row)
    if not 2 <= count <= MAX_RANKED:
        return [(0, 1)]  # what cannot be compared is one row, which says why
    if pairs_from == "all":
        return combinations(range(count), 2)
    role, _, values = orders_of(row)[0]
    numbers = [as_number(value) for value in values]
    sign = 1 if role == "rank" else -1
    placed = sorted((sign * number, place) for place, number in enumerate(numbers) if number is not None)
    order = [place for _, place in placed] + [place for place, number in enumerate(numbers) if number is None]
    if pairs_from == "best-worst":
        last = order[max(1, len(placed) - 1)]
        return [(min(order[0], last), max(order[0], last))]
    return [(min(pair), max(pair)) for pair in pairwise(order)]


def holds_singles(row: RowFields) -> bool:
    """Whether the row is one image of a list that goes over several rows."""
    images = row.columns("images")
    if not images:
        return False
    others = [role for role in IMAGE_ROLES if role != "images" and row.columns(role)]
    orders = [name for role in ORDERS for name in row.columns(role)]
    has_list = any(isinstance(row.fields[name], list) for name in (*images, *orders))
    return bool(orders and not others and not has_list)


def is_of_list(row: RowFields) -> bool:
    """Whether the row's images are a ranking or a part of one, or it says of which list its pair is."""
    return is_ranking(row) or holds_singles(row) or not is_null(row.get("list"))


def list_key(row: RowFields) -> tuple[str, str] | None:
    """What the rows of one list have in common, beside following one another: its id, or its prompt. None: the list
    has no other row.
    """
    role = "list" if row.columns("list") else "prompt"
    return None if role == "list" and is_null(row.get(role)) else (role, repr(row.get(role)))


def merge(rows: Sequence[RowFields]) -> tuple[RowFields, RowProblem | None]:
    """A list's rows of one image each as one ranking, and why no pair can be made of it."""
    first = rows[0]
    layout = {role: first.layout[role] for role in ("prompt", "list", "has_label") if role in first.layout}
    fields = {name: first.fields.get(name) for names in layout.values() for name in names}
    for role in ("images", *ORDERS, "seeds", "noise"):
        if role in first.layout:
            layout[role] = first.layout[role]
            fields |= {name: [row.fields.get(name) for row in rows] for name in layout[role] if name in first.fields}
    problem = None
    if len({repr(row.get("prompt")) for row in rows}) > 1:
        problem = RowProblem(reason="bad_metadata", detail=f"rows of one {first.name('list')} have several prompts")
    return RowFields(fields=fields, layout=layout), problem


def _item(
    row: RowFields,
    pairing: tuple[int, int] | None,
    *,
    number: int,
    name: str,
    default_id: str | None,
    read: ReadImage,
    with_noise: bool,
    problem: RowProblem | None,
    scores_of: str | None = None,
) -> Pair | Skipped:
    suffix = "" if pairing is None else f".{pairing[0]}-{pairing[1]}"
    pair_id = id_or(None if default_id is None else default_id + suffix, f"{name}/{number}")
    try:
        given = _given_id(row, is_list=pairing is not None)
        if given is not None:
            pair_id = check_id(given + suffix)
        elif default_id is not None:
            pair_id = check_id(default_id + suffix, what="the name of the sample, which is its id,")
        if problem is not None:
            raise problem
        _refuse_absent(row)
        sides = _sides(row, pairing)
        if given is None and default_id is None:
            pair_id = _content_id(sides, _one_of(row, "prompt"))
        prompt = _prompt(row)
        if parse_flag(row.get("has_label"), what=row.name("has_label")) is False:
            raise RowProblem(reason="unlabelled", detail=f"{row.name('has_label')} is false")
        scores = scores_of_sides(row) if pairing is None else ranks_of(row, pairing)
        label = first_preferred(row, scores) if pairing is None else ranked(row, pairing)
        swap, label = preference(label)
        seeds = seeds_of(row, pairing)
        images = [check_image_bytes(None if value is None else read(value, what), what=what) for what, value in sides]
        noise = _noise(row, pairing, read) if with_noise else None
        if pairing is None:
            list_id = parse_id(row.get("list"), what=row.name("list"))
            scores_of = parse_id(row.get("scores_of"), what=row.name("scores_of"))
        else:  # without an id the list is its prompt's, so that it may grow
            list_id = given or default_id or _content_id([], prompt)
    except RowProblem as found:
        return Skipped(pair_id=pair_id, reason=found.reason, detail=found.detail, row=number)
    win, lose = reversed(images) if swap else images
    return Pair(
        pair_id=pair_id,
        prompt=prompt,
        win=win,
        lose=lose,
        label=label,
        row=number,
        list=list_id,
        scores=(scores[1], scores[0]) if scores and swap else scores,
        scores_of=scores_of if scores else None,
        seeds=(seeds[1], seeds[0]) if seeds and swap else seeds,
        noise=(noise[1], noise[0]) if noise and swap else noise,
    )


def _noise(row: RowFields, pairing: tuple[int, int] | None, read: ReadImage) -> tuple[bytes, bytes] | None:
    """The files with the two images' noise, in the order of the images. Raises RowProblem if one is not there."""
    found: list[bytes] = []
    for what, value in noise_of(row, pairing) or ():
        try:
            found.append(check_image_bytes(None if value is None else read(value, what), what=what))
        except RowProblem as problem:
            is_missing = problem.reason in ("missing_image", "empty_image")
            raise RowProblem(reason="missing_noise" if is_missing else problem.reason, detail=problem.detail) from None
    return (found[0], found[1]) if found else None


def _refuse_absent(row: RowFields) -> None:
    """A column that --columns names must be there: what it would have said is not made up."""
    absent = [name for names in row.layout.values() for name in names if name not in row.fields]
    if absent:
        raise RowProblem(reason="bad_metadata", detail=missing_field(absent[:1], row.fields))


def _prompt(row: RowFields) -> str:
    prompt = _one_of(row, "prompt")
    if prompt is MISSING:
        raise RowProblem(reason="missing_prompt", detail=missing_field(row.names("prompt"), row.fields))
    return check_text(prompt, what="prompt", missing="missing_prompt")


def _given_id(row: RowFields, *, is_list: bool) -> str | None:
    for name, value in row.given("id"):
        given = parse_id(value, what=name)
        if given is not None:
            return given
    # One pair of images may be ranked by several people, so their ids come second.
    uids = [parse_id(row.get(role), what=row.name(role)) for role in ("uid1", "uid2")]
    if None not in uids:
        return "_".join(map(str, uids))  # a dot would make 1 and 0 a number
    return parse_id(row.get("list"), what=row.name("list")) if is_list else None


def _content_id(sides: list[tuple[str, Any]], prompt: object) -> str:
    """A digest of what the row says: inserting or sorting rows changes no id."""
    content = json.dumps([value for _, value in sides] + [None if prompt is MISSING else prompt], ensure_ascii=True)
    return hashlib.blake2b(content.encode("ascii"), digest_size=8).hexdigest()


def is_ranking(row: RowFields) -> bool:
    """Whether there is a list of images, or a field for one and ranks, whose images are missing then."""
    columns = row.columns("images")
    return any(isinstance(row.fields[name], list) for name in columns) or (
        any(row.fields[name] is None for name in columns) and num_ranked(row) > 0
    )


def _sides(row: RowFields, pairing: tuple[int, int] | None) -> list[tuple[str, Any]]:
    """(name, value) of the two image fields, the first one first."""
    found = [role for role in IMAGE_ROLES if row.given(role)]
    if pairing is None and not found:
        found = [role for role in IMAGE_ROLES if row.columns(role)]
    layouts = [layout for layout in SIDES if any(role in found for role in layout)]
    if len(layouts) + (pairing is not None) > 1:
        words = "images of two layouts" if pairing is None else "a ranking and a pair in one row"
        raise RowProblem(reason="bad_metadata", detail=f"{words}: {', '.join(row.name(role) for role in found)}")
    if pairing is not None:
        name, images = next(((each, value) for each, value in row.given("images") if isinstance(value, list)), ("", []))
        count = num_ranked(row)
        if len(images) != count or not 2 <= count <= MAX_RANKED:
            words = f"{name or ' or '.join(row.names('images'))} has {len(images)} images, "
            words += f"{' or '.join(row.names(*ORDERS))} has {count} values; 2..{MAX_RANKED}"
            raise RowProblem(reason="bad_metadata", detail=f"{words} of both are needed")
        return [(f"{name}[{i}]", images[i]) for i in pairing]
    if not layouts:
        if found:
            name, value = next(iter(row.given(found[0])), (row.name(found[0]), None))
            what = "one image" if isinstance(value, str | bytes | dict) else type(value).__name__
            detail = f"{name} is {what}, not a list of images with their ranks or scores"
        else:
            detail = missing_field(row.names(*SIDES[0]), row.fields)
        raise RowProblem(reason="bad_metadata", detail=detail)
    sides = []
    for role in layouts[0]:
        value = _one_of(row, role)
        if value is MISSING:
            raise RowProblem(reason="bad_metadata", detail=missing_field(row.names(role), row.fields))
        sides.append((row.columns(role)[0], value))
    return sides


def _one_of(row: RowFields, role: str) -> Any:
    """The value of the one field that goes by several names; MISSING if there is none. Two that differ are a
    RowProblem: whichever were taken, the other would be lost without a word.
    """
    columns = row.columns(role)
    values = [value for _, value in row.given(role)]
    if len({value.strip() if isinstance(value, str) else repr(value) for value in values}) > 1:
        detail = f"{' and '.join(columns)} are both there and differ: keep one"
        raise RowProblem(reason="bad_metadata", detail=detail)
    return values[0] if values else None if columns else MISSING


def _remember(read: ReadImage) -> ReadImage:
    """Read each image of a ranking once, though it is in several pairs."""
    known: dict[str, bytes | None] = {}

    def once(value: Any, what: str) -> bytes | None:
        if what not in known:
            known[what] = read(value, what)
        return known[what]

    return once
