"""What a run shares with the released codes, and where it says that it does not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from inpo.common.cache import open_cache
from inpo.common.cache.labels import LabelSet, PairLabel, write_labels
from inpo.common.errors import CacheIncomplete, CacheMismatch, TrainingError
from inpo.common.recipe import read_recipe
from inpo.train.index import build_index
from inpo.train.objectives import OBJECTIVES

ROOT = Path(__file__).parents[2]


def lines(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def half(world: Any, tmp_path: Path) -> str:
    """A float16 cache."""
    return world.cache(tmp_path / "half", network_dtype="float16")


def scale(monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """float16's scaler on the CPU, where accelerate has none."""
    init = Accelerator.__init__

    def with_scaler(self: Accelerator, **arguments: Any) -> None:
        init(self, **arguments)
        self.native_amp, self.scaler = True, torch.amp.GradScaler("cpu", **options)

    monkeypatch.setattr(Accelerator, "__init__", with_scaler)


def test_the_schedule_waits_for_updates_that_the_scaler_skips(
    half: str,
    run: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """Gradients at a scale of 2^127 overflow, and at the next, 2^27, not."""
    scale(monkeypatch, init_scale=2.0**127, backoff_factor=2.0**-100)
    options = {"caches": [half], "warmup_steps": 10, "learning_rate": 1e-4, "log_every": 1, "ema": 0.9}
    output = run(steps=6, save_every=3, keep_last=9, **options)
    rest = lines(output)[1:]
    skipped = [line["skipped_updates"] for line in rest]
    assert skipped[0] == 1
    assert 1 <= skipped[-1] < 6
    for line in rest:
        assert line["learning_rate"] == pytest.approx(1e-5 * (line["step"] - line["skipped_updates"]))
    assert f"overflowed float16 in {skipped[-1]} of 6 steps" in capsys.readouterr().err
    other = run(
        steps=6, save_every=3, output=tmp_path / "o", resume=str(output / "checkpoints/step-00000003"), **options
    )
    assert lines(other)[-1]["skipped_updates"] == skipped[-1]
    left, right = (load_file(each / "pipeline/unet/diffusion_pytorch_model.safetensors") for each in (output, other))
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize(
    ("backoff_factor", "options"),
    [(0.99, {"steps": 3}), (2.0**-100, {"steps": 2, "warmup_steps": 1})],
    ids=["all skipped", "one skipped, one at the warm-up's first rate"],
)
def test_a_run_without_an_update_is_an_error(
    half: str,
    run: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    backoff_factor: float,
    options: dict[str, int],
) -> None:
    scale(monkeypatch, init_scale=2.0**127, backoff_factor=backoff_factor)
    with pytest.raises(TrainingError, match="No update was made"):
        run(caches=[half], **options)
    assert not (tmp_path / "run/pipeline").exists()


@pytest.mark.parametrize("objective", ["inpo", "ipo", "mapo"])
def test_accumulation_gives_the_gradient_of_the_whole_batch(
    objective: str, world: Any, run: Callable[..., Path], tmp_path: Path
) -> None:
    """By the weights after two steps; Adam's eps is far above the gradients, so that an update is proportional."""
    options = {"steps": 2, "objective": objective, "adam_eps": 1e2, "learning_rate": 1.0, "weight_decay": 0.0}
    one = run(output=tmp_path / "one", batch_size=4, **options)
    many = run(output=tmp_path / "many", batch_size=1, accumulate=4, **options)
    start = world.model.load_network().state_dict()
    left, right = (
        UNet2DConditionModel.from_pretrained(each / "pipeline", subfolder="unet").state_dict() for each in (one, many)
    )
    moved = max(float((left[name] - start[name]).abs().max()) for name in left)
    assert moved > 0
    assert max(float((left[name] - right[name]).abs().max()) for name in left) < 1e-3 * moved


def test_prompts_that_differ_in_case_and_blanks_are_held_out_together(world: Any, tmp_path: Path) -> None:
    spellings = ["a café by the sea", "A CAFÉ by the Sea", " a café  by the\tsea ", "a cafe\u0301 by the sea\n"]

    cache = open_cache(
        world.cache(tmp_path / "c", shards=(7,), prompts=[*spellings, *(f"another {number}" for number in range(5, 8))])
    )
    sides = set()
    for share in (0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95):
        try:
            index = build_index([cache], soft=False, held_out=share)
        except CacheIncomplete:  # every pair is held out
            continue
        (held,) = [shard.rows.tolist() for shard in index.held_out] or [[]]
        together = {row for row in range(4) if row in held}
        assert together in (set(), {0, 1, 2, 3}), share
        sides.add(bool(together))
    assert sides == {True, False}


def label(cache: str, name: str, scorer: str, temperature: Callable[[int], float]) -> None:
    opened = open_cache(cache)
    for number, (shard_name, shard) in enumerate(opened.shards.items()):
        pairs = {str(pair): PairLabel(scores=(0.3, 0.2), label=0.7) for pair in shard.read("pair/id")}
        labels = LabelSet(
            attempt=shard.commit.attempt, scorer=scorer, temperature=temperature(number), source="test", pairs=pairs
        )
        assert write_labels(opened.store, name, shard_name, labels)


def test_smpo_says_what_its_labels_temperature_does(
    world: Any, run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = world.cache(tmp_path / "c")
    label(cache, "released", "pickscore", lambda number: 0.16658)
    label(cache, "default", "pickscore", lambda number: 0.01)
    label(cache, "other", "toyworld-oracle", lambda number: 1.0)
    label(cache, "mixed", "pickscore", lambda number: 0.01 * (number + 1))

    def says(labels: str, objective: str = "smpo") -> str:
        capsys.readouterr()
        run(output=tmp_path / f"{labels}-{objective}", caches=[cache], steps=1, labels=labels, objective=objective)
        return capsys.readouterr().err

    assert "note:" not in says("released")
    assert "note:" not in says("default", "inpo")
    said = says("default")
    assert "note: label set default" in said
    assert "16.7 times as hard" in said
    assert "--temperature 0.16658" in said
    assert "other scores have another unit" in says("other")
    with pytest.raises(CacheMismatch, match="is a mixture"):
        says("mixed")


def test_every_default_beta_is_told_with_its_source() -> None:
    from inpo.cli import app

    rows = {
        cells[1].strip(" `"): cells
        for line in (ROOT / "docs/training.md").read_text().splitlines()
        if line.startswith("| `") and len(cells := line.split("|")) == 7
    }
    for name, objective in OBJECTIVES.items():
        assert float(rows[name][3]) == objective.beta
        assert rows[name][4].strip() == objective.beta_source
    options = typer.main.get_command(app).commands["train"].params
    text = " ".join(f"{option.help} {option.show_default}" for option in options)
    for part in ("inpo 2000", "dpo 2000", "ipo 0.05 and hinge 1000", "kto 1000", "smpo 2000", "mapo 1000"):
        assert part in text
    assert "inversion_dpo 100" in text
    assert "s / (9 + s)" in text


def test_the_moving_average_has_the_decay_that_the_help_says() -> None:
    from diffusers.training_utils import EMAModel

    ema = EMAModel([torch.nn.Parameter(torch.zeros(1))], decay=0.9999)
    assert [ema.get_decay(step) for step in (2, 10, 400)] == pytest.approx([2 / 11, 10 / 19, 400 / 409])


def test_sdxl_is_sampled_at_the_papers_guidance() -> None:
    sections = read_recipe(ROOT / "recipes/sdxl.toml")
    assert sections["evaluate"]["guidance"] == 5.0
    assert sections["train"]["sample_guidance"] == 5.0
