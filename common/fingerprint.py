"""Fingerprints: what a model is, by content, never by path or modification time.

The digest of a safetensors file is over its header (names, dtypes, shapes) and bytes; it is kept in a small file of the
user's cache folder under (path, size, mtime), so that a second run does not read gigabytes again.
"""

import hashlib
import json
import os
import struct
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_VOLATILE = {"_name_or_path", "_diffusers_version", "transformers_version", "torch_dtype", "dtype", "_commit_hash"}
_BLOCK_BYTES = 1 << 24


def of_config(config: dict[str, Any]) -> str:
    """Digest of a configuration without the entries that do not change numbers."""
    kept = {key: value for key, value in config.items() if key not in _VOLATILE}
    return hashlib.blake2b(json.dumps(kept, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def of_files(files: Iterable[Path], *, config: dict[str, Any] | None = None, prefix: tuple[str, ...] = ()) -> str:
    """Digest of a component: its weight files in name order, and its configuration if given.

    With `prefix` only the tensors of a safetensors file whose names start so are read (one file, many components).
    """
    total = hashlib.blake2b(digest_size=16)
    for file in sorted(files, key=lambda path: path.name):
        total.update(_of_file(file, prefix).encode())
    if config is not None:
        total.update(of_config(config).encode())
    return total.hexdigest()


def _of_file(file: Path, prefix: tuple[str, ...]) -> str:
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
    total = hashlib.blake2b(digest_size=16)
    with file.open("rb") as stream:
        (header_bytes,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(header_bytes))
        start = 8 + header_bytes
        for name in sorted(header):
            if name == "__metadata__" or (prefix and not name.startswith(prefix)):
                continue
            entry = header[name]
            total.update(f"{name}|{entry['dtype']}|{entry['shape']}".encode())
            first, last = entry["data_offsets"]
            stream.seek(start + first)
            left = last - first
            while left:
                block = stream.read(min(left, _BLOCK_BYTES))
                if not block:
                    raise ValueError(f"{file} is shorter than its header says")
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
        memo = _memo_file()
        memo.parent.mkdir(parents=True, exist_ok=True)
        known = _load_known() | {key: value}
        with tempfile.NamedTemporaryFile("w", dir=memo.parent, delete=False) as stream:
            json.dump(known, stream)
        os.replace(stream.name, memo)
    except OSError:
        return
