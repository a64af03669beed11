"""What a run refuses before it computes anything wrong, and what it says."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file

from inpo.common.cache import CacheWriter, open_cache
from inpo.common.errors import CacheIncomplete, CacheMismatch, CacheMissing, TrainingError, UsageError
from inpo.common.models import open_model
from inpo.common.recipe import read_recipe, resolve, to_toml
from inpo.common.testing import save_tiny_pipeline
from inpo.train import requirements
from inpo.train.index import build_index
from inpo.train.loop import Trainer
from inpo.train.run import run_train
from inpo.train.settings import TrainSettings

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(autouse=True)
def short_proof() -> None:
    """None: the proof is what is tested."""


def test_another_model_is_refused_by_fingerprint(make_world: Callable[..., Any], run: Callable[..., Path]) -> None:
    other = make_world(seed=1)
    with pytest.raises(CacheMismatch) as caught:
        run(model=str(other.model.folder))
    message = str(caught.value)
    assert "made by another model: its network" in message
    assert other.model.fingerprints["network"] in message
    assert "--init-from" in message


def test_other_numbers_under_the_right_fingerprint_fail_the_proof(
    world: Any, run: Callable[..., Path], tmp_path: Path
) -> None:
    """The stored errors are off by 1e-4 in one record: 0.1 on the logit at beta 2000."""

    def shift(shard: int, arrays: dict[str, np.ndarray]) -> None:
        arrays["reference_error"][1, 0] += 1e-4

    location = world.cache(tmp_path / "c", shards=(4,), change=shift)
    with pytest.raises(CacheMismatch) as caught:
        run(caches=[location])
    message = str(caught.value)
    assert "Zero-step proof failed" in message
    off = float(message.split("the logit off by ")[1].split(",")[0])
    # 0.1 of one of 16 errors (8 images, 2 records): its root mean square, to the size of that error.
    assert 0.01 < off < 0.1
    assert "at most 0.001" in message
    assert "at beta 2000" in message
    assert "mean E_ref" in message
    assert "mean E_theta" in message
    assert "inpo inspect verify" in message


def test_an_error_that_both_sides_share_fails_the_proof_too(
    world: Any, run: Callable[..., Path], tmp_path: Path
) -> None:
    def shift(shard: int, arrays: dict[str, np.ndarray]) -> None:
        arrays["reference_error"][:2, 0] += 1e-4

    with pytest.raises(CacheMismatch, match="Zero-step proof failed"):
        run(caches=[world.cache(tmp_path / "c", shards=(4,), change=shift)])


def test_numbers_of_another_network_in_any_shard_fail_the_proof(
    world: Any, run: Callable[..., Path], tmp_path: Path
) -> None:
    """The manifest says that one reference made all shards; the numbers of one of them say otherwise: of the first, of
    one with a single pair, of the last."""
    for foreign in (0, 2, 4):

        def shift(shard: int, arrays: dict[str, np.ndarray], foreign: int = foreign) -> None:
            if shard == foreign:
                arrays["reference_error"] *= np.float32(1.01)

        location = world.cache(tmp_path / f"c{foreign}", shards=(2, 3, 1, 2, 2), change=shift)
        with pytest.raises(CacheMismatch, match="Zero-step proof failed"):
            run(caches=[location], output=tmp_path / f"run{foreign}")


def test_numbers_of_another_network_in_a_cache_that_is_held_out_whole_fail_the_proof(
    world: Any, cache: str, run: Callable[..., Path], tmp_path: Path
) -> None:
    """The held-out accuracy, which ends runs and ranks them, would be of those numbers."""

    def shift(shard: int, arrays: dict[str, np.ndarray]) -> None:
        arrays["reference_error"] *= np.float32(3)

    aside = world.cache(tmp_path / "aside", shards=(2,), prompts=["prompt 0"] * 7, change=shift)
    both = build_index([open_cache(cache), open_cache(aside)], soft=False, held_out=0.5)
    assert {shard.shard.cache.location for shard in both.training} == {cache}
    with pytest.raises(CacheMismatch, match="Zero-step proof failed") as caught:
        run(caches=[cache, aside], held_out=0.5)
    assert caught.value.where == aside


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        *(("sd15", part) for part in ("text_encoder", "vae", "tokenizer", "scheduler", "unet")),
        ("sdxl", "text_encoder_2"),
        ("sdxl", "tokenizer_2"),
    ],
)
def test_a_model_of_which_one_component_is_another_is_refused(
    make_world: Callable[..., Any], run: Callable[..., Path], tmp_path: Path, kind: str, part: str
) -> None:
    """The written pipeline would carry encoders that the embeddings and latents never came from."""
    world = make_world(kind)
    location = world.cache(tmp_path / "c", shards=(2,))
    folder = Path(shutil.copytree(world.model.folder, tmp_path / "model"))
    if "tokenizer" in part or part == "scheduler":
        (file,) = [f for f in (folder / part).iterdir() if f.name in ("tokenizer_config.json", "scheduler_config.json")]
        document = json.loads(file.read_text())
        file.write_text(json.dumps(document | {"model_max_length": 9, "beta_end": 0.0121}))
    else:
        (file,) = (folder / part).glob("*.safetensors")
        times = file.stat()
        with file.open("r+b") as stream:  # in place: size, times and number of the file stay
            stream.seek(-2, os.SEEK_END)
            last = stream.read(1)[0]
            stream.seek(-2, os.SEEK_END)
            stream.write(bytes([last ^ 1]))
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    other = open_model(str(folder)).fingerprints
    part = "network" if part == "unet" else part
    assert {name for name in other if other[name] != world.model.fingerprints[name]} == {part}
    with pytest.raises(CacheMismatch) as caught:
        run(model=str(folder), caches=[location])
    for words in (f"by another model: its {part} differs", other[part], world.model.fingerprints[part]):
        assert words in str(caught.value)


@pytest.mark.parametrize("part", ["text_encoder", "vae", "tokenizer"])
def test_caches_of_which_one_component_is_another_are_not_mixed(
    world: Any, cache: str, run: Callable[..., Path], tmp_path: Path, part: str
) -> None:
    other = world.cache(tmp_path / "other", shards=(2,), fingerprints={part: "0" * 32})
    with pytest.raises(CacheMismatch) as caught:
        build_index([open_cache(cache), open_cache(other)], soft=False, held_out=0.0)
    for words in (part, "0" * 32, world.model.fingerprints[part], other):
        assert words in str(caught.value)


@pytest.mark.parametrize(("made", "used"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_another_dtype_is_refused_by_identity(
    world: Any, run: Callable[..., Path], tmp_path: Path, made: str, used: str
) -> None:
    """From the reference as from other weights: the stored errors are of the cache's dtype."""
    location = world.cache(tmp_path / "c", shards=(4,), network_dtype=made)
    for flags in ({}, {"init_from": str(world.model.folder)}):
        with pytest.raises(CacheMismatch) as caught:
            run(caches=[location], dtype=used, **flags)
        for words in (f"network_dtype {made} (in the cache)", f"--dtype {used}", "leave --dtype out", location):
            assert words in str(caught.value)
    assert (run(caches=[location], dtype=made, steps=1) / "pipeline").is_dir()


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("sd15", "float32"), ("sd2-v", "float32"), ("sample", "float32"), ("sdxl", "float32"), ("sd2-v", "bfloat16")],
)
def test_the_proof_holds_for_the_caches_own_model_and_dtype(
    make_world: Callable[..., Any], run: Callable[..., Path], tmp_path: Path, kind: str, dtype: str
) -> None:
    world = make_world(kind)
    location = world.cache(tmp_path / "c", shards=(3,), network_dtype=dtype)
    assert (run(model=str(world.model.folder), caches=[location], steps=1) / "pipeline").is_dir()


