"""What is known of the images of a group beyond one pair: who is preferred to whom, and what scores make of it."""

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.special import expit, softmax


def preferences(
    num_images: int, sides: Int[np.ndarray, "pair 2"], label: Float[np.ndarray, " pair"]
) -> Bool[np.ndarray, "image image"]:
    """True where the first image is preferred to the second, by the pairs and what follows from them: A over B and B
    over C give A over C. Images that come out above each other, in a circle of pairs, are not compared.

    `sides` numbers the group's images; a label below 0.5 turns a pair, one of 0.5 says nothing.
    """
    above = np.zeros((num_images, num_images), bool)
    for win, lose in np.where((label < 0.5)[:, None], sides[:, ::-1], sides)[label != 0.5].tolist():
        above[win, lose] = True
    for through in range(num_images):
        above |= above[:, through, None] & above[through]
    return above & ~above.T


def by_score(score: Float[np.ndarray, " image"]) -> Bool[np.ndarray, "image image"]:
    """True where the first image has the higher score."""
    found: np.ndarray = score[:, None] > score
    return found


def advantages(score: Float[np.ndarray, " image"]) -> Float[np.ndarray, " image"]:
    """LAIR's: the softmax of the scores, which are in units of their temperature, minus 1 / m."""
    found: np.ndarray = softmax(score) - 1 / len(score)
    return found


def win_rates(score: Float[np.ndarray, " image"]) -> Float[np.ndarray, " image"]:
    """CaPO's calibrated rewards: an image's mean P(preferred) over the other images of its group, by Bradley and
    Terry's model of the scores.

    Of two images their difference is 2 P - 1. The paper takes the rate over samples of the model that is trained; our
    reading is that the group stands for them.
    """
    chance = expit(score[:, None] - score)
    others: np.ndarray = (chance.sum(axis=1) - 0.5) / (len(score) - 1)
    return others
