"""What makes a run the one that its checkpoint is of: what a setting means, not how it is spelled."""

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file, save_file

import inpo.train.run
from inpo.common.cache import open_cache
from inpo.common.cache.labels import LabelSet, PairLabel, write_labels
from inpo.common.errors import TrainingError
from inpo.common.models import Model
from inpo.train import checkpoint
from inpo.train.identity import result_identity, run_identity
from inpo.train.index import build_index
from inpo.train.loss_space import error_weights
from inpo.train.settings import LossSpace, TrainSettings
from tests.light import LIGHT, LIGHT_V
from tests.train.test_resume import equal, steps_of


def identity_of(model: Model, location: str, **options: Any) -> dict[str, Any]:
    settings, cache = TrainSettings(**options), open_cache(location)
    index = build_index([cache], soft=False, held_out=0.0, labels=settings.labels)
    return run_identity(settings, model, [cache], index, cache.manifest.network_dtype, 1)


@pytest.mark.parametrize("kind", [LIGHT, LIGHT_V, "sample", "sd3"])
def test_loss_spaces_are_one_where_their_errors_are(make_world: Callable[..., Any], cache: str, kind: str) -> None:
    model = make_world(kind).model
    for left, right in itertools.combinations(get_args(LossSpace), 2):
        weights = [error_weights(model.levels, model.prediction, each, model.levels.space) for each in (left, right)]
        identities = [identity_of(model, cache, loss_space=each) for each in (left, right)]
        assert (identities[0] == identities[1]) == torch.allclose(*weights), (left, right)


def test_label_sets_are_one_where_their_labels_are(world: Any, tmp_path: Path) -> None:
    location = world.cache(tmp_path / "c", shards=(2,))
    opened = open_cache(location)
    for name, label in (("a", 0.8), ("b", 0.8), ("c", 0.7)):
        for shard in opened:
            pairs = {str(pair_id): PairLabel(scores=None, label=label) for pair_id in shard.read("pair/id")}
            made = LabelSet(attempt=shard.commit.attempt, scorer="s", temperature=1.0, source="x", pairs=pairs)
            assert write_labels(opened.store, name, shard.name, made)
    first, second, third = (identity_of(world.model, location, labels=name) for name in "abc")
    assert first == second != third


def test_how_often_a_run_is_looked_at_changes_its_result_only_where_it_may_stop(world: Any) -> None:
    def told(**options: Any) -> dict[str, Any]:
        return result_identity(TrainSettings(**options), world.model)

    assert told(evaluate_every=5, overfitting="ignore", log_every=1) == told() != told(steps=5)
    assert told(evaluate_every=5, overfitting="stop") != told(overfitting="stop") != told()


def test_a_setting_that_does_nothing_is_not_asked_for_again(world: Any, cache: str, tmp_path: Path) -> None:
    """A recipe may have it, a flag may not: the run could go on with neither."""
    recipe = tmp_path / "r.toml"
    recipe.write_text('[train]\noptimizer = "adafactor"\nadam_eps = 1e-6\n')
    told = {"output": tmp_path / "run", "batch_size": 2, "tracker": "none", "held_out": 0.0, "log_every": 1}
    model = {"model": str(world.model.folder)}
    inpo.train.run.run_train(recipe, model, [cache], told | {"steps": 1}, resume="auto")
    plain = told | {"steps": 2, "optimizer": "adafactor"}
    inpo.train.run.run_train(None, model, [cache], plain, resume="auto")
    assert steps_of(tmp_path / "run")[-1] == 2
    with pytest.raises(TrainingError, match="adam_eps"):
        inpo.train.run.run_train(recipe, model, [cache], told | {"steps": 3, "optimizer": "adamw"}, resume="auto")


def test_other_settings_are_refused_by_name(run: Callable[..., Path]) -> None:
    """Those that a command can repeat: that other pairs are held out is told by what held them out."""
    run(steps=2)
    with pytest.raises(TrainingError) as caught:
        run(steps=4, beta=500.0, batch_size=3, held_out=0.5)
    assert "other settings (batch_size, beta, held_out)" in str(caught.value)
    assert "batch_size = 2" in str(caught.value)
    assert "beta = 500.0" in str(caught.value)
    assert "another --output" in str(caught.value)


def test_what_no_setting_says_is_refused_with_what_helps(
    world: Any, cache: str, run: Callable[..., Path], tmp_path: Path
) -> None:
    """Digests help nobody."""
    output = run(steps=1)
    (tmp_path / "list").write_text("pair-0000\n")
    more = world.cache(tmp_path / "more", shards=(2,))
    for others in ({"except": tmp_path / "list"}, {"caches": [cache, more]}, {"timestep_range": (0, 500)}):
        with pytest.raises(TrainingError, match="on other pairs") as caught:
            run(steps=2, **others)
        assert "--except and --timestep-range" in str(caught.value.fix)
        assert (caught.value.expected, caught.value.got) == (None, None)
    chosen = checkpoint.choose("auto", output / "checkpoints", say=print)
    assert chosen is not None
    with pytest.raises(TrainingError, match="another number of processes") as caught:
        chosen.check_identity(chosen.document.identity | {"world_size": 2})
    assert (caught.value.expected, caught.value.got) == ("world_size = 1", "world_size = 2")
    assert "as many processes as before" in str(caught.value.fix)


def test_a_start_that_has_changed_is_refused(
    make_world: Callable[..., Any], run: Callable[..., Path], tmp_path: Path
) -> None:
    """The frozen weights under LoRA layers are in no checkpoint: they are read from where training began. Where that
    lies is no part of the run, nor how a setting is spelled.
    """
    start = shutil.copytree(make_world(seed=1).model.folder, tmp_path / "start")
    options = {"init_from": str(start), "lora_rank": 2}
    spelled = {"lora_alpha": 2.0, "lora_targets": ("to_out.0", "to_v", "to_k", "to_q"), "timestep_range": (0, 1000)}
    spelled |= {"loss_space": "noise", "schedule": "constant"}
    spelled |= {"init_from": str(shutil.copytree(start, tmp_path / "moved"))}
    run(steps=1, **options)
    output, whole = run(steps=2, **options | spelled), run(steps=2, output=tmp_path / "whole", **options)
    left, right = (load_file(each / "lora/pytorch_lora_weights.safetensors") for each in (whole, output))
    assert equal(left, right)
    (file,) = (start / "unet").glob("*.safetensors")
    save_file({name: 1.5 * value for name, value in load_file(file).items()}, file, metadata={"format": "pt"})
    with pytest.raises(TrainingError, match="began with other weights") as caught:
        run(steps=3, **options)
    assert "--init-from" in str(caught.value.fix)
