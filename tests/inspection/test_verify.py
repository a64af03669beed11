"""`verify`: damaged bytes and wrong numbers are found and named; sound caches of every kind pass."""

import json
import shutil

import numpy as np
import pytest

from inpo.common.cache import CacheWriter
from inpo.common.models import open_model
from inpo.inspection import verify as verify_module
from inpo.inspection.verify import verify
from tests.inspection.conftest import flip_byte
from tests.inspection.test_drift import rounding_of


def one_step_up(values, at):
    """The next float16, at one place."""
    flat = values.reshape(-1)
    flat[at] = np.nextafter(flat[at], np.float16(np.inf))


def change(name):
    """Whole bytes with one wrong number: how, and what verify must say."""

    def tamper(arrays):
        if name == "x_t":
            one_step_up(arrays["x_t"], 7)
        elif name == "target":
            one_step_up(arrays["target"], int(np.abs(arrays["target"].reshape(-1)).argmax()))
        elif name == "x0_t":
            arrays["x0_t"].reshape(-1)[5] += np.float16(0.05)
        elif name == "delta":
            arrays["delta"].reshape(-1)[5] += np.float16(0.1)
        elif name == "reference_error":
            arrays["reference_error"][3, 0] *= np.float32(1.01)
        elif name == "timestep":
            arrays["timestep"][1] = arrays["timestep"][1][::-1].copy()
        elif name == "pair/id":
            arrays["pair/id"][1] = arrays["pair/id"][0]
        elif name == "pair/label":
            arrays["pair/label"][0] = 1.5
        elif name == "image/score":
            arrays["image/score"][2] = np.inf

    return tamper


@pytest.mark.parametrize(
    ("name", "check"),
    [
        ("x_t", "x_t"),
        ("target", "x_t"),
        ("x0_t", "x0_t"),
        ("delta", "x0_t"),
        ("reference_error", "reference_error"),
        ("timestep", "timestep"),
        ("pair/id", "rows"),
        ("pair/label", "rows"),
        ("image/score", "finite"),
    ],
)
def test_one_wrong_number_in_whole_bytes_is_found_and_named(write_cache, inspect, tmp_path, name, check):
    folder = write_cache(tmp_path / "cache", tamper=change(name))
    done = inspect("verify", folder)
    assert done.code == 1
    assert "1 bad: s1" in done.out
    assert f"s1  {check}: " in done.out


