"""Fingerprints: what a model is, by content, never by path or modification time.

The digest of a safetensors file is over its header (names, dtypes, shapes) and bytes; it is kept in a small file of the
user's cache folder under (path, size, mtime), so that a second run does not read gigabytes again.
"""

import hashlib
import json
import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from inpo.common.durable import write_file
from inpo.common.errors import ModelError, StorageError

_VOLATILE = {"_name_or_path", "_diffusers_version", "transformers_version", "torch_dtype", "dtype", "_commit_hash"}
_BLOCK_BYTES = 1 << 24


def of_config(config: dict[str, Any]) -> str:
    """Digest of a configuration without the entries that do not change numbers."""
    kept = {key: value for key, value in config.items() if key not in _VOLATILE}
    return hashlib.blake2b(json.dumps(kept, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def of_files(files: Iterable[Path], *, config: dict[str, Any] | None = None, prefix: tuple[str, ...] = ()) -> str:
    """Digest of a component: its weight files in name order, and its configuration if given.

    With `prefix` only the tensors of a safetensors file whose names start so are read (one file, many components).
    Raises ModelError for a file that cannot be read, is damaged or cut, or has no tensor under `prefix`.
    """
    total = hashlib.blake2b(digest_size=16)
    for file in sorted(files, key=lambda path: path.name):
        total.update(_of_file(file, prefix).encode())
    if config is not None:
        total.update(of_config(config).encode())
    return total.hexdigest()


def _of_file(file: Path, prefix: tuple[str, ...]) -> str:
    try:
        return _known_or_read(file, prefix)
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


def _known_or_read(file: Path, prefix: tuple[str, ...]) -> str:
    status = file.stat()
    key = f"{file.resolve()}|{status.st_size}|{status.st_mtime_ns}|{','.join(prefix)}"
    known = _load_known()
    if key in known:
        return known[key]
    value = _digest_safetensors(file, prefix) if file.suffix == ".safetensors" else _digest_bytes(file)
    _remember(key, value)
    return value


def _digest_bytes(file: Path) -> str:
    total = hashlib.blake2b(digest_size=16)
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            total.update(block)
    return total.hexdigest()


def _digest_safetensors(file: Path, prefix: tuple[str, ...]) -> str:
    """Digest over tensors in name order; the header's free metadata does not count."""
    with safe_open(file, framework="numpy"):
        pass  # the library checks that header and offsets fit the file: nothing below can run astray
    total = hashlib.blake2b(digest_size=16)
    with file.open("rb") as stream:
        (header_bytes,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(header_bytes))
        start = 8 + header_bytes
        names = [name for name in sorted(header) if name != "__metadata__" and name.startswith(prefix or "")]
        if not names:
            # Its digest would be that of every other file without them.
            raise ModelError(
                "A file of the model lacks the weights that are looked for in it.",
                where=file,
                expected=f"tensors whose names begin with {' or '.join(prefix)}" if prefix else "tensors",
                got=", ".join([name for name in sorted(header) if name != "__metadata__"][:3]) or "none",
                fix="a single file must be a whole checkpoint (UNet, VAE and text encoder in the original layout); "
                "put one component alone into a pipeline folder instead",
            )
        for name in names:
            entry = header[name]
            total.update(f"{name}|{entry['dtype']}|{entry['shape']}".encode())
            first, last = entry["data_offsets"]
            stream.seek(start + first)
            left = last - first
            while left:
                block = stream.read(min(left, _BLOCK_BYTES))
                if not block:
                    raise OSError(f"{file} is shorter than its header says")
                total.update(block)
                left -= len(block)
    return total.hexdigest()


def _memo_file() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "inpo" / "fingerprints.json"


def _load_known() -> dict[str, str]:
    try:
        known = json.loads(_memo_file().read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _remember(key: str, value: str) -> None:
    """Best effort: a home that cannot be written costs time, not correctness."""
    try:
        write_file(_memo_file(), json.dumps(_load_known() | {key: value}))
    except StorageError:
        return
