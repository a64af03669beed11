"""What a row of a list may name: regular files of the list's folder; with allow_remote other places, within limits."""

import base64
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest

from inpo.common.errors import DataError
from inpo.common.pairs import Pair, Skipped, open_source, pair, reach

LIMIT = 1 << 20


@pytest.fixture(autouse=True)
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A MiB an image, two seconds a host, no waiting between tries."""
    monkeypatch.setattr(reach, "MAX_IMAGE_BYTES", LIMIT)
    monkeypatch.setattr(pair, "MAX_IMAGE_BYTES", LIMIT)
    monkeypatch.setattr(reach, "SECONDS_PER_IMAGE", 2.0)
    monkeypatch.setattr(reach, "_SECONDS_TO_NEXT_TRY", 0.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A list's folder with one image, and one image beside the folder."""
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "a.png").write_bytes(b"A")
    (tmp_path / "secret.png").write_bytes(b"S")
    return tmp_path / "list"


def rows_of(folder: Path, *wins: str, allow_remote: bool = False) -> list[Pair | Skipped]:
    """What a list in `folder` gives whose rows have these images as win and a.png as lose, after a good first row."""
    rows = [{"win": win, "lose": "a.png", "prompt": "p", "id": str(i)} for i, win in enumerate(("a.png", *wins))]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (shard,) = open_source(str(folder), allow_remote=allow_remote).shards
    first, *others = shard.rows(0, 99)
    assert isinstance(first, Pair)
    return others


def reasons(items: list[Pair | Skipped]) -> list[str]:
    return [getattr(item, "reason", "pair") for item in items]


