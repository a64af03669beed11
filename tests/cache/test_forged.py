"""A hostile cache: documents that are whole and sealed, and say what no writer of ours says.

Every forged value must be refused, with a message that names the document, by whatever reads a cache, before it is used
as a length, a path or a line on a screen.
"""

import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from inpo.common.cache import CacheWriter, open_cache
from inpo.common.conditions import Condition
from inpo.common.errors import CacheCorrupt, CacheError, CacheIncomplete, CacheSchemaError, InpoError
from inpo.inspection.cli import app
from inpo.inspection.verify import quarantine, verify
from inpo.train.index import build_index
from tests.cache.forging import DEEP, edit, forge_commit, forge_file, forge_manifest, refused, verified

HUGE = 10**30
COMMIT = {
    "pairs beyond memory": ("num_pairs", HUGE),
    "pairs beyond a shard": ("num_pairs", 257),
    "pairs below none": ("num_pairs", -1),
    "more pairs than rows": ("num_pairs", 100),
    "pairs as text": ("num_pairs", "3"),
    "pairs as a fraction": ("num_pairs", 3.0),
    "pairs as a truth": ("num_pairs", True),
    "no pairs and files": ("num_pairs", 0),
    "groups beyond memory": ("num_groups", HUGE),
    "groups below none": ("num_groups", -1),
    "no groups": ("num_groups", 0),
    "more groups than pairs": ("num_groups", 4),
    "groups as a truth": ("num_groups", True),
    "images beyond memory": ("num_images", HUGE),
    "images beyond a shard": ("num_images", 513),
    "images below none": ("num_images", -1),
    "images fewer than two a group": ("num_images", 5),
    "more images than sides": ("num_images", 7),
    "texts that are none": ("texts", None),
    "a text elsewhere": ("texts", ["empty", DEEP]),
    "a text with an escape": ("texts", ["empty", "t0\x1b[31m"]),
    "texts without end": ("texts", ["t0"] * 258),
    "a text that is no name": ("texts", ["empty", 0]),
    "an attempt elsewhere": ("attempt", "../s1/0123456789abcdef"),
    "an attempt of another form": ("attempt", "0123456789ABCDEF"),
    "an attempt with a line end": ("attempt", "0123456789abcdef\n"),
    "an empty attempt": ("attempt", ""),
    "no files": ("files", {}),
    "a file above": ("files", lambda files: files | {DEEP: 1}),
    "a size beyond any disk": ("files", lambda files: files | {"x_t/zarr.json": HUGE}),
    "metadata of a megabyte": ("files", lambda files: files | {"x_t/zarr.json": 1 << 20}),
    "texts beyond memory": ("files", lambda files: files | {"pair/id/c/0": 1 << 39}),
    "timesteps beyond memory": ("files", lambda files: files | {"timestep/c/0/0": 1 << 39}),
    "a size that is none": ("files", lambda files: files | {"x_t/zarr.json": math.inf}),
    "no digests": ("digests", {}),
    "a digest that is none": ("digests", lambda digests: digests | {"x_t/zarr.json": "0" * 31}),
    "skipped beyond a shard": ("skipped", {"tie": HUGE}),
    "more skipped than rows": ("skipped", {"tie": 200}),
    "a reason with an escape": ("skipped", {"\x1b[31mtie": 1}),
    "many reasons": ("skipped", {f"reason{number}": 0 for number in range(100)}),
    "a count beyond a shard": ("counts", {"cut_prompt": HUGE}),
    "an infinite time": ("seconds", {"read": math.inf}),
    "a negative time": ("seconds", {"read": -1.0}),
    "a time that is no number": ("seconds", {"read": math.nan}),
    "rows backwards": ("source.rows", [5, 3]),
    "rows beyond a shard": ("source.rows", [0, 257]),
    "rows below none": ("source.rows", [-3, 1]),
    "rows beyond any source": ("source.rows", [HUGE, HUGE + 4]),
    "an input shard elsewhere": ("source.input_shard", DEEP),
    "a location without end": ("source.location", "x" * 10_000),
    "half a surrogate pair": ("source.location", "\ud800"),
    "an input's digest": ("source.fingerprint", "f" * 33),
    "a day with an escape": ("created", "2026-01-01T00:00:00+00:00\x1b[2J"),
    "another manifest's digest": ("manifest", "0" * 31),
    "a list's digest": ("skipped_digest", "no"),
    "a spread below none": ("spread", -1e-3),
    "a spread that is none": ("spread", math.nan),
    "a spread without end": ("spread", math.inf),
    "a spread as text": ("spread", "0.001"),
}


