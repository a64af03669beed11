"""One preference pair as read from a source, the rows that give none, and the interface of every pair source.

    PairSource --shards--> InputShard --rows(start, stop)--> Pair | Skipped

Images stay encoded here; images.py decodes them. A pair is kept or dropped whole: a row with one bad image
gives one `Skipped`, never half a pair, and never the win of one row beside the lose of another.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np

from inpo.common.printable import is_printable, shown

if TYPE_CHECKING:
    from inpo.common.pairs.columns import Reading

MAX_IMAGE_BYTES = 128 << 20
"""Limit on the file of one image, wherever it comes from: never is more than that and a little read."""
MAX_ID_CHARACTERS = 1000
_MAX_DETAIL_CHARACTERS = 1000
MAX_TEXT_CHARACTERS = 1_000_000
"""Limit on any text of a row, so that the texts of a shard can always be read back."""

SkipReason = Literal[
    "tie",
    "unlabelled",
    "bad_label",
    "missing_prompt",
    "bad_metadata",
    "missing_image",
    "missing_noise",
    "not_allowed",
    "unreachable",
    "empty_image",
    "too_large",
    "unreadable",
    "truncated",
    "decompression_bomb",
    "unsupported_mode",
    "duplicate_id",
    "mixed_sizes",
]
"""Every reason for which a row gives no pair. The words are stable: commits, tables and JSONL lists carry them."""

SKIP_REASONS: dict[SkipReason, str] = {
    "tie": "the label is 0.5: neither image is preferred",
    "unlabelled": "the row says it has no label, or its label is null",
    "bad_label": "the label is not a number in [0, 1], or the two labels of the row contradict each other",
    "missing_prompt": "no prompt column, member or field, or it is null (an empty prompt is a prompt)",
    "bad_metadata": "the row cannot be understood: JSON, CSV, UTF-8, a field missing or given twice, or a bad id",
    "missing_image": "an image's bytes, member or file are not there",
    "missing_noise": "--inverter tracked, and an image has no seed and no noise of the latent's shape, or is not of "
    "the resolution it was made at",
    "not_allowed": "the row names a place outside the list's folder or on another host: see --allow-remote",
    "unreachable": "an image's host did not answer, or its scheme is unknown",
    "empty_image": "an image has zero bytes",
    "too_large": "an image's file is larger than 128 MiB",
    "unreadable": "the bytes are not an image in a supported format",
    "truncated": "an image file ends too early",
    "decompression_bomb": "an image has more pixels than the limit",
    "unsupported_mode": "an image's pixels have no defined 8-bit meaning (float, 32-bit, LAB)",
    "duplicate_id": "an earlier row has the same pair id",
    "mixed_sizes": "its images fit two buckets, or not the one they were sorted into (precompute --buckets)",
}
"""What each reason means, in words for tables and documents."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One preference pair, images still encoded."""

    pair_id: str
    """Unique in the source. The source's own id where it has one, else made from what the row says, not from order."""
    prompt: str
    """The caption as given; may be empty, any length, any script."""
    win: bytes
    """Encoded image file of the preferred side."""
    lose: bytes
    """Encoded image file of the other side."""
    label: float
    """P(win preferred), in (0.5, 1]: the source orders the sides so."""
    row: int
    """Row in the input shard, from 0."""
    list: str | None = None
    """The ranking or list that the pair comes from: its images are one group. None for a pair of its own."""
    scores: tuple[float, float] | None = None
    """The source's own scores of win and lose, higher is better: ranks are negated. None: it has none."""
    scores_of: str | None = None
    """The ranking or the rater that the scores are of: those of different ones are not compared. None: all are of one.
    """
    seeds: tuple[int, int] | None = None
    """Of the noise that win and lose were made from, where the source says them."""
    noise: tuple[bytes, bytes] | None = None
    """That noise itself, as files, where the source has it and it is asked for."""


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """A row that gives no pair."""

    pair_id: str
    reason: SkipReason
    detail: str
    """One line for people: which side, which member, what was found."""
    row: int