def test_no_cache_and_an_empty_cache(world: Any, run: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(CacheMissing, match="There is no cache here"):
        run(caches=[str(tmp_path / "nothing")])
    location = world.cache(tmp_path / "empty", shards=())
    with pytest.raises(CacheMissing, match="inpo precompute"):
        run(caches=[location])


@pytest.mark.parametrize(
    ("objective", "options", "words"),
    [
        ("inversion_dpo", {}, ["delta_prev", "--extra delta_prev"]),
        ("inversion_dpo", {"profile": "lean", "extra": ("delta_prev",)}, ["needs eps_ref", "--extra eps_ref"]),
        ("inversion_dpo", {"guidance": 0.0, "extra": ("delta_prev",)}, ["eps_ref", "--extra eps_ref"]),
        ("dpo", {}, ["noised latents", "--inverter noise"]),
        ("smpo", {}, ["soft labels", "inpo relabel", "--smpo", "--labels"]),
        ("inpo", {"label": lambda pair: 0.5}, ["No pair is left to train on"]),
    ],
)
def test_an_objective_that_the_cache_cannot_serve(
    world: Any, run: Callable[..., Path], tmp_path: Path, objective: str, options: dict[str, Any], words: list[str]
) -> None:
    location = world.cache(tmp_path / "c", shards=(3,), **options)
    with pytest.raises(CacheIncomplete) as caught:
        run(caches=[location], objective=objective)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("objective", "options"),
    [
        ("inversion_dpo", {"extra": ("delta_prev",)}),
        ("inversion_dpo", {"guidance": 0.0, "extra": ("delta_prev", "eps_ref")}),
        ("inversion_dpo", {"profile": "lean", "extra": ("delta_prev", "eps_ref")}),
        ("dpo", {"inverter": "noise"}),
        ("smpo", {"label": lambda pair: 0.2 + pair / 10}),
        ("kto", {"profile": "lean"}),
        ("inpo", {"guidance": 0.0}),
    ],
)
def test_an_objective_that_the_cache_serves(
    world: Any, run: Callable[..., Path], tmp_path: Path, objective: str, options: dict[str, Any]
) -> None:
    location = world.cache(tmp_path / "c", shards=(3,), **options)
    assert (run(caches=[location], objective=objective, steps=1) / "pipeline").is_dir()


