"""`inpo push`: a run's result on a model hub, with a card that shows it."""

import json
import os
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi

from inpo.common.errors import StorageError, UsageError
from inpo.common.text import read_text
from inpo.train.card import hub_id, with_results
from inpo.train.lora import KOHYA_FILE, result_folder


def claim_repository(repository: str, *, private: bool = False) -> None:
    """Make the repository, or see that one may write to it. Raises StorageError, and UsageError for one that is there
    already and public, if it is to be private."""
    try:
        _api().create_repo(repository, private=private, exist_ok=True)
        is_public = private and not _api().repo_info(repository).private
    except Exception as error:  # the hub's client raises its own, its HTTP library's, and ValueError for a name
        raise _refused(repository, error) from error
    if is_public:
        raise UsageError(
            "The repository is there already, and everybody can read it.",
            where=repository,
            expected="a private one, as was asked for",
            got="a public one",
            fix="make it private at the hub, or push to another",
        )


def push(run: Path, repository: str, *, private: bool, license: str | None, compare: Path | None) -> str:
    """Upload what a run wrote, in one commit; returns the commit's address.

    The card gets the repository's name, the first and last of RUN/samples, and picture and table of `compare`, a folder
    of `inpo evaluate compare --out`. Files are as they are, but for paths of this machine that libraries left in them.

    Raises UsageError if there is nothing to push, StorageError if the hub refuses or is not reached.
    """
    folder = result_folder(run)
    if folder is None or not (folder / "README.md").is_file():
        raise UsageError(
            "There is nothing to push here.",
            where=run,
            expected="a finished run's output folder, with pipeline/ or lora/",
            got=", ".join(sorted(entry.name for entry in run.iterdir())[:8]) if run.is_dir() else "no folder",
            fix="let `inpo train` finish",
        )
    pictures, scores = _samples(run), ""
    if compare is not None:
        fix = "name a folder that `inpo evaluate compare --out` made"
        scores = read_text(compare / "comparison.md", what="There is no comparison here.", error=UsageError, fix=fix)
        pictures = {"images/comparison.png": compare / "comparison.png", **pictures}
    card = read_text(
        folder / "README.md", what="The model card cannot be read.", error=UsageError, fix="let `inpo train` finish"
    )
    files: dict[str, Path] = {
        file.relative_to(folder).as_posix(): file
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file != folder / "README.md"
    }
    if folder.name == "lora" and (run / KOHYA_FILE).is_file():
        files[KOHYA_FILE] = run / KOHYA_FILE
    files |= {name: file for name, file in pictures.items() if file.is_file()}
    text = with_results(
        card,
        repository=repository,
        license=license,
        images=[name for name, file in pictures.items() if file.is_file()],
        scores=scores,
    )
    claim_repository(repository, private=private)
    operations = [CommitOperationAdd("README.md", text.encode())]
    operations += [CommitOperationAdd(name, _content(file)) for name, file in files.items()]
    try:
        return str(_api().create_commit(repository, operations, commit_message="Trained with InPO cache").commit_url)
    except Exception as error:
        raise _refused(repository, error) from error


def _api() -> HfApi:
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT"))


def _samples(run: Path) -> dict[str, Path]:
    found = sorted((run / "samples").glob("step-*.png"))
    return {f"images/{file.name}": file for file in dict.fromkeys([*found[:1], *found[-1:]])}


def _content(file: Path) -> str | bytes:
    """What is uploaded of a file: the libraries write into configurations where they were read from."""
    if file.suffix != ".json" or file.stat().st_size > 1 << 20:
        return str(file)
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return str(file)
    cleaned = _without_paths(document)
    return str(file) if cleaned == document else (json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n").encode()


def _without_paths(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_paths(each) for each in value]
    if not isinstance(value, dict):
        return value
    return {
        key: _without_paths(each)
        for key, each in value.items()
        if not (key.endswith("name_or_path") and isinstance(each, str) and hub_id(each) is None)
    }


def _refused(repository: str, error: Exception) -> StorageError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return StorageError(
        "The hub did not take it.",
        where=repository,
        expected="a repository OWNER/NAME that you may write to",
        got=" ".join(lines[:2])[:300],
        fix="check the network, log in with `hf auth login` or set HF_TOKEN, and check the name and HF_ENDPOINT",
    )
