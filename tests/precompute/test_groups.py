"""`--group prompt`: images of one prompt share grid and noise, and one that several pairs share is inverted once."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from inpo.common.cache import Shard
from inpo.common.choices import GroupName
from inpo.common.errors import UsageError
from inpo.common.pairs import Pair, open_source
from inpo.common.pairs.decode import PreparedPair, prepare_pair
from inpo.common.seeding import normal
from inpo.common.spread import SPREAD_RECORDS
from inpo.precompute.arrange import arrange
from tests.precompute.conftest import Example, assert_same_but_for_rounding, png

PROMPT, OTHER = "a red cat", "a blue dog"


def digest(text: str) -> str:
    """Of a prompt: blake2b of 128 bits, read as a little-endian number."""
    return f"{int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), 'little'):032x}"


@pytest.fixture
def chain(examples: Callable) -> list[Example]:
    """Three images of one prompt in three pairs, a pair of another prompt, and one of the first prompt's images under
    that other prompt."""
    a, b, c, d = (each.win for each in examples(4))
    (plain,) = examples(1, first=9)
    return [
        Example("a-b", PROMPT, a, b),
        Example("b-c", PROMPT, b, c),
        replace(plain, pair_id="other", prompt=OTHER),
        Example("a-c", PROMPT, a, c),
        Example("a-d", OTHER, a, d),
    ]


def sides(shard: Shard, path: str, pair_id: str) -> np.ndarray:
    (row,) = np.flatnonzero(shard.read("pair/id") == pair_id)
    return shard.read(path)[shard.sides()[row]]


def test_an_image_of_several_pairs_is_inverted_once_and_serves_them_all(
    pipelines: Callable, chain: list[Example], write_tars: Callable, run: Callable, tmp_path: Path
) -> None:
    source = write_tars(tmp_path / "pairs", chain, 9)
    settings = {"grid_points": 4, "timesteps_per_pair": 4}
    plain = run.cache(source, pipelines(), tmp_path / "plain", **settings)
    assert run.network_calls == 10 * 5 + SPREAD_RECORDS  # of each side: the start, and four points
    before = run.network_calls
    cache = run.cache(source, pipelines(), tmp_path / "cache", group="prompt", **settings)
    assert (
        run.network_calls - before == 7 * 5 + SPREAD_RECORDS
    )  # a, b, c; two more, a again under another prompt, and d

    (shard,) = cache
    assert cache.manifest.group == "prompt"
    assert (shard.num_pairs, shard.num_images, shard.commit.num_groups) == (5, 7, 2)
    assert shard.read("group/id").tolist() == [digest(PROMPT), digest(OTHER)]
    assert shard.prompts().tolist() == [PROMPT, OTHER]
    assert shard.read("image/group").tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert shard.read("pair/id").tolist() == [pair.pair_id for pair in chain]
    assert shard.sides().tolist() == [[0, 1], [1, 2], [3, 4], [0, 2], [5, 6]]
    assert shard.groups().tolist() == [0, 0, 1, 0, 1]
    for row, pair in enumerate(chain):
        for image, pixels in zip(shard.sides()[row], (pair.win, pair.lose), strict=True):
            assert shard.read("image/id")[image] == hashlib.blake2b(png(pixels), digest_size=16).hexdigest()
    assert len(set(shard.read("image/id"))) == 6  # one image stands in both groups
    assert not np.array_equal(shard.read("x_t")[0], shard.read("x_t")[5])

    # What was there without groups: plain pairs have a row for every side.
    (slots,) = plain
    assert (slots.num_pairs, slots.num_images, slots.commit.num_groups) == (5, 10, 5)
    for pair in chain:
        np.testing.assert_array_equal(sides(shard, "x0", pair.pair_id), sides(slots, "x0", pair.pair_id))


def test_the_images_of_a_group_share_timesteps_and_noise(
    pipelines: Callable, chain: list[Example], write_tars: Callable, run: Callable, tmp_path: Path
) -> None:
    source = write_tars(tmp_path / "pairs", chain, 9)
    cache = run.cache(source, pipelines(), tmp_path / "cache", group="prompt", inverter="noise", seed=4)
    (shard,) = cache
    timestep, group = shard.read("timestep"), shard.read("image/group")
    assert timestep.shape == (2, 3)
    assert not np.array_equal(timestep[0], timestep[1])
    for image, row in enumerate(group):
        for record, t in enumerate(timestep[row].tolist()):
            noise = normal((4, 8, 8), 4, digest((PROMPT, OTHER)[row]), "noise", t)
            np.testing.assert_array_equal(shard.read("target")[image, record], noise.half().numpy())


def test_flips_and_dropped_captions_are_a_groups(
    pipelines: Callable, examples: Callable, write_tars: Callable, run: Callable, tmp_path: Path
) -> None:
    """Twelve pairs of four prompts, an image of its own for every side: what is drawn is drawn by prompt."""
    pairs = examples(12)
    source = write_tars(tmp_path / "pairs", pairs, 12)
    settings = {"group": "prompt", "flip": True, "caption_dropout": 0.5, "seed": 1, "grid_points": 1}
    cache = run.cache(source, pipelines(), tmp_path / "cache", timesteps_per_pair=1, **settings)
    (shard,) = cache
    assert (shard.num_images, shard.commit.num_groups) == (24, 4)
    assert 0 < shard.dropped().sum() < 4
    straight = run.cache(
        source, pipelines(), tmp_path / "straight", group="prompt", grid_points=1, timesteps_per_pair=1
    )
    (other,) = straight
    flipped = [
        {bool((shard.read("x0")[image] != other.read("x0")[image]).any()) for image in np.flatnonzero(rows)}
        for rows in (shard.read("image/group") == group for group in range(4))
    ]
    assert all(len(each) == 1 for each in flipped)
    assert {True, False} == set().union(*flipped)


def test_a_group_lies_within_a_shard_and_hangs_on_its_prompt_alone(
    pipelines: Callable, chain: list[Example], write_tars: Callable, run: Callable, tmp_path: Path, by_id: Callable
) -> None:
    """Cut into other shards, an image has the same grid and, to rounding, the same records."""
    one = run.cache(write_tars(tmp_path / "one", chain, 9), pipelines(), tmp_path / "a", group="prompt")
    many = run.cache(
        write_tars(tmp_path / "many", chain[::-1], 2), pipelines(), tmp_path / "b", group="prompt", batch_size=1
    )
    assert len(many.shards) == 3
    assert sum(shard.num_images for shard in many) > sum(shard.num_images for shard in one)
    for pair_id, timestep in by_id(one, "timestep").items():
        np.testing.assert_array_equal(timestep, by_id(many, "timestep")[pair_id])
    assert_same_but_for_rounding(one, many, by_id)


def test_an_image_against_itself_stays_two_images(
    pipelines: Callable, chain: list[Example], write_tars: Callable, run: Callable, tmp_path: Path
) -> None:
    pairs = [chain[0], replace(chain[0], pair_id="same", lose=chain[0].win)]
    cache = run.cache(write_tars(tmp_path / "pairs", pairs, 2), pipelines(), tmp_path / "cache", group="prompt")
    (shard,) = cache
    assert shard.sides().tolist() == [[0, 1], [0, 2]]
    np.testing.assert_array_equal(shard.read("image/id")[0], shard.read("image/id")[2])
    np.testing.assert_array_equal(shard.read("x0")[0], shard.read("x0")[2])


A_B = {"images": ["a.png", "b.png"], "ranks": [1, 2]}
C_D_A = {"images": ["c.png", "d.png", "a.png"], "ranks": [1, 2, 3]}
RATED = {"win": "a.png", "lose": "b.png", "score_win": 5, "score_lose": 1}


@pytest.mark.parametrize(
    ("rows", "group", "scores"),
    [
        ([C_D_A], "list", [-1, -2, -3]),
        ([A_B, C_D_A], "list", [np.nan] * 4),
        ([A_B, {"images": ["c.png", "d.png"], "ranks": [1, 2]}], "list", [np.nan] * 4),
        ([A_B | {"id": "x"}, C_D_A | {"id": "y"}], "list", [-1, -2, -1, -2, -3]),
        ([A_B | {"id": "x"}, C_D_A | {"id": "y"}], "prompt", [np.nan] * 4),
        ([{"images": ["a.png", "b.png", "a.png"], "ranks": [1, 2, 3], "id": "x"}], "list", [np.nan] * 3),
        ([RATED, {"win": "a.png", "lose": "c.png", "score_win": 5, "score_lose": 3}], "prompt", [5, 1, 3]),
        ([RATED, {"win": "a.png", "lose": "c.png", "score_win": 4, "score_lose": 3}], "prompt", [np.nan] * 3),
        ([RATED | {"scores_of": 1}, RATED | {"lose": "c.png", "scores_of": 2}], "prompt", [np.nan] * 3),
        ([RATED, {"win": "a.png", "lose": "c.png"}], "prompt", [5, 1, np.nan]),
    ],
)
def test_a_group_has_scores_where_they_are_one_scale(
    examples: Callable, tmp_path: Path, rows: list[dict[str, object]], group: GroupName, scores: list[float]
) -> None:
    """A rank is one among its own ranking's: objectives of lists would order the others by it, against the labels."""
    for name, pair in zip("abcd", examples(4), strict=True):
        (tmp_path / f"{name}.png").write_bytes(png(pair.win))
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row | {"prompt": PROMPT}) + "\n" for row in rows))
    (shard,) = open_source(str(tmp_path / "pairs.jsonl")).shards
    pairs = [prepare_pair(pair, False, resolution=(32, 32)) for pair in shard.rows(0, 99) if isinstance(pair, Pair)]
    assert len(pairs) == shard.num_rows
    arrangement = arrange([pair for pair in pairs if isinstance(pair, PreparedPair)], group)
    np.testing.assert_array_equal(arrangement.scores, scores)