def test_only_regular_files_are_opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where every path is allowed."""
    os.mkfifo(folder / "fifo")
    os.symlink("fifo", folder / "link to a fifo")
    os.symlink("/dev/zero", folder / "link to a device")
    os.symlink("loop", folder / "loop")
    (folder / "folder").mkdir()
    monkeypatch.chdir(folder)  # a socket's address is short
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("socket")
    names = ["fifo", "link to a fifo", "link to a device", "loop", "folder", "socket", "/dev/zero", "/dev/urandom"]
    names += ["a\0b", "x" * 5000, "~/a.png", "a.png/b.png"]
    items = rows_of(folder, *names, "/proc/self/environ", allow_remote=True)
    assert reasons(items) == ["missing_image"] * len(names) + ["empty_image"]
    details = [item.detail for item in items if isinstance(item, Skipped)]
    assert "named pipe" in details[0]
    assert "device" in details[6]
    assert "~ is not expanded in a list" in details[10]


def test_images_that_are_still_packed_are_told_as_such(folder: Path) -> None:
    (found,) = rows_of(folder, "images/0.png")
    assert "unpack" not in found.detail  # type: ignore[union-attr]
    for name in ("images.tar.gz.00", "images.tar.gz.01"):
        (folder / name).write_bytes(b"\x1f\x8b")
    (found,) = rows_of(folder, "images/0.png")
    assert reasons([found]) == ["missing_image"]
    assert "no file images/0.png; compressed archives are not looked into (images.tar.gz.00): unpack" in found.detail  # type: ignore[union-attr]
    elsewhere = fsspec.filesystem("memory")
    elsewhere.pipe({"/packed/pairs.jsonl": (folder / "pairs.jsonl").read_bytes(), "/packed/set.tar": b"no matter"})
    (shard,) = open_source("memory://packed/pairs.jsonl").shards
    details = {item.detail for item in shard.rows(0, 1) if isinstance(item, Skipped)}
    assert ["a tar at an address is not looked into (set.tar): download it" in each for each in details] == [True]


def test_a_file_above_the_limit_is_not_read(folder: Path) -> None:
    for name, size in (("sparse.png", 2 << 30), ("above.png", LIMIT + 1), ("at.png", LIMIT)):
        with (folder / name).open("wb") as stream:
            stream.truncate(size)
    sparse, above, at = rows_of(folder, "sparse.png", "above.png", "at.png")
    assert reasons([sparse, above, at]) == ["too_large", "too_large", "pair"]
    assert isinstance(sparse, Skipped)
    assert str(2 << 30) in sparse.detail
    assert str(LIMIT) in sparse.detail
    assert isinstance(at, Pair)
    assert len(at.win) == LIMIT


def test_a_list_stays_below_its_folder(folder: Path) -> None:
    secret = folder.parent / "secret.png"
    os.symlink(secret, folder / "link.png")
    os.symlink("..", folder / "up")
    (folder / "sub").mkdir()
    paths = ["../secret.png", "sub/../../secret.png", str(secret), f"{folder}/../secret.png", f"//{secret}"]
    paths += [f"file://{secret}", f"FILE://{secret}", f"local://{secret}", "link.png", "up/secret.png"]
    paths += [f"/proc/self/root{secret}"]
    items = rows_of(folder, *paths)
    assert reasons(items) == ["not_allowed"] * len(paths)
    assert all("--allow-remote" in item.detail for item in items if isinstance(item, Skipped))
    allowed = rows_of(folder, *paths, allow_remote=True)
    assert [getattr(item, "win", item) for item in allowed] == [b"S"] * len(paths)


def test_inside_is_inside_however_it_is_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "sub").mkdir()
    os.symlink("a.png", folder / "link.png")
    os.symlink(folder, folder.parent / "linked")
    paths = ["./a.png", "sub/../a.png", "link.png", str(folder / "a.png"), f"file://{folder}/a.png"]
    for place in (folder, folder.parent / "linked"):
        assert reasons(rows_of(place, *paths)) == ["pair"] * len(paths)
    monkeypatch.chdir(folder)
    for name in ("pairs.jsonl", "./pairs.jsonl"):
        (shard,) = open_source(name).shards
        assert reasons(list(shard.rows(0, 99))) == ["pair"] * (1 + len(paths))


def test_the_hub_clients_own_links_are_followed_and_no_others(tmp_path: Path) -> None:
    repository, revision = tmp_path / "datasets--o--n", "0123456789abcdef0123456789abcdef01234567"
    snapshot = repository / "snapshots" / revision
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (repository / "blobs" / "aa").write_bytes(b"A")
    (repository / "secret").write_bytes(b"S")
    for name, target in (("a.png", "../../blobs/aa"), ("b.png", "../../blobs/aa"), ("c.png", "../../secret")):
        os.symlink(target, snapshot / name)
    assert reasons(rows_of(snapshot, "b.png", "c.png")) == ["pair", "not_allowed"]


class Host(BaseHTTPRequestHandler):
    """Good and bad answers by the last part of the path; `asked` keeps what was asked for."""

    protocol_version = "HTTP/1.1"
    asked: list[str]
    listed: bytes

    def do_GET(self) -> None:
        self.asked.append(self.path)
        name = self.path.split("?")[0].rsplit("/", 1)[-1]
        if name == "silent.png":
            time.sleep(6)
        elif name == "dripping.png":
            self._head(200, size=10_000)
            for _ in range(40):
                self.wfile.write(b"x")
                time.sleep(0.15)
        elif name == "endless.png":
            self._head(200, size=None)
            while True:
                self.wfile.write(b"10000\r\n" + bytes(1 << 16) + b"\r\n")
        elif name == "lying.png":
            self._head(200, size=10**15)
            self.wfile.write(bytes(2 * LIMIT))
        elif name == "cut.png":
            self._head(200, size=100)
            self.wfile.write(b"x")
        elif name == "moved.png":
            self._head(302, size=0, Location=f"http://localhost:{self.server.server_address[1]}/list/a.png")
        elif name == "locked.png":
            right = "Basic " + base64.b64encode(b"alice:PASSWORD").decode()
            self._body(200 if self.headers.get("Authorization") == right else 401)
        elif name == "signed.png":
            self._body(200 if self.path.endswith("?X-Amz-Signature=SIGNED%2F1&n=2") else 403)
        elif name == "pairs.jsonl":
            self._body(200, self.listed)
        else:
            self._body(200 if name in ("a.png", "a%20b%3F.png") else int(name[:3]))

    def do_HEAD(self) -> None:
        self._head(200 if self.path.endswith("pairs.jsonl") else 404, size=len(self.listed))

    def _head(self, status: int, *, size: int | None, **fields: str) -> None:
        self.close_connection = True
        length = {"Transfer-Encoding": "chunked"} if size is None else {"Content-Length": str(size)}
        changed = {"Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT", "ETag": '"1"'}
        self.send_response(status)
        for name, value in (length | changed | fields).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def _body(self, status: int, body: bytes = b"W") -> None:
        part = self.headers.get("Range")
        if part and status == 200:
            first, last = part.split("=")[1].split("-")
            whole, body = len(body), body[int(first) : int(last) + 1]
            self._head(206, size=len(body), Content_Range=f"bytes {first}-{int(first) + len(body) - 1}/{whole}")
        else:
            self._head(status, size=len(body))
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class QuietServer(ThreadingHTTPServer):
    """Clients that leave early are what is tested here."""

    daemon_threads = True
    block_on_close = False

    def handle_error(self, *_: object) -> None:
        pass


class Server:
    """A web server in this process."""

    def __init__(self) -> None:
        self.handler = type("Handler", (Host,), {"asked": [], "listed": b""})
        self.server = QuietServer(("127.0.0.1", 0), self.handler)

    def __call__(self, path: str) -> str:
        """The address of a path on it."""
        return f"http://127.0.0.1:{self.server.server_port}/{path}"


@pytest.fixture
def host() -> Iterator[Server]:
    made = Server()
    thread = threading.Thread(target=made.server.serve_forever, args=(0.01,))
    thread.start()
    yield made
    made.server.shutdown()
    made.server.server_close()
    thread.join()


def test_no_host_is_asked_without_leave(folder: Path, host: Server) -> None:
    paths = [host("a.png"), host("a.png").replace("http", "HTTP"), "s3://b/a.png", "gs://b/a.png"]
    paths += ["hf://datasets/o/n/a.png", "ftp://h/a.png", "carrierpigeon://loft/a.png"]
    items = rows_of(folder, *paths)
    assert reasons(items) == ["not_allowed"] * len(paths)
    assert all("--allow-remote" in item.detail for item in items if isinstance(item, Skipped))
    assert host.handler.asked == []


def test_a_row_that_cannot_be_fetched_is_skipped_with_its_reason(folder: Path, host: Server) -> None:
    """And the rows beside it are read."""
    expected = {
        host("a.png"): "pair",
        host("404.png"): "missing_image",
        host("403.png"): "missing_image",
        host("500.png"): "unreachable",
        host("a.png#again"): "pair",
        host("429.png"): "unreachable",
        host("signed.png?X-Amz-Signature=SIGNED%2F1&n=2"): "pair",
        host("locked.png").replace("http://", "http://alice:PASSWORD@"): "pair",
        host("locked.png").replace("http://", "http://alice:WRONG@"): "missing_image",
        host("403.png?X-Amz-Signature=SIGNED"): "missing_image",
        host("moved.png"): "pair",
        host("cut.png"): "unreachable",
        host("lying.png"): "too_large",
        host("endless.png"): "too_large",
        "http://127.0.0.1:1/a.png?sig=SIGNED": "unreachable",
        "http://[nonsense/a.png": "missing_image",
        "carrierpigeon://loft/a.png": "unreachable",
        "github://a.png": "unreachable",
        "simplecache::file:///etc/hostname": "missing_image",
        f"zip://a.png::{host('a.png')}": "not_allowed",
    }
    items = rows_of(folder, *expected, allow_remote=True)
    assert dict(zip(expected, reasons(items), strict=True)) == expected
    details = "\n".join(item.detail for item in items if isinstance(item, Skipped))
    for secret in ("PASSWORD", "WRONG", "alice", "SIGNED"):
        assert secret not in details
    assert [path for path in host.handler.asked if "500" in path] == ["/500.png"] * reach.TRIES


@pytest.mark.parametrize("name", ["silent.png", "dripping.png"])
def test_a_silent_host_is_waited_for_a_few_times_and_no_more(
    folder: Path, host: Server, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(reach, "SECONDS_PER_IMAGE", 0.5)
    items = rows_of(folder, *[host(name)] * 20, allow_remote=True)
    assert reasons(items) == ["unreachable"] * 20
    assert 1 <= len(host.handler.asked) <= reach.ROWS_PER_SILENT_HOST * reach.TRIES


def test_when_no_image_at_all_can_be_fetched_the_shard_fails(folder: Path, host: Server) -> None:
    row = {"win": host("503.png?sig=SIGNED"), "lose": host("a.png"), "prompt": "p"}
    (folder / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    (shard,) = open_source(str(folder), allow_remote=True).shards
    with pytest.raises(DataError, match="No image of these rows could be fetched") as caught:
        list(shard.rows(0, 1))
    assert "SIGNED" not in str(caught.value)


def test_a_list_on_a_host_reaches_below_its_own_folder_there(folder: Path, host: Server) -> None:
    """Without leave, for the user named it; and never to this machine's files."""
    elsewhere = host("list/a.png").replace("127.0.0.1", "localhost")
    expected = {
        "a.png": "pair",
        "a b?.png": "pair",
        host("list/sub/a.png"): "pair",
        "404.png": "missing_image",
        "500.png": "unreachable",
        "../a.png": "not_allowed",
        host("a.png"): "not_allowed",
        host("list/%2e%2e/a.png"): "not_allowed",
        host("list/%252e%252e/a.png"): "not_allowed",
        host("listing/a.png"): "not_allowed",
        elsewhere: "not_allowed",
        "moved.png": "not_allowed",
        str(folder / "a.png"): "not_allowed",
        f"file://{folder}/a.png": "not_allowed",
    }
    rows = [{"win": win, "lose": "a.png", "prompt": "p"} for win in expected]
    host.handler.listed = "".join(json.dumps(row) + "\n" for row in rows).encode()

    def found(*, allow_remote: bool) -> dict[str, str]:
        (shard,) = open_source(host("list/pairs.jsonl"), allow_remote=allow_remote).shards
        return dict(zip(expected, reasons(list(shard.rows(0, 99))), strict=True))

    assert found(allow_remote=False) == expected
    allowed = found(allow_remote=True)
    assert {allowed[elsewhere], allowed[host("a.png")], allowed["moved.png"]} == {"pair"}
    assert {allowed[str(folder / "a.png")], allowed[f"file://{folder}/a.png"]} == {"not_allowed"}


