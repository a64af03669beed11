"""Whole runs: resume, quarantine, refusals, and what a user is told."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from inpo.common.cache import open_cache
from inpo.common.errors import CacheMismatch, DataError, InpoError, ModelError, UsageError
from inpo.common.log import set_level
from inpo.common.testing import save_tiny_pipeline
from inpo.precompute.components import Components
from inpo.precompute.encode import TextEncoder
from inpo.precompute.run import run_precompute
from inpo.precompute.settings import RayOptions
from inpo.precompute.worker import ShardWorker
from tests.precompute.conftest import Runs


def test_resume_makes_no_committed_shard_again(
    pipelines: Callable, tars: Callable, run: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tars(3, 1)
    whole = run.cache(source, pipelines(), tmp_path / "whole")
    all_calls = run.network_calls
    assert run(source, pipelines(), tmp_path / "parts", limit=2) == 0
    partial = open_cache(str(tmp_path / "parts"))
    assert sorted(partial.commits) == sorted(whole.commits)[:2]
    before = {name: commit.attempt for name, commit in partial.commits.items()}
    first_calls = run.network_calls - all_calls
    done = run.cache(source, pipelines(), tmp_path / "parts")
    assert run.network_calls - all_calls - first_calls == all_calls - first_calls > 0
    assert {name: done.commits[name].attempt for name in before} == before
    assert sorted(done.shards) == sorted(whole.shards)
    for name, shard in whole.shards.items():
        assert shard.prompts().tolist() == done.shards[name].prompts().tolist()
        for path in set(whole.manifest.specs) - {"group/prompt"}:  # in which text shard a prompt stands may differ
            np.testing.assert_array_equal(shard.read(path), done.shards[name].read(path), err_msg=path)
    # Once more: nothing is left, and no model is even loaded.
    loaded = len(run.components)
    said = capsys.readouterr()
    assert "bytes of x_t" in said.err
    assert said.out == "", "nothing was asked for"
    assert run(source, pipelines(), tmp_path / "parts") == 0
    assert len(run.components) == loaded
    again = capsys.readouterr().err
    assert "3 (3 committed already)" in again
    assert "bytes of x_t" not in again
    before_quiet = set_level(logging.WARNING)
    try:
        assert run(source, pipelines(), tmp_path / "parts") == 0
        assert "committed already" not in "".join(capsys.readouterr())
        assert run(source, pipelines(), tmp_path / "parts", dry_run=True) == 0
        assert "3 (3 committed already)" in capsys.readouterr().out
    finally:
        set_level(before_quiet)


def test_a_run_that_dies_between_shards_is_completed(
    pipelines: Callable, tars: Callable, run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tars(6, 2)
    compute, made = ShardWorker.compute, []

    def failing(self: ShardWorker, prepared: Any) -> Any:
        if len(made) == 2:
            raise MemoryError("the machine gave up")
        made.append(prepared.task.name)
        return compute(self, prepared)

    monkeypatch.setattr(ShardWorker, "compute", failing)
    with pytest.raises(MemoryError):
        run(source, pipelines(), tmp_path / "cache")
    monkeypatch.setattr(ShardWorker, "compute", compute)
    survived = set(open_cache(str(tmp_path / "cache")).commits)
    assert survived == set(made)  # the shard in the writer's hands was finished, not torn
    calls = run.network_calls
    cache = run.cache(source, pipelines(), tmp_path / "cache")
    assert cache.num_pairs == 6
    assert run.network_calls - calls == 2 * 2 * 4 + 8  # one shard: 2 pairs, 2 sides, start and 3 points; its spread


def _nan_latent(run: Runs) -> None:
    def prepare(components: Components) -> None:
        encode = components.images.vae.encode

        def broken(pixels: torch.Tensor) -> Any:
            output = encode(pixels)
            output.latent_dist.mean[2:3] = float("nan")  # the win of the second pair
            return output

        components.images.vae.encode = broken

    run.prepare = prepare


def _nan_text(run: Runs) -> None:
    def prepare(encoder: TextEncoder) -> None:
        encode = encoder.pipeline.encode_prompt

        def broken(*, prompt: list[str], **rest: Any) -> Any:
            embedding, *others = encode(prompt=prompt, **rest)
            embedding[[index for index, text in enumerate(prompt) if "blue dog" in text]] = float("inf")
            return (embedding, *others)

        encoder.pipeline.encode_prompt = broken

    run.prepare_texts = prepare


def _nan_network(run: Runs) -> None:
    def prepare(components: Components) -> None:
        forward = components.denoiser.network.forward
        sick = run.embeddings["a blue dog on the house"].float()

        def broken(x: torch.Tensor, timestep: Any, *, encoder_hidden_states: torch.Tensor, **rest: Any) -> Any:
            output = forward(x, timestep, encoder_hidden_states=encoder_hidden_states, **rest)[0].clone()
            output[(encoder_hidden_states - sick).abs().amax((1, 2)) < 1e-3] = float("nan")
            return (output,)

        components.denoiser.network.forward = broken

    run.prepare = prepare


@pytest.mark.parametrize(
    ("breakage", "words"),
    [(_nan_latent, "VAE latent"), (_nan_text, "text embedding"), (_nan_network, "tensor of the inversion")],
)
def test_a_pair_that_is_not_finite_is_quarantined(
    pipelines: Callable,
    tars: Callable,
    run: Callable,
    tmp_path: Path,
    by_id: Callable,
    capsys: pytest.CaptureFixture[str],
    breakage: Callable[[Runs], None],
    words: str,
) -> None:
    source = tars(4, 4)  # the second pair has the prompt "a blue dog on the house"
    well = run.cache(source, pipelines(), tmp_path / "well")
    breakage(run)
    cache = run.cache(source, pipelines(), tmp_path / "cache")
    kept = by_id(cache, "x_t")
    assert list(kept) == ["pair-000", "pair-002", "pair-003"]
    (commit,) = cache.commits.values()
    assert commit.skipped == {"not_finite": 1}
    (listed,) = (tmp_path / "cache" / "skipped").rglob("*.jsonl")
    row = json.loads(listed.read_text())
    assert (row["pair_id"], row["reason"], row["row"]) == ("pair-001", "not_finite", 1)
    assert words in row["detail"]
    assert "1 x not_finite" in capsys.readouterr().err
    assert "WARNING note: skipped: 1 x not_finite" in (tmp_path / "cache" / "log.txt").read_text()
    for pair_id, value in by_id(well, "x_t").items():
        if pair_id in kept:
            np.testing.assert_allclose(kept[pair_id].astype(float), value.astype(float), rtol=2e-3, atol=2e-3)
    for texts in cache.texts:
        assert np.isfinite(texts.read_stored("embedding")).all()


def test_what_is_counted_is_counted_of_the_pairs_that_are_kept(
    pipelines: Callable, tars: Callable, run: Callable, tmp_path: Path
) -> None:
    """No start converges in one iteration; the second pair's network breaks down afterwards, at the higher levels."""

    _nan_network(run)
    break_down = run.prepare
    assert break_down is not None

    def late(components: Components) -> None:
        whole = components.denoiser.network.forward
        break_down(components)
        broken = components.denoiser.network.forward
        components.denoiser.network.forward = lambda x, timestep, **rest: (broken if timestep.max() > 600 else whole)(
            x, timestep, **rest
        )

    run.prepare = late
    cache = run.cache(tars(4, 4), pipelines(), tmp_path / "cache", inverter="fixed_point", iterations=1, tolerance=0.0)
    (commit,) = cache.commits.values()
    assert commit.skipped == {"not_finite": 1}
    assert commit.counts == {"fixed_point_not_converged": 3}


