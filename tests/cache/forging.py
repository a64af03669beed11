"""Documents and files that are whole and sealed, and say what no writer of ours says; and what verify finds."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from inpo.common.cache import open_cache
from inpo.common.cache.store import CacheStore, digest
from inpo.common.errors import CacheError
from inpo.inspection.checks import Finding
from inpo.inspection.verify import verify


def edit(document: Any, path: str, value: Any) -> None:
    """Set `a.b.0` of a document to a value; to what a function makes of it, if the value is one."""
    *parents, last = path.split(".")
    for name in parents:
        document = document[int(name) if isinstance(document, list) else name]
    key: Any = int(last) if isinstance(document, list) else last
    document[key] = value(document[key]) if callable(value) else value


def commit_of(folder: Path, name: str) -> Path:
    """The commit of a shard of images, or of one of texts: texts/NAME."""
    of_texts = name.startswith("texts/")
    return folder / ("text-commits" if of_texts else "commits") / f"{name.removeprefix('texts/')}.json"


def attempt_of(folder: Path, name: str = "s0") -> Path:
    """The only attempt of such a shard."""
    (attempt,) = (folder / (name if name.startswith("texts/") else f"shards/{name}")).iterdir()
    return attempt


def forge_commit(folder: Path, change: Callable[[dict[str, Any]], None], name: str = "s0") -> None:
    file = commit_of(folder, name)
    document = json.loads(file.read_text())
    change(document)
    rest = {key: value for key, value in document.items() if key != "checksum"}
    checksum = digest(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode())
    file.write_text(json.dumps(rest | {"checksum": checksum}))


DEEP = "../../../../etc/passwd"
RANDOM = ("x0_t", "reference_error")
"""Checks of numbers that are random here, and fulfil no identity."""


def verified(folder: Path) -> list[Finding]:
    """What verify finds beside that."""
    return [each for each in verify(str(folder)).findings if each.check not in RANDOM]


def forge_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest and make every commit one of it."""
    file = folder / "manifest.json"
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))
    made_under = digest(file.read_bytes())
    names = [commit.stem for commit in (folder / "commits").iterdir()]
    for name in [*names, *(f"texts/{commit.stem}" for commit in (folder / "text-commits").iterdir())]:
        forge_commit(folder, lambda each: each.update(manifest=made_under), name)


def forge_file(folder: Path, path: str, data: bytes, name: str = "s0") -> None:
    """Replace a file of a shard's attempt and have the commit say so."""
    attempt = attempt_of(folder, name)
    (attempt / path).write_bytes(data)
    store = CacheStore(str(folder))

    def change(document: dict[str, Any]) -> None:
        document["files"][path] = len(data)
        document["digests"][path] = store.sample_digest(str((attempt / path).relative_to(folder)), len(data))

    forge_commit(folder, change, name)


def refused(folder: Path, document: Path, *, others: set[str], name: str = "s0") -> None:
    """Opening refuses, naming the document and what to do; what goes on without damaged shards has the others."""
    with pytest.raises(CacheError) as caught:
        open_cache(str(folder))
    assert str(document) in str(caught.value)
    assert "to do:" in str(caught.value)
    damaged: dict[str, CacheError] = {}
    try:
        cache = open_cache(str(folder), damaged=damaged)
        left = {*cache.commits, *(f"texts/{each.name}" for each in cache.texts)}
    except CacheError:  # the manifest is refused, or no commit is left
        left = set()
    assert left == others
    assert not others or str(damaged[name]) == str(caught.value)
