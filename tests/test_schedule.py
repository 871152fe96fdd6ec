"""The schedule room: schedules of the right shape, and stretches that end where they should."""

from __future__ import annotations

import math

import numpy as np
import pytest

from config import Train
from schedule import SCHEDULES, Stretch, plan_stretch

# Schedules


@pytest.mark.parametrize(
    ("name", "points"),
    [
        ("constant", {0: 1, 0.5: 1, 1: 1}),
        ("onecycle", {0: 0, 0.1: 0.5, 0.2: 1, 0.6: 0.5, 1: 0}),
        ("cosine", {0: 0, 0.1: 0.5, 0.2: 1, 0.6: 0.5, 0.4: 0.5 + 0.5 * math.sqrt(0.5), 1: 0}),
    ],
)
def test_schedule_goes_through_its_points(name, points):
    found = {progress: SCHEDULES[name](progress, 0, Train(warm_up=0.2)) for progress in points}
    assert found == pytest.approx(points, abs=1e-9)


def test_step_schedule_falls_every_so_many_epochs():
    train = Train(step_epochs=10, step_factor=0.3)
    found = [SCHEDULES["step"](0.5, epoch, train) for epoch in (0, 9, 10, 19, 20)]
    assert found == pytest.approx([1, 1, 0.3, 0.3, 0.09])


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("warm_up", [0.0, 0.1, 1.0])
def test_schedule_stays_within_bounds(name, warm_up):
    train = Train(warm_up=warm_up, step_epochs=5)
    found = [SCHEDULES[name](progress, round(20 * progress), train) for progress in np.linspace(0, 1, 101)]
    assert all(0 <= factor <= 1 for factor in found)
    assert max(found) == pytest.approx(1, abs=0.02)


def test_progress_of_epochs_and_of_the_clock():
    epochs, clock = Stretch(10, 30), Stretch(10, 0, minutes=2.0, elapsed=60)
    assert [epochs.progress(epoch, 1e9) for epoch in (10, 15.5, 30, 31)] == [0, 0.275, 1, 1]
    assert [clock.progress(1e9, elapsed) for elapsed in (0, 30, 120, 500)] == [0, 0.25, 1, 1]
    assert [epochs.done(epoch) for epoch in (29, 30, 31)] == [False, True, True]
    assert not clock.done(10**6)
    assert Stretch(10, 0, minutes=2.0, elapsed=120).done(10)


# Stretches

HALFWAY, FINISHED = Stretch(0, 100), Stretch(0, 40)
CLOCK, RUN_DOWN = Stretch(7, 0, 60.0, elapsed=600.0), Stretch(7, 0, 60.0, elapsed=3601.0)


@pytest.mark.parametrize(
    ("epoch", "saved", "n_epoch", "minutes", "train", "expected"),
    [
        # nothing yet: what is asked for, else what the settings say
        (0, None, None, None, {}, Stretch(0, 100)),
        (0, None, 20, None, {}, Stretch(0, 20)),
        (0, None, None, 30.0, {}, Stretch(0, 0, 30.0)),
        (0, None, None, None, {"minutes": 15}, Stretch(0, 0, 15.0)),
        (0, None, 20, None, {"minutes": 15}, Stretch(0, 20)),
        # cut off: finished when nothing or the same is asked for
        (40, HALFWAY, None, None, {}, HALFWAY),
        (40, HALFWAY, 100, None, {}, HALFWAY),
        (40, HALFWAY, None, None, {"n_epoch": 50}, HALFWAY),
        (40, CLOCK, None, None, {}, CLOCK),
        (40, CLOCK, None, 60.0, {}, CLOCK),
        (40, CLOCK, None, None, {"minutes": 60}, CLOCK),
        # cut off, and something else is asked for: counted from here
        (40, HALFWAY, 20, None, {}, Stretch(40, 60)),
        (40, HALFWAY, None, 30.0, {}, Stretch(40, 0, 30.0)),
        (40, CLOCK, None, 30.0, {}, Stretch(40, 0, 30.0)),
        (40, CLOCK, 20, None, {}, Stretch(40, 60)),
        # finished: further epochs are counted from here, and nothing asked for is nothing to do
        (40, FINISHED, 40, None, {}, Stretch(40, 80)),
        (40, FINISHED, None, 60.0, {}, Stretch(40, 0, 60.0)),
        (40, RUN_DOWN, None, 60.0, {}, Stretch(40, 0, 60.0)),
        (100, HALFWAY, None, None, {}, HALFWAY),
        (40, FINISHED, None, None, {}, FINISHED),
        (40, RUN_DOWN, None, None, {"minutes": 60}, RUN_DOWN),
    ],
)
def test_plan_of_what_to_train_now(epoch, saved, n_epoch, minutes, train, expected):
    assert plan_stretch(epoch, saved, n_epoch, minutes, Train(**train)) == expected


@pytest.mark.parametrize(
    ("epoch", "saved", "train", "expected"),
    [
        (40, HALFWAY, {"n_epoch": 50}, Stretch(40, 50)),
        (40, HALFWAY, {"n_epoch": 20}, Stretch(40, 40)),
        (40, FINISHED, {"n_epoch": 100}, Stretch(40, 100)),
        (40, CLOCK, {"minutes": 90}, Stretch(40, 0, 90.0)),
        (40, RUN_DOWN, {"n_epoch": 60}, Stretch(40, 60)),
    ],
)
def test_a_length_set_anew_counts(epoch, saved, train, expected):
    assert plan_stretch(epoch, saved, None, None, Train(**train), changed=True) == expected


@pytest.mark.parametrize(("n_epoch", "minutes"), [(0, None), (-2, None), (None, -1.0), (None, 0.0)])
def test_less_than_nothing_is_refused(n_epoch, minutes):
    with pytest.raises(ValueError, match="wanted more than 0"):
        plan_stretch(3, None, n_epoch, minutes, Train())


def test_a_finished_stretch_is_done():
    for epoch, saved, train in ((100, HALFWAY, {}), (120, FINISHED, {}), (40, RUN_DOWN, {"minutes": 60})):
        assert plan_stretch(epoch, saved, None, None, Train(**train)).done(epoch)