@runtime_checkable
class InputShard(Protocol):
    """Consecutive rows of a source that live in one file; a ranking of n images is n (n - 1) / 2 of them. Picklable;
    opens its file anew for each `rows` call.
    """

    @property
    def name(self) -> str:
        """Stable, file-system safe, unique in the source."""
        ...

    @property
    def reading(self) -> "Reading":
        """How the file is read: which columns, what of a ranking."""
        ...

    @property
    def num_rows(self) -> int:
        """Rows in the file, known without decoding an image. Raises DataError when the file is unreadable."""
        ...

    @property
    def not_read(self) -> Mapping[str, int]:
        """What lies in the file and has no part in any pair, and how often: `member .cls`, `column user_id`. Raises
        DataError as `num_rows` does.
        """
        ...

    @property
    def has_lists(self) -> bool:
        """Whether pairs of the file come from rankings or lists of images. Raises DataError as `num_rows` does."""
        ...

    def group_sizes(self, start: int, stop: int) -> np.ndarray:
        """int64 [group]: of rows start..stop-1 how many images, at most, each ranking has, or each pair of its own: 2.
        Raises DataError.
        """
        ...

    def fingerprint(self) -> str:
        """Cheap identity of the content (32 hex digits); never of path or time alone. Raises DataError."""
        ...

    def rows(self, start: int, stop: int) -> Iterator[Pair | Skipped]:
        """Rows start..stop-1 in order, exactly one item a row, read lazily in bounded memory. Raises DataError."""
        ...

    def prompts(self, start: int, stop: int) -> Iterator[str]:
        """The prompts of rows start..stop-1: every one that `rows` gives a pair of, and those of rows that give none.
        No image is read. Raises DataError.
        """
        ...

    def head(self, count: int) -> list[dict[str, Any]]:
        """The fields of the first `count` records as the file has them, whatever they mean, also where no pair can be
        made of them. Raises DataError.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class PairSource:
    """All pairs behind one location. Nothing is read until a shard is asked."""

    location: str
    shards: tuple[InputShard, ...]
    """Sorted by name."""
    kind: str
    """webdataset, parquet or folder, as datasets calls them; of what is no file, what it is."""
    not_read: Mapping[str, int] = field(default_factory=dict)
    """What lies beside the input shards and is none, and how often: `file *.md`, `folder raw`."""
    files: Mapping[str, str] = field(default_factory=dict)
    """The file of each input shard, by its name."""

    @property
    def place(self) -> str:
        """See `place_of`."""
        return place_of(self.location)


def place_of(location: str) -> str:
    """A location without secrets and, of a path, from the root: two of one name in two folders are two."""
    return shown(location if "://" in location else str(Path(location).absolute()))


class RowProblem(Exception):
    """Raised inside a source while it reads one row; turned into that row's `Skipped`."""

    def __init__(self, *, reason: SkipReason, detail: str) -> None:
        if len(detail) > _MAX_DETAIL_CHARACTERS:  # it may quote the row: an image in base64 where a path should be
            detail = f"{detail[: _MAX_DETAIL_CHARACTERS // 2]} ... {detail[-_MAX_DETAIL_CHARACTERS // 4 :]}"
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


def check_text(value: object, *, what: str, missing: SkipReason) -> str:
    """`value` as a string that can be stored as UTF-8, else RowProblem: `missing` for null, bad_metadata otherwise."""
    if value is None:
        raise RowProblem(reason=missing, detail=f"{what} is missing")
    if not isinstance(value, str):
        raise RowProblem(reason="bad_metadata", detail=f"{what} is {type(value).__name__}, not text")
    if len(value) > MAX_TEXT_CHARACTERS:
        raise RowProblem(
            reason="bad_metadata", detail=f"{what} has {len(value)} characters, limit {MAX_TEXT_CHARACTERS}"
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise RowProblem(reason="bad_metadata", detail=f"{what} is not valid Unicode") from None
    return value


def check_id(value: object, *, what: str = "id") -> str:
    """`value` as a pair's id, else RowProblem: one line of text that lists, commands and terminals give back as it is.

    Refused are control characters, line breaks of any script, blanks at either end, the empty text, and more than
    MAX_ID_CHARACTERS characters.
    """
    text = check_text(value, what=what, missing="bad_metadata")
    if not text or text != text.strip():
        raise RowProblem(
            reason="bad_metadata", detail=f"{what} {text[:100]!r} is blank, or begins or ends with a blank"
        )
    if not is_printable(text):
        raise RowProblem(reason="bad_metadata", detail=f"{what} {text[:100]!r} has characters that no list can hold")
    if len(text) > MAX_ID_CHARACTERS:
        raise RowProblem(reason="bad_metadata", detail=f"{what} has {len(text)} characters, limit {MAX_ID_CHARACTERS}")
    return text


def id_or(given: str | None, other: str) -> str:
    """`given` where it can be a pair's id, else `other`: what a row that gives no pair is called."""
    try:
        return other if given is None else check_id(given)
    except RowProblem:
        return other


def preference(label: float) -> tuple[bool, float]:
    """(swap, P(win preferred) > 0.5) for P(first preferred) = `label`; RowProblem tie when float32 makes it 0.5.

    The cache stores labels as float32, so a label that rounds to 0.5 there is a tie here.
    """
    if np.float32(label) == np.float32(0.5):
        raise RowProblem(reason="tie", detail=f"label {label!r}")
    return label < 0.5, max(label, 1.0 - label)


def check_image_bytes(value: bytes | None, *, what: str) -> bytes:
    """`value` when there are bytes, else RowProblem missing_image, empty_image or too_large."""
    if value is None:
        raise RowProblem(reason="missing_image", detail=f"{what} is not there")
    if len(value) == 0:
        raise RowProblem(reason="empty_image", detail=f"{what} has zero bytes")
    if len(value) > MAX_IMAGE_BYTES:
        raise too_large(what, len(value))
    return value


def too_large(what: str, size: int | None = None) -> RowProblem:
    """The RowProblem of an image whose file is above the limit; `size` None: it was not read to its end."""
    found = f"more than {MAX_IMAGE_BYTES}" if size is None else f"{size}"
    return RowProblem(reason="too_large", detail=f"{what} has {found} bytes, limit {MAX_IMAGE_BYTES}")


def mark_duplicates(rows: Iterable[Pair | Skipped], seen: set[str]) -> Iterator[Pair | Skipped]:
    """The same rows, with every pair whose id is already in `seen` turned into Skipped(duplicate_id); fills `seen`.

    The first row with an id is kept. Skipped rows neither claim an id nor are marked.
    """
    for item in rows:
        if isinstance(item, Pair):
            if item.pair_id in seen:
                detail = "an earlier row has this id"
                if item.list is not None and item.pair_id.startswith(f"{item.list}."):
                    detail += "; the rows of a ranking are to lie together, in one file"
                yield Skipped(pair_id=item.pair_id, reason="duplicate_id", detail=detail, row=item.row)
                continue
            seen.add(item.pair_id)
        yield item