REFERENCES = {
    "a group whose images are apart": ("image/group", lambda values: values.__setitem__(slice(1, 3), values[2:0:-1])),
    "a group without an image": ("image/group", lambda values: values.__setitem__(slice(None), 0)),
    "a group that is not there": ("image/group", lambda values: values.__setitem__(-1, 9)),
    "a group below none": ("image/group", lambda values: values.__setitem__(0, -1)),
    "an image that is not there": ("pair/win", lambda values: values.__setitem__(0, 4)),
    "an image below none": ("pair/lose", lambda values: values.__setitem__(0, -1)),
    "an image against itself": ("pair/lose", lambda values: values.__setitem__(0, 0)),
    "images of two groups": ("pair/lose", lambda values: values.__setitem__(slice(None), values[::-1].copy())),
    "another group's id": ("group/id", lambda values: values.__setitem__(slice(None), values[::-1].copy())),
    "a group id twice": ("group/id", lambda values: values.__setitem__(1, values[0])),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_a_reference_to_another_image_or_group_is_found_and_named(write_cache, inspect, tmp_path, monkeypatch, name):
    """In whole bytes, of a writer that is not ours."""
    monkeypatch.setattr(CacheWriter, "_check", lambda self, name, data: None)
    path, spoil = REFERENCES[name]
    done = inspect("verify", write_cache(tmp_path / "cache", tamper=lambda arrays: spoil(arrays[path])))
    assert done.code == 1
    assert "1 bad: s1" in done.out
    assert "s1  rows: " in done.out


@pytest.mark.parametrize("value", [(1, 3), (1, -1), (2, 0), (-1, 0)])
def test_a_prompt_that_is_not_there_is_found_and_named(write_cache, inspect, tmp_path, monkeypatch, value):
    monkeypatch.setattr(CacheWriter, "_check", lambda self, name, data: None)
    folder = write_cache(
        tmp_path / "cache", tamper=lambda arrays: arrays["group/prompt"].__setitem__(0, np.array(value, np.int32))
    )
    done = inspect("verify", folder)
    assert done.code == 1
    assert "1 bad: s1" in done.out
    assert "s1  texts: Array group/prompt" in done.out


def test_an_image_of_no_pair_is_found(write_cache, inspect, tmp_path, monkeypatch):
    monkeypatch.setattr(CacheWriter, "_check", lambda self, name, data: None)

    def leave_out(arrays):
        arrays["pair/lose"][1] = 0  # of the chain 0-1, 1-2

    done = inspect("verify", write_cache(tmp_path / "cache", group="prompt", tamper=leave_out))
    assert done.code == 1
    assert "s1  rows: 1 images are of no pair" in done.out


def spoil_texts(name):
    def tamper(arrays):
        if name == "NaN":
            arrays["embedding"][1, 2, 3] = np.nan
        elif name == "twice":
            arrays["text"][2] = arrays["text"][0]
        elif name == "another width":
            arrays["embedding"] = arrays["embedding"][..., 1:].copy()

    return tamper


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("NaN", "embedding: prompt 1 holds NaN"),
        ("twice", "a prompt stands twice"),
        ("another width", "for the empty prompt"),
    ],
)
def test_wrong_texts_in_whole_bytes_are_found_and_their_shard_alone(
    write_cache, inspect, tmp_path, monkeypatch, name, words
):
    monkeypatch.setattr("inpo.common.cache.writer._check_arrays", lambda *arguments: None)
    folder = write_cache(tmp_path / "cache", tamper_texts=spoil_texts(name))
    done = inspect("verify", folder, "--quarantine")
    assert done.code == 1
    assert "1 bad: texts/t0" in done.out
    assert "texts/t0  texts: " in done.out
    assert words in done.out
    assert "moved 1 commits" in done.out
    assert [file.name for file in (folder / "quarantine" / "texts").iterdir()] == ["t0.json"]
    assert len(list((folder / "commits").iterdir())) == 2


def test_the_empty_prompt_must_stand_where_readers_look_for_it(fresh, inspect):
    folder = fresh("healthy")
    # Healthy texts in another's place: the commit of t0 under the name of the empty one, and its files with it.
    for top in ("texts", "text-commits"):
        ending = ".json" if top == "text-commits" else ""
        shutil.rmtree(folder / top / "empty") if top == "texts" else (folder / top / "empty.json").unlink()
        (folder / top / f"t0{ending}").rename(folder / top / f"empty{ending}")
    done = inspect("verify", folder)
    assert done.code == 1
    assert "texts/empty  texts: row 0 is not the empty prompt" in done.out
    assert "texts/t0  texts: no commit, and 2 shards need it (s0, s1)" in done.out


@pytest.mark.parametrize("array", ["embedding", "text"])
def test_a_flipped_bit_in_a_text_shard_moves_its_commit_alone(fresh, inspect, array):
    folder = fresh("healthy")
    flip_byte(folder, "t0", array, of="texts")
    done = inspect("verify", folder, "--quarantine")
    assert done.code == 1
    assert f"rray {array} of text shard t0" in done.out
    assert "1 bad: texts/t0" in done.out
    assert [file.name for file in (folder / "text-commits").iterdir()] == ["empty.json"]
    assert len(list((folder / "commits").iterdir())) == 2
    again = inspect("verify", folder)
    assert again.code == 1
    assert "texts/t0  texts: no commit, and 2 shards need it (s0, s1)" in again.out
    assert "1 shards have an attempt and no commit (texts/t0)" in again.out
    # What is not there cannot be moved, and the shards of images are sound.
    told = inspect("verify", folder, "--quarantine").out
    assert "moved 0 commits" in told
    assert "makes these shards again" not in told


