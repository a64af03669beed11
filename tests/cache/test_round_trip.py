"""What is written is what is read, whatever the shapes, the profile and the store."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import torch
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from inpo.common.cache import CacheWriter, Manifest, TextCommit, open_cache
from inpo.common.cache.committed import CommittedArrays
from inpo.common.cache.derive import coarse, point_from_target, round_to_half, split, stored_point
from inpo.common.cache.document import MAX_PAIRS_PER_SHARD
from inpo.common.cache.specs import ArraySpec
from inpo.common.conditions import Condition, read_prompts
from inpo.common.errors import CacheIncomplete, CacheMissing, CacheSchemaError
from tests.cache.forging import verified


def same_bytes(left: np.ndarray, right: np.ndarray) -> bool:
    return left.shape == right.shape and (
        list(left) == list(right) if right.dtype == object else left.tobytes() == right.tobytes()
    )


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shard_comes_back_bit_for_bit(tmp_path_factory, build, data):
    folder = tmp_path_factory.mktemp("cache")
    grouped = data.draw(st.booleans())
    manifest = build.manifest(
        group="prompt" if grouped else "pair",
        profile=data.draw(st.sampled_from(["full", "lean"])),
        steps=data.draw(st.integers(1, 4)),
        latent=data.draw(st.tuples(*[st.integers(1, 9)] * 3)),
        told=data.draw(st.lists(st.sampled_from(build.conditions), min_size=1, unique=True).map(tuple)),
        extra=data.draw(st.sampled_from([(), ("eps_ref",), ("delta_prev", "eps_ref")])),
    )
    number = data.draw(st.integers(0, 9))
    shard = build.shard(manifest, data.draw(st.integers(1, 9)), seed=number, grouped=grouped)
    assert build.writer(folder, manifest, texts=(number,)).write("s", shard) is not None

    cache = open_cache(str(folder))
    assert cache.manifest == manifest
    read = cache.shards["s"]
    assert read.stored >= set(shard.arrays)
    assert (read.num_pairs, read.num_images) == (len(shard.arrays["pair/id"]), len(shard.arrays["x0"]))
    for path, values in shard.arrays.items():
        rows = np.array(data.draw(st.lists(st.integers(0, len(values) - 1), max_size=5)), dtype=np.int64)
        assert same_bytes(read.read(path), values), path
        assert same_bytes(read.read(path, rows), values[rows]), path
        assert same_bytes(read.read(path, slice(1, None)), values[1:]), path
    for name, texts in (("empty", build.texts(manifest, None)), (f"t{number}", build.texts(manifest, number))):
        found = cache.texts.need(name)
        assert found.stored == set(texts.arrays)
        for path, values in texts.arrays.items():
            assert same_bytes(found.read_stored(path), values), path
            rows = np.array(data.draw(st.lists(st.integers(0, len(values) - 1), max_size=3)), dtype=np.int64)
            assert same_bytes(found.read_stored(path, rows), values[rows]), path


def test_a_pair_is_two_images_of_its_group(tmp_path, build):
    """The four pairs of a group of three images, and a plain pair behind them."""
    build.cache(tmp_path, pairs=(5,), grouped=True)
    shard = open_cache(str(tmp_path)).shards["s0"]
    assert (shard.num_pairs, shard.num_images, shard.commit.num_groups) == (5, 5, 2)
    assert shard.sides().tolist() == [[0, 1], [1, 2], [0, 2], [1, 0], [3, 4]]
    assert shard.sides(np.array([4, 1])).tolist() == [[3, 4], [1, 2]]
    assert shard.groups().tolist() == [0, 0, 0, 0, 1]
    assert shard.groups(np.array([4, 0])).tolist() == [1, 0]
    timestep = shard.read("timestep")
    assert same_bytes(shard.timesteps(), timestep[[0, 0, 0, 1, 1]])
    assert same_bytes(shard.timesteps(np.array([3, 0])), timestep[[1, 0]])
    places = shard.read("group/prompt")
    assert shard.prompts().tolist() == [f"prompt 0 {row} ä" for row in places[:, 1]]
    assert same_bytes(shard.dropped(), shard.read("group/caption_dropped"))


def test_plain_pairs_are_groups_of_two(tmp_path, build):
    build.cache(tmp_path, pairs=(3,))
    shard = open_cache(str(tmp_path)).shards["s0"]
    assert shard.sides().tolist() == [[0, 1], [2, 3], [4, 5]]
    assert shard.groups().tolist() == [0, 1, 2]
    assert list(shard.read("group/id")) == list(shard.read("pair/id"))


@pytest.mark.parametrize("told", [("embedding",), ("embedding", "pooled", "time_ids"), ("embedding", "length")])
def test_what_the_network_is_told_of_an_image(tmp_path, build, told):
    """Rows of the text shards where the group's prompt stands, the empty one's where the caption was dropped; padded
    with zeros to max_tokens where prompts have a length."""
    manifest = build.cache(tmp_path, pairs=(8, 7), grouped=True, told=told)
    cache = open_cache(str(tmp_path))
    for number, shard in enumerate(cache):
        texts = [build.texts(manifest, None).arrays, build.texts(manifest, number).arrays]
        images = np.array([4, 0, 5])
        condition, empty = Condition.of(shard, images), Condition.empty(shard, images)
        assert set(condition) == set(told)
        for row, image in enumerate(images):
            group = shard.read("image/group")[image]
            text, prompt = (0, 0) if shard.dropped()[group] else shard.read("group/prompt")[group]
            for name in set(told) - {"time_ids"}:
                for found, want in ((condition, texts[text][name][prompt]), (empty, texts[0][name][0])):
                    got = found[name][row].numpy()
                    if "length" in told and name == "embedding":
                        assert got.shape == (9, 6)
                        assert not got[len(want) :].any()
                        got = got[: len(want)]
                    assert same_bytes(got, np.asarray(want)), name
            if "time_ids" in told:
                for found in (condition, empty):
                    assert same_bytes(found["time_ids"][row].numpy(), shard.read("image/time_ids")[image])


def test_prompts_of_several_text_shards_at_once(tmp_path, build):
    """In the order asked for, those of longer shards beside those of shorter ones."""
    manifest = build.cache(tmp_path, pairs=(1, 1, 1), told=("embedding", "length"))
    places = [("t2", 3), ("empty", 0), ("t1", 0), ("t2", 0), ("t2", 3)]
    told = read_prompts(open_cache(str(tmp_path)).texts, places)
    assert told["embedding"].shape == (5, 9, 6)
    for row, (name, prompt) in enumerate(places):
        want = build.texts(manifest, None if name == "empty" else int(name[1:])).arrays
        assert told["length"][row] == want["length"][prompt]
        assert same_bytes(told["embedding"][row, : want["embedding"].shape[1]], want["embedding"][prompt])
        assert not told["embedding"][row, want["embedding"].shape[1] :].any()


def test_a_lean_cache_gives_the_x_t_of_a_full_one_bit_for_bit(tmp_path, build):
    shape = {"latent": (4, 48, 48), "steps": 3}
    build.cache(tmp_path / "full", pairs=(5,), **shape)
    build.cache(tmp_path / "lean", pairs=(5,), profile="lean", **shape)
    full, lean = (open_cache(str(tmp_path / name)).shards["s0"] for name in ("full", "lean"))
    assert "x_t" in full.stored
    assert "x_t" not in lean.stored
    assert "x_t" in lean
    assert same_bytes(lean.read("x_t"), full.read("x_t"))
    rows = np.array([4, 1])
    assert same_bytes(lean.read("x_t", rows), full.read("x_t")[rows])


def test_torch_and_numpy_round_the_stored_point_alike():
    # A million values: torch's own float64 -> float16, by way of float32, differs from numpy's in about 60 of them.
    rng = np.random.default_rng(0)
    x0, target = (rng.standard_normal((1, 100, 100, 100)).astype(np.float16) for _ in range(2))
    a, s = 0.7, np.sqrt(1 - 0.7**2)
    expected = (a * x0.astype(np.float64) + s * target.astype(np.float64)).astype(np.float16)
    axes = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    got = point_from_target(torch.from_numpy(x0), torch.from_numpy(target), a * axes, float(s) * axes)
    assert same_bytes(got.numpy(), expected)

    again, x_t = stored_point(torch.from_numpy(x0), got.float(), a * axes, float(s) * axes)
    numpy_x_t = (a * x0.astype(np.float64) + s * again.numpy().astype(np.float64)).astype(np.float16)
    assert same_bytes(x_t.numpy(), numpy_x_t)


@given(st.lists(st.floats(width=64), min_size=1, max_size=50))
def test_round_to_half_is_the_nearest_half(values):
    doubles = np.array(values)
    with np.errstate(all="ignore"):
        expected = doubles.astype(np.float16)
    np.testing.assert_array_equal(round_to_half(torch.from_numpy(doubles)).numpy(), expected)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.integers(0, 39), max_size=12))
def test_any_rows_come_in_the_order_asked_for(large, rows):
    read, arrays = large
    for path in ("x0", "timestep", "pair/id"):
        assert same_bytes(read.read(path, np.array(rows, dtype=np.int64)), arrays[path][rows]), path


@pytest.fixture(scope="module")
def large(tmp_path_factory, build):
    folder = tmp_path_factory.mktemp("large")
    manifest = build.manifest(latent=(1, 2, 2), profile="lean")
    shard = build.shard(manifest, 40)
    build.writer(folder, manifest).write("s", shard)
    return open_cache(str(folder)).shards["s"], shard.arrays


def test_eps_ref_is_delta_at_guidance_one_only(tmp_path, build):
    build.cache(tmp_path / "one", pairs=(2,))
    shard = open_cache(str(tmp_path / "one")).shards["s0"]
    assert "eps_ref" in shard
    assert same_bytes(shard.read("eps_ref"), shard.read("delta"))

    inverter = build.manifest().inverter.model_copy(update={"guidance": 0.0})
    build.cache(tmp_path / "zero", pairs=(2,), inverter=inverter)
    shard = open_cache(str(tmp_path / "zero")).shards["s0"]
    assert "eps_ref" not in shard
    with pytest.raises(CacheIncomplete, match="--extra eps_ref"):
        shard.read("eps_ref")


@pytest.mark.parametrize(("path", "option"), [("delta", "--profile full"), ("delta_prev", "--extra delta_prev")])
def test_what_is_not_stored_is_named_with_the_option_that_would_store_it(tmp_path, build, path, option):
    build.cache(tmp_path, pairs=(1,), profile="lean")
    with pytest.raises(CacheIncomplete, match=option) as caught:
        open_cache(str(tmp_path)).shards["s0"].read(path)
    assert str(tmp_path) in str(caught.value)


def test_rows_outside_a_shard_are_the_callers_mistake(tmp_path, build):
    build.cache(tmp_path, pairs=(3,))
    shard = open_cache(str(tmp_path)).shards["s0"]
    for rows in ([6], [-1]):
        with pytest.raises(IndexError, match="which has 6"):
            shard.read("x0", np.array(rows))


def groups_of(location: Path, manifest: Manifest) -> list[tuple[CommittedArrays, dict[str, ArraySpec]]]:
    """Every committed attempt of a cache, of images and of texts, and the arrays that it must have."""
    cache = open_cache(str(location))
    return [(shard, manifest.specs) for shard in cache] + [(shard, manifest.text_specs) for shard in cache.texts]


def test_tensorstore_and_zarr_read_the_same_bytes_with_no_code_of_ours(tmp_path, build):
    manifest = build.cache(tmp_path, pairs=(3, 5), grouped=True, **build.everything)
    for shard, specs in groups_of(tmp_path, manifest):
        group = zarr.open_group(shard.location, mode="r")
        assert set(specs) == {name for name, node in group.members(max_depth=None) if isinstance(node, zarr.Array)}
        for spec in specs.values():
            ours = shard.read_stored(spec.path)
            array = group[spec.path]
            assert array.metadata.dimension_names == spec.axes
            assert same_bytes(np.asarray(array[...]), ours), spec.path
            if not spec.is_text:
                theirs = tensorstore.open(
                    {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{shard.location}/{spec.path}/"}}
                ).result()
                assert theirs.domain.labels == spec.axes
                assert same_bytes(theirs.read().result(), ours), spec.path


def test_zarrs_reads_the_same_bytes(tmp_path, build):
    pytest.importorskip("zarrs")
    manifest = build.cache(tmp_path, pairs=(3, 5), grouped=True, **build.everything)
    for shard, specs in groups_of(tmp_path, manifest):
        ours = {spec.path: shard.read_stored(spec.path) for spec in specs.values() if not spec.is_text}
        with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
            group = zarr.open_group(shard.location, mode="r")
            for path, values in ours.items():
                assert same_bytes(np.asarray(group[path][...]), values), path


def test_every_chunk_is_checksummed_and_only_texts_are_compressed(tmp_path, build):
    manifest = build.cache(tmp_path, pairs=(3,), **build.everything)
    for shard, specs in groups_of(tmp_path, manifest):
        location = Path(shard.location)
        for spec in specs.values():
            codecs = json.loads((location / spec.path / "zarr.json").read_text())["codecs"]
            assert len([file for file in (location / spec.path).rglob("*") if file.is_file()]) == 2
            if spec.chunking != "whole":
                assert [codec["name"] for codec in codecs] == ["sharding_indexed"]
                shape = codecs[0]["configuration"]["chunk_shape"]
                assert shape[0] == 1
                if spec.chunking == "image_record":
                    assert shape[1] == 1
                    assert shape[2:] == list(manifest.latent_shape)
                assert codecs[0]["configuration"]["index_codecs"][-1]["name"] == "crc32c"
                codecs = codecs[0]["configuration"]["codecs"]
            zstd = ["zstd"] if specs is manifest.text_specs else []
            names = [codec["name"] for codec in codecs]
            assert names == ["vlen-utf8" if spec.is_text else "bytes", *zstd, "crc32c"]


def test_a_shard_has_the_files_and_bytes_that_scaling_md_counts_with(tmp_path, build):
    said = " ".join((Path(__file__).parents[2] / "docs" / "scaling.md").read_text().split())
    files, bytes_per_pair = {}, {"full": [], "lean": []}
    for profile, steps in itertools.product(("full", "lean", "compact"), (1, 4, 10)):
        folder = tmp_path / f"{profile}-{steps}"
        manifest = build.cache(folder, pairs=(2,), profile=profile, steps=steps, latent=(4, 64, 64))
        (listed,) = (commit.files for commit in open_cache(str(folder)).commits.values())
        files[profile] = len(listed)
        chunks = [manifest.specs[path] for path in manifest.specs if manifest.specs[path].chunking != "whole"]
        # Of a whole shard: the checksum at the end of a file's index stands once for all of its pairs.
        size = sum(listed[spec.chunk_file] - 4 for spec in chunks) / 2 + 4 * len(chunks) / MAX_PAIRS_PER_SHARD
        if profile != "compact":
            bytes_per_pair[profile].append(f"{round(size):,}")
    assert f"a shard: {files['full']} files ({files['lean']} lean, {files['compact']} compact)" in said
    one, four, ten = bytes_per_pair["full"]
    assert f"{one} bytes a pair at K = 1, {four} at K = 4, {ten} at K = 10" in said
    assert f"lean: {', '.join(bytes_per_pair['lean'])}" in said


def test_a_shard_without_pairs_is_committed_and_holds_nothing(tmp_path, build):
    manifest = build.manifest()
    writer = CacheWriter.open(str(tmp_path), manifest)
    skipped = [{"pair_id": name, "reason": "tie", "detail": "", "row": row} for row, name in enumerate("pq")]
    commit = writer.write("s", build.shard(manifest, 0, skipped=skipped))
    assert commit is not None
    assert (commit.num_pairs, commit.files, commit.skipped) == (0, {}, {"tie": 2})
    assert writer.committed() == {"s"}
    lines = (tmp_path / "skipped" / "s" / f"{commit.attempt}.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == skipped
    with pytest.raises(CacheMissing, match="no committed pair yet"):
        open_cache(str(tmp_path))
    assert open_cache(str(tmp_path), allow_empty=True).num_pairs == 0


def test_a_prompt_for_which_the_encoder_gave_no_numbers_is_refused(tmp_path, build):
    """It keeps its row, and whatever asks for it is told: a shard of images, and whoever reads the embeddings."""
    manifest = build.manifest()
    writer = CacheWriter.open(str(tmp_path), manifest)
    assert writer.write_texts("empty", build.texts(manifest, None))
    data = build.shard(manifest, 3)
    used, *others = np.unique(data.arrays["group/prompt"][:, 1]).tolist()
    commit = writer.write_texts("t0", replace(build.texts(manifest, 0), not_finite=[used]))
    assert commit is not None
    assert (commit.num_prompts, commit.not_finite) == (4, (used,))
    assert writer.write("s0", data)
    cache = open_cache(str(tmp_path))
    assert cache.texts.need("t0").text == tuple(f"prompt 0 {row} ä" for row in range(4))
    words = "the encoder gave"
    with pytest.raises(
        CacheSchemaError, match=rf"(?s)group/prompt of shard s0.*prompt {used} of text shard t0.*{words}"
    ):
        cache.shards["s0"].prompts()
    with pytest.raises(CacheSchemaError, match=rf"(?s)embedding of text shard t0.*prompt {used}.*{words}"):
        read_prompts(cache.texts, [("t0", row) for row in (*others, used)])
    assert len(read_prompts(cache.texts, [("t0", row) for row in others])["embedding"]) == len(others)
    assert {(each.shard, each.check) for each in verified(tmp_path)} == {("s0", "texts")}


def test_attempts_without_a_commit_are_invisible(tmp_path, build):
    manifest = build.cache(tmp_path, pairs=(2,))
    writer = CacheWriter.open(str(tmp_path), manifest)
    assert writer.write("s0", build.shard(manifest, 2, seed=5)) is None  # the shard is committed: an orphan
    assert writer.write_texts("t0", build.texts(manifest, 5)) is None
    for kind, name in (("shards", "s9"), ("texts", "t9")):
        (tmp_path / kind / "half" / "0123").mkdir(parents=True)
        (tmp_path / kind / "half" / "0123" / "zarr.json").write_text("{")
        commits = {"shards": "commits", "texts": "text-commits"}[kind]
        (tmp_path / commits / f"{name}.json.5.staged").write_text("{")

    cache = open_cache(str(tmp_path))
    assert list(cache.shards) == ["s0"]
    assert [shard.name for shard in cache.texts] == ["empty", "t0"]
    assert writer.committed() == {"s0"}
    assert writer.committed(TextCommit) == {"empty", "t0"}
    for place in ("shards/s0", "texts/t0"):
        assert len(list((tmp_path / place).iterdir())) == 2
    assert list(cache.shards["s0"].read("pair/id")) == ["pair-0-0 ä", "pair-0-1 ä"]
    assert cache.texts.need("t0").text == tuple(f"prompt 0 {row} ä" for row in range(4))
    assert cache.find("pair-0-1 ä") == (cache.shards["s0"], 1)
    with pytest.raises(CacheIncomplete, match="an id like"):
        cache.find("pair-5-0 ä")


def test_a_text_shard_that_is_committed_later_is_found(tmp_path, build):
    manifest = build.cache(tmp_path, pairs=(1,))
    cache = open_cache(str(tmp_path))
    assert cache.texts.get("t7") is None
    with pytest.raises(CacheIncomplete, match=r"(?s)Text shard t7.*text-commits/t7\.json"):
        cache.texts.need("t7")
    build.writer(tmp_path, manifest, texts=(7,))
    assert cache.texts.need("t7").text[0] == "prompt 7 0 ä"


@pytest.mark.parametrize("size", [0.0, 1e-7, 1e-4, 1.0, 300.0, 15000.0])
def test_eight_bits_and_a_scale_are_float16_numbers(size):
    """What a compact cache can hold comes back exactly, and is near what was given."""
    given = torch.from_numpy((size * np.random.default_rng(0).standard_normal((400, 4, 3, 3))).astype(np.float16))
    rounded = coarse(given)
    multiples, scale = split(rounded.numpy())
    assert (multiples.dtype, scale.dtype) == (np.int8, np.float16)
    assert same_bytes((multiples * scale[..., None, None]) + np.float16(0), rounded.numpy() + np.float16(0))
    assert np.array_equal(multiples.astype(np.float64) * scale.astype(np.float64)[..., None, None], rounded.double())
    half_a_step = 9 / 16 * given.double().abs().amax((-2, -1), keepdim=True) / 127
    assert bool(((rounded.double() - given.double()).abs() <= half_a_step.clamp(min=2.0**-22)).all())
    with pytest.raises(ValueError, match="multiples"):
        split(np.array([[[1.0, 0.333, 0.1, 0.7]]], np.float16))
