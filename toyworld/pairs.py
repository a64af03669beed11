"""Preference pairs: two pictures for one caption, labelled by the oracle.

Who made the pictures says how far the pairs are from what a model makes itself:

    own         the model made both
    other       the model made one, the world's other model the other
    rendered    the renderer made both, of mixed quality as in the training data; `distance` adds a look of their own

Everything random in a pair depends on (seed, index) alone. Pairs come in parts of 256; a part is written whole, then
listed in toyworld.json, so that work stopped goes on where it was and finished work is not done again.
"""

import hashlib
import io
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel

from inpo.common.durable import entries, write_file
from inpo.common.errors import DataError, UsageError
from inpo.common.progress import ProgressReport
from inpo.common.seeding import normal, stable_hash, uniform
from inpo.common.text import read_text
from inpo.toyworld.mixed_quality import foreign_look, mixed_render
from inpo.toyworld.oracle import OracleScorer
from inpo.toyworld.pair_files import WRITERS, LabelledPair, part_file
from inpo.toyworld.sampling import GUIDANCE, LATENT_SHAPE, MODELS, STEPS, generate
from inpo.toyworld.scenes import captions, parse_caption
from inpo.toyworld.split import Split

PAIRS_PER_PART = 256
PAIRS_PER_BATCH = 32
MAX_DISTANCE = 4.0
TIE_MARGIN = 0.05
"""Pictures whose oracle scores (0 to 6) differ by less are a tie."""
_PAINTER = "base"
_FIRST_RIGHT = 8
"""So many pairs keep their label: the first of a cache is the one that people look at."""

Format = Literal["parquet", "webdataset"]
Images = Literal["own", "other", "rendered"]
RECORD = "toyworld.json"