def test_where_an_image_breaks_down_its_pairs_go_and_the_others_stay(
    pipelines: Callable, chain: list[Example], write_tars: Callable, run: Callable, tmp_path: Path, by_id: Callable
) -> None:
    """The second image of the chain a-b, b-c, a-c: a and c are in a pair without it."""
    from inpo.precompute.components import Components

    def broken(components: Components) -> None:
        encode = components.images.vae.encode

        def sick(pixels: object) -> object:
            output = encode(pixels)
            output.latent_dist.mean[1:2] = float("nan")
            return output

        components.images.vae.encode = sick

    source = write_tars(tmp_path / "pairs", chain, 9)
    whole = run.cache(source, pipelines(), tmp_path / "whole", group="prompt")
    run.prepare = broken
    cache = run.cache(source, pipelines(), tmp_path / "cache", group="prompt")
    (shard,) = cache
    assert shard.commit.skipped == {"not_finite": 2}
    assert shard.read("pair/id").tolist() == ["other", "a-c", "a-d"]
    assert shard.num_images == 6
    assert sorted(shard.read("group/id").tolist()) == sorted([digest(PROMPT), digest(OTHER)])
    left, right = by_id(cache, "x_t"), by_id(whole, "x_t")
    assert left.keys() < right.keys()
    assert_same_but_for_rounding(cache, whole, by_id)


def test_faithful_has_no_groups(
    pipelines: Callable, chain: list[Example], write_tars: Callable, run: Callable, tmp_path: Path
) -> None:
    source = write_tars(tmp_path / "pairs", chain, 9)
    with pytest.raises(UsageError, match="--faithful draws its noise by pair"):
        run(source, pipelines(), tmp_path / "cache", group="prompt", faithful=True)
    assert not (tmp_path / "cache").exists()