TEXT_COMMIT = {
    "prompts beyond memory": ("num_prompts", HUGE),
    "prompts beyond a shard": ("num_prompts", 257),
    "prompts below none": ("num_prompts", -1),
    "prompts as text": ("num_prompts", "4"),
    "prompts as a truth": ("num_prompts", True),
    "no prompts and files": ("num_prompts", 0),
    "a cut prompt beyond memory": ("cut", [HUGE]),
    "a cut prompt that is not there": ("cut", [4]),
    "a cut prompt below none": ("cut", [-1]),
    "cut prompts without end": ("cut", [0] * 257),
    "a prompt without numbers beyond memory": ("not_finite", [HUGE]),
    "a prompt without numbers that is not there": ("not_finite", [4]),
    "a prompt without numbers as a digest": ("not_finite", ["0" * 32]),
    "prompts without numbers without end": ("not_finite", [0] * 257),
    "an attempt elsewhere": ("attempt", "../t1/0123456789abcdef"),
    "an empty attempt": ("attempt", ""),
    "no files": ("files", {}),
    "a file above": ("files", lambda files: files | {DEEP: 1}),
    "a size beyond any disk": ("files", lambda files: files | {"text/zarr.json": HUGE}),
    "metadata of a megabyte": ("files", lambda files: files | {"text/zarr.json": 1 << 20}),
    "texts beyond memory": ("files", lambda files: files | {"text/c/0": 1 << 39}),
    "embeddings beyond memory": ("files", lambda files: files | {"embedding/c/0/0/0": 1 << 39}),
    "no digests": ("digests", {}),
    "a digest that is none": ("digests", lambda digests: digests | {"text/zarr.json": "0" * 31}),
    "an infinite time": ("seconds", {"encode": math.inf}),
    "a day with an escape": ("created", "2026-01-01T00:00:00+00:00\x1b[2J"),
    "another manifest's digest": ("manifest", "0" * 31),
    "a field of a shard of images": ("num_pairs", 3),
}


@pytest.mark.parametrize("name", COMMIT)
def test_a_forged_commit_is_refused(folder, name):
    field, value = COMMIT[name]
    forge_commit(folder, lambda document: edit(document, field, value))
    refused(folder, folder / "commits" / "s0.json", others={"s1", "texts/empty", "texts/t0", "texts/t1"})


@pytest.mark.parametrize("name", TEXT_COMMIT)
def test_a_forged_commit_of_texts_is_refused(folder, name):
    field, value = TEXT_COMMIT[name]
    forge_commit(folder, lambda document: edit(document, field, value), "texts/t0")
    file = folder / "text-commits" / "t0.json"
    refused(folder, file, others={"s0", "s1", "texts/empty", "texts/t1"}, name="texts/t0")
    with pytest.raises(CacheError) as caught:  # and so does whoever needs these texts
        open_cache(str(folder), damaged={}).shards["s0"].prompts()
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("name", ["s0", "texts/t0"])
def test_a_commit_of_another_manifest_is_refused(folder, name):
    forge_commit(folder, lambda document: document.update(manifest="0" * 32), name)
    with pytest.raises(CacheCorrupt, match=f"not the one that shard {name[-2:]} was made under"):
        open_cache(str(folder))


