"""Captions, splits and renders of the toyworld."""

import numpy as np
import pytest

from inpo.common.errors import UsageError
from inpo.toyworld.mixed_quality import mixed_renders
from inpo.toyworld.scenes import (
    ATTRIBUTES,
    CLASHES,
    COLOURS,
    SPLITS,
    captions,
    object_centre,
    object_mask,
    parse_caption,
    render,
    scenes_by_caption,
)


def test_captions_and_scenes_are_one_to_one():
    world = scenes_by_caption()
    words = {name: {getattr(scene, name) for scene in world.values()} for name in ATTRIBUTES}
    assert words == {name: set(all_words) for name, all_words in ATTRIBUTES.items()}
    assert len(set(world.values())) == len(world) == 2 * 6 * 5 * (6 * 8 - sum(map(len, CLASHES.values())))
    for caption, scene in world.items():
        assert parse_caption(caption) == scene
        assert scene.caption == caption


@pytest.mark.parametrize("sentence", ["", "a cat", "a small white star on the left in the snow", "small red ball"])
def test_other_sentences_are_refused_with_an_example(sentence):
    with pytest.raises(UsageError, match=r"no caption of the toyworld(.|\n)*a small red ball"):
        parse_caption(sentence)


def test_splits_are_disjoint_complete_and_of_the_stated_sizes():
    by_split = {split: captions(split) for split in SPLITS}
    together = [caption for ours in by_split.values() for caption in ours]
    assert len(together) == len(set(together)) == len(scenes_by_caption())
    assert set(together) == set(scenes_by_caption())
    shares = {split: len(ours) / len(together) for split, ours in by_split.items()}
    assert shares == pytest.approx({"train": 0.65, "validation": 0.15, "test": 0.2}, abs=0.03)


def test_a_caption_never_moves_to_another_split():
    # Written down once; a change here would leak test captions into the training pairs of older folders.
    assert [len(captions(split)) for split in SPLITS] == [1558, 368, 474]
    assert captions("test")[:2] == (
        "a small red star in the middle over a meadow",
        "a small white triangle on the left over the desert",
    )


@pytest.mark.parametrize("split", SPLITS)
def test_any_prefix_of_a_split_is_a_fair_sample(split):
    prefix = captions(split)[:200]
    for name, words in ATTRIBUTES.items():
        counts = [sum(getattr(parse_caption(caption), name) == word for caption in prefix) for word in words]
        assert min(counts) >= 200 / len(words) * 0.5, name


def test_the_object_lies_where_the_caption_says_and_has_its_colour():
    rows, columns = np.mgrid[0:32, 0:32] + 0.5
    for caption in captions("validation")[:60]:
        scene = parse_caption(caption)
        mask = object_mask(scene)
        assert mask.min() == 0
        assert mask.max() == 1
        middle = np.array([(mask * columns).sum(), (mask * rows).sum()]) / mask.sum()
        # A triangle's or a moon's weight does not lie in the middle of its circle.
        assert np.linalg.norm(middle - object_centre(scene)) < 3.5
        paint = render(scene)[mask > 0.99].mean(axis=0)
        distances = {name: np.linalg.norm(paint - rgb) for name, rgb in COLOURS.items()}
        assert min(distances, key=distances.__getitem__) == scene.colour


def test_edges_are_anti_aliased():
    mask = object_mask(parse_caption("a big red ball in the middle at night"))
    assert ((mask > 0) & (mask < 1)).sum() > 30
    # Area of the circle u^2 + v^2 < 0.9 at a radius of 9 pixels.
    assert mask.sum() == pytest.approx(np.pi * 0.9 * 81, rel=0.01)


def test_a_shift_moves_the_object_and_leaves_the_backdrop():
    scene = parse_caption("a small red heart in the middle over the sea")
    still, moved = object_mask(scene), object_mask(scene, shift=(3, -2))
    assert np.array_equal(np.roll(still, (-2, 3), axis=(0, 1)), moved)
    untouched = (still == 0) & (moved == 0)
    assert np.array_equal(render(scene)[untouched], render(scene, shift=(3, -2))[untouched])


def test_mixed_quality_is_seeded_and_mixed():
    pictures, index = mixed_renders(240, seed=3)
    again, _ = mixed_renders(240, seed=3)
    other, _ = mixed_renders(240, seed=4)
    assert np.array_equal(pictures, again)
    assert not np.array_equal(pictures, other)
    scenes = list(scenes_by_caption().values())
    error = [
        np.abs(picture.astype(float) - render(scenes[i])).mean() for picture, i in zip(pictures, index, strict=True)
    ]
    # Many pictures are clean but for a jitter of a pixel, and many are clearly not.
    assert 0.2 < np.mean(np.array(error) < 5) < 0.75
    assert 0.15 < np.mean(np.array(error) > 10) < 0.7