@dataclass(frozen=True, kw_only=True)
class PairSettings:
    """What determines the pairs."""

    num_pairs: int
    seed: int = 0
    split: Split = "train"
    formats: tuple[Format, ...] = ("parquet", "webdataset")
    flip_labels: float = 0.05
    """Probability that a pair's label is the opposite of what the oracle says; ties stay ties."""
    model: str = _PAINTER
    """Which of the base models makes the pictures."""
    images: Images = "own"
    """Who makes the pictures."""
    distance: float = 0.0
    """How strange the look of rendered pictures is; at 0 it is that of the training data."""

    def __post_init__(self) -> None:
        makers, formats = get_args(Images), ", ".join(self.formats)
        once = len(set(self.formats)) == len(self.formats) > 0 and not set(self.formats) - set(WRITERS)
        for right, option, expected, got in (
            (self.model in MODELS, "--model", " or ".join(MODELS), self.model),
            (
                self.model == _PAINTER or self.images != "rendered",
                "--model",
                f"{_PAINTER} with --images rendered: no model has a part in them",
                self.model,
            ),
            (self.num_pairs >= 1, "--pairs", "1 or more", self.num_pairs),
            (0 <= self.flip_labels <= 1, "--flip-labels", "a probability, 0 to 1", self.flip_labels),
            (self.images in makers, "--images", " or ".join(makers), self.images),
            (0 <= self.distance <= MAX_DISTANCE, "--distance", f"0 to {MAX_DISTANCE}", self.distance),
            (
                not self.distance or self.images == "rendered",
                "--distance",
                "0 without --images rendered",
                self.distance,
            ),
            (once, "--format", "parquet, webdataset or both, once each", formats),
        ):
            if not right:
                raise UsageError(
                    "No such pairs can be made.", where=option, expected=expected, got=got, fix="correct the value"
                )
        captions(self.split)

    @property
    def num_parts(self) -> int:
        """Parts of at most 256 pairs."""
        return -(-self.num_pairs // PAIRS_PER_PART)

    def identity(self) -> dict[str, Any]:
        """The settings with all else the pairs depend on, as it stands in toyworld.json."""
        settings: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return settings | {
            "steps": STEPS,
            "guidance": GUIDANCE,
            "tie_margin": TIE_MARGIN,
            "base": {name: _fingerprint(name) for name in self.models},
        }

    @property
    def models(self) -> tuple[str, ...]:
        """Which base models make pictures, by side where there are two."""
        others = tuple(name for name in MODELS if name != self.model)
        return {"own": (self.model,), "other": (self.model, *others), "rendered": ()}[self.images]


@dataclass(frozen=True, kw_only=True)
class PairReport:
    """How many pairs there are, and how many of them are ties or carry a flipped label."""

    num_pairs: int
    num_ties: int
    num_flipped: int

    @classmethod
    def of(cls, parts: dict[str, dict[str, int]]) -> "PairReport":
        """The sums over all parts."""
        pairs, ties, flipped = (sum(part[name] for part in parts.values()) for name in ("pairs", "ties", "flipped"))
        return cls(num_pairs=pairs, num_ties=ties, num_flipped=flipped)


@cache
def _fingerprint(model: str) -> str:
    files = sorted(MODELS[model].rglob("*.safetensors"))
    if not files:
        raise UsageError(
            "This base model has not been trained.",
            where=MODELS[model],
            expected="a pipeline folder",
            got="no weights",
            fix=f"`make toyworld-{model}` trains it, in the repository",
        )
    digest = hashlib.blake2b(digest_size=16)
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def pair_captions(settings: PairSettings) -> list[str]:
    """The caption of every pair: the split's captions in an order of the seed's, over again when there are too few."""
    ours = sorted(captions(settings.split), key=lambda caption: stable_hash(settings.seed, caption))
    return [ours[index % len(ours)] for index in range(settings.num_pairs)]


def make_batch(settings: PairSettings, start: int, stop: int) -> list[LabelledPair]:
    """Pairs start..stop-1: makes two pictures each, judges and labels them."""
    indices = range(start, stop)
    texts = pair_captions(settings)[start:stop]
    images = _rendered(settings, texts, indices) if settings.images == "rendered" else _drawn(settings, texts, indices)
    scores = OracleScorer().score(images, texts + texts).tolist()
    half = len(texts)
    return [
        _label(settings, index, texts[i], (images[i], images[half + i]), (scores[i], scores[half + i]))
        for i, index in enumerate(indices)
    ]


def _drawn(settings: PairSettings, texts: list[str], indices: range) -> list[Image.Image]:
    """All first pictures, then all second ones, from noise of their own."""
    noise = [normal(LATENT_SHAPE, settings.seed, index, "picture", side) for side in (0, 1) for index in indices]
    asked, parts = texts + texts, len(settings.models)
    share = len(asked) // parts
    return [
        image
        for part, model in enumerate(settings.models)
        for image in generate(
            asked[part * share : (part + 1) * share], torch.stack(noise[part * share : (part + 1) * share]), model=model
        )
    ]


def _rendered(settings: PairSettings, texts: list[str], indices: range) -> list[Image.Image]:
    """All first pictures, then all second ones."""
    made = []
    for side in (0, 1):
        for index, text in zip(indices, texts, strict=True):
            rng = np.random.default_rng(stable_hash(settings.seed, index, "render", side))
            picture = mixed_render(parse_caption(text), rng)
            made.append(Image.fromarray(foreign_look(picture, rng, strength=settings.distance)))
    return made


def _label(
    settings: PairSettings, index: int, caption: str, images: tuple[Image.Image, ...], scores: tuple[float, float]
) -> LabelledPair:
    tie = abs(scores[0] - scores[1]) < TIE_MARGIN
    turned = index >= _FIRST_RIGHT and uniform(settings.seed, index, "flip") < settings.flip_labels
    flipped = turned and not tie
    first_wins = (scores[0] > scores[1]) != flipped
    return LabelledPair(
        index=index,
        caption=caption,
        pictures=(_png(images[0]), _png(images[1])),
        picture_ids=(_picture_id(settings, index, 0), _picture_id(settings, index, 1)),
        label_0=0.5 if tie else float(first_wins),
        flipped=flipped,
    )


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _picture_id(settings: PairSettings, index: int, side: int) -> str:
    makers = [_fingerprint(name) for name in settings.models] or [settings.images, str(settings.distance)]
    return f"{stable_hash(*makers, settings.split, settings.seed, index, side):016x}"


def make_pairs(settings: PairSettings, folder: Path, *, quiet: bool = False) -> PairReport:
    """Makes the pairs that `folder` still lacks.

    Raises UsageError for a folder that holds anything but the beginning of these very pairs.
    """
    parts = _finished_parts(settings, folder)
    spans = {part: _batch_spans(settings, part) for part in range(settings.num_parts) if str(part) not in parts}
    jobs = [span for of_part in spans.values() for span in of_part]
    left = sum(stop - start for start, stop in jobs)
    progress = ProgressReport(
        "pairs", total=settings.num_pairs, unit="pairs", done=settings.num_pairs - left, quiet=quiet
    )
    with progress, _workers(len(jobs)) as run:
        batches = run(partial(make_batch, settings), [start for start, _ in jobs], [stop for _, stop in jobs])
        for part, of_part in spans.items():
            pairs: list[LabelledPair] = []
            for _ in of_part:
                batch = next(batches)
                pairs += batch
                progress.advance(len(batch))
            for name in settings.formats:
                WRITERS[name](pairs, part_file(folder, name, part))
            parts[str(part)] = {
                "pairs": len(pairs),
                "ties": sum(pair.label_0 == 0.5 for pair in pairs),
                "flipped": sum(pair.flipped for pair in pairs),
            }
            _write_record(settings, folder, parts)
    return PairReport.of(parts)


class _Counts(BaseModel):
    pairs: int
    ties: int
    flipped: int


class _Record(BaseModel):
    """What is read of toyworld.json."""

    settings: dict[str, Any]
    parts: dict[str, _Counts]


def _finished_parts(settings: PairSettings, folder: Path) -> dict[str, dict[str, int]]:
    """Counts of the parts that lie in `folder` already, by part; begins the record of a new or empty folder."""
    record = folder / RECORD
    if record.exists():
        found, ours = _read_record(record), settings.identity()
        differ = [name for name in ours if found.settings.get(name) != ours[name]]
        if differ:
            raise UsageError(
                "This folder holds pairs of other settings.",
                where=folder,
                expected=", ".join(f"{name} = {ours[name]}" for name in differ),
                got=", ".join(f"{name} = {found.settings.get(name)}" for name in differ),
                fix="choose another folder, or remove this one",
            )
        return {
            str(part): found.parts[str(part)].model_dump()
            for part in range(settings.num_parts)
            if str(part) in found.parts and all(part_file(folder, name, part).is_file() for name in settings.formats)
        }
    if entries(folder) or (folder.exists() and not folder.is_dir()):
        raise UsageError(
            "This folder holds something else.",
            where=folder,
            expected="a new or empty folder",
            fix="choose another one",
        )
    _write_record(settings, folder, {})
    return {}


def _read_record(file: Path) -> _Record:
    """Raises DataError for what is no such record."""
    fix = "remove the file and the folders beside it, and make the pairs again"
    text = read_text(file, what="The record of the pairs cannot be read.", error=DataError, fix=fix)
    try:
        return _Record.model_validate(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise DataError(
            "The record of the pairs cannot be read.",
            where=file,
            expected="a JSON object, as `inpo toyworld pairs` wrote it",
            got="; ".join(str(error).splitlines()[:3]),
            fix=fix,
        ) from None


def _write_record(settings: PairSettings, folder: Path, parts: dict[str, dict[str, int]]) -> None:
    complete = len(parts) == settings.num_parts
    record = {"settings": settings.identity(), "complete": complete, **vars(PairReport.of(parts)), "parts": parts}
    write_file(folder / RECORD, json.dumps(record, indent=2) + "\n")


def _batch_spans(settings: PairSettings, part: int) -> list[tuple[int, int]]:
    """First and last-but-one pair index of a part's batches."""
    end = min((part + 1) * PAIRS_PER_PART, settings.num_pairs)
    return [(at, min(at + PAIRS_PER_BATCH, end)) for at in range(part * PAIRS_PER_PART, end, PAIRS_PER_BATCH)]


@contextmanager
def _workers(num_jobs: int) -> Iterator[Callable[..., Iterator[list[LabelledPair]]]]:
    """A `map` over as many processes as there are cores, or the builtin one where a single process will do; with one
    thread each, so that the same pairs come out everywhere."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if min(cores, num_jobs) < 2:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield map
        finally:
            torch.set_num_threads(threads)
        return
    # A fresh interpreter for each worker: forking a process that has used torch's threads may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        min(cores, num_jobs), mp_context=context, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        try:
            yield pool.map
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
