"""The oracle and the held-out scorer order pictures as a person would."""

import numpy as np
import pytest
from PIL import Image

from inpo.common.errors import UsageError
from inpo.toyworld.heldout import HeldoutScorer
from inpo.toyworld.mixed_quality import blur
from inpo.toyworld.oracle import WEIGHTS, OracleScorer
from inpo.toyworld.scenes import captions, parse_caption, render

CAPTIONS = captions("test")[:60]
SCORERS = pytest.mark.parametrize("scorer", [OracleScorer(), HeldoutScorer()], ids=lambda scorer: scorer.name)


def clean_pictures():
    return [render(parse_caption(caption)) for caption in CAPTIONS]


def score(scorer, pictures, prompts=CAPTIONS):
    return scorer.score([Image.fromarray(picture) for picture in pictures], list(prompts))


def noisy(picture):
    noise = np.random.default_rng(0).normal(0, 25, picture.shape)
    return np.clip(picture + noise, 0, 255).astype(np.uint8)


def faint(picture):
    grey = picture.mean()
    return (grey + 0.4 * (picture - grey)).astype(np.uint8)


def soft(picture):
    return blur(picture.astype(np.float32), radius=1.4).astype(np.uint8)


def with_other_word(scene, attribute, words):
    other = next(word for word in words if word != getattr(scene, attribute))
    return type(scene)(**{**vars(scene), attribute: other})


@SCORERS
def test_scores_are_one_float64_per_image(scorer):
    scores = score(scorer, clean_pictures())
    assert scores.dtype == np.float64
    assert scores.shape == (len(CAPTIONS),)
    assert np.isfinite(scores).all()
    # Neither the size of a batch nor the order changes a score.
    alone = [
        score(scorer, [picture], [caption])[0] for picture, caption in zip(clean_pictures(), CAPTIONS, strict=True)
    ]
    np.testing.assert_allclose(alone, scores, atol=1e-4)


@pytest.mark.parametrize("degrade", [noisy, faint, soft])
def test_oracle_prefers_clean_pictures(degrade):
    clean, spoilt = score(OracleScorer(), clean_pictures()), score(OracleScorer(), map(degrade, clean_pictures()))
    assert (clean > spoilt + 0.3).all()
    assert clean.min() > 5
    assert clean.max() <= sum(WEIGHTS.values())


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
    assert np.mean(score(scorer, clean_pictures()) > score(scorer, wrong)) >= 0.95


def test_oracle_orders_clean_degraded_and_wrong():
    clean = score(OracleScorer(), clean_pictures())
    degraded = score(OracleScorer(), map(soft, clean_pictures()))
    wrong = score(OracleScorer(), clean_pictures()[1:] + clean_pictures()[:1])
    assert clean.mean() > degraded.mean() + 1 > wrong.mean() + 2


def test_oracle_forgives_a_pixel_but_not_a_misplacement():
    near = score(OracleScorer(), [render(parse_caption(caption), shift=(1, 0)) for caption in CAPTIONS])
    far = score(OracleScorer(), [render(parse_caption(caption), shift=(4, 4)) for caption in CAPTIONS])
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
    large = picture.resize((64, 64), Image.Resampling.NEAREST).convert("RGBA")
    same, other = scorer.score([picture, large], [CAPTIONS[0]] * 2)
    assert other == pytest.approx(same, abs=1.5)
