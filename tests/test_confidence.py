"""The second opinion: it learns what makes a candidate good, and says the same again."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from candidate import FEATURES
from confidence import Opinion, learn, quality


def candidates(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Features of which one decides the IoU."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(n, len(FEATURES))).astype(np.float32)
    return features, 1 / (1 + np.exp(-features[:, 4]))


def test_quality_is_what_a_nucleus_adds_to_the_score():
    assert quality(np.array([0.3, 0.5, 0.51, 0.72, 0.96])) == pytest.approx([0, 0, 0.1, 0.5, 1])


def test_it_learns_what_decides():
    opinion = learn(*zip(*(candidates(200, seed) for seed in range(4)), strict=True))
    features, iou = candidates(300, 9)
    said = opinion.judge(features)
    assert said.dtype == np.float32 and said.min() >= 0 and said.max() <= 1
    assert np.abs(said - quality(iou)).mean() < 0.08


def test_the_same_seed_gives_the_same_opinion():
    known = candidates(50, 0)
    before = torch.get_rng_state()
    one, two, other = (learn([known[0]], [known[1]], seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(one.judge(known[0]), two.judge(known[0]))
    assert not np.array_equal(one.judge(known[0]), other.judge(known[0]))
    again = Opinion.load(one.state_dict())
    assert np.array_equal(again.judge(known[0]), one.judge(known[0]))


def test_nothing_to_judge_and_nothing_to_learn_from():
    assert Opinion().judge(np.zeros((0, len(FEATURES)), np.float32)).shape == (0,)
    with pytest.raises(ValueError, match="no candidate to learn from"):
        learn([np.zeros((0, len(FEATURES)), np.float32)], [np.zeros(0)])


def test_an_opinion_on_other_features_is_refused():
    state = Opinion(n_features=7).state_dict()
    with pytest.raises(ValueError, match="on 7 features"):
        Opinion.load(state)
