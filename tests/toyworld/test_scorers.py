"""The oracle and the held-out scorer order pictures as a person would."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from PIL import Image

from inpo.common.errors import UsageError
from inpo.toyworld.heldout import HeldoutScorer
from inpo.toyworld.mixed_quality import blur
from inpo.toyworld.oracle import BACKDROP_WEIGHT, WEIGHTS, OracleScorer
from inpo.toyworld.scenes import CLASHES, COLOURS, Look, captions, parse_caption, render

CAPTIONS = captions("test")[:60]
WITH_TWO = [caption for caption in captions("test")[:90] if len(parse_caption(caption).objects) == 2]
ORACLE = OracleScorer()
SCORERS = pytest.mark.parametrize("scorer", [ORACLE, HeldoutScorer()], ids=lambda scorer: scorer.name)


@cache
def clean_pictures():
    return [render(parse_caption(caption)) for caption in CAPTIONS]


def score(scorer, pictures, prompts=CAPTIONS):
    return scorer.score([Image.fromarray(picture) for picture in pictures], list(prompts))


@cache
def clean_scores(scorer):
    return score(scorer, clean_pictures())


@cache
def best_of_two(scorer):
    return score(scorer, [render(parse_caption(caption)) for caption in WITH_TWO], WITH_TWO)


def noisy(picture):
    noise = np.random.default_rng(0).normal(0, 25, picture.shape)
    return np.clip(picture + noise, 0, 255).astype(np.uint8)


def faint(picture):
    grey = picture.mean()
    return (grey + 0.4 * (picture - grey)).astype(np.uint8)


def soft(picture):
    return blur(picture.astype(np.float32), radius=2.0).astype(np.uint8)


def with_other_word(scene, attribute, words):
    """The scene with another word in its last object or backdrop."""
    if attribute == "backdrop":
        return replace(scene, backdrop=next(word for word in words if word != scene.backdrop))
    *others, last = scene.objects
    other = next(word for word in words if word != getattr(last, attribute))
    return replace(scene, objects=(*others, replace(last, **{attribute: other})))


def swapped(scene, attribute):
    """The scene with its two objects' words for one attribute exchanged."""
    one, two = scene.objects
    words = {attribute: getattr(two, attribute)}, {attribute: getattr(one, attribute)}
    return replace(scene, objects=(replace(one, **words[0]), replace(two, **words[1])))


def with_extra(scene, colour):
    """The scene with a second object where there is room."""
    (own,) = scene.objects
    place = "on the left" if own.place != "on the left" else "on the right"
    return replace(scene, objects=(own, replace(own, size="big", colour=colour, place=place)))


@SCORERS
def test_scores_are_one_float64_per_image(scorer):
    scores = clean_scores(scorer)
    assert scores.dtype == np.float64
    assert scores.shape == (len(CAPTIONS),)
    assert np.isfinite(scores).all()
    # Neither the size of a batch nor the order changes a score.
    some = list(zip(clean_pictures(), CAPTIONS, strict=True))[:12]
    alone = [score(scorer, [picture], [caption])[0] for picture, caption in some]
    np.testing.assert_allclose(alone, scores[:12], atol=1e-4)


@pytest.mark.parametrize("degrade", [noisy, faint, soft])
def test_oracle_prefers_clean_pictures(degrade):
    clean, spoilt = clean_scores(ORACLE), score(ORACLE, map(degrade, clean_pictures()))
    assert (clean > spoilt + 0.3).all()
    assert clean.min() > 5
    assert clean.max() <= sum(WEIGHTS.values()) + BACKDROP_WEIGHT == 6


@pytest.mark.parametrize(
    ("attribute", "words"),
    [
        ("size", ("small", "big")),
        ("colour", ("red", "blue")),
        ("shape", ("star", "box")),
        ("place", ("on the left", "at the top")),
        ("backdrop", ("at night", "over a meadow")),
    ],
)
@SCORERS
def test_right_pictures_beat_pictures_with_one_wrong_attribute(scorer, attribute, words):
    wrong = [render(with_other_word(parse_caption(caption), attribute, words)) for caption in CAPTIONS]
    assert np.mean(clean_scores(scorer) > score(scorer, wrong)) >= 0.95


@SCORERS
def test_swapped_colours_missing_and_extra_objects_cost_much(scorer):
    right = [parse_caption(caption) for caption in WITH_TWO]
    best = best_of_two(scorer)
    spoilt = {
        "colours swapped": [swapped(scene, "colour") for scene in right],
        "first missing": [replace(scene, objects=scene.objects[1:]) for scene in right],
        "second missing": [replace(scene, objects=scene.objects[:1]) for scene in right],
    }
    for flaw, scenes in spoilt.items():
        assert (best - score(scorer, map(render, scenes), WITH_TWO)).min() > 1, flaw
    alone = [caption for caption in CAPTIONS if len(parse_caption(caption).objects) == 1]
    crowded = [
        with_extra(scene, next(c for c in COLOURS if c not in (*CLASHES[scene.backdrop], scene.objects[0].colour)))
        for scene in map(parse_caption, alone)
    ]
    fall = score(scorer, [render(parse_caption(caption)) for caption in alone], alone) - score(
        scorer, map(render, crowded), alone
    )
    assert fall.min() > 0.8


def test_one_wrong_object_of_two_costs_half_of_what_both_cost():
    scenes = [parse_caption(caption) for caption in WITH_TWO]
    best = best_of_two(ORACLE)
    both = score(OracleScorer(), [render(swapped(scene, "colour")) for scene in scenes], WITH_TWO)
    first = [
        replace(scene, objects=(replace(scene.objects[0], colour=scene.objects[1].colour), scene.objects[1]))
        for scene in scenes
    ]
    one = score(OracleScorer(), map(render, first), WITH_TWO)
    assert ((best - one) / (best - both)).mean() == pytest.approx(0.5, abs=0.05)


def test_oracle_orders_clean_degraded_and_wrong():
    clean = clean_scores(ORACLE)
    degraded = score(OracleScorer(), map(soft, clean_pictures()))
    wrong = score(OracleScorer(), clean_pictures()[1:] + clean_pictures()[:1])
    assert clean.mean() > degraded.mean() + 1 > wrong.mean() + 2


def moved(caption, *shift):
    scene = parse_caption(caption)
    return render(scene, [Look(shift=shift)] * len(scene.objects))


def test_oracle_forgives_a_pixel_but_not_a_misplacement():
    near = score(OracleScorer(), [moved(caption, 2, -1) for caption in CAPTIONS])
    far = score(OracleScorer(), [moved(caption, 8, 8) for caption in CAPTIONS])
    assert near.min() > 5
    assert (far < near - 1).all()


def test_heldout_ranks_the_right_caption_first():
    scorer, pictures = HeldoutScorer(), clean_pictures()[:40]
    table = np.stack([score(scorer, pictures, [caption] * 40) for caption in CAPTIONS[:40]])
    assert np.mean(table.argmax(axis=0) == np.arange(40)) >= 0.95
    assert table.max() <= 0


@SCORERS
def test_foreign_prompts_are_refused(scorer):
    with pytest.raises(UsageError, match="no caption of the toyworld"):
        score(scorer, clean_pictures()[:1], ["a photograph of a cat"])


@SCORERS
def test_other_sizes_and_modes_are_read(scorer):
    picture = Image.fromarray(clean_pictures()[0])
    large = picture.resize((128, 128), Image.Resampling.NEAREST).convert("RGBA")
    same, other = scorer.score([picture, large], [CAPTIONS[0]] * 2)
    assert other == pytest.approx(same, abs=1.5)