MANIFEST = {
    "a latent beyond memory": ("latent_shape", [HUGE, HUGE, HUGE]),
    "no channel": ("latent_shape", [0, 8, 8]),
    "steps beyond memory": ("timesteps_per_pair", HUGE),
    "steps beyond the grid": ("timesteps_per_pair", 11),
    "no step": ("timesteps_per_pair", 0),
    "levels beyond int16": ("levels.label", list(range(40_000))),
    "a table of another length": ("levels.label", lambda table: table[:-1]),
    "no level": ("levels", lambda levels: levels | {"signal": [], "noise": [], "label": []}),
    "a table with infinity": ("levels.signal.5", math.inf),
    "a table with nothing a number is": ("levels.noise.5", math.nan),
    "a signal that rises": ("levels.signal.5", 0.99999),
    "a noise that falls": ("levels.noise.5", 0.00001),
    "a signal of zeros at the end": ("levels.signal.999", 0.0),
    "a label without end": ("levels.label.5", math.inf),
    "no floor": ("levels.floor", 0.0),
    "another space": ("levels.space", "flow"),
    "no condition": ("conditions", {}),
    "a condition elsewhere": ("conditions", lambda told: told | {"../../x0": told["embedding"]}),
    "a condition over an array": ("conditions", lambda told: told | {"score": told["embedding"] | {"per": "image"}}),
    "a condition over the prompts": ("conditions", lambda told: told | {"text": told["embedding"]}),
    "a condition over a group": ("conditions", lambda told: told | {"group": told["embedding"] | {"per": "image"}}),
    "a condition over an image's id": ("conditions", lambda told: told | {"id": told["embedding"] | {"per": "image"}}),
    "another group": ("group", "side"),
    "no group": ("group", None),
    "tokens beyond memory": ("max_tokens", HUGE),
    "no token": ("max_tokens", 0),
    "tokens as a truth": ("max_tokens", True),
    "another owner": ("conditions.embedding.per", "pair"),
    "a condition of text": ("conditions.embedding.dtype", "string"),
    "an axis elsewhere": ("conditions.embedding.axes", ["../token", "width"]),
    "a family with an escape": ("family", "\x1b[31m"),
    "another profile": ("profile", "fat"),
    "an extra that is none": ("extra", ["x_t"]),
    "a seed without end": ("seed", HUGE),
    "a resolution without end": ("resolution", [64, HUGE]),
    "a resolution of nothing": ("resolution", [0, 64]),
    "half a resolution": ("resolution", [64]),
    "a resolution that is one number": ("resolution", 64),
    "another crop": ("crop", "random"),
    "another VAE latent": ("vae_latent", "mode"),
    "another dtype": ("network_dtype", "int8"),
    "a share above one": ("measure_inversion", 1.5),
    "no component": ("fingerprints", {}),
    "a component's digest": ("fingerprints.network", "../" * 10 + "ab"),
    "a component's name": ("fingerprints", lambda prints: prints | {"\x1b]0;x\x07": "0" * 32}),
    "a version without end": ("versions", {"torch": "9" * 1000}),
    "a version with an escape": ("versions", {"torch": "\x1b[31m"}),
    "an infinite guidance": ("inverter.guidance", math.inf),
    "a dropout below none": ("inverter.caption_dropout", -0.5),
    "an inverter without end": ("inverter.grid_points", HUGE),
    "an inverter's name": ("inverter.name", DEEP),
    "a range outside the table": ("inverter.timestep_range", [0, HUGE]),
    "an empty range": ("inverter.timestep_range", [5, 5]),
    "iterations without end": ("inverter.iterations", HUGE),
    "a tolerance that is none": ("inverter.tolerance", math.nan),
}


@pytest.mark.parametrize("name", MANIFEST)
def test_a_forged_manifest_is_refused(folder, name):
    field, value = MANIFEST[name]
    forge_manifest(folder, lambda document: edit(document, field, value))
    refused(folder, folder / "manifest.json", others=set())


@pytest.mark.parametrize(
    ("field", "value", "array"), [("latent_shape", [4, 16, 16], "x0"), ("timesteps_per_pair", 3, "timestep")]
)
def test_a_manifest_of_other_arrays_is_refused_when_they_are_read(folder, field, value, array):
    forge_manifest(folder, lambda document: edit(document, field, value))
    with pytest.raises(CacheSchemaError, match=f"Array {array} of shard s0 does not fit the manifest"):
        open_cache(str(folder)).shards["s0"].read(array)
    assert {finding.shard for finding in verified(folder)} == {"s0", "s1"}