@pytest.mark.parametrize("name", ["empty", "t0"])
def test_an_edited_or_damaged_commit_of_texts_is_found_and_moved(fresh, inspect, name):
    folder = fresh("healthy")
    file = folder / "text-commits" / f"{name}.json"
    file.write_text(file.read_text().replace('"num_prompts": ', '"num_prompts": 1'))
    done = inspect("verify", folder, "--quarantine")
    assert done.code == 1
    assert f"texts/{name}  commit: " in done.out
    assert f"1 bad: texts/{name}" in done.out
    assert (folder / "quarantine" / "texts" / f"{name}.json").exists()
    assert len(list((folder / "commits").iterdir())) == 2


def test_what_was_looked_at_is_counted(states):
    found = verify(str(states("grouped")))
    counts = {name: found.num_checked[name] for name in ("commit", "finite", "x_t", "timestep", "rows", "texts")}
    # Shard s0: images 0-1-2 in a chain, and a pair of its own; s1: a chain of three images.
    assert counts == {"commit": 4, "finite": 8, "x_t": 8, "timestep": 3, "rows": 5, "texts": 4}
    assert (found.num_shards, found.num_pairs, found.num_texts) == (2, 5, 2)


@pytest.mark.parametrize("state", ["healthy", "writing", "lean", "sdxl", "grouped"])
def test_sound_caches_pass(states, inspect, state):
    done = inspect("verify", states(state))
    assert done.code == 0, done.out
    assert "all sound" in done.out


def test_where_nothing_is_committed_nothing_is_proved(states, inspect):
    done = inspect("verify", states("empty"))
    assert done.code == 1
    assert "nothing is committed yet" in done.out
    texts = inspect("verify", states("texts"))
    assert texts.code == 1
    assert "no pair is committed yet" in texts.out
    assert "0 shards, 0 pairs, 2 text shards" in texts.out


@pytest.mark.parametrize("kind", ["sd2-v", "sample"])
def test_the_tolerances_hold_for_other_predictions_and_guidance(write_cache, inspect, tmp_path, kind):
    folder = write_cache(tmp_path / "cache", kind=kind, pairs=(3,), timesteps_per_pair=4)
    assert inspect("verify", folder).code == 0
    guided = write_cache(tmp_path / "guided", kind=kind, pairs=(2,), inverter={"guidance": 2.0})
    done = inspect("verify", guided)
    assert done.code == 0
    assert "needs delta as the reference's prediction" in " ".join(done.out.split())


@pytest.mark.parametrize("name", ["t0", "empty"])
def test_damaged_texts_do_not_end_a_check_with_a_model(fresh, inspect, tiny, name):
    folder = fresh("healthy")
    flip_byte(folder, name, "embedding", of="texts")
    done = inspect("verify", folder, "--model", tiny(), "--quarantine")
    assert done.code == 1
    assert "error:" not in done.out
    assert f"1 bad: texts/{name}" in done.out
    assert "moved 1 commits" in done.out


def test_what_breaks_during_a_check_with_a_model_is_a_finding(fresh, tiny, monkeypatch):
    folder = fresh("healthy")
    load = verify_module.load_denoiser

    def late(*arguments):
        flip_byte(folder, "s1", "target")
        return load(*arguments)

    monkeypatch.setattr(verify_module, "load_denoiser", late)
    found = verify(str(folder), model=open_model(str(tiny())))
    (finding,) = found.findings
    assert (finding.shard, finding.check, finding.remake) == ("s1", "re-inversion", False)
    assert found.num_checked["re-inversion"] == 3


def test_checks_that_damage_prevents_have_not_held_and_say_so(fresh, write_cache, inspect, tmp_path):
    folder = fresh("corrupt")
    (folder / "commits" / "s0.json").unlink()  # the damaged shard alone
    done = inspect("verify", folder)
    assert done.code == 1
    for check in ("x_t", "reference_error", "finite"):
        assert f"not checked: {check}, what it needs is damaged" in done.out
    assert "lean" not in done.out
    lean = inspect("verify", write_cache(tmp_path / "lean", pairs=(3,), profile="lean")).out
    assert "not checked: x_t, not stored (lean)" in lean
    assert "damaged" not in lean


