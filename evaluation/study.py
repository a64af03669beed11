"""A blind study: pairs of images of two models, of the same prompt and noise, for people to judge in a browser.

    DIR/study.html   the page that people get: pictures and prompts, and no word of where a picture comes from
    DIR/key.json     which side is which model's; it stays with whoever counts (evaluation/tally.py)

Which pairs are shown, their order and their sides are hashes of (seed, prompt, image seed).
"""

import base64
import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from inpo.common.durable import write_file
from inpo.common.errors import DataError, UsageError
from inpo.common.pages import render
from inpo.common.paths import short_names
from inpo.common.seeding import stable_hash
from inpo.common.text import read_text
from inpo.evaluation.compare import shared_keys
from inpo.evaluation.image_folder import ImageFolder

PAGE, KEY = "study.html", "key.json"
MOST_PAIRS = 50
QUESTIONS = {
    "overall": ("Overall preference", "Which image do you prefer, given the prompt?"),
    "appeal": ("Visual appeal", "Which image looks better, whatever the prompt says?"),
    "alignment": ("Prompt alignment", "Which image shows better what the prompt says?"),
}
"""{id: (name, wording)} of the paper's user study."""
CHOICES = {"left": "left", "tie": "no difference", "right": "right"}
_PIXEL_ART = 128
"""Images up to this side are kept to the pixel, and drawn with hard edges."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """What was made."""

    page: Path
    num_pairs: int
    num_bytes: int
    """Of the page."""
    notes: tuple[str, ...]
    """What whoever counts must know."""


def make_study(a: ImageFolder, b: ImageFolder, out: Path, *, seed: int = 0, most_pairs: int = MOST_PAIRS) -> Study:
    """Write the page and the key of a study of at most so many pairs into `out`.

    Raises DataError if the folders have no images of the same prompt and seed, or none that differ; UsageError if `out`
    holds the key of another study: without it answers could not be counted any more.
    """
    keys = sorted(shared_keys(a, b), key=lambda key: stable_hash("study", seed, *key))
    pairs: list[tuple[tuple[str, int], list[str]]] = []
    alike: set[bool] = set()
    num_equal = 0
    digest = hashlib.blake2b(str(seed).encode(), digest_size=8)
    for key in keys:
        if len(pairs) == most_pairs:
            break
        images = [folder.open(folder.by_key[key]) for folder in (a, b)]
        if np.array_equal(np.asarray(images[0]), np.asarray(images[1])):
            num_equal += 1
            continue
        alike.add(images[0].size == images[1].size)
        pictures = [_picture(image) for image in images]
        digest.update(json.dumps([*key, *pictures]).encode())
        pairs.append((key, pictures))
    if not pairs:
        raise DataError(
            "Every image of one folder is also in the other: there is nothing to choose.",
            where=f"{a.path} and {b.path}",
            expected="images that differ",
            got=f"{num_equal} equal pairs",
            fix="give the folders of two models",
        )
    study = digest.hexdigest()
    sides: dict[str, dict[str, Any]] = {}
    shown = []
    for (prompt, image_seed), pictures in pairs:
        name = f"{stable_hash('study pair', study, prompt, image_seed):016x}"
        left = stable_hash("study side", seed, prompt, image_seed) & 1
        sides[name] = {"prompt": prompt, "seed": image_seed, "left": "ab"[left]}
        shown.append({"pair": name, "prompt": prompt, "left": pictures[left], "right": pictures[1 - left]})
    names, paths = short_names([a.path, b.path]), (a.path, b.path)
    models = {
        letter: {"name": each, "folder": str(path)} for letter, each, path in zip("ab", names, paths, strict=True)
    }
    key_file = out / KEY
    _check_free(key_file, study)
    write_file(key_file, json.dumps({"study": study, **models, "pairs": sides}, indent=1, ensure_ascii=False) + "\n")
    page = _page(study, shown)
    write_file(out / PAGE, page)
    notes = []
    if num_equal:
        notes.append(f"Pairs of equal images, left out: {num_equal}.")
    if False in alike:
        notes.append("The images of the two folders differ in size: people may tell the models apart by that.")
    return Study(page=out / PAGE, num_pairs=len(pairs), num_bytes=len(page.encode()), notes=tuple(notes))


def read_key(out: Path) -> dict[str, Any]:
    """The key of the study in `out`: {"study", "a", "b", "pairs": {pair: {"prompt", "seed", "left"}}}.

    Raises DataError if there is none, or if it is not as `make_study` wrote it.
    """
    file = out / KEY
    if not file.is_file():
        raise DataError(
            "There is no study here.",
            where=out,
            expected=KEY,
            got="no such file",
            fix="give the --out of `inpo evaluate study A B`",
        )
    fix = "restore it from a copy: without it nobody knows which side was which"
    text = read_text(file, what="The study's key cannot be read.", error=DataError, fix=fix)
    try:
        key = json.loads(text)
        sides = [(pair["prompt"], pair["left"]) for pair in key["pairs"].values()]
        named = [key["study"], key["a"]["name"], key["b"]["name"], *(prompt for prompt, _ in sides)]
        if not all(isinstance(each, str) for each in named) or any(left not in ("a", "b") for _, left in sides):
            raise ValueError("a name or a side is missing")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            "The study's key cannot be read.",
            where=file,
            expected="the file as `inpo evaluate study` wrote it",
            got=f"{type(error).__name__}: {error}"[:200],
            fix=fix,
        ) from None
    return dict(key)


def _check_free(file: Path, study: str) -> None:
    if file.is_file() and (other := read_key(file.parent)["study"]) != study:
        raise UsageError(
            "The output folder holds another study.",
            where=file.parent,
            expected="a new folder, or the same images, --seed and --most-pairs",
            got=f"study {other}, this one is {study}",
            fix="choose another --out: the answers to the other study need its key",
        )


def _picture(image: Image.Image) -> str:
    """A data URI that holds pixels and nothing else, of the same form for every image of a size."""
    bare = Image.fromarray(np.asarray(image))
    buffer = io.BytesIO()
    small = max(bare.size) <= _PIXEL_ART
    if small:
        bare.save(buffer, format="PNG")
    else:
        bare.save(buffer, format="JPEG", quality=95, subsampling=0)
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _page(study: str, pairs: list[dict[str, Any]]) -> str:
    data = {"study": study, "pairs": pairs, "questions": list(QUESTIONS), "small": _PIXEL_ART}
    return render(Path(__file__).parent / "assets", PAGE, data=data, questions=QUESTIONS, choices=CHOICES)
