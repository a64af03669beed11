"""Which column of a source says what: the one way from a container's names to a row's meaning.

    names of the columns --ColumnMap.layout--> {role: columns}    fields --ColumnMap.row--> RowFields, asked by role

A column is a column of parquet, CSV and TSV, a key of JSON, a member of a tar or a key of its `.json` member. Columns
are known by the names below; --columns names others, which come before these.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

from inpo.common.choices import PairsFrom
from inpo.common.errors import UsageError
from inpo.common.printable import escaped

ROLES: dict[str, tuple[str, ...]] = {
    "win": ("win", "chosen", "path1", "img_better"),
    "lose": ("lose", "rejected", "path2", "img_worse"),
    "image1": ("jpg_0", "image1"),
    "image2": ("jpg_1", "image2"),
    "images": ("images", "image", "image_path", "image_paths", "file_path"),
    "prompt": ("prompt", "caption"),
    "id": ("id", "pair_id", "ranking_id"),
    "uid1": ("image_0_uid",),
    "uid2": ("image_1_uid",),
    "list": ("list", "prompt_id"),
    "label": ("label",),
    "label1": ("label_0",),
    "label2": ("label_1",),
    "votes": ("choice_dist",),
    "votes1": ("votes_win", "votes_image1"),
    "votes2": ("votes_lose", "votes_image2"),
    "has_label": ("has_label",),
    "rank": ("rank", "ranks"),
    "score": ("score", "scores", "human_preference"),
    "score1": ("score_win",),
    "score2": ("score_lose",),
    "scores_of": ("scores_of",),
    "seeds": ("seeds",),
    "noise": ("noises",),
    "noise_win": ("noise_win",),
    "noise_lose": ("noise_lose",),
    "noise1": ("noise_image1",),
    "noise2": ("noise_image2",),
}
"""{role: the names it is known by}. A role with a 1 or 2 is of the first or second image, win before lose. A
list of `images` is a ranking, a single one belongs to a ranking of several rows."""

SETS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Pick-a-Pic", ("jpg_0", "jpg_1", "caption")),
    ("HPDv3", ("path1", "path2", "prompt", "choice_dist")),
    ("HPDv3++", ("path1", "path2", "prompt")),
    ("Rapidata votes", ("image1", "image2", "prompt", "votes_image1", "votes_image2")),
    ("ImageRewardDB", ("image", "prompt_id", "prompt", "rank")),
    ("ImageRewardDB", ("image_path", "prompt_id", "prompt", "rank")),
    ("HPDv2", ("image_path", "prompt", "rank")),
    ("HPDv2", ("image_path", "prompt", "human_preference")),
    ("HPDv2", ("file_path", "prompt", "human_preference")),
    ("ImageRewardDB, pairs", ("img_better", "img_worse", "prompt")),
    ("chosen and rejected", ("chosen", "rejected")),
    ("win and lose", ("win", "lose")),
    ("rankings", ("images",)),
)
"""Public data sets and plain layouts by the columns that tell them, the more telling first."""

SIDES = (("win", "lose"), ("image1", "image2"))
"""Roles of the two images, by layout."""
ORDERS = ("rank", "score")
IMAGE_ROLES = ("win", "lose", "image1", "image2", "images")
SIDE_NOISE = (("noise_win", "noise_lose"), ("noise1", "noise2"))
"""Roles of the two images' noise, by layout."""
NOISE_ROLES = ("noise", *SIDE_NOISE[0], *SIDE_NOISE[1])
"""Of the noise that the images were made from: files, as images are."""
LABEL_ROLES = ("label", "label1", "label2", "votes", "votes1", "votes2")
_RIVALS: tuple[tuple[tuple[str, ...], ...], ...] = (
    (*SIDES, ("images",)),
    (("label",), ("label1", "label2"), ("votes",), ("votes1", "votes2")),
    (("rank",), ("score",)),
)
"""Ways to say one thing: where --columns names a column of one of them, no other is looked for."""
_ROLE_OF = {name: role for role, names in ROLES.items() for name in names}

Layout = Mapping[str, tuple[str, ...]]
"""{role: the columns that are there for it}; a role without a column is left out."""
MISSING = object()


@dataclass(frozen=True, kw_only=True)
class RowFields:
    """The fields of a row, asked by role."""

    fields: Mapping[str, Any]
    layout: Layout
    chosen: frozenset[str] = frozenset()
    """The roles whose column --columns names."""

    def columns(self, role: str) -> tuple[str, ...]:
        """The names of the row's fields of a role."""
        return tuple(name for name in self.layout.get(role, ()) if name in self.fields)

    def given(self, role: str) -> list[tuple[str, Any]]:
        """(column, value) of every field of a role that is not null."""
        return [(name, self.fields[name]) for name in self.columns(role) if self.fields[name] is not None]

    def get(self, role: str) -> Any:
        """The first value of a role that is not null; None if there is none."""
        return next((value for _, value in self.given(role)), None)

    def names(self, *roles: str) -> list[str]:
        """What columns of these roles are, or may be, called."""
        return [name for role in roles for name in self.layout.get(role) or ROLES[role]]

    @property
    def is_open(self) -> bool:
        """Whether the names of the images do not say which one is preferred."""
        return any(self.columns(role) for role in SIDES[1])

    def name(self, role: str) -> str:
        """What to call a role in messages: its column here, or the name it is known by."""
        return next(iter([*(name for name, _ in self.given(role)), *self.layout.get(role, ()), *ROLES[role]]))