def test_fewer_tokens_than_the_prompts_have_are_refused_when_they_are_read(folder):
    forge_manifest(folder, lambda document: document.update(max_tokens=4))
    with pytest.raises(
        CacheSchemaError, match=r"(?s)Array embedding of text shard (t0|empty).*5 tokens, and at most 4"
    ):
        Condition.of(open_cache(str(folder)).shards["s0"], np.arange(6))
    assert {"texts/empty", "texts/t0", "texts/t1"} <= {finding.shard for finding in verified(folder)}


def test_a_condition_that_texts_do_not_have_is_refused(folder):
    forge_manifest(folder, lambda document: document["conditions"].pop("pooled"))
    refused(folder, folder / "text-commits" / "empty.json", others={"s0", "s1"}, name="texts/empty")


def test_a_manifest_of_another_profile_is_refused(folder):
    forge_manifest(folder, lambda document: document.update(profile="lean"))
    refused(folder, folder / "commits" / "s0.json", others=set())


WAYS_IN = {
    "summary": (),
    "verify": (),
    "filter": ("--where", "label >= 0", "--out", "list"),
    "pair": ("pair-0-0 ä",),
    "report": ("--out", "r.html"),
}
FORGED = {
    "a field of a commit": lambda folder: forge_commit(folder, lambda document: document.update(num_pairs=HUGE)),
    "the files of a commit": lambda folder: forge_commit(folder, lambda document: document.update(num_pairs=0)),
    "a field of a commit of texts": lambda folder: forge_commit(
        folder, lambda document: document.update(num_prompts=HUGE), "texts/t0"
    ),
    "a field of the manifest": lambda folder: forge_manifest(folder, lambda document: document.update(seed=HUGE)),
}


@pytest.mark.parametrize("forge", FORGED)
def test_every_way_into_a_cache_refuses_what_is_forged(folder, monkeypatch, forge):
    FORGED[forge](folder)
    monkeypatch.chdir(folder.parent)
    for command, options in WAYS_IN.items():
        done = CliRunner().invoke(app, [command, str(folder), *options])
        said = str(done.exception) if isinstance(done.exception, InpoError) else done.output
        assert done.exit_code == 1, said
        assert isinstance(done.exception, InpoError | SystemExit), done.exception
        assert "s0" in said or "t0" in said or str(folder / "manifest.json") in said, command
    with pytest.raises(CacheError):
        build_index([open_cache(str(folder))], soft=True, held_out=0.0)


def test_a_copy_of_a_commit_of_texts_is_no_second_shard(folder):
    shutil.copytree(folder / "texts" / "t0", folder / "texts" / "t7")
    shutil.copy(folder / "text-commits" / "t0.json", folder / "text-commits" / "t7.json")
    with pytest.raises(CacheCorrupt, match="Two commits name one attempt: those of shards t0 and t7"):
        open_cache(str(folder))


def test_a_copy_of_a_commit_is_no_second_shard(folder):
    shutil.copytree(folder / "shards" / "s0", folder / "shards" / "s7")
    shutil.copy(folder / "commits" / "s0.json", folder / "commits" / "s7.json")
    with pytest.raises(CacheCorrupt, match="Two commits name one attempt: those of shards s0 and s7"):
        open_cache(str(folder))


@pytest.mark.parametrize("name", ["..", ".s0", "s\x1b[31m", "s 0", "ä"])
def test_a_commit_of_a_name_that_no_shard_has_is_refused(folder, name):
    """`..` would be a shard whose attempts lie outside shards/."""
    (folder / "commits" / "s0.json").rename(folder / "commits" / f"{name}.json")
    with pytest.raises(CacheSchemaError, match="a name that no shard has"):
        open_cache(str(folder))
    assert list(open_cache(str(folder), damaged={}).commits) == ["s1"]


