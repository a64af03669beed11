"""`drift`: nothing for the model that made the cache; for another, what inverting with it gives."""

import json
import shlex
import shutil

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from inpo.common.cache import open_cache
from inpo.common.conditions import Condition
from inpo.common.errors import CacheCorrupt
from inpo.common.inversion import Group, invert
from inpo.common.models import open_model
from inpo.inspection.drift import refresh_command
from inpo.inspection.pair_table import read_pair_table
from inpo.inspection.reinvert import load_denoiser, reinvert
from tests.rounding import record_bounds


def rounding_of(location: object) -> dict[str, float]:
    """What rounding alone may change of x_t and target, relative RMS: the largest of the records' bounds."""
    cache = open_cache(str(location))
    bounds = []
    for shard in cache:
        arrays = {name: shard.read(name) for name in ("x_t", "target", "reference_error")}
        if "delta" in shard.stored:
            arrays |= {name: shard.read(name) for name in ("delta", "x0_t")}
        else:  # a lean cache: those of a prediction as large as the target, and x0(t) as x0
            arrays |= {"delta": arrays["target"], "x0_t": np.repeat(shard.read("x0")[:, None], 2, axis=1)}
        timestep = shard.read("timestep")
        for sides, group in zip(shard.sides(), shard.groups(), strict=True):
            for place, t in enumerate(timestep[group]):
                record = {name: values[sides, place] for name, values in arrays.items()}
                bounds.append(record_bounds(record, cache.manifest.levels.signal[t], cache.manifest.levels.noise[t]))
    return {name: max(each[name] for each in bounds) for name in ("x_t", "target")}


@pytest.mark.parametrize(
    ("state", "kind"), [("healthy", "sd15"), ("lean", "sd15"), ("sdxl", "sdxl"), ("grouped", "sd15")]
)
def test_the_model_that_made_the_cache_has_not_drifted(states, inspect, tiny, state, kind):
    done = inspect("drift", states(state), "--model", tiny(kind), "--json")
    assert done.code == 0, done.out
    found = json.loads(done.out)
    assert found["same_weights"] is True
    assert found["num_sampled"] == 5
    for name, bound in rounding_of(states(state)).items():
        assert found[name] < bound
    assert found["verdict"] == "keep"


def test_another_models_drift_is_what_its_own_inversion_gives(states, inspect, tiny):
    cache = open_cache(str(states("healthy")))
    found = json.loads(inspect("drift", states("healthy"), "--model", tiny("sd15", seed=1), "--json").stdout)
    unet = UNet2DConditionModel.from_pretrained(tiny("sd15", seed=1) / "unet")
    squares = []
    for shard in cache:
        images = np.arange(shard.num_images)
        again = invert(
            open_model(str(tiny())).denoiser(unet),
            torch.from_numpy(shard.read("x0")),
            [Group(id=str(name), num_images=2) for name in shard.read("pair/id")],
            identity=cache.manifest.inverter,
            seed=0,
            timesteps_per_pair=2,
            caption=Condition.of(shard, images),
        )
        old, new = shard.read("target").astype(np.float64), again.target.double().numpy()
        squares.append(((new - old) ** 2).mean((-3, -2, -1)) / (old**2).mean((-3, -2, -1)))
    expected = float(np.sqrt(np.concatenate(squares).mean()))
    assert expected > 0.2
    # 1e-3 of each target's RMS by its rounding, in thousands of elements that differ by far more.
    assert found["target"] == pytest.approx(expected, rel=1e-3)
    assert found["verdict"] == "refresh"
    assert f"inpo precompute --like {states('healthy')}" in found["advice"]
    assert sum(each["num_records"] for each in found["bins"]) == 10
    assert "Refresh" in inspect("drift", states("healthy"), "--model", tiny("sd15", seed=1)).out


@pytest.mark.parametrize(
    ("pair", "walked"), [("pair-0-0", [0, 1]), ("pair-0-1", [0, 1, 2, 3]), ("pair-0-3", [2, 3, 4])]
)
def test_a_pair_of_a_large_group_is_inverted_with_those_that_walked_with_it(
    write_cache, tiny, tmp_path, monkeypatch, pair, walked
):
    """fixed_point stops when all images that walk as one have come to rest: two of a group, from its first on. Here a
    chain of five images and a pair of its own. Alone, or with others, an image would stop elsewhere."""
    settings = {"name": "fixed_point", "iterations": 10, "tolerance": 0.05, "timestep_range": (0, 600)}
    folder = write_cache(tmp_path / "cache", pairs=(5,), group="prompt", inverter=settings, timesteps_per_pair=1)
    cache = open_cache(str(folder))
    shard = cache.shards["s0"]
    inverted = []

    def watched(denoiser, x0, groups, **options):
        inverted.append((x0.numpy(), [(group.id, group.num_images) for group in groups]))
        return invert(denoiser, x0, groups, **options)

    monkeypatch.setattr("inpo.inspection.reinvert.invert", watched)
    table = read_pair_table(cache)
    denoiser = load_denoiser(cache, open_model(str(tiny())))
    (again,) = reinvert(cache, table, np.flatnonzero(table.pair_id == pair), denoiser)
    ((x0, groups),) = inverted
    assert np.array_equal(x0, shard.read("x0")[walked])
    assert groups == [(str(shard.read("group/id")[0]), len(walked))]
    for name, bound in rounding_of(folder).items():
        assert again.change(name).max() < bound


