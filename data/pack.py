"""Write any source as webdataset tars of our layout.

    OUT/pairs-000000.tar: 000000000.json 000000000.lose.<ext> 000000000.win.<ext> 000000001.json ...

The tars are written into a hidden folder beside OUT, which takes its name when all are whole and on disk: OUT is there
complete or not at all. Image files are copied byte for byte; the same pairs give the same tars, byte for byte.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import webdataset

from inpo.common.durable import new_folder
from inpo.common.errors import DataError, UsageError
from inpo.common.pairs.pair import InputShard, Pair, Skipped, SkipReason
from inpo.common.pairs.recognise import SKIPPED_NAME
from inpo.common.pairs.walk import Reasons
from inpo.data.group import group_by_prompt

PATTERN = "pairs-%06d.tar"


@dataclass(kw_only=True)
class PackReport:
    """What was written."""

    num_pairs: int = 0
    num_tars: int = 0
    skipped: dict[SkipReason, int] = field(default_factory=dict)
    reasons: Reasons = field(default_factory=Reasons)


def pack(
    rows: Iterable[tuple[str, Pair | Skipped]],
    *,
    output: Path,
    pairs_per_tar: int,
    by_prompt: bool = False,
    shards: Iterable[InputShard] = (),
    on_written: Callable[[], object] = lambda: None,
) -> PackReport:
    """Write the pairs to `output` as tars of `pairs_per_tar`, and the rows without a pair to `skipped.jsonl` there.

    With `by_prompt` pairs whose prompts are equal come one after another, in one tar if they fit into one (group.py
    says in what order); tars are then closed before they are full. `shards` are what the rows come from, for the
    message where there is no pair. `on_written` is called for each pair in its tar.

    Images are not decoded, so a damaged one is copied. Raises UsageError when `output` exists and is not an empty
    folder, StorageError when the disk refuses, DataError when no row gives a pair; nothing is left under `output` then.
    """
    refuse_occupied(output)
    if pairs_per_tar < 1:
        raise UsageError(
            "A tar holds one pair at least.",
            where="--pairs-per-tar",
            expected="1 or more",
            got=pairs_per_tar,
            fix="correct the number",
        )
    report = PackReport()
    with new_folder(output, action="write the tars") as building:
        pairs = _pairs(rows, building, report)
        if by_prompt:
            groups = group_by_prompt(pairs, folder=building, most=pairs_per_tar)
        else:
            groups = ((1, iter([pair])) for pair in pairs)
        _write(groups, building, pairs_per_tar, report, on_written)
        if not report.num_pairs:
            raise DataError(
                "No row gives a pair, so there is nothing to pack.",
                where=output,
                got="\n".join(report.reasons.lines(shards)) or "no rows",
                fix="`inpo data check SRC --out bad.jsonl` lists the rows with their reasons",
            )
    return report


def refuse_occupied(output: Path) -> None:
    """Raise UsageError unless `output` is absent or an empty folder, and not the one that the command runs in: a new
    folder would take its place, and whoever is in it would be nowhere."""
    if output.exists() and output.samefile(Path.cwd()):
        raise UsageError(
            "The output is the folder that this runs in.",
            where=output,
            expected="a folder of its own",
            fix="name a folder in it",
        )
    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists():
        raise UsageError(
            "The output is there already.", where=output, expected="a new or empty folder", fix="name another folder"
        )


def _pairs(rows: Iterable[tuple[str, Pair | Skipped]], folder: Path, report: PackReport) -> Iterator[Pair]:
    """The pairs; the other rows are counted and listed."""
    with open(folder / SKIPPED_NAME, "w", encoding="utf-8") as skipped:
        for name, item in rows:
            if isinstance(item, Pair):
                yield item
            else:
                report.skipped[item.reason] = report.skipped.get(item.reason, 0) + 1
                report.reasons.add(item.reason, item.pair_id, item.detail)
                skipped.write(skipped_line(name, item))


def _write(
    groups: Iterable[tuple[int, Iterator[Pair]]],
    folder: Path,
    pairs_per_tar: int,
    report: PackReport,
    on_written: Callable[[], object],
) -> None:
    """Write tars; a group whose size is no more than a tar holds lies in one."""
    streams: list[BinaryIO] = []

    def opened(name: str) -> BinaryIO:
        streams.append(open(name, "wb"))  # `finished` closes it
        return streams[-1]

    def finished(name: str) -> None:
        streams.pop().close()

    writer = None
    try:
        for size, pairs in groups:
            if writer is None:  # ShardWriter makes its first file at once, and an empty tar is no use
                writer = webdataset.ShardWriter(
                    str(folder).replace("%", "%%") + "/" + PATTERN,
                    maxcount=pairs_per_tar,
                    maxsize=float("inf"),
                    opener=opened,
                    post=finished,
                    verbose=0,
                    mtime=0,
                    encoder=False,
                )
            if writer.count + size > pairs_per_tar:
                writer.next_stream()
            for pair in pairs:
                writer.write(_sample(report.num_pairs, pair))
                report.num_pairs += 1
                report.num_tars = writer.shard
                on_written()
    finally:
        if writer is not None:
            writer.close()


def skipped_line(input_shard: str, item: Skipped) -> str:
    """One JSON line for a row that gave no pair."""
    fields = {
        "pair_id": item.pair_id,
        "reason": item.reason,
        "detail": item.detail,
        "input_shard": input_shard,
        "row": item.row,
    }
    # ensure_ascii keeps bytes that are not UTF-8 writable
    return json.dumps(fields) + "\n"


def is_skipped_line(line: bytes) -> bool:
    """Whether `skipped_line` wrote it."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(fields, dict) and fields.keys() == {"pair_id", "reason", "detail", "input_shard", "row"}


def _sample(number: int, pair: Pair) -> dict[str, object]:
    metadata: dict[str, object] = {"prompt": pair.prompt, "label": pair.label, "id": pair.pair_id}
    if pair.list is not None:
        metadata["list"] = pair.list
    if pair.scores is not None:
        metadata["score_win"], metadata["score_lose"] = pair.scores
    if pair.scores_of is not None:
        metadata["scores_of"] = pair.scores_of
    if pair.seeds is not None:
        metadata["seeds"] = list(pair.seeds)
    noise = zip(("noise_win.npy", "noise_lose.npy"), pair.noise or (), strict=False)
    return {
        "__key__": f"{number:09d}",
        "json": json.dumps(metadata, ensure_ascii=False).encode("utf-8"),
        f"win.{image_extension(pair.win)}": pair.win,
        f"lose.{image_extension(pair.lose)}": pair.lose,
        **dict(noise),
    }


def image_extension(data: bytes) -> str:
    """File extension for an encoded image by its first bytes; `img` when they say nothing."""
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "webp"
    if data[4:8] == b"ftyp" and data[8:12] in (b"avif", b"avis"):
        return "avif"
    signatures = {
        b"\xff\xd8": "jpg",
        b"\x89PNG": "png",
        b"GIF8": "gif",
        b"BM": "bmp",
        b"II*\0": "tif",
        b"MM\0*": "tif",
        b"P5": "ppm",
        b"P6": "ppm",
        b"\0\0\0\x0cjP": "jp2",
    }
    return next((extension for signature, extension in signatures.items() if data.startswith(signature)), "img")
