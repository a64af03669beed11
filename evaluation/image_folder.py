"""A folder of generated images: what it was made with, which images it holds, and their scores.

    FOLDER/generate.json          the settings: a folder holds images of one model and one setting
    FOLDER/images/00012-0.png     one picture per prompt and number
    FOLDER/images.jsonl           {prompt, seed, file} a line, written when all images that were asked for are there
    FOLDER/scores-<scorer>.jsonl  {prompt, seed, file, score} a line

Any folder with an images.jsonl of this form can be scored and compared, however its images were made.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from inpo.common.durable import write_file
from inpo.common.errors import DataError, command
from inpo.common.pairs import ImageError, decode_image
from inpo.common.text import read_text, text_lines

SETTINGS = "generate.json"
LISTING = "images.jsonl"


@dataclass(frozen=True, kw_only=True)
class ImageEntry:
    """One image of a folder. Two folders' images are paired by (prompt, seed)."""

    prompt: str
    seed: int
    file: str
    """Path relative to the folder."""

    @property
    def key(self) -> tuple[str, int]:
        return self.prompt, self.seed


def to_lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(dict(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows).encode()


_REMAKE = "correct it, or remove the file and run the command that wrote it again"


def read_settings(file: Path) -> dict[str, Any]:
    """generate.json. Raises DataError if it is no JSON object."""
    text = read_text(file, what="The folder's settings cannot be read.", error=DataError, fix=_REMAKE)
    try:
        settings = json.loads(text)
        if not isinstance(settings, dict):
            raise ValueError(f"{type(settings).__name__}, not an object")
    except ValueError as error:
        raise DataError(
            "The folder's settings cannot be read.",
            where=file,
            expected="a JSON object, as `generate` wrote it",
            got=str(error),
            fix="restore the file from a copy, or make the images in a new --out",
        ) from None
    return settings


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a JSON-lines file, of whole characters. Raises DataError naming the first bad line."""
    rows: list[dict[str, Any]] = []
    lines = text_lines(read_text(path, what="The list cannot be read.", error=DataError, fix=_REMAKE))
    if lines[-1] == "":
        lines.pop()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()  # a text may hold half a character, which has no bytes
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise DataError(
                "A line is no JSON object.",
                where=f"{path}, line {number}",
                expected="an object of whole characters",
                got=line[:120],
                fix=_REMAKE,
            )
        rows.append(row)
    return rows


class ImageFolder:
    """Reads a folder's listing, images and scores."""

    def __init__(self, path: Path) -> None:
        """Read and check the listing. Raises DataError if there is none, or if an image of it is not there."""
        self.path = path
        listing = path / LISTING
        if not listing.is_file():
            begun = (path / SETTINGS).is_file()
            raise DataError(
                "This folder's images are not complete." if begun else "This is no folder of generated images.",
                where=path,
                expected=LISTING,
                got="no such file",
                fix="run the same `inpo evaluate generate` again: it goes on where it stopped"
                if begun
                else "make it with `inpo evaluate generate --out`, or write images.jsonl yourself (docs/evaluation.md)",
            )
        self.entries = [self._entry(row, number) for number, row in enumerate(read_lines(listing), start=1)]
        self.by_key = {entry.key: entry for entry in self.entries}
        if len(self.by_key) != len(self.entries):
            raise DataError("Two images have the same prompt and seed.", where=listing, fix="give each pair once")
        if not self.entries:
            raise DataError(
                "The listing names no image.",
                where=listing,
                expected='a line {"prompt", "seed", "file"} for each image',
                got="no line",
                fix="make the images with `inpo evaluate generate --out`, or name another folder",
            )
        missing = [entry.file for entry in self.entries if not (path / entry.file).is_file()]
        if missing:
            raise DataError(
                "Images are missing.",
                where=path,
                expected=f"{len(self.entries)} images of {LISTING}",
                got=f"{len(missing)} missing, the first {missing[0]}",
                fix="run the same `inpo evaluate generate` again: it makes what is missing",
            )

    def _entry(self, row: Mapping[str, Any], number: int) -> ImageEntry:
        prompt, seed, file = row.get("prompt"), row.get("seed"), row.get("file")
        if not isinstance(prompt, str) or not isinstance(seed, int) or not isinstance(file, str):
            raise DataError(
                "A line of the listing is not as expected.",
                where=f"{self.path / LISTING}, line {number}",
                expected="prompt (text), seed (integer), file (path relative to the folder)",
                got=str(dict(row))[:200],
                fix=_REMAKE,
            )
        return ImageEntry(prompt=prompt, seed=seed, file=file)

    @property
    def settings(self) -> dict[str, Any]:
        """generate.json; {} for a folder made otherwise."""
        file = self.path / SETTINGS
        return read_settings(file) if file.is_file() else {}

    def open(self, entry: ImageEntry) -> Image.Image:
        """One image as RGB, of any mode and format that pairs may have. Raises DataError for a damaged file."""
        try:
            return decode_image((self.path / entry.file).read_bytes())
        except (OSError, ImageError) as error:
            raise DataError(
                "An image cannot be read.",
                where=self.path / entry.file,
                expected="a whole image file",
                got=str(error),
                fix="remove it, and run the same `inpo evaluate generate` again: it makes what is missing",
            ) from None

    def scorer_names(self) -> list[str]:
        """Scorers that have scored images here, maybe not all of them."""
        names = sorted(file.name[len("scores-") : -len(".jsonl")] for file in self.path.glob("scores-*.jsonl"))
        return [name for name in names if ".part-" not in name]

    def has_scores(self, scorer: str) -> bool:
        """Whether every image has a score of this scorer."""
        file = self.path / f"scores-{scorer}.jsonl"
        return file.is_file() and self.by_key.keys() <= parse_scores(read_lines(file), file).keys()

    def scores(self, scorer: str) -> dict[tuple[str, int], float]:
        """{(prompt, seed): score} of every image. Raises DataError if the scores are not there or not complete."""
        file = self.path / f"scores-{scorer}.jsonl"
        advice = f"run `{command('evaluate', 'score', self.path, '--scorer', scorer)}`"
        if not file.is_file():
            raise DataError(
                f"This folder has no scores of {scorer}.", where=self.path, got=self.scorer_names(), fix=advice
            )
        found = {key: score for key, score in parse_scores(read_lines(file), file).items() if key in self.by_key}
        if len(found) != len(self.entries):
            raise DataError(
                f"The scores of {scorer} are not complete.",
                where=file,
                expected=len(self.entries),
                got=len(found),
                fix=advice,
            )
        return found


def parse_scores(rows: Iterable[Mapping[str, Any]], where: Path) -> dict[tuple[str, int], float]:
    """{(prompt, seed): score}. Raises DataError for a row that has no finite score of a prompt and a seed."""
    found: dict[tuple[str, int], float] = {}
    for number, row in enumerate(rows, start=1):
        prompt, seed, score = row.get("prompt"), row.get("seed"), row.get("score")
        if (
            not isinstance(prompt, str)
            or not isinstance(seed, int)
            or not isinstance(score, int | float)
            or not math.isfinite(score)
        ):
            raise DataError(
                "A line is no score of an image.",
                where=f"{where}, line {number}",
                expected="prompt (text), seed (integer), score (finite number)",
                got=str(dict(row))[:200],
                fix=_REMAKE,
            )
        found[prompt, seed] = float(score)
    return found


def write_listing(folder: Path, entries: Iterable[ImageEntry]) -> None:
    write_file(folder / LISTING, to_lines(asdict(entry) for entry in entries))