def test_every_pair_of_groups_is_compared_with_its_own_images(states, tiny):
    cache = open_cache(str(states("grouped")))
    table = read_pair_table(cache)
    denoiser = load_denoiser(cache, open_model(str(tiny())))
    found = list(reinvert(cache, table, np.arange(len(table)), denoiser))
    assert [again.pair_ids for again in found] == [["pair-0-0", "pair-0-1", "pair-0-2"], ["pair-1-0", "pair-1-1"]]
    for again in found:
        shard = cache.shards[again.shard]
        for row, sides in enumerate(zip(shard.read("pair/win"), shard.read("pair/lose"), strict=True)):
            for side, image in enumerate(sides):
                assert np.array_equal(again.cached_target[row, side], shard.read("target")[image].astype(np.float32))
                assert np.array_equal(again.cached_error[row, side], shard.read("reference_error")[image])
        for name, bound in rounding_of(states("grouped")).items():
            assert again.change(name).max() < bound
        assert (again.error_change < again.error_change_limit(1e-3)).all()
        assert np.array_equal(again.timestep, again.timestep_again)


def test_what_cannot_be_compared_is_told(states, inspect, tiny, tmp_path):
    """The very weights under a scheduler that reads them as v, too."""
    model = shutil.copytree(tiny(), tmp_path / "v")
    config = model / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"prediction_type": "v_prediction"}))
    assert "cannot walk this cache's latents" in inspect("drift", states("healthy"), "--model", model).out
    assert "no committed pair yet" in inspect("drift", states("empty"), "--model", tiny()).out
    (tmp_path / "none").mkdir()
    assert "There is no cache here" in inspect("drift", tmp_path / "none", "--model", tiny()).out
    nobody = inspect("drift", states("healthy"), "--model", tmp_path / "nobody")
    assert nobody.code == 1
    assert "There is no model here" in nobody.out


def test_a_damaged_shard_is_named_and_the_rest_is_measured(states, inspect, tiny):
    done = inspect("drift", states("corrupt"), "--model", tiny(), "--json")
    assert done.code == 1
    found = json.loads(done.out)
    assert found["unreadable"] == ["s1"]
    assert found["num_sampled"] == 3
    assert found["target"] < rounding_of(states("healthy"))["target"]
    assert "shards that cannot be read, left out: s1" in inspect("drift", states("corrupt"), "--model", tiny()).out


def test_a_model_whose_inversion_holds_no_number_is_told_in_a_document_too(states, inspect, tiny, tmp_path):
    """Its predictions are finite, and beyond float16."""
    model = shutil.copytree(tiny(), tmp_path / "beyond")
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    network = load_file(weights)
    network["conv_out.weight"] *= 1e9
    save_file(network, weights, metadata={"format": "pt"})
    done = inspect("drift", states("healthy"), "--model", model, "--json")
    found = json.loads(done.stdout, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert (found["num_not_finite"], found["x_t"], found["target"], found["verdict"]) == (5, None, None, "refresh")
    shown = inspect("drift", states("healthy"), "--model", model).out
    assert "5 pairs came out NaN or infinite" in shown
    assert "overall: x_t -, target -" in shown


def test_the_refreshing_command_makes_the_same_kind_of_cache_from_any_path(write_cache, tiny, tmp_path):
    folder = write_cache(tmp_path / "my caches", pairs=(1,), flip=True, inverter={"guidance": 0.0})
    words = shlex.split(refresh_command(open_cache(str(folder)), open_model(str(tiny()))))
    assert words[words.index("--like") + 1] == str(folder)
    assert words[words.index("--cache") + 1] == f"{folder}-refreshed"
    assert words[words.index("--model") + 1] == str(tiny())


def test_recorded_points_do_not_drift(write_cache, inspect, tiny, tmp_path):
    folder = write_cache(tmp_path / "cache", pairs=(1,), inverter={"name": "recorded", "guidance": 7.5})
    found = inspect("drift", folder, "--model", tiny())
    assert found.code == 2
    assert "--errors-only" in found.out


def test_the_refreshing_command_tells_what_the_last_run_was_told(write_cache, tiny, tmp_path):
    folder = write_cache(tmp_path / "cache", pairs=(1,))
    kept = folder / "configurations"
    kept.mkdir()
    (kept / "1.toml").write_text('[model]\nvae = "first"\n')
    (kept / "2.toml").write_text('[model]\nvae = "/vaes/other one"\n')
    trained = shutil.copytree(tiny(), tmp_path / "trained")  # a pipeline with its own VAE, not the cache's
    weights = trained / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({name: value + 1 for name, value in load_file(weights).items()}, weights, metadata={"format": "pt"})
    words = shlex.split(refresh_command(open_cache(str(folder)), open_model(str(trained))))
    assert words[words.index("--vae") + 1] == "/vaes/other one"
    (kept / "3.toml.0123.staged").write_text("[mod")  # a writer's, on its way
    assert "/vaes/other one" in refresh_command(open_cache(str(folder)), open_model(str(trained)))
    (kept / "2.toml").write_text("[model\n")
    with pytest.raises(CacheCorrupt, match=r"(?s)told cannot be read.*2\.toml"):
        refresh_command(open_cache(str(folder)), open_model(str(tiny())))
