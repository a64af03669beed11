"""Plans: what they cost, what they show, and a disk that is too small for them."""

import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import inpo.precompute.plan as plan_module
from inpo.common.errors import CacheCorrupt, StorageError
from inpo.common.pairs import open_source


def _disk(free: int) -> Callable[[Any], Any]:
    usage = namedtuple("usage", "total used free")
    return lambda path: usage(10**12, 10**12 - free, free)


def test_a_disk_too_small_is_refused_before_any_work(
    pipelines: Callable, tars: Callable, run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tars(4, 4)
    monkeypatch.setattr(shutil, "disk_usage", _disk(10_000))
    for dry_run in (False, True):
        with pytest.raises(StorageError) as raised:
            run(source, pipelines(), tmp_path / "cache", dry_run=dry_run)
        for word in ("10 kB free", "largest array", "--profile lean"):
            assert word in str(raised.value)
    assert not run.components
    assert not (tmp_path / "cache").exists()


def test_dry_run_writes_nothing_and_shows_the_configuration(
    pipelines: Callable, tars: Callable, run: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tars(4, 2)
    assert run(source, pipelines(), tmp_path / "cache", dry_run=True) == 0
    output = capsys.readouterr().out
    for words in (
        "[precompute]",
        "timesteps_per_pair = 3",
        "network calls",
        "48 latents, 4.00 per image and 8 per shard",
        "bytes in all",
    ):
        assert words in output
    assert not (tmp_path / "cache").exists()
    assert not run.components


def test_dry_run_tells_of_a_manifest_that_was_edited(
    pipelines: Callable, tars: Callable, run: Callable, tmp_path: Path
) -> None:
    source, manifest = tars(2, 2), tmp_path / "cache/manifest.json"
    assert run(source, pipelines(), tmp_path / "cache", limit=2) == 0
    manifest.write_text(json.dumps(json.loads(manifest.read_bytes()), indent=2))
    with pytest.raises(CacheCorrupt, match="edited or replaced"):
        run(source, pipelines(), tmp_path / "cache", dry_run=True)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"profile": "lean", "grid_points": 5, "timesteps_per_pair": 5},
        {"inverter": "fixed_point", "iterations": 2, "tolerance": 0.0},
        {"inverter": "noise"},
        {"guidance": 0.0, "measure_inversion": 1.0},
        {"guidance": 4.0, "measure_inversion": 1.0, "extra": ("eps_ref", "delta_prev")},
        {"faithful": True, "grid_points": 5, "timesteps_per_pair": 5},
        {"inverter": "ab2", "grid_points": 6, "timesteps_per_pair": 2},
        {"inverter": "fireflow", "grid_points": 6, "timesteps_per_pair": 2},
        {"noised_start": 0.5, "grid_points": 6, "timesteps_per_pair": 2},
    ],
    ids=lambda settings: ",".join(map(str, settings.values())) or "default",
)
def test_the_plan_is_what_the_run_costs(
    pipelines: Callable,
    tars: Callable,
    run: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
) -> None:
    """Network calls and bytes, counted. Where the paths differ between pairs the plan is their mean."""
    import inpo.precompute.works as works_module

    plans: list[plan_module.Plan] = []
    make = works_module.make_plan
    monkeypatch.setattr(works_module, "make_plan", lambda *a, **k: plans.append(make(*a, **k)) or plans[-1])
    count = 6
    source = tars(count, count)
    cache = run.cache(source, pipelines(), tmp_path / "cache", batch_size=count, **settings)
    (plan,) = plans
    grid_points, kept = settings.get("grid_points", 3), settings.get("timesteps_per_pair", 3)
    if grid_points == kept and not settings.get("faithful"):
        assert plan.network_calls == run.network_calls
    else:
        assert plan.network_calls == pytest.approx(run.network_calls, rel=0.25)
    (shard,) = cache
    real = {spec.path: shard.read(spec.path).nbytes for spec in cache.manifest.arrays if not spec.is_text}
    for path, size in real.items():
        assert plan.bytes_by_array[path] == size, path
    # At most a prompt of its own for every pair, not compressed.
    texts = [each for each in cache.texts if each.name != "empty"]
    prompts = sum(each.num_prompts for each in texts)
    embeddings = [each.read_stored("embedding") for each in texts]
    assert plan.bytes_by_array["embedding"] == sum(each.nbytes for each in embeddings) // prompts * count
    # Files on the disk; of the texts what describes them.
    on_disk = sum((Path(shard.location) / file).stat().st_size for file in shard.commit.files)
    on_disk += sum(size for file, size in texts[0].commit.files.items() if file.endswith("zarr.json"))
    predicted = plan.cache_bytes - plan.bytes_by_array["embedding"] - plan.bytes_by_array["text"]
    assert predicted == pytest.approx(on_disk, rel=0.03)


def test_a_plan_for_rankings_counts_their_images_once(
    pipelines: Callable, run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the run: a ranking of n images is n (n - 1) / 2 pairs of n images and one prompt, whatever the layout."""
    import inpo.precompute.works as works_module

    plans: list[plan_module.Plan] = []
    make = works_module.make_plan
    monkeypatch.setattr(works_module, "make_plan", lambda *a, **k: plans.append(make(*a, **k)) or plans[-1])
    for number in range(6):
        image = Image.fromarray(np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8))
        image.save(tmp_path / f"{number}.png")
    rows: list[dict[str, Any]] = [
        {"id": "four", "prompt": "p", "images": [f"{i}.png" for i in range(4)], "ranks": [1, 2, 3, 4]},
        {"id": "two", "prompt": "q", "images": ["4.png", "5.png"], "ranks": [2, 1]},
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cache = run.cache(str(tmp_path / "pairs.jsonl"), pipelines(), tmp_path / "cache")
    (plan,), (shard,) = plans, cache
    assert (plan.num_pairs, plan.num_images, plan.num_groups) == (7, 6, 2)
    assert (shard.num_pairs, shard.num_images, shard.commit.num_groups) == (7, 6, 2)
    assert plan.network_calls == run.network_calls
    for spec in cache.manifest.arrays:
        if not spec.is_text:
            assert plan.bytes_by_array[spec.path] == shard.read(spec.path).nbytes, spec.path


@pytest.mark.parametrize(("how", "sizes"), [("all", [4, 3, 2]), ("adjacent", [4, 3, 2]), ("best-worst", [2, 2, 2])])
@pytest.mark.parametrize("singles", [False, True])
def test_how_many_images_the_rankings_of_some_rows_have(
    tmp_path: Path, how: str, sizes: list[int], singles: bool
) -> None:
    rows: list[dict[str, Any]] = []
    for number, count in enumerate((4, 3, 2)):
        told = {"prompt": "p", "prompt_id": str(number)}
        if singles:
            rows += [told | {"image": f"{i}.png", "rank": i} for i in range(count)]
        else:
            rows.append(told | {"images": [f"{i}.png" for i in range(count)], "ranks": list(range(count))})
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (shard,) = open_source(str(tmp_path), pairs_from=how).shards  # type: ignore[arg-type]
    assert shard.group_sizes(0, shard.num_rows).tolist() == sizes
    assert shard.group_sizes(0, 1).tolist() == [2]
    last = shard.num_rows - 1
    assert shard.group_sizes(last - 1, last + 1).tolist() == [2, 2]
