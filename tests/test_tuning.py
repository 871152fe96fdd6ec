"""The tuning room: the search finds what was hidden, and cross-validation does not flatter."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage as ndi

from config import Config, load_config
from tuning import WINDOW, WITH_OPINION, Case, Lesson, Tuner, form_from_lessons, form_opinion, judge, strangers

SHAPE = (64, 80)
SMALL = {"param.threshold": (0.3, 0.4, 0.5, 0.6, 0.7), "post.min_object_size": (0, 12, 30)}


def case(edge: float, kind: str = "", seed: int = 0, specks: bool = False) -> Case:
    """Disks whose semantic map is `edge` where they end, with specks of 20 pixels that are no nuclei."""
    rng = np.random.default_rng(seed)
    y, x = np.indices(SHAPE)
    truth, depth = np.zeros(SHAPE, np.int32), np.full(SHAPE, -20.0)
    for i, (cy, cx) in enumerate([(16, 16), (16, 48), (48, 30), (46, 64)], 1):
        away = np.hypot(y - cy - rng.uniform(-2, 2), x - cx - rng.uniform(-2, 2))
        truth[away <= 9] = i
        depth = np.maximum(depth, 9 - away)
    semantic = np.clip(edge + 0.08 * depth, 0, 1).astype(np.float32)
    for i in range(5 if specks else 0):
        semantic[30:34, 2 + 16 * i : 7 + 16 * i] = 1
    return Case.pack(kind, [{"semantic": semantic}], truth)


def settings(*overrides: str) -> Config:
    return load_config(overrides=["post.marker=peak", *overrides], folder="/nonexistent")


def test_a_case_is_judged_by_the_settings():
    assert judge(case(0.5), settings("param.threshold=0.5")) == 1.0
    assert judge(case(0.5), settings("param.threshold=0.9")) < 0.5


@pytest.mark.parametrize("edge", [0.3, 0.4, 0.6, 0.7])
def test_the_search_finds_the_edge(edge):
    with Tuner([case(edge, seed=i) for i in range(3)], settings(), SMALL) as tuner:
        best = tuner.search()
        assert dict(best)["param.threshold"] == pytest.approx(edge)
        assert tuner.scores(best).mean() > tuner.scores(tuner.start).mean() + 0.1


def test_settings_are_searched_together():
    with Tuner([case(0.6, specks=True, seed=i) for i in range(2)], settings("post.min_object_share=0"), SMALL) as tuner:
        assert dict(tuner.search()) == {"param.threshold": 0.6, "post.min_object_size": 30}


def test_what_the_user_set_stays():
    with Tuner([case(0.7)], settings("param.threshold=0.45"), SMALL) as tuner:
        assert list(tuner.grid) == ["post.min_object_size"]
        assert "param.threshold" not in dict(tuner.search())


def test_where_nothing_helps_nothing_changes():
    with Tuner([case(0.5)], settings(), SMALL) as tuner:
        assert tuner.search() == tuner.start


def test_cross_validation_judges_each_kind_by_the_others():
    cases = [case(edge, kind, seed) for edge, kind in ((0.3, "low"), (0.7, "high")) for seed in range(2)]
    with Tuner(cases, settings(), {"param.threshold": SMALL["param.threshold"]}) as tuner:
        honest = tuner.cross_validate()
        assert honest[:2] == pytest.approx(tuner.scores((("param.threshold", 0.7),))[:2])
        assert honest[2:] == pytest.approx(tuner.scores((("param.threshold", 0.3),))[2:])
        assert honest.mean() < tuner.scores(tuner.start).mean()


def test_images_of_a_single_kind_are_judged_by_each_other():
    with Tuner([case(0.7, "one"), case(0.7, "one", 1)], settings(), SMALL) as tuner:
        assert tuner.cross_validate().mean() > tuner.scores(tuner.start).mean() + 0.1
    with Tuner([case(0.7, "one")], settings(), SMALL) as tuner:
        assert np.array_equal(tuner.cross_validate(), tuner.scores(tuner.start))


def test_strangers_share_neither_kind_nor_kin():
    kinds, groups = ["a", "a", "b", "b", "c"], ["1", "2", "2", "3", "4"]
    cases = [Case(kind, ({},), np.zeros((2, 2), np.int32), group) for kind, group in zip(kinds, groups, strict=True)]
    found = [(np.flatnonzero(mine).tolist(), np.flatnonzero(others).tolist()) for mine, others in strangers(cases)]
    assert found == [([0, 1], [3, 4]), ([2, 3], [0, 4]), ([4], [0, 1, 2, 3])]
    alone = strangers([Case("a", case.members, case.truth, case.group) for case in cases])
    assert sorted(i for mine, _ in alone for i in np.flatnonzero(mine)) == [0, 1, 2, 3, 4]
    for mine, others in alone:
        assert not (mine & others).any()
        assert mine[1] == mine[2] and others[1] == others[2]
    assert strangers([Case(kind, ({},), cases[0].truth, "1") for kind in "ab"]) == []


def test_worker_processes_find_the_same():
    cases = [case(0.4, seed=i) for i in range(3)]
    with Tuner(cases, settings(), SMALL, n_worker=2) as many, Tuner(cases, settings(), SMALL) as one:
        assert many.search() == one.search()
        assert np.array_equal(many.scores(many.start), one.scores(one.start))


def test_a_choice_is_judged_once(monkeypatch):
    seen = []
    monkeypatch.setattr("tuning.judge", lambda case, config: seen.append(config) or 0.0)
    with Tuner([case(0.5)], settings(), SMALL) as tuner:
        tuner.search()
        tuner.cross_validate()
        assert len(seen) == tuner.n_judged


def test_of_a_rule_every_value_is_tried(monkeypatch):
    grid = {"post.policy": ("ws", "rw")}
    with Tuner([case(0.5)], settings(), grid) as tuner:
        assert dict(tuner.start) == {"post.policy": "auto"}
        assert dict(tuner.search()) == {"post.policy": "auto"}  # no other is better
    monkeypatch.setattr("tuning.judge", lambda case, config: 1.0 if config.post.policy == "rw" else 0.5)
    with Tuner([case(0.5)], settings(), grid) as tuner:
        assert dict(tuner.search()) == {"post.policy": "rw"}


def test_a_search_starts_between_two_values():
    with Tuner([case(0.6)], settings(), {"param.threshold": (0.3, 0.6)}) as tuner:
        assert dict(tuner.search()) == {"param.threshold": 0.6}


def test_of_a_large_image_the_middle_is_judged():
    truth = np.arange(700 * 20, dtype=np.int32).reshape(700, 20)
    probs = {"semantic": np.ones((700, 20), np.float32), "color": np.ones((4, 700, 20), np.float32)}
    packed = Case.pack("", [probs], truth)
    assert packed.truth.shape == (WINDOW, 20) and packed.truth.max() == WINDOW * 20
    assert packed.members[0]["semantic"].shape == (WINDOW, 20) and packed.members[0]["color"].shape == (4, WINDOW, 20)


def test_networks_of_an_ensemble_are_weighed():
    good, bad = case(0.5), case(0.2)
    cases = [Case("", (bad.members[0], good.members[0], bad.members[0]), good.truth)]
    with Tuner(cases, settings(), SMALL) as tuner:
        best = tuner.search()
        ((key, weights), *_) = best
        assert key == "valid.ensemble_weights"
        assert weights[1] > weights[0] + weights[2]
        assert tuner.scores(best) > tuner.scores(tuner.start)
    with Tuner(cases, settings("valid.ensemble_weights=1,1,1"), SMALL) as tuner:
        assert "valid.ensemble_weights" not in dict(tuner.search())


def test_a_left_out_kind_has_no_say_in_the_weights():
    low, high = case(0.2, "low"), case(0.5, "high")
    truths = [Case(kind, (low.members[0], high.members[0]), low.truth) for kind in ("one", "two")]
    with Tuner(truths, settings(), SMALL) as tuner:
        seen = []
        search = tuner.search
        tuner.search = lambda subset: seen.append(subset.tolist()) or search(subset)
        tuner.cross_validate()
        assert seen == [[False, True], [True, False]]


def test_maps_are_packed_in_a_quarter_of_the_memory():
    probs = {"semantic": ndi.gaussian_filter(np.random.default_rng(0).random(SHAPE), 2).astype(np.float32)}
    packed = Case.pack("", [probs], np.zeros(SHAPE, np.int32))
    assert packed.members[0]["semantic"].nbytes * 4 == probs["semantic"].nbytes
    assert np.abs(packed.members[0]["semantic"] / 255 - probs["semantic"]).max() <= 0.5 / 255 + 1e-6


def test_a_second_opinion_is_judged_on_what_it_has_not_seen(monkeypatch):
    monkeypatch.setattr("confidence.N_STEPS", 200)
    cases = [case(0.5, kind, seed, specks=True) for kind in ("one", "two") for seed in range(3)]
    config = settings("post.min_object_size=0", "post.min_object_share=0", "param.threshold=0.5")
    formed = form_opinion(cases, config.suggest(WITH_OPINION))
    assert formed is not None
    opinion, scores = formed
    plain = np.array([judge(one, config) for one in cases])
    assert plain.max() < 0.6  # specks are taken for nuclei
    assert scores.min() > 0.95
    again = case(0.5, "three", 7, specks=True)
    assert judge(again, config.suggest(WITH_OPINION), opinion) > 0.95


def test_each_image_is_judged_by_an_opinion_of_strangers(monkeypatch):
    cases = [case(0.5, kind, seed) for kind in ("one", "two", "three") for seed in range(2)]
    number = {id(one): i for i, one in enumerate(cases)}
    monkeypatch.setattr("tuning.examine", lambda one, _: Lesson(one.kind, np.array([number[id(one)]]), np.array([0.5])))
    monkeypatch.setattr("tuning.learn", lambda features, ious, seed: {int(x[0]) for x in features})
    judged = {}
    monkeypatch.setattr("tuning.judge", lambda case, config, opinion: judged.update({number[id(case)]: opinion}) or 0)
    formed = form_opinion(cases, settings())
    assert formed is not None and formed[0] == set(range(6))
    assert judged == {i: set(range(6)) - {i - i % 2, i - i % 2 + 1} for i in range(6)}


def test_what_other_images_teach_is_judged_on_kinds_that_they_are_not_of(monkeypatch):
    kinds = ("one", "two", "two", "strange")
    lessons = [Lesson(kind, np.array([i]), np.array([0.5])) for i, kind in enumerate(kinds[:3])]
    cases = [case(0.5, kind) for kind in kinds]
    monkeypatch.setattr("tuning.learn", lambda features, ious, seed: {int(x[0]) for x in features})
    judged = []
    monkeypatch.setattr("tuning.judge", lambda case, config, opinion: judged.append(opinion) or len(opinion))
    assert form_from_lessons(lessons, cases, settings())[0] == {0, 1, 2}
    assert judged == [{1, 2}, {0}, {0}, {0, 1, 2}]
    judged.clear()
    form_from_lessons(lessons[1:], cases[1:2], settings())
    assert judged == [{1, 2}]  # there is no other kind
    assert form_from_lessons([Lesson("one", np.zeros((0, 1)), np.zeros(0))], cases, settings()) is None


def test_there_is_no_opinion_without_strangers_or_without_candidates():
    assert form_opinion([case(0.5)], settings()) is None
    dark = Case.pack("dark", [{"semantic": np.zeros(SHAPE, np.float32)}], np.zeros(SHAPE, np.int32))
    assert form_opinion([case(0.5, "one"), dark], settings()) is None
