"""A result on a hub: a stand-in of its API, on this machine, keeps what it is sent."""

import base64
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from huggingface_hub import ModelCard
from PIL import Image

from inpo.common.errors import StorageError, UsageError
from inpo.train.card import hub_id, public_name
from inpo.train.push import push


class Hub(ThreadingHTTPServer):
    """Takes one commit, whatever the repository; refuses everything if `refuse` is a status."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.created: list[dict[str, Any]] = []
        self.cards: list[str] = []
        self.refuse = 0
        self.private = True


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        answer: dict[str, Any] = {}
        if self.server.refuse:
            return self._send(self.server.refuse, {"error": "no"})
        if self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            made = json.loads(body)
            answer = {"url": f"https://huggingface.co/{made.get('organization') or 'owner'}/{made['name']}"}
        elif self.path == "/api/validate-yaml":
            self.server.cards.append(json.loads(body)["content"])
            answer = {"errors": [], "warnings": []}
        elif "/preupload/" in self.path:
            answer = {
                "files": [
                    {"path": each["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for each in json.loads(body)["files"]
                ]
            }
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            answer = {"commitUrl": "https://huggingface.co/owner/name/commit/1", "commitOid": "1"}
        return self._send(200, answer)

    def do_GET(self) -> None:
        self._send(self.server.refuse or 200, {"id": "owner/name", "private": self.server.private})

    def _send(self, status: int, answer: dict[str, Any]) -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        return


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setenv("HF_TOKEN", "secret-token")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def comparison(tmp_path: Path) -> Path:
    folder = tmp_path / "compare"
    folder.mkdir()
    (folder / "comparison.md").write_text("| scorer | win rate |\n|---|---|\n| clip | 0.7 |\n")
    Image.new("RGB", (8, 8)).save(folder / "comparison.png")
    return folder


def test_a_lora_run_arrives_with_a_card_that_names_no_machine(
    run: Callable[..., Path], hub: Hub, comparison: Path, tmp_path: Path, cache: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = run(
        steps=1, lora_rank=2, sample_every=1, sample_steps=1, sample_prompts=["a cat"], push_to_hub="owner/by-train"
    )
    assert "pushed https://huggingface.co/owner/name/commit/1" in capsys.readouterr().err
    assert {"README.md", "lora-kohya.safetensors", "pytorch_lora_weights.safetensors"} <= set(hub.files)
    hub.files.clear()
    url = push(output, "owner/name", private=True, license="openrail", compare=comparison)
    assert url == "https://huggingface.co/owner/name/commit/1"
    assert "private" in json.dumps(hub.created[-1])
    card = hub.files["README.md"].decode()
    assert hub.cards[-1] == card  # the hub's own check saw it
    read = ModelCard(card)
    assert read.data.license == "openrail"
    assert read.data.library_name == "diffusers"
    assert {"text-to-image", "lora", "inpo"} <= set(read.data.tags)
    assert read.data.base_model is None  # a folder is not a model of the hub
    assert 'load_lora_weights("owner/name", weight_name="pytorch_lora_weights.safetensors")' in card
    assert "| clip | 0.7 |" in card
    assert "learning_rate" in card
    for image in ("images/comparison.png", "images/step-00000001.png"):
        assert f"]({image})" in card
        assert hub.files[image].startswith(b"\x89PNG")
    # Nothing that was sent names a path of this machine, or the token.
    for name, data in hub.files.items():
        for secret in (str(tmp_path), str(Path(cache).parent), "secret-token"):
            assert secret.encode() not in data, name
    # One that is there already, and public, stays so: nothing is sent to it.
    hub.private = False
    hub.files.clear()
    with pytest.raises(UsageError, match="everybody can read it"):
        push(output, "owner/name", private=True, license=None, compare=None)
    assert not hub.files
    # Again, without a comparison: the card is made anew, not on top of the other.
    push(output, "owner/name", private=False, license=None, compare=None)
    assert "| clip |" not in hub.files["README.md"].decode()


def test_a_pipeline_arrives_without_the_paths_that_libraries_note_in_it(
    run: Callable[..., Path], hub: Hub, tmp_path: Path, world: Any
) -> None:
    output = run(steps=1)
    push(output, "owner/name", private=False, license=None, compare=None)
    assert {"model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"} <= set(hub.files)
    for name, data in hub.files.items():
        assert str(world.model.folder).encode() not in data, name
    assert "images/" not in "".join(hub.files)
    assert 'DiffusionPipeline.from_pretrained("owner/name")' in hub.files["README.md"].decode()


def test_what_cannot_be_pushed_is_said(run: Callable[..., Path], hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing to push"):
        push(tmp_path, "owner/name", private=False, license=None, compare=None)
    hub.refuse = 401
    # Asked for at the start: no step is made for a hub that will not take it.
    with pytest.raises(StorageError, match="did not take it") as caught:
        run(steps=1, push_to_hub="owner/name")
    assert "401" in str(caught.value)
    assert not (tmp_path / "run/metrics.jsonl").exists()
    with pytest.raises(StorageError, match="did not take it"):
        run(steps=1, push_to_hub="not a name")
    # A public one is no place for what was to be private, and no step is made for it either.
    hub.refuse, hub.private = 0, False
    with pytest.raises(UsageError, match="everybody can read it"):
        run(steps=1, push_to_hub="owner/name", push_private=True)
    assert "private" in json.dumps(hub.created[-1])
    assert not hub.files
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_names_for_the_public(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/mine").mkdir(parents=True)
    assert hub_id("runwayml/stable-diffusion-v1-5") == "runwayml/stable-diffusion-v1-5"
    assert hub_id("runs/mine") is None
    assert hub_id("toyworld/base") is None  # from every folder
    assert public_name("toyworld/base") == "toyworld/base"
    snapshot = "/home/me/.cache/huggingface/hub/models--owner--some--name/snapshots/0123/unet"
    assert hub_id(snapshot) == "owner/some--name"
    assert [public_name(each) for each in ("/home/me/cache", "runs/mine", "s3://b/c", "file:///home/me/x")] == [
        *("cache", "mine", "s3://b/c", "x")
    ]
    assert public_name("https://me:word@host/c?sig=word") == "https://host/c?sig=***"