@pytest.mark.parametrize("name", ["pairs.tar", "pairs.parquet", "pairs.jsonl"])
def test_an_input_file_that_is_a_pipe_is_refused_and_not_waited_for(folder: Path, name: str) -> None:
    os.mkfifo(folder / name)
    (shard,) = open_source(str(folder / name)).shards
    with pytest.raises(DataError, match="not a regular file"):
        _ = shard.num_rows


def test_images_in_tars_and_parquet_have_the_same_limit(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    write_tar: Callable[..., Path],
    write_parquet: Callable[..., Path],
    pick_row: Callable[..., dict[str, object]],
) -> None:
    from inpo.common.pairs import tars

    monkeypatch.setattr(tars, "MAX_IMAGE_BYTES", LIMIT)
    huge = bytes(LIMIT + 1)
    members = [("a.json", b'{"prompt": "p"}'), ("a.lose.png", b"L"), ("a.win.png", huge)]
    tar = write_tar(
        folder / "a.tar", [*members, ("b.json", b'{"prompt": "p"}'), ("b.lose.png", b"L"), ("b.win.png", b"W")]
    )
    parquet = write_parquet(folder / "a.parquet", [pick_row(0, jpg_0=huge), pick_row(1)])
    for file in (tar, parquet):
        (shard,) = open_source(str(file)).shards
        bad, good = shard.rows(0, 2)
        assert reasons([bad, good]) == ["too_large", "pair"]
        assert isinstance(bad, Skipped)
        assert str(LIMIT + 1) in bad.detail