def test_a_loss_that_is_not_finite_stops_before_the_checkpoint(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    optimise = Trainer._optimise

    def poisoned(self: Trainer, batches: Any) -> int:
        if self.step == 3:
            with torch.no_grad():
                next(iter(self.trained)).fill_(float("nan"))
        return optimise(self, batches)

    monkeypatch.setattr(Trainer, "_optimise", poisoned)
    with pytest.raises(TrainingError) as caught:
        run(steps=6, save_every=2, log_every=100)
    assert "not finite" in str(caught.value)
    assert "last good checkpoint" in str(caught.value)
    assert "step-00000002" in str(caught.value)


def test_a_held_out_loss_that_is_not_finite_stops_before_anything_is_written(
    run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The weights are finite, and the one loss before the update was."""
    flags = {"steps": 1, "learning_rate": 1e36, "held_out": 0.5}
    with pytest.raises(TrainingError, match="held-out loss is not finite"):
        run(**flags)
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))
    assert not (tmp_path / "run/pipeline").exists()
    output = run(check_finite=False, **flags)
    assert "the held-out loss at step 1 is not finite" in capsys.readouterr().err
    last = json.loads((output / "metrics.jsonl").read_text().splitlines()[-1])
    assert (last["held_out_loss"], last["held_out_implicit_accuracy"]) == (None, None)
    (checkpoint,) = output.glob("checkpoints/step-*")
    assert json.loads((checkpoint / "run.json").read_text())["held_out"] == []


def test_nan_in_a_record_stops_the_run_with_its_pair(
    world: Any, run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CacheWriter, "_check", lambda self, name, data: None)

    def spoil(shard: int, arrays: dict[str, np.ndarray]) -> None:
        arrays["x_t"][4, 1, 0, 0, 0] = np.inf

    location = world.cache(tmp_path / "c", shards=(4,), change=spoil)
    with pytest.raises(OSError, match="pair-0002"):
        run(caches=[location])
    (tmp_path / "list").write_text("pair-0002\n")
    assert (run(caches=[location], steps=1, **{"except": tmp_path / "list"}) / "pipeline").is_dir()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"objective": "ppo"}, ["--objective", "ppo", "'inpo'"]),
        ({"seed": 2**63}, ["seed", "less than"]),
        ({"steps": 0}, ["steps", "greater than or equal to 1"]),
        ({"schedule": "nonsense"}, ["schedule"]),
        ({"schedule": "polynomial", "warmup_steps": 2, "steps": 2}, ["--warmup-steps", "less than --steps 2"]),
        ({"warmup_steps": 1, "steps": 1}, ["--warmup-steps", "0 at every step", "more --steps"]),
        ({"schedule": "cosine", "warmup_steps": 9, "steps": 1}, ["--warmup-steps", "first step of a warm-up"]),
        ({"score_temperature": 2.0}, ["--score-temperature", "an objective of scores: ", "capo", "lair"]),
        ({"schedule": "polynomial", "learning_rate": 1e-8}, ["--learning-rate", "more than 1e-7"]),
        ({"optimizer": "sgd"}, ["optimizer", "adamw"]),
        ({"lora_rank": 2, "lora_targets": ["nosuch"]}, ["--lora-targets", "nosuch"]),
        ({"lora_rank": 2, "lora_targets": ["to_q", "nosuch"]}, ["--lora-targets", "no module's name ends in nosuch"]),
        ({"dtype": "int8"}, ["dtype", "float32"]),
    ],
)
def test_options_out_of_range(run: Callable[..., Path], flags: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        run(**flags)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "package"), [({"optimizer": "adamw8bit"}, "bitsandbytes"), ({"tracker": "wandb"}, "wandb")]
)
def test_a_package_that_is_not_installed_is_named(
    run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: dict[str, Any], package: str
) -> None:
    monkeypatch.setattr(requirements, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=f"pip install {package}"):
        run(**flags)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flags",
    [{"ema": 0.9}, {"lora_rank": 4}, {"sample_every": 1}, {"optimizer": "adafactor"}, {"optimizer": "adamw8bit"}],
)
def test_what_needs_whole_weights_is_refused_under_fsdp(flags: dict[str, Any]) -> None:
    chosen = resolve(TrainSettings, "train", {}, flags)
    requirements.check_distribution(0, chosen)
    option = "--" + next(iter(flags)).replace("_", "-")
    with pytest.raises(UsageError, match=f"{option} .* does not work under FSDP"):
        requirements.check_distribution(2, chosen)


def test_fsdp_of_version_1_is_refused() -> None:
    with pytest.raises(UsageError, match="Only version 2 of FSDP"):
        requirements.check_distribution(1, resolve(TrainSettings, "train", {}, {}))


def test_the_fsdp_file_wraps_layers_that_sdxl_has_and_goes_with_its_recipe(make_world: Callable[..., Any]) -> None:
    """That it trains is in test_fsdp.py."""
    config = load_config_from_file(str(RECIPES / "sdxl_fsdp.yaml"))
    layers = {type(layer).__name__ for layer in make_world("sdxl").model.load_network().modules()}
    assert set(config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"].split(",")) <= layers
    advised = {line for line in (RECIPES / "sdxl_fsdp.yaml").read_text().splitlines() if "accelerate launch" in line}
    assert all(line.endswith("--optimizer adamw") for line in advised)
    assert advised
    chosen = resolve(TrainSettings, "train", read_recipe(RECIPES / "sdxl.toml"), {"optimizer": "adamw"})
    requirements.check_distribution(config.fsdp_config["fsdp_version"], chosen)


@pytest.mark.parametrize("kind", ["sd3", "flux", "qwen-image", "z-image"])
def test_the_fsdp_file_of_flows_leaves_the_layers_to_their_class(kind: Any, tmp_path: Path) -> None:
    config = load_config_from_file(str(RECIPES / "flow_fsdp.yaml")).fsdp_config
    assert "fsdp_transformer_layer_cls_to_wrap" not in config
    network = open_model(str(save_tiny_pipeline(tmp_path / kind, kind))).load_network()
    assert set(network._no_split_modules or ()) & {type(layer).__name__ for layer in network.modules()}
    whole = {"lora_rank": 0}
    for recipe in ("flux", "qwen-image"):
        chosen = resolve(TrainSettings, "train", read_recipe(RECIPES / f"{recipe}.toml"), whole)
        requirements.check_distribution(config["fsdp_version"], chosen)


def test_a_misspelt_setting_is_answered_with_the_right_name() -> None:
    with pytest.raises(UsageError) as caught:
        resolve(TrainSettings, "train", {"train": {"learnrate": 1e-5}}, {})
    assert "Unknown setting 'learnrate' in [train]" in str(caught.value)
    assert "did you mean learning_rate?" in str(caught.value)
    assert "only, except, held_out" in str(caught.value)


@pytest.mark.parametrize(
    ("values", "option"),
    [({"lora_alpha": 8.0}, "--lora-alpha"), ({"schedule": "constant", "warmup_steps": 2}, "--warmup-steps")],
)
def test_a_recipe_of_what_would_not_be_made_is_refused_too(
    world: Any, cache: str, tmp_path: Path, values: dict[str, Any], option: str
) -> None:
    """What a run says of itself before the first step would not be so."""
    recipe = tmp_path / "r.toml"
    recipe.write_text(to_toml({"train": TrainSettings(**values)}, differing=True))
    told = {"output": tmp_path / "run", "steps": 1, "tracker": "none"}
    with pytest.raises(UsageError, match=f"{option} does nothing"):
        run_train(recipe, {"model": str(world.model.folder)}, [cache], told, resume="auto")
