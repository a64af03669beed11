"""A data set by its name on the hub, against a stand-in of the hub's own API on this machine."""

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import HfFileSystem, constants

from inpo.common.errors import DataError, ModelError
from inpo.common.models import open_model
from inpo.common.pairs import Pair, open_source
from inpo.common.pairs.hub import parse_hub_name

SHA = {"main": "1" * 40, "v2": "2" * 40}


def table(word: str) -> bytes:
    """Two votes of a set, its prompts told apart by `word`."""
    rows = [
        {
            "prompt": f"{word} {number}",
            "image1": {"bytes": b"A", "path": "a"},
            "image2": {"bytes": b"B", "path": "b"},
            "votes_image1": 3,
            "votes_image2": 1,
        }
        for number in range(2)
    ]
    stream = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), stream)
    return stream.getvalue().to_pybytes()


FILES = {
    "votes/one": {
        "README.md": b"#",
        "data/train-00000-of-00002.parquet": table("a"),
        "data/train-00001-of-00002.parquet": table("b"),
    },
    "votes/many": {
        f"{config}/{split}-00000-of-00001.parquet": table(f"{config} {split}")
        for config in ("4k", "8k")
        for split in ("train", "test")
    },
    "votes/list": {
        "train.json": json.dumps([{"prompt": "p", "path1": "images/a.png", "path2": "images/b.png"}]).encode(),
        "images/a.png": b"A",
        "images/b.png": b"B",
    },
}


class Hub(BaseHTTPRequestHandler):
    """What the client asks for: a data set's description, the entries of paths, and ranges of files."""

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: object) -> None:
        self._answer(200, json.dumps(value).encode(), Content_Type="application/json")

    def _missing(self, code: str) -> None:
        self._answer(404, b"{}", X_Error_Code=code, X_Error_Message=code)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        repository = re.match(r"/api/datasets/([^/]+/[^/]+)/paths-info/", self.path)[1]  # type: ignore[index]
        files = FILES[repository]
        asked = json.loads(body)["paths"] if body.startswith("{") else re.findall(r"paths=([^&]+)", body)
        self._json([entry(name, files) for name in map(unquote, asked) if name in files])

    def do_GET(self) -> None:
        path = unquote(self.path.partition("?")[0])
        api = re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/revision/([^/]+))?", path)
        if api:
            revision = api[2] or "main"
            if api[1] not in FILES:
                return self._missing("RepoNotFound")
            sha = SHA.get(revision) or (revision if revision in SHA.values() else None)
            if sha is None:
                return self._missing("RevisionNotFound")
            return self._json({"id": api[1], "sha": sha, "siblings": [{"rfilename": name} for name in FILES[api[1]]]})
        tree = re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/tree/[^/]+(?:/(.*))?", path)
        if tree and tree[1] in FILES:
            files, folder = FILES[tree[1]], f"{tree[2]}/" if tree[2] else ""
            below = {name.removeprefix(folder).partition("/")[0] for name in files if name.startswith(folder)}
            if below:
                return self._json([entry(folder + name, files) for name in sorted(below)])
        file = re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if file and file[3] in FILES.get(file[1], {}):
            data = FILES[file[1]][file[3]]
            span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if span:
                first, last = int(span[1]), min(int(span[2]), len(data) - 1)
                return self._answer(206, data[first : last + 1], Content_Range=f"bytes {first}-{last}/{len(data)}")
            return self._answer(200, data)
        return self._missing("EntryNotFound")


def entry(name: str, files: dict[str, bytes]) -> dict[str, object]:
    if name not in files:
        return {"type": "directory", "path": name, "size": 0, "oid": "0" * 40}
    return {"type": "file", "path": name, "size": len(files[name]), "oid": "0" * 40}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    HfFileSystem.clear_instance_cache()
    yield
    server.shutdown()
    server.server_close()
    HfFileSystem.clear_instance_cache()


def prompts(location: str) -> list[str]:
    items = [item for shard in open_source(location).shards for item in shard.rows(0, shard.num_rows)]
    assert all(isinstance(item, Pair) and (item.win, item.lose) == (b"A", b"B") for item in items), items
    return [item.prompt for item in items if isinstance(item, Pair)]


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("votes/one", ["a 0", "a 1", "b 0", "b 1"]),
        ("votes/one/train", ["a 0", "a 1", "b 0", "b 1"]),
        ("votes/one@v2", ["a 0", "a 1", "b 0", "b 1"]),
        ("votes/many:8k/test", ["8k test 0", "8k test 1"]),
        ("votes/many:4k@main/train", ["4k train 0", "4k train 1"]),
        ("votes/list/train", ["p"]),
        ("hf://datasets/votes/one@main/data/train-00001-of-00002.parquet", ["b 0", "b 1"]),
    ],
)
def test_a_data_set_is_read_by_its_name(hub: None, location: str, expected: list[str]) -> None:
    assert prompts(location) == expected


def test_a_revision_is_fixed_to_its_commit(hub: None) -> None:
    shards = open_source("votes/one@v2").shards
    assert [shard.name for shard in shards] == ["train-00000-of-00002", "train-00001-of-00002"]
    assert all(f"@{SHA['v2']}/" in shard.file for shard in shards)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("location", "words"),
    [
        ("votes/many", "more than one config: 4k, 8k.*votes/many:CONFIG"),
        ("votes/many:8k", "more than one split: test, train.*votes/many:8k/SPLIT"),
        ("votes/many:9k", "no config 9k; there are: 4k, 8k"),
        ("votes/many:8k/trian", "no split trian; there are: test, train.*is train meant"),
        ("votes/gone", "no data set of that name, here or on the hub"),
        ("votes/one@v9", "no revision v9 of votes/one"),
    ],
)
def test_what_the_hub_has_not_is_said(hub: None, location: str, words: str) -> None:
    with pytest.raises(DataError, match=f"(?s){words}"):
        open_source(location)


@pytest.mark.parametrize("location", ["votes/one", "hf://datasets/votes/one/data/*.parquet", "hf://datasets/votes/one"])
def test_offline_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, location: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="the hub is not asked: HF_HUB_OFFLINE is set"):
        open_source(location)


@pytest.mark.parametrize("location", ["a", "/a/b", "./a/b", "a/b/c/d", "a/pairs.tar", "a/b.jsonl", "s3://a/b", "a/b c"])
def test_what_is_no_name_on_the_hub(location: str) -> None:
    assert parse_hub_name(location) is None


def test_a_model_on_this_machine_has_no_revision(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has no revisions"):
        open_model(str(tmp_path), revision="main")
