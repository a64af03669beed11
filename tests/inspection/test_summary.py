"""`summary`: its figures against the files themselves, in every state of a cache."""

import io
import json
import os
import re
import time
from collections import Counter

import numpy as np
import pytest
import zarr
from rich.console import Console

from inpo.inspection.summary import summarise
from inpo.inspection.summary_view import show


def attempt_of(folder, shard):
    return json.loads((folder / "commits" / f"{shard}.json").read_bytes())["attempt"]


def columns(folder, name):
    """[pair, side, ...] of a small array of images, or [pair, record] of the timesteps, by plain zarr."""
    parts = []
    for shard in ("s0", "s1"):
        group = zarr.open_group(folder / "shards" / shard / attempt_of(folder, shard), mode="r")
        sides = np.stack([group["pair/win"][...], group["pair/lose"][...]], axis=1)
        rows = group["image/group"][...][sides[:, 0]] if name == "timestep" else sides
        parts.append(group[name][...][rows])
    return np.concatenate(parts)


def test_the_figures_equal_a_count_of_the_files_and_a_plain_reading_of_the_arrays(states, inspect):
    folder = states("healthy")
    done = inspect("summary", folder, "--json")
    assert done.code == 0
    found = json.loads(done.out)
    assert (found["num_shards"], found["num_pairs"], found["num_records"]) == (2, 5, 10)
    assert found["skipped"] == {"tie": 2}
    assert found["counts"] == {"cut_prompt": 2}
    assert found["num_soft_labels"] == 1
    assert found["num_captions_dropped"] == 2
    assert found["num_orphaned"] == found["num_pending"] == 0
    assert (found["num_images"], found["num_groups"]) == (10, 5)
    assert (found["num_texts"], found["num_prompts"]) == (2, 3)
    sizes = {"shards": Counter(), "texts": Counter()}
    for top, counter in sizes.items():
        for file in (folder / top).rglob("*"):
            if file.is_file():
                counter[file.relative_to(folder / top).parts[2]] += file.stat().st_size
    assert found["total_bytes"] == sizes["shards"].total() + sizes["texts"].total()
    assert found["text_bytes"] == sizes["texts"].total()
    for name in ("x0", "x_t", "delta", "x0_t", "target"):
        assert found["array_bytes"][name] == sizes["shards"][name]
    for name in ("text", "embedding"):
        assert found["array_bytes"][f"texts/{name}"] == sizes["texts"][name]

    timestep, error = columns(folder, "timestep"), np.moveaxis(columns(folder, "reference_error"), 1, 2)
    for each in found["timesteps"]:
        inside = error[(timestep >= each["low"]) & (timestep < each["high"])]
        assert each["num_records"] == len(inside)
        if len(inside):
            assert [each["reference_error_win"], each["reference_error_lose"]] == pytest.approx(
                inside.astype(np.float64).mean(0).tolist(), rel=1e-6
            )
    assert sum(each["num_records"] for each in found["timesteps"]) == 10
    inversion = columns(folder, "inversion_error")
    measured = inversion[np.isfinite(inversion)]
    assert 0 < len(measured) < 10
    assert found["inversion_error"]["num_measured"] == len(measured)
    assert found["inversion_error"]["median"] == pytest.approx(float(np.median(measured)), rel=1e-6)


def test_an_image_of_several_pairs_is_one_image(states, inspect):
    """The chains of `grouped`: 0-1, 1-2 in both shards, and a pair of its own in s0."""
    found = json.loads(inspect("summary", states("grouped"), "--json").out)
    assert (found["num_images"], found["num_groups"], found["num_pairs"], found["num_records"]) == (8, 3, 5, 10)
    inversion = np.concatenate(
        [
            zarr.open_array(
                states("grouped") / "shards" / shard / attempt_of(states("grouped"), shard) / "inversion_error",
                mode="r",
            )[...]
            for shard in ("s0", "s1")
        ]
    )
    measured = inversion[np.isfinite(inversion)]
    assert 0 < len(measured) < 8
    assert found["inversion_error"]["num_measured"] == len(measured)
    assert found["inversion_error"]["median"] == pytest.approx(float(np.median(measured)), rel=1e-6)
    shown = inspect("summary", states("grouped")).out
    assert "8 in 3 groups" in shown
    assert f"measured on {len(measured)} of 8 images" in " ".join(shown.split())