def test_an_edited_manifest_moves_nothing(fresh, inspect):
    folder = fresh("healthy")
    manifest = json.loads((folder / "manifest.json").read_bytes())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"seed": 5}))
    done = inspect("verify", folder, "--quarantine")
    assert done.code == 1
    assert "it is the manifest that was edited" in done.out
    assert not (folder / "quarantine").exists()


def test_an_edited_commit_is_found(fresh, inspect):
    folder = fresh("healthy")
    file = folder / "commits" / "s0.json"
    file.write_text(file.read_text().replace('"num_pairs": 3', '"num_pairs": 2'))
    done = inspect("verify", folder)
    assert done.code == 1
    assert "s0  commit: " in done.out


def test_the_same_pair_in_two_shards_is_found_and_not_quarantined(write_cache, inspect, tmp_path):
    def repeat(arrays):
        arrays["pair/id"][0] = arrays["group/id"][0] = "pair-0-0"

    folder = write_cache(tmp_path / "cache", tamper=repeat)
    done = inspect("verify", folder, "--quarantine")
    assert done.code == 1
    assert "pair-0-0" in done.out
    assert len(list((folder / "commits").iterdir())) == 2


@pytest.mark.parametrize(
    ("state", "kind"), [("healthy", "sd15"), ("lean", "sd15"), ("sdxl", "sdxl"), ("grouped", "sd15")]
)
def test_the_model_that_made_the_cache_inverts_to_the_same_points(states, inspect, tiny, state, kind):
    done = inspect("verify", states(state), "--model", tiny(kind), "--sample", "3")
    assert done.code == 0, done.out
    assert "largest relative change on re-inversion" in done.out


@pytest.mark.parametrize("kind", ["sd15", "sd15-one"])
def test_a_faithful_cache_is_inverted_again_with_the_settings_of_its_models_scheduler(
    write_cache, inspect, tiny, tmp_path, kind
):
    """The manifest has the tables alone; the clean end, the offset and the clamp are the model's to say."""
    folder = write_cache(tmp_path / "cache", kind=kind, inverter={"faithful": True})
    done = inspect("verify", folder, "--model", tiny(kind))
    assert done.code == 0, done.out
    found = json.loads(inspect("drift", folder, "--model", tiny(kind), "--json").out)
    for name, bound in rounding_of(folder).items():
        assert found[name] < bound
    assert (found["num_sampled"], found["verdict"]) == (5, "keep")


def test_another_model_is_refused_and_other_latents_are_found(write_cache, states, inspect, tiny, tmp_path):
    other = inspect("verify", states("healthy"), "--model", tiny("sd15", seed=1))
    assert other.code == 1
    assert "made by another model: its network" in other.out

    def another_x0(arrays):  # a lean cache derives x_t, so every identity holds; but no inversion gives these points
        arrays["x0"] += np.float16(0.25)

    folder = write_cache(tmp_path / "cache", profile="lean", tamper=another_x0)
    assert inspect("verify", folder).code == 0
    done = inspect("verify", folder, "--model", tiny(), "--sample", "5")
    assert done.code == 1
    assert "s1  re-inversion: " in done.out


def test_verify_changes_nothing(fresh, inspect):
    folder = fresh("corrupt")
    before = {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    inspect("verify", folder)
    assert before == {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_the_log_of_its_runs_belongs_to_a_cache_and_other_files_do_not(fresh, inspect):
    folder = fresh("healthy")
    (folder / "log.txt").write_text("2026-11-27 10:00:00,000 INFO committed\n")
    assert "belong to no document" not in inspect("verify", folder).out
    (folder / "notes.txt").write_text("mine")
    assert "1 files belong to no document of the cache (notes.txt)" in inspect("verify", folder).out
