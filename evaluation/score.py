"""Scores of a folder's images, written as they come, so that a stopped run goes on where it was.

Each process appends to a part file of its own; when every image has a score, the parts become scores-<name>.jsonl.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from inpo.common.durable import storage_errors, write_file
from inpo.common.processes import processes
from inpo.common.progress import ProgressReport
from inpo.common.scorer import Scorer, checked_scores, load_scorer
from inpo.evaluation.image_folder import ImageEntry, ImageFolder, parse_scores, read_lines, to_lines

DEFAULT_BATCH = 32
SCORERS_DTYPE = "float32 (scorers of other packages may choose another)"


def try_scorers(names: Sequence[str], folder: ImageFolder) -> None:
    """Raise what every scorer but the first, whose turn is next anyway, would raise after hours of the others' work."""
    scorers = [load_scorer(name) for name in names]
    entry = folder.entries[0]
    while len(scorers) > 1:  # one after the other in memory
        checked_scores(scorers.pop(), [folder.open(entry)], [entry.prompt], [entry.file])


def score_folder(folder: ImageFolder, scorer: Scorer, *, batch_size: int | None = None) -> int:
    """Score every image that has no score yet; returns how many this process scored.

    Raises DataError, naming the image, if the scorer fails or returns what is no score (`checked_scores`).
    """
    state = processes()
    final = folder.path / f"scores-{scorer.name}.jsonl"
    known = _known(folder, scorer.name)
    mine = folder.entries[state.process_index :: state.num_processes]
    left = [entry for entry in mine if entry.key not in known]
    state.wait_for_everyone()  # nobody writes before everybody has read
    if left:
        part = folder.path / f"scores-{scorer.name}.part-{state.process_index}.jsonl"
        quiet = not state.is_main_process
        with (
            storage_errors("write scores", part),
            ProgressReport(scorer.name, total=len(mine), unit="images", done=len(mine) - len(left), quiet=quiet) as bar,
        ):
            for start in range(0, len(left), batch_size or DEFAULT_BATCH):
                batch = left[start : start + (batch_size or DEFAULT_BATCH)]
                scores = checked_scores(
                    scorer,
                    [folder.open(entry) for entry in batch],
                    [entry.prompt for entry in batch],
                    [entry.file for entry in batch],
                )
                # Opened for each batch: a scorer that cannot be loaded leaves no empty file.
                with part.open("ab") as stream:
                    stream.write(to_lines(_row(entry, score) for entry, score in zip(batch, scores, strict=True)))
                bar.advance(len(batch))
    state.wait_for_everyone()
    if state.is_main_process:
        known = _known(folder, scorer.name)
        listed = [known.pop(entry.key) | asdict(entry) for entry in folder.entries]
        write_file(final, to_lines([*listed, *known.values()]))  # of the others too: a longer listing may come again
        for part in folder.path.glob(f"scores-{scorer.name}.part-*.jsonl"):
            part.unlink()
    state.wait_for_everyone()
    return len(left)


def _row(entry: ImageEntry, score: float) -> dict[str, object]:
    return {**asdict(entry), "score": score}


def _known(folder: ImageFolder, scorer: str) -> dict[tuple[str, int], dict[str, Any]]:
    """{(prompt, seed): line} of every score there is, of images that are not listed as well."""
    known: dict[tuple[str, int], dict[str, Any]] = {}
    final = folder.path / f"scores-{scorer}.jsonl"
    for file in (final, *sorted(folder.path.glob(f"scores-{scorer}.part-*.jsonl"))):
        if file.is_file():
            if file is not final:
                _drop_torn_line(file)
            rows = read_lines(file)
            parse_scores(rows, file)
            known |= {(row["prompt"], row["seed"]): row for row in rows}
    return known


def _drop_torn_line(part: Path) -> None:
    """A part that was being written when its process died may end within a line; that line's image is scored again."""
    data = part.read_bytes()
    if not data.endswith(b"\n"):
        write_file(part, data[: data.rfind(b"\n") + 1])
