"""`precompute --like`: a cache made again by another model, and the errors at its points alone.

The oracle is precompute itself, from the images: a cache made again by the same model is the same, bit for bit, and by
another model it is what that model's precompute makes.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

import inpo.precompute.phases as phases
import inpo.precompute.refresh as refresh
from inpo.common.cache import Cache, CacheWriter, open_cache
from inpo.common.denoiser import Denoiser
from inpo.common.errors import CacheMismatch, UsageError
from inpo.common.models import Model, open_model
from inpo.common.spread import SPREAD_RECORDS
from inpo.inspection.verify import verify
from inpo.precompute.configuration import configure
from inpo.precompute.run import run_precompute
from inpo.precompute.settings import RayOptions
from inpo.train.run import run_train
from tests.light import LIGHT
from tests.precompute.conftest import Runs


@pytest.fixture(scope="session")
def trained(pipelines: Callable, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """trained(kind, component): a tiny pipeline whose component has moved."""

    def build(kind: str = LIGHT, component: str = "unet") -> Path:
        folder = tmp_path_factory.mktemp("trained") / "pipeline"
        shutil.copytree(pipelines(kind), folder)
        (file,) = (folder / component).glob("*.safetensors")
        weights = load_file(file)
        moved = {name: value * 1.02 if value.is_floating_point() else value for name, value in weights.items()}
        save_file(moved, file, metadata={"format": "pt"})
        return folder

    return build


@dataclass
class Again:
    """Runs `precompute --like`, without images, VAE and text encoders, and counts."""

    denoisers: list[Denoiser] = field(default_factory=list)
    prepare: Callable[[Denoiser], None] = lambda denoiser: None

    def __call__(self, like: Cache, model: Path, cache: Path, **flags: Any) -> int:
        load = refresh.load_denoiser

        def watched(*arguments: Any) -> Denoiser:
            self.denoisers.append(load(*arguments))
            self.prepare(self.denoisers[-1])
            return self.denoisers[-1]

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(refresh, "load_denoiser", watched)
            patched.setattr(Model, "load_vae", lambda self: pytest.fail("a VAE"))
            patched.setattr(phases, "TextEncoder", lambda *_, **__: pytest.fail("a text encoder"))
            return run_precompute(
                None,
                {"model": str(model)},
                {"cache": str(cache)},
                {"like": like.location, "batch_size": 4, **flags},
                ray_options=RayOptions(),
                dry_run=False,
            )

    def cache(self, like: Cache, model: Path, cache: Path, **flags: Any) -> Cache:
        assert self(like, model, cache, **flags) == 0
        return open_cache(str(cache))

    @property
    def network_calls(self) -> int:
        return sum(each.num_calls for each in self.denoisers)


@pytest.fixture
def again() -> Again:
    return Again()


def tensors(cache: Cache) -> dict[str, dict[str, np.ndarray]]:
    """{shard: {array: values}}, texts too."""
    found = {name: {path: shard.read(path) for path in cache.manifest.specs} for name, shard in cache.shards.items()}
    texts = {
        f"texts/{shard.name}": {path: shard.read_stored(path) for path in cache.manifest.text_specs}
        for shard in cache.texts
    }
    return found | texts


def assert_equal(found: Cache, expected: Cache, *, but: tuple[str, ...] = ()) -> None:
    one, other = tensors(found), tensors(expected)
    assert one.keys() == other.keys()
    for name, arrays in other.items():
        for path, values in arrays.items():
            if path not in but:
                np.testing.assert_array_equal(one[name][path], values, err_msg=f"{name} {path}")


SETTINGS: list[dict[str, Any]] = [
    {"inverter": "ab2", "caption_dropout": 0.5, "measure_inversion": 0.5},
    {"inverter": "fixed_point", "profile": "lean", "extra": ("delta_prev", "eps_ref"), "guidance": 0.0},
    {"profile": "compact", "group": "prompt", "noised_start": 0.4},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda each: str(each.get("inverter", each.get("profile"))))
def test_the_same_model_makes_the_same_cache(
    settings: dict[str, Any], tars: Callable, pipelines: Callable, run: Runs, again: Again, tmp_path: Path
) -> None:
    first = run.cache(tars(3, 3), pipelines(), tmp_path / "cache", **settings)
    second = again.cache(first, pipelines(), tmp_path / "again")
    assert second.manifest.identity() == first.manifest.identity()
    assert_equal(second, first)
    for name, commit in first.commits.items():
        other = second.commits[name]
        assert (other.source, other.skipped, other.counts) == (commit.source, commit.skipped, commit.counts)
    calls = again.network_calls
    points = again.cache(first, pipelines(), tmp_path / "points", errors_only=True)
    assert again.network_calls - calls == sum(shard.num_images * 3 + SPREAD_RECORDS for shard in first)
    assert points.manifest.inverter.name == "recorded"
    free = ("reference_error", "x0_t", "delta", "eps_ref", "inversion_error")  # one kernel call of other rows
    one, other = tensors(points), tensors(first)
    for name, arrays in one.items():
        for path, values in arrays.items():
            if path == "reference_error":
                np.testing.assert_allclose(values, other[name][path], rtol=1e-4, err_msg=path)
            elif path not in free:
                np.testing.assert_array_equal(values, other[name][path], err_msg=path)


def test_another_model_makes_what_it_makes_of_the_images(
    tars: Callable, pipelines: Callable, trained: Callable, run: Runs, again: Again, tmp_path: Path
) -> None:
    source = tars(2, 2)
    first = run.cache(source, pipelines(), tmp_path / "cache")
    second = again.cache(first, trained(), tmp_path / "again", inverter="ab2")
    assert second.manifest.fingerprints["network"] != first.manifest.fingerprints["network"]
    assert_equal(second, run.cache(source, trained(), tmp_path / "expected", inverter="ab2"))


def test_errors_alone_are_those_of_the_model_at_the_stored_points(
    tars: Callable, pipelines: Callable, trained: Callable, run: Runs, again: Again, tmp_path: Path
) -> None:
    model = trained()
    first = run.cache(tars(4, 4), pipelines(), tmp_path / "cache", caption_dropout=0.5)
    points = again.cache(first, model, tmp_path / "points", errors_only=True)
    made = ("reference_error", "delta", "x0_t", "inversion_error")
    assert_equal(points, first, but=made)
    (shard,) = points
    unet = UNet2DConditionModel.from_pretrained(model / "unet").double().eval()
    dropped, group = shard.read("group/caption_dropped"), shard.read("image/group")
    assert 0 < dropped.sum() < 4
    for image, timesteps in enumerate(shard.timesteps()):
        place, row = shard.read("group/prompt")[group[image]]
        if dropped[group[image]]:
            place, row = shard.commit.texts.index("empty"), 0
        text = points.texts.need(shard.commit.texts[place]).read_stored("embedding")[row]
        for record, t in enumerate(timesteps.tolist()):
            x_t, target = (torch.from_numpy(shard.read(name)[image, record]).double() for name in ("x_t", "target"))
            with torch.no_grad():
                eps = unet(x_t[None], t, encoder_hidden_states=torch.from_numpy(text).double()[None]).sample[0]
            stored = shard.read("reference_error")[image, record]
            assert stored == pytest.approx(float(((target - eps) ** 2).mean()), rel=1e-4)
    assert verify(points.location, model=open_model(str(model)), num_sampled=2).findings == []
    told = {"output": str(tmp_path / "run"), "steps": 1, "batch_size": 2, "tracker": "none", "held_out": 0.0}
    assert run_train(None, {"model": str(model)}, [points.location], told, resume="never") == 0


def test_what_is_committed_is_not_made_again(
    tars: Callable, pipelines: Callable, run: Runs, again: Again, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run.cache(tars(2, 1), pipelines(), tmp_path / "cache")
    write, last = CacheWriter.write, [*first.commits][-1]

    def dying(self: CacheWriter, name: str, data: Any) -> Any:
        if name == last:
            raise KeyboardInterrupt
        return write(self, name, data)

    with monkeypatch.context() as patched:
        patched.setattr(CacheWriter, "write", dying)
        with pytest.raises(KeyboardInterrupt):
            again(first, pipelines(), tmp_path / "again")
    before = dict(open_cache(str(tmp_path / "again")).commits)
    assert before.keys() == first.commits.keys() - {last}
    again.denoisers.clear()
    second = again.cache(first, pipelines(), tmp_path / "again")
    assert again.network_calls == 2 * (3 + 1) + SPREAD_RECORDS
    assert before.items() <= second.commits.items()
    assert_equal(second, first)


def test_a_pair_that_the_model_has_no_numbers_for_is_skipped(
    tars: Callable, pipelines: Callable, run: Runs, again: Again, tmp_path: Path
) -> None:
    first = run.cache(tars(3, 3), pipelines(), tmp_path / "cache")

    def broken(denoiser: Denoiser) -> None:
        predict = denoiser.predict

        def poisoned(x: torch.Tensor, timestep: torch.Tensor, condition: Any) -> torch.Tensor:
            output = predict(x, timestep, condition)
            output[0] = float("nan") if denoiser.num_calls == len(x) else output[0]
            return output

        denoiser.predict = poisoned  # type: ignore[method-assign]

    again.prepare = broken
    second = again.cache(first, pipelines(), tmp_path / "again")
    (shard,), (whole,) = second, first
    assert (second.num_pairs, shard.commit.skipped) == (2, {"not_finite": 1})
    assert shard.read("pair/id").tolist() == whole.read("pair/id")[1:].tolist()
    assert shard.sides().tolist() == [[0, 1], [2, 3]]
    np.testing.assert_array_equal(shard.read("x0"), whole.read("x0")[2:])
    np.testing.assert_array_equal(shard.read("group/id"), whole.read("group/id")[1:])
    assert verify(second.location).findings == []


def test_a_model_without_numbers_is_told_as_such(
    tars: Callable, pipelines: Callable, run: Runs, again: Again, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run.cache(tars(1, 1), pipelines(), tmp_path / "cache")
    capsys.readouterr()
    again.prepare = lambda denoiser: [each.data.fill_(float("nan")) for each in denoiser.network.parameters()] and None
    assert again(first, pipelines(), tmp_path / "again") == 1
    told = capsys.readouterr().err
    assert "look at its weights" in told
    assert "data check" not in told  # of pairs, which a cache is not


def test_noise_that_a_cache_has_not_is_refused(
    tars: Callable, pipelines: Callable, run: Runs, again: Again, tmp_path: Path
) -> None:
    first = run.cache(tars(1, 1), pipelines("sd3"), tmp_path / "cache")
    with pytest.raises(UsageError, match="--inverter"):
        again(first, pipelines("sd3"), tmp_path / "again", inverter="tracked")
    assert not (tmp_path / "again").exists()


def test_what_does_not_go_together_is_refused(
    tars: Callable, pipelines: Callable, trained: Callable, run: Runs, again: Again, tmp_path: Path
) -> None:
    source = tars(2, 2)
    first = run.cache(source, pipelines(), tmp_path / "cache")
    for component in ("vae", "text_encoder"):
        with pytest.raises(CacheMismatch, match=component):
            again(first, trained(LIGHT, component), tmp_path / "again")
    for told, match in (
        ({"resolution": 64}, "--resolution"),
        ({"flip": True}, "--flip"),
        ({"caption_dropout": 0.5}, "--caption-dropout"),
        ({"errors_only": True, "grid_points": 4}, "--grid-points"),
        ({"buckets": "sdxl"}, "--buckets"),
    ):
        with pytest.raises(UsageError, match=match):
            again(first, pipelines(), tmp_path / "again", **told)
    with pytest.raises(UsageError, match="--pairs"):
        run(source, pipelines(), tmp_path / "again", like=first.location)
    for told in ({"columns": "win=nosuch"}, {"pairs_from": "adjacent"}, {"allow_remote": True}):
        (option,) = told
        with pytest.raises(UsageError, match=f"--{option.replace('_', '-')}"):
            configure(None, {}, told, {"like": first.location})
    with pytest.raises(UsageError, match="--errors-only"):
        run(source, pipelines(), tmp_path / "again", errors_only=True)
    assert not (tmp_path / "again").exists()
    # A recipe may have settings for other flags here too.
    recipe = tmp_path / "r.toml"
    recipe.write_text(f'[precompute]\niterations = 9\nlike = "{first.location}"\n')
    assert configure(recipe, {}, {}, {}).settings.iterations == 9
    with pytest.raises(UsageError, match="--tolerance"):
        configure(recipe, {}, {}, {"tolerance": 0.5})


@pytest.mark.parametrize("drawn", [{"flip": True}, {"vae_latent": "sample"}, {"caption_dropout": 0.5}, {}], ids=str)
def test_another_seed_is_refused_where_what_stays_was_drawn_with_the_first(
    drawn: dict[str, Any], tars: Callable, pipelines: Callable, run: Runs, again: Again, tmp_path: Path
) -> None:
    first = run.cache(tars(2, 2), pipelines(), tmp_path / "cache", **drawn)
    if drawn:
        with pytest.raises(UsageError, match="--seed"):
            again(first, pipelines(), tmp_path / "again", seed=5)
        assert not (tmp_path / "again").exists()
    else:
        assert again.cache(first, pipelines(), tmp_path / "again", seed=5).manifest.seed == 5