def test_a_damaged_text_shard_is_named_with_the_shards_that_need_it(fresh, inspect):
    folder = fresh("healthy")
    file = folder / "text-commits" / "t0.json"
    file.write_text(file.read_text().replace('"num_prompts": 3', '"num_prompts": 2'))
    document = json.loads(inspect("summary", folder, "--json").out)
    assert list(document["unreadable"]) == ["s0", "s1", "texts/t0"]
    assert "A commit is not the one that was written" in document["unreadable"]["texts/t0"]
    file.unlink()
    document = json.loads(inspect("summary", folder, "--json").out)
    assert list(document["unreadable"]) == ["s0", "s1"]
    assert "Text shard t0 is not there" in document["unreadable"]["s0"]
    assert "the same `inpo precompute` encodes missing texts again" in document["unreadable"]["s0"]


@pytest.mark.parametrize(
    ("state", "code", "words"),
    [
        (
            "healthy",
            0,
            ["2 shards", "5 (10 records", "10 in 5 groups", "tie", "E_ref win", "ddim", "32 x 32", "[0, 1000)"],
        ),
        ("empty", 0, ["0 shards", "Nothing is committed yet"]),
        ("texts", 0, ["0 shards", "2 text shards", "No pair is committed yet"]),
        ("writing", 0, ["1 shards", "being written", "1 attempts"]),
        ("corrupt", 0, ["2 shards", "No latent was read here", "inpo inspect verify"]),
        ("lean", 0, ["lean", "target"]),
        ("sdxl", 0, ["text_encoder_2", "texts/pooled"]),
    ],
)
def test_every_state_is_shown(states, inspect, state, code, words):
    done = inspect("summary", states(state))
    assert done.code == code, done.out
    for word in words:
        assert word in done.out


def test_a_damaged_shard_is_named_and_the_rest_is_shown(fresh, inspect):
    folder = fresh("healthy")
    chunk = next(
        file
        for file in (folder / "shards" / "s1" / attempt_of(folder, "s1") / "pair" / "label" / "c").rglob("*")
        if file.is_file()
    )
    chunk.write_bytes(chunk.read_bytes()[:-1])
    done = inspect("summary", folder)
    assert done.code == 1
    assert "1 unreadable shard" in done.out
    assert "array pair/label of shard s1" in done.out
    assert "E_ref win" in done.out
    document = json.loads(inspect("summary", folder, "--json").out)
    assert list(document["unreadable"]) == ["s1"]
    assert sum(each["num_records"] for each in document["timesteps"]) == 6


def test_a_terminal_without_unicode_gets_the_same_figures(states):
    def shown(encoding):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        show(summarise(str(states("healthy"))), Console(file=stream, width=100))
        stream.flush()
        return stream.buffer.getvalue().decode(encoding)

    plain, rich = shown("ascii"), shown("utf-8")
    assert "#####" in plain
    assert "█" in rich
    words = re.compile(r"[\w.%]+")
    assert words.findall(plain) == words.findall(rich)


def test_old_attempts_without_a_commit_are_orphans_and_young_ones_pending(fresh, inspect):
    folder = fresh("writing")
    assert json.loads(inspect("summary", folder, "--json").out)["num_pending"] == 1
    old = time.time() - 2 * 3600
    for file in (folder / "shards" / "s1").rglob("*"):
        os.utime(file, (old, old))
    for file in (folder / "skipped" / "s1").rglob("*"):
        os.utime(file, (old, old))
    found = json.loads(inspect("summary", folder, "--json").out)
    assert (found["num_pending"], found["num_orphaned"]) == (0, 1)
    assert found["orphaned_bytes"] == sum(
        file.stat().st_size
        for part in ("shards", "skipped")
        for file in (folder / part / "s1").rglob("*")
        if file.is_file()
    )


@pytest.mark.parametrize(
    "words",
    [("summary",), ("pair", "x"), ("verify",), ("clean",), ("report",), ("filter", "--where", "label == 1")],
    ids=lambda words: words[0],
)
def test_a_path_that_is_no_cache_is_told(tmp_path, inspect, words):
    command, *rest = words
    for folder in (tmp_path / "nothing", tmp_path):
        done = inspect(command, folder, *rest)
        assert done.code == 1
        assert "There is no cache here." in done.out
        assert "to do:" in done.out


def test_a_recipe_names_the_cache_and_nothing_is_told_how_to_name_one(states, inspect, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'[data]\ncache = "{states("healthy")}"\n')
    named, by_recipe = (
        inspect("summary", str(states("healthy")), "--json"),
        inspect("summary", "--recipe", str(recipe), "--json"),
    )
    assert (named.code, by_recipe.code) == (0, 0)
    assert json.loads(named.out) == json.loads(by_recipe.out)
    nothing = inspect("summary")
    assert nothing.code == 2
    assert "--recipe" in nothing.out