@dataclass(frozen=True, kw_only=True)
class ColumnMap:
    """What --columns says: nothing, or the column of some roles."""

    chosen: tuple[tuple[str, str], ...] = ()
    """(role, column)."""

    def layout(self, names: Iterable[str]) -> Layout:
        """Which of these columns stand for what. A chosen column stands for its role, there or not."""
        return _layout(self.chosen, tuple(names))

    def row(self, fields: Mapping[str, Any]) -> RowFields:
        chosen = frozenset(role for role, _ in self.chosen)
        return RowFields(fields=fields, layout=self.layout(fields), chosen=chosen)

    def absent(self, names: Iterable[str]) -> tuple[str, ...]:
        """The chosen columns that are not among these names."""
        there = set(names)
        return tuple(column for _, column in self.chosen if column not in there)

    def names(self, *roles: str) -> tuple[str, ...]:
        """What columns of these roles may be called."""
        chosen = dict(self.chosen)
        return tuple(name for role in roles for name in ((chosen[role],) if role in chosen else ROLES[role]))

    def role_of(self, name: str) -> str | None:
        """The role of one column, whatever others there are."""
        return next((role for role, columns in self.layout([name]).items() if name in columns), None)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How a source is to be read: the same for each of its shards."""

    columns: ColumnMap = ColumnMap()
    pairs_from: PairsFrom = "all"
    allow_remote: bool = False
    """Whether rows may name what lies outside their file's folder, here or on other hosts."""
    with_noise: bool = False
    """Whether the noise that images were made from is read, where the rows have it."""

    @property
    def identity(self) -> str:
        """What changes the rows of a file; empty for the usual reading."""
        return (
            repr((self.columns.chosen, self.pairs_from))
            if (self.columns, self.pairs_from) != (ColumnMap(), "all")
            else ""
        )


USUAL = Reading()


def parse_columns(value: object) -> dict[str, str]:
    """`win=chosen,lose=rejected`, or such a table, as {what it is: column}. Raises ValueError with what is known."""
    if isinstance(value, str):
        parts = [part.partition("=") for part in value.split(",")]
        if any(not sign for _, sign, _ in parts):
            raise ValueError("expected ROLE=COLUMN,ROLE=COLUMN, for instance win=good,lose=bad")
        pairs = [(name.strip(), column.strip()) for name, _, column in parts]
    elif isinstance(value, Mapping):
        pairs = list(value.items())
    else:
        raise ValueError("expected a table such as {win = 'good', lose = 'bad'}")
    for name, column in pairs:
        if name not in _ROLE_OF:
            raise ValueError(f"{brief(str(name))!r} is nothing that a column can be; {known_words(str(name))}")
        if not isinstance(column, str) or not column:
            raise ValueError(f"the column of {name} is to be a name")
    for what, each in (("role", [_ROLE_OF[name] for name, _ in pairs]), ("column", [column for _, column in pairs])):
        if len(set(each)) < len(each):
            raise ValueError(
                f"a {what} is named twice: {', '.join(f'{brief(name)}={brief(of)}' for name, of in pairs)}"
            )
    return dict(pairs)


def known_words(name: str) -> str:
    """What there is instead of an unknown role."""
    close = get_close_matches(name, _ROLE_OF, n=1)
    return f"is {close[0]!r} meant?" if close else f"known: {', '.join(names[0] for names in ROLES.values())}"


def column_map(columns: Mapping[str, str] | str | None) -> ColumnMap:
    """The map of --columns. Raises UsageError."""
    try:
        found = parse_columns(columns) if columns else {}
    except ValueError as error:
        raise UsageError("These columns cannot be read.", where="--columns", got=columns, fix=str(error)) from None
    return ColumnMap(chosen=tuple(sorted((_ROLE_OF[name], column) for name, column in found.items())))


def recognise_set(names: Iterable[str]) -> str | None:
    """The public data set, or the plain layout, that has these columns; None if none has."""
    there = set(names)
    return next((title for title, columns in SETS if there.issuperset(columns)), None)


def missing_field(wanted: Iterable[str], found: Iterable[str]) -> str:
    """Words for a field that is not there: what was looked for, what was found, and which of it may be meant."""
    wanted, found = list(wanted), [brief(name) for name in found]
    lower = {name.strip().lower(): name for name in found}
    close = [match for name in wanted for match in get_close_matches(name.lower(), lower, n=1)]
    words = f"no field {' or '.join(map(brief, wanted))}; found: {', '.join(found[:12]) or 'none'}"
    if len(found) > 12:
        words += f" and {len(found) - 12} more"
    return words + (f"; is {lower[close[0]]!r} meant?" if close else "")


def brief(name: str) -> str:
    """A name out of a user's file as one short piece of a line."""
    return escaped(name[:60], line=True)


@lru_cache(maxsize=1024)
def _layout(chosen: tuple[tuple[str, str], ...], names: tuple[str, ...]) -> Layout:
    there, given = set(names), dict(chosen)
    taken = set(given.values())
    barred = {
        role
        for ways in _RIVALS
        if any(role in given for way in ways for role in way)
        for way in ways
        if not any(role in given for role in way)
        for role in way
    }
    layout: dict[str, tuple[str, ...]] = {}
    for role, known in ROLES.items():
        if role in given:
            layout[role] = (given[role],)
        elif role not in barred:
            columns = tuple(name for name in known if name in there and name not in taken)
            if columns:
                layout[role] = columns
    return layout
