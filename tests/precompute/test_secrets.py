"""A password in the pairs' address is used, and stands neither in the cache nor on the screen."""

import base64
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image


class Locked(BaseHTTPRequestHandler):
    """The files of a folder, with ranges, for alice and nobody else."""

    folder: Path

    def do_GET(self) -> None:
        file = self.folder / self.path.lstrip("/")
        body = file.read_bytes() if file.is_file() else b""
        right = "Basic " + base64.b64encode(b"alice:SECRET").decode()
        status = 401 if self.headers.get("Authorization") != right else 200 if body else 404
        part = self.headers.get("Range")
        length, start = len(body), 0
        if part and status == 200:
            begin, end = part.split("=")[1].split("-")
            start = int(begin) if begin else length - int(end)
            body = body[start : int(end) + 1 if begin and end else None]
            status = 206
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Range", f"bytes {start}-{start + len(body) - 1}/{length}")
        self.send_header("Last-Modified", "Mon, 01 Jan 2024 00:00:00 GMT")
        self.send_header("ETag", '"1"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """(a folder, its address with the login) on a web server in this process."""
    (tmp_path / "served").mkdir()
    handler = type("Handler", (Locked,), {"folder": tmp_path / "served"})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield tmp_path / "served", f"http://alice:SECRET@127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("kind", ["list", "tar"])
def test_no_file_of_the_cache_and_no_output_has_the_password(
    locked: tuple[Path, str],
    kind: str,
    pipelines: Callable,
    examples: Callable,
    write_tars: Callable,
    run: Callable,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder, address = locked
    write_tars(folder, examples(2), 2)
    name = "00000.tar"
    if kind == "list":
        for pair in examples(2):
            Image.fromarray(pair.win).save(folder / f"{pair.pair_id}.png")
        name = "pairs.jsonl"
        (folder / name).write_text(
            '{"win": "pair-000.png", "lose": "pair-001.png", "prompt": "p"}\n'
            '{"win": "none.png", "lose": "pair-001.png", "prompt": "p"}\n'
        )
    for _ in range(2):  # the second run finds all that the first one made
        cache = run.cache(f"{address}/{name}", pipelines(), tmp_path / "cache")
    (commit,) = cache.commits.values()
    assert commit.source.location == f"{address}/{name}".replace("alice:SECRET@", "")
    assert (commit.num_pairs, commit.skipped) == ((2, {}) if kind == "tar" else (1, {"missing_image": 1}))
    out, err = capfd.readouterr()
    assert "127.0.0.1" in err
    assert "127.0.0.1" in (tmp_path / "cache" / "log.txt").read_text()
    texts = [out, err, *(file.read_bytes().decode("latin-1") for file in cache_files(tmp_path / "cache"))]
    assert not [text for text in texts if "SECRET" in text or "alice" in text]


def cache_files(cache: Path) -> list[Path]:
    return [file for file in cache.rglob("*") if file.is_file()]


def test_a_wrong_password_is_not_told_either(
    locked: tuple[Path, str], run: Callable, pipelines: Callable, tmp_path: Path
) -> None:
    from inpo.common.errors import DataError

    address = locked[1].replace("SECRET", "WRONG")
    with pytest.raises(DataError) as caught:
        run(f"{address}/pairs.tar?sig=SECRET", pipelines(), tmp_path / "cache")
    assert not [secret for secret in ("WRONG", "SECRET", "alice") if secret in str(caught.value)]