@pytest.mark.parametrize("name", ["..", ".t0", "t\x1b[31m", "t 0"])
def test_a_commit_of_texts_of_a_name_that_no_shard_has_is_refused(folder, name):
    (folder / "text-commits" / "t0.json").rename(folder / "text-commits" / f"{name}.json")
    with pytest.raises(CacheSchemaError, match="a name that no shard has"):
        open_cache(str(folder))
    assert [shard.name for shard in open_cache(str(folder), damaged={}).texts] == ["empty", "t1"]


@pytest.mark.parametrize("kind", ["fifo", "folder", "huge"])
@pytest.mark.parametrize("document", ["manifest.json", "commits/s0.json", "text-commits/t0.json"])
def test_what_is_no_document_is_not_read(folder, kind, document):
    file = folder / document
    file.unlink()
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    else:
        with file.open("wb") as stream:
            stream.truncate(1 << 40)  # sparse
    if kind == "folder" and document != "manifest.json":  # a folder is no commit: the shard is not committed
        cache = open_cache(str(folder))
        left = {"commits/s0.json": ["s1", "empty", "t0", "t1"], "text-commits/t0.json": ["s0", "s1", "empty", "t1"]}
        assert [*cache.commits, *(each.name for each in cache.texts)] == left[document]
        return
    with pytest.raises(CacheSchemaError, match="no document of a cache"):
        open_cache(str(folder))


def commit_of_nothing(folder: Path, name: str = "s0") -> None:
    forge_commit(folder, lambda document: document.update(files={}, digests={}), name)


def commit_without_x_t(folder: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        for name in ("files", "digests"):
            document[name] = {path: value for path, value in document[name].items() if not path.startswith("x_t/")}

    forge_commit(folder, change)


@pytest.mark.parametrize("forge", [commit_of_nothing, commit_without_x_t])
@pytest.mark.parametrize("alone", [False, True])
def test_a_commit_that_does_not_make_up_its_arrays_is_found_moved_and_made_again(folder, build, forge, alone):
    if alone:
        (folder / "commits" / "s1.json").unlink()
    forge(folder)
    (finding,) = verified(folder)
    assert (finding.shard, finding.check, finding.remake) == ("s0", "commit", True)
    assert "x_t" in finding.detail or "0 files" in finding.detail
    assert "s0" in quarantine(str(folder), verify(str(folder)))
    manifest = open_cache(str(folder), allow_empty=True).manifest
    assert CacheWriter.open(str(folder), manifest).write("s0", build.shard(manifest, 3)) is not None
    assert len(open_cache(str(folder)).shards["s0"].read("x_t")) == 6


def test_a_commit_of_another_manifest_is_not_moved(folder):
    """It is whole, and which of two manifests is the right one is not known."""
    forge_commit(folder, lambda document: document.update(manifest="0" * 32), "s0")
    forge_file(folder, "x_t/c/0/0/0/0/0", b"x", "s1")
    verification = verify(str(folder))
    assert verification.bad_shards == ["s0", "s1"]
    assert quarantine(str(folder), verification) == ["s1"]
    assert [file.name for file in (folder / "commits").iterdir()] == ["s0.json"]


@pytest.mark.parametrize("forge", [commit_of_nothing, lambda folder, name: forge_file(folder, "text/c/0", b"x", name)])
def test_texts_that_are_not_what_their_commit_says_are_found_moved_and_made_again(folder, build, forge):
    before = Condition.of(open_cache(str(folder)).shards["s0"], np.arange(6))
    forge(folder, "texts/t0")
    assert {finding.shard for finding in verified(folder) if finding.remake} == {"texts/t0"}
    assert quarantine(str(folder), replace(verify(str(folder)), findings=verified(folder))) == ["texts/t0"]
    assert (folder / "quarantine" / "texts" / "t0.json").is_file()
    cache = open_cache(str(folder))
    with pytest.raises(CacheIncomplete, match="Text shard t0 is not there"):
        cache.shards["s0"].prompts()
    writer = CacheWriter.open(str(folder), cache.manifest)
    assert writer.write_texts("t0", build.texts(cache.manifest, 0)) is not None
    assert cache.shards["s0"].prompts()[0].startswith("prompt 0")
    after = Condition.of(open_cache(str(folder)).shards["s0"], np.arange(6))
    assert all(torch.equal(after[name], before[name]) for name in before)
