"""Fingerprints: what a model is, by content, never by path or modification time.

What counts is what a library loads: the tensors of a component's safetensors files, by name, dtype, shape and bytes,
however many files hold them. Every byte is read at every start. No digest is remembered: whatever a file system says of
a file without reading it (size, times, number) can be the same for other bytes.
"""

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from inpo.common.errors import ModelError

_VOLATILE = {
    "_name_or_path",
    "name_or_path",
    "_diffusers_version",
    "transformers_version",
    "torch_dtype",
    "dtype",
    "_commit_hash",
}
_BLOCK_BYTES = 1 << 22


def of_config(config: dict[str, Any]) -> str:
    """Digest of a configuration without the entries that do not change numbers."""
    kept = {key: value for key, value in config.items() if key not in _VOLATILE}
    return hashlib.blake2b(json.dumps(kept, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def of_weights(files: Iterable[Path], *, config: dict[str, Any] | None = None, prefix: tuple[str, ...] = ()) -> str:
    """Digest of a component: the tensors of its safetensors files in name order, and its configuration if given.

    With `prefix` only tensors whose names start so are read (one file, many components). Raises ModelError for a file
    that cannot be read, is damaged or cut, or has no tensor under `prefix`.
    """
    total = hashlib.blake2b(digest_size=16)
    tensors = sorted((each for file in files for each in _tensors(file, prefix)), key=lambda each: each.name)
    if sum(each.num_bytes for each in tensors) < _BLOCK_BYTES:
        for each in tensors:
            total.update(each.digest())
    else:
        # Hashing leaves Python's lock to the others.
        with ThreadPoolExecutor(min(32, len(os.sched_getaffinity(0)))) as pool:
            for value in pool.map(_Tensor.digest, tensors):
                total.update(value)
    if config is not None:
        total.update(of_config(config).encode())
    return total.hexdigest()


def of_texts(files: Iterable[Path]) -> str:
    """Digest of small text files by name and content; of JSON, without the entries that do not change numbers."""
    total = hashlib.blake2b(digest_size=16)
    for file in sorted(files, key=lambda path: path.name):
        with _readable(file):
            data = file.read_bytes()
        try:
            document = json.loads(data) if file.suffix == ".json" else None
        except (ValueError, RecursionError):  # whoever loads it will say so
            document = None
        value = of_config(document) if isinstance(document, dict) else hashlib.blake2b(data, digest_size=16).hexdigest()
        total.update(f"{file.name}|{value}".encode())
    return total.hexdigest()


TAKEN_OVER = "taken-over.json"
"""In a pipeline that a run wrote: {component that it did not train: {"here": digest, "there": digest}}."""


def write_taken_over(folder: Path, here: Mapping[str, str], there: Mapping[str, str]) -> None:
    """Say of a pipeline's components what they were where they were taken from: the libraries write the same numbers
    in another dtype, configurations with more in them, tokenizers in other files."""
    told = {name: {"here": here[name], "there": there[name]} for name in here}
    (folder / TAKEN_OVER).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def as_taken_over(folder: Path, found: Mapping[str, str]) -> dict[str, str]:
    """The fingerprints of a pipeline's components: of those that lie there as a run wrote them, what they were where it
    took them from. Raises ModelError if that cannot be read."""
    file = folder / TAKEN_OVER
    if not file.is_file():
        return dict(found)
    try:
        told = json.loads(file.read_bytes())
        return {
            name: str(told[name]["there"]) if name in told and told[name]["here"] == digest else digest
            for name, digest in found.items()
        }
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ModelError(
            "What a run has written of its pipeline's components cannot be read.",
            where=file,
            expected='{"vae": {"here": digest, "there": digest}, ...}',
            got=f"{type(error).__name__}: {error}",
            fix="remove the file: the components then count as others than those of the base",
        ) from None


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        if file.exists() and not os.access(file, os.R_OK):  # safetensors calls such a file missing
            raise ModelError(
                "A file of the model may not be read.",
                where=file,
                expected="read permission",
                got="permission denied",
                fix="check the owner and mode of the file",
            ) from error
        raise ModelError(
            "A file of the model cannot be read: it is damaged, cut or not what its name says.",
            where=file,
            expected="a whole safetensors file" if file.suffix == ".safetensors" else "a readable file",
            got=f"{_bytes_of(file)}; {error}",
            fix="download or copy the file again",
        ) from error


def _bytes_of(file: Path) -> str:
    try:
        return f"{file.stat().st_size} bytes"
    except OSError:  # a link to nothing, as an interrupted download leaves it
        return "no such file"


@dataclass(frozen=True)
class _Tensor:
    """Where a tensor's bytes lie in its file."""

    file: Path
    name: str
    dtype: str
    shape: list[int]
    start: int
    num_bytes: int

    def digest(self) -> bytes:
        total = hashlib.blake2b(f"{self.name}|{self.dtype}|{self.shape}|".encode(), digest_size=16)
        left = self.num_bytes
        with _readable(self.file), self.file.open("rb") as stream:
            stream.seek(self.start)
            while left:
                block = stream.read(min(left, _BLOCK_BYTES))
                if not block:
                    raise OSError(f"{self.file} is shorter than its header says")
                total.update(block)
                left -= len(block)
        return total.digest()


def _tensors(file: Path, prefix: tuple[str, ...]) -> list[_Tensor]:
    """The tensors of a safetensors file, by its header; the header's free metadata does not count."""
    with _readable(file):
        with safe_open(file, framework="numpy"):
            pass  # the library checks that header and offsets fit the file: nothing below can run astray
        with file.open("rb") as stream:
            (header_bytes,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(header_bytes))
    header.pop("__metadata__", None)
    names = [name for name in header if name.startswith(prefix or "")]
    if not names:
        # Its digest would be that of every other file without them.
        raise ModelError(
            "A file of the model lacks the weights that are looked for in it.",
            where=file,
            expected=f"tensors whose names begin with {' or '.join(prefix)}" if prefix else "tensors",
            got=", ".join(sorted(header)[:3]) or "none",
            fix="a single file must be a whole checkpoint (UNet, VAE and text encoder in the original layout); "
            "put one component alone into a pipeline folder instead",
        )
    tensors = []
    for name in names:
        start, end = header[name]["data_offsets"]
        tensors.append(
            _Tensor(file, name, header[name]["dtype"], header[name]["shape"], 8 + header_bytes + start, end - start)
        )
    return tensors
