"""The whole life of a cache on an object store: precompute, resume, every look at it, train, damage, and repair."""

import json
import socket
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState
from PIL import Image
from typer.testing import CliRunner

from inpo.common.cache import open_cache
from inpo.common.cache import store as store_module
from inpo.common.cache.store import CacheStore
from inpo.common.errors import StorageError
from inpo.inspection.cli import app
from inpo.precompute.run import run_precompute
from inpo.precompute.settings import RayOptions
from inpo.train.run import run_train
from tests.light import save_light_pipeline


@pytest.fixture
def precompute(tmp_path: Path, s3: Any) -> Callable[..., int]:
    """precompute(limit=...): 600 rows of which 4 are pairs, into three shards, by a tiny model."""
    source, model = tmp_path / "pairs", save_light_pipeline(tmp_path / "model")
    source.mkdir()
    for name in ("red", "blue"):
        Image.new("RGB", (32, 32), name).save(source / f"{name}.png")
    kept = {0, 1, 256, 512}
    rows = [
        {"win": "red.png", "lose": "blue.png", "prompt": "a cat", "id": str(row), "label": 1.0 if row in kept else 0.5}
        for row in range(600)
    ]
    (source / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(**flags: Any) -> int:
        settings = {
            "resolution": 32,
            "grid_points": 2,
            "timesteps_per_pair": 2,
            "measure_inversion": 0.0,
            "batch_size": 4,
            "decode_workers": 0,
        }
        return run_precompute(
            None,
            {"model": str(model)},
            {"pairs": str(source), "cache": s3.location},
            settings | flags,
            ray_options=RayOptions(),
            dry_run=False,
        )

    return run


def inspect(*words: object, code: int = 0) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})
    assert done.exit_code == code, done.output
    return done.output


def test_precompute_resume_look_train_damage_and_repair(
    s3: Any, precompute: Callable[..., int], tmp_path: Path
) -> None:
    assert precompute(limit=300) == 0
    first = {name: commit.attempt for name, commit in open_cache(s3.location).commits.items()}
    assert len(first) == 2
    assert precompute() == 0
    cache = open_cache(s3.location)
    assert cache.num_pairs == 4
    assert {name: cache.commits[name].attempt for name in first} == first

    model = tmp_path / "model"
    assert "3 shards" in inspect("summary", s3.location)
    assert "all sound" in inspect("verify", s3.location, "--model", model, "--sample", 2)
    inspect("pair", s3.location, "0", "--out", tmp_path / "pair.png")
    assert (tmp_path / "pair.png").stat().st_size > 0
    assert "nothing to remove" in inspect("clean", s3.location, "--yes")

    AcceleratorState._reset_state(reset_partial_state=True)
    settings = {"output": tmp_path / "run", "steps": 2, "batch_size": 2, "held_out": 0.0, "tracker": "none"}
    assert run_train(None, {"model": str(model)}, [s3.location], settings, resume="auto") == 0
    assert (tmp_path / "run" / "pipeline" / "model_index.json").is_file()

    store, shard = CacheStore(s3.location), next(iter(cache))
    (file,) = [name for name in shard.commit.files if name.startswith("target/c/")]
    data = bytearray(store.get(f"{shard.folder}/{file}") or b"")
    data[len(data) // 2] ^= 1
    store.remove(f"{shard.folder}/{file}")
    assert store.put_new(f"{shard.folder}/{file}", bytes(data))
    damaged = inspect("verify", s3.location, "--quarantine", code=1)
    assert f"1 bad: {shard.name}" in damaged
    assert "moved 1 commits" in damaged
    assert precompute() == 0
    assert "all sound" in inspect("verify", s3.location)
    cache = open_cache(s3.location)
    assert cache.commits[shard.name].attempt != shard.commit.attempt

    # The same for the one text shard that has a prompt; no shard of images is made again.
    (texts,) = [each for each in cache.texts if each.name != "empty"]
    store.remove(f"{texts.folder}/embedding/c/0/0/0")
    assert "moved 1 commits" in inspect("verify", s3.location, "--quarantine", code=1)
    assert precompute() == 0
    assert "all sound" in inspect("verify", s3.location)
    again = open_cache(s3.location)
    assert {name: commit.attempt for name, commit in again.commits.items()} == {
        name: commit.attempt for name, commit in cache.commits.items()
    }
    assert again.texts.need(texts.name).text == ("a cat",)
    assert again.texts.need(texts.name).commit.attempt != texts.commit.attempt

    inspect("clean", s3.location, "--yes", "--all")
    attempts = {name.split("/")[1] for name in store.listing("shards")}
    assert attempts == {commit.attempt for commit in again.commits.values() if commit.num_pairs}
    attempts = {name.split("/")[1] for name in store.listing("texts")}
    assert attempts == {each.commit.attempt for each in again.texts}


def test_a_server_that_does_not_answer_is_one_clear_error(s3: Any, build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection is taken and nothing ever comes back: the client's time-out ends each try, the retries end too."""
    build.cache(s3.location, pairs=(1,), profile="lean")
    monkeypatch.setattr(store_module, "RETRY", {"max_retries": 2, "retry_timeout": timedelta(seconds=5)})
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("AWS_TIMEOUT", "300ms")
        with pytest.raises(StorageError) as caught:
            open_cache(s3.location)
    for part in ("Could not read", s3.location, "what is committed stays"):
        assert part in str(caught.value)