def test_no_pair_left_is_a_failure_and_no_commit(
    pipelines: Callable, tars: Callable, run: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tars(2, 2)

    def broken(components: Components) -> None:
        components.denoiser.network.conv_out.bias.data.fill_(float("nan"))

    run.prepare = broken
    assert run(source, pipelines(), tmp_path / "cache") == 1
    assert "2 x not_finite" in capsys.readouterr().err
    assert not open_cache(str(tmp_path / "cache"), allow_empty=True).commits
    run.prepare = None
    assert run.cache(source, pipelines(), tmp_path / "cache").num_pairs == 2


def test_bad_images_and_shards_stop_nothing_else(
    pipelines: Callable, tars: Callable, run: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Path(tars(4, 2))
    (source / "00009.tar").write_bytes(b"this is no tar file at all" * 100)
    data = (source / "00001.tar").read_bytes()
    first = data.index(b"\x89PNG\r\n\x1a\n")
    (source / "00001.tar").write_bytes(data[:first] + b"not an image" + data[first + 12 :])
    # The plan is without it, and says so as the run does.
    assert run(str(source), pipelines(), tmp_path / "cache", dry_run=True) == 1
    assert "00009.tar" in capsys.readouterr().err
    code = run(str(source), pipelines(), tmp_path / "cache")
    output = capsys.readouterr()
    assert code == 1
    assert output.err.count("error:") == 1
    assert "00009.tar" in output.err
    assert "Traceback" not in output.err
    assert "1 x unreadable" in output.err
    cache = open_cache(str(tmp_path / "cache"))
    assert cache.num_pairs == 3


def test_another_model_or_settings_are_refused_with_both_values(
    pipelines: Callable, tars: Callable, run: Callable, tmp_path: Path
) -> None:
    source = tars(1, 1)
    run.cache(source, pipelines(), tmp_path / "cache", grid_points=3)
    loaded = len(run.components)
    with pytest.raises(CacheMismatch) as raised:
        run(source, pipelines(), tmp_path / "cache", grid_points=4, seed=7)
    for words in (
        "inverter.grid_points = 3 (in the cache)",
        "inverter.grid_points = 4 (this run)",
        "seed = 0",
        "seed = 7",
    ):
        assert words in str(raised.value)
    other = save_tiny_pipeline(tmp_path / "other", seed=1)
    with pytest.raises(CacheMismatch, match=r"fingerprints\.network"):
        run(source, other, tmp_path / "cache", grid_points=3)
    assert len(run.components) == loaded  # before any model work
    # What does not change the numbers may change.
    assert run(source, pipelines(), tmp_path / "cache", grid_points=3, batch_size=1, decode_workers=2) == 0


@pytest.mark.parametrize(
    ("settings", "kind", "words"),
    [
        ({"timesteps_per_pair": 4}, UsageError, ["--timesteps-per-pair", "1..3", "4"]),
        ({"timestep_range": (0, 200)}, UsageError, ["--timestep-range", "[0, 200)"]),
        ({"inverter": "euler"}, UsageError, ["--inverter", "euler", "'noise' or 'tracked'"]),
        ({"extra": ("noise",)}, UsageError, ["--extra", "noise", "'delta_prev' or 'eps_ref'"]),
        ({"profile": "slim"}, UsageError, ["--profile", "slim"]),
        ({"guidance": -1.0}, UsageError, ["--guidance", "-1.0"]),
        ({"caption_dropout": 1.5}, UsageError, ["--caption-dropout", "1.5"]),
        ({"colour": "red"}, UsageError, ["colour", "timesteps_per_pair"]),
        ({"dtype": "int8"}, UsageError, ["--dtype", "int8", "bfloat16"]),
        ({"resolution": 34}, UsageError, ["--resolution", "34", "multiples of 4"]),
        ({"faithful": True, "inverter": "ab2"}, UsageError, ["--faithful"]),
    ],
)
def test_wrong_settings(
    pipelines: Callable,
    tars: Callable,
    run: Callable,
    tmp_path: Path,
    settings: dict[str, Any],
    kind: type[InpoError],
    words: list[str],
) -> None:
    source = tars(1, 1)
    with pytest.raises(kind) as raised:
        run(source, pipelines(), tmp_path / "cache", **settings)
    for word in words:
        assert word in str(raised.value)
    assert raised.value.exit_code == 2
    assert not (tmp_path / "cache").exists()


def test_missing_model_source_and_cache(pipelines: Callable, tars: Callable, run: Callable, tmp_path: Path) -> None:
    source = tars(1, 1)
    with pytest.raises(ModelError, match="no model here"):
        run(source, tmp_path / "nowhere", tmp_path / "cache")
    with pytest.raises(ModelError, match=r"model_index\.json"):
        run(source, pipelines() / "unet", tmp_path / "cache")
    with pytest.raises(DataError) as missing:
        run(str(tmp_path / "none"), pipelines(), tmp_path / "cache")
    assert "none" in str(missing.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError) as empty:
        run(str(tmp_path / "empty"), pipelines(), tmp_path / "cache")
    assert "empty" in str(empty.value)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    with pytest.raises(CacheMismatch, match=r"thesis\.tex"):
        run(source, pipelines(), tmp_path / "mine")
    with pytest.raises(UsageError, match="--model"):
        run_precompute(None, {}, {"pairs": source, "cache": "c"}, {}, ray_options=RayOptions(), dry_run=False)


def test_weights_are_hashed_once_and_loaded_once(
    pipelines: Callable, tars: Callable, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each component's, whatever the phases and shards: gigabytes, which every start waits for."""
    import inpo.common.models as models

    read: list[tuple[str, str]] = []
    load, of_weights = models.Model.load_component, models.fingerprint.of_weights

    def loading(self: models.Model, component: str) -> Any:
        read.append(("load", component))
        return load(self, component)

    def hashing(files: Any, **told: Any) -> str:
        read.extend(("hash", file.parent.name) for file in files)
        return of_weights(files, **told)

    monkeypatch.setattr(models.Model, "load_component", loading)
    monkeypatch.setattr(models.fingerprint, "of_weights", hashing)
    assert run(tars(4, 2), pipelines(), tmp_path / "cache") == 0
    assert sorted(read) == [(how, name) for how in ("hash", "load") for name in ("text_encoder", "unet", "vae")]


def test_what_another_writer_has_committed_first_is_said_and_kept(
    pipelines: Callable, tars: Callable, run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    source, theirs = tars(2, 1), []
    write = ShardWorker.write

    def second(self: ShardWorker, task: Any, data: Any) -> Any:
        theirs.append(write(self, task, data))
        return write(self, task, data)

    monkeypatch.setattr(ShardWorker, "write", second)
    cache = run.cache(source, pipelines(), tmp_path / "cache")
    assert [each.attempt for each in cache.commits.values()] == [each.attempt for each in theirs]
    assert "2 shards were committed by another writer first" in capsys.readouterr().err
