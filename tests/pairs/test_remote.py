"""Sources on an object store and on a web server, through real sockets on this machine."""

import io
import json
import tarfile
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from inpo.common.errors import DataError
from inpo.common.pairs import Pair, Skipped, open_source


@pytest.fixture(scope="module")
def bucket() -> Iterator[object]:
    """An S3 bucket named `pairs` on a local server, with its address in the environment."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ALLOW_HTTP", "true")
        client = boto3.client("s3", endpoint_url=f"http://{host}:{port}")
        client.create_bucket(Bucket="pairs")
        yield client
        client.close()
    server.stop()


def tar_bytes(names: list[str]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name in names:
            metadata = json.dumps({"prompt": "p", "id": name}).encode()
            for suffix, data in (("json", metadata), ("lose.png", b"L"), ("win.png", name.encode())):
                info = tarfile.TarInfo(f"{name}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def ids(location: str) -> list[str]:
    return [item.pair_id for shard in open_source(location).shards for item in shard.rows(0, 99)]


def test_tars_parquet_and_lists_on_s3(
    bucket: object, tmp_path: Path, pick_row: Callable[..., dict[str, object]], write_parquet: Callable[..., Path]
) -> None:
    def put(key: str, data: bytes) -> None:
        bucket.put_object(Bucket="pairs", Key=key, Body=data)  # type: ignore[attr-defined]

    put("tars/pairs-0000.tar", tar_bytes(["a", "b"]))
    put("tars/pairs-0001.tar", tar_bytes(["c"]))
    for pattern in ("", "/pairs-{0000..0001}.tar", "/*.tar"):
        assert ids(f"s3://pairs/tars{pattern}") == ["a", "b", "c"]

    put("parquet/a.parquet", write_parquet(tmp_path / "a.parquet", [pick_row(i) for i in range(9)]).read_bytes())
    assert ids("s3://pairs/parquet") == [str(1000 + i) for i in range(9)]
    (shard,) = open_source("s3://pairs/parquet/a.parquet").shards
    assert [item.pair_id for item in shard.rows(5, 7)] == ["1005", "1006"]

    rows = [{"win": "i/a.png", "lose": "s3://pairs/list/i/b.png", "prompt": "p", "id": "1"}]
    rows += [rows[0] | {"win": "i/none.png", "id": "2"}, rows[0] | {"win": "i//a.png", "id": "3"}]
    put("list/pairs.jsonl", "\n".join(json.dumps(row) for row in rows).encode())
    put("list/i/a.png", b"A")
    put("list/i/b.png", b"B")
    (shard,) = open_source("s3://pairs/list").shards
    good, *missing = shard.rows(0, 3)
    assert good == Pair(pair_id="1", prompt="p", win=b"A", lose=b"B", label=1.0, row=0)
    assert [isinstance(each, Skipped) and each.reason for each in missing] == ["missing_image"] * 2

    with pytest.raises(DataError, match="No pairs found"):
        open_source("s3://pairs/nothing")


class _Images(BaseHTTPRequestHandler):
    """/a.png is an image, /forbidden is refused, all else is not there."""

    def do_GET(self) -> None:
        status = {"/a.png": 200, "/forbidden": 403}.get(self.path, 404)
        body = b"A" if status == 200 else b""
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Last-Modified", "Mon, 01 Jan 2024 00:00:00 GMT")
        self.send_header("ETag", '"1"')
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def web() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Images)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_images_on_a_web_server(web: str, tmp_path: Path) -> None:
    rows = [{"win": f"{web}/{name}", "lose": f"{web}/a.png", "prompt": "p"} for name in ("a.png", "b.png", "forbidden")]
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (shard,) = open_source(str(tmp_path), allow_remote=True).shards
    good, *others = shard.rows(0, 3)
    assert isinstance(good, Pair)
    assert (good.win, good.lose) == (b"A", b"A")
    assert [item.reason for item in others if isinstance(item, Skipped)] == ["missing_image", "missing_image"]


class Refusing(BaseHTTPRequestHandler):
    """A host that lets nobody in."""

    def do_GET(self) -> None:
        self.send_error(403)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("name", ["pairs.tar", "pairs-*.tar", "pairs-{0..1}.tar", "folder"])
def test_a_host_that_refuses_is_one_clear_error(name: str) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    try:
        with pytest.raises(DataError, match="cannot be reached") as caught:
            open_source(f"{address}/{name}")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    for words in (address, "403", "credentials"):
        assert words in str(caught.value)
