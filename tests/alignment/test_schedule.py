import math
from itertools import pairwise

import pytest

from srepa_ds.alignment.schedule import SCHEDULES, ScheduleConfig, weight_factor
from srepa_ds.errors import ConfigError
from srepa_ds.schema import validated


def factors(steps, **settings):
    config = validated(ScheduleConfig, settings, source="test")
    return [weight_factor(config, step) for step in steps]


def test_constant_never_changes():
    assert factors([0, 1, 10**9], kind="constant") == [1.0, 1.0, 1.0]


def test_stop_drops_the_term_at_its_step():
    assert factors([0, 99, 100, 101], kind="stop", end_step=100) == [1.0, 1.0, 0.0, 0.0]


def test_linear_and_cosine_fall_from_start_to_end():
    steps = [0, 100, 150, 175, 200, 500]
    settings = {"start_step": 100, "end_step": 200}
    assert factors(steps, kind="linear", **settings) == [1.0, 1.0, 0.5, 0.25, 0.0, 0.0]
    expected = [1.0, 1.0, 0.5, (1 + math.cos(0.75 * math.pi)) / 2, 0.0, 0.0]
    assert factors(steps, kind="cosine", **settings) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_every_schedule_starts_whole_never_rises_and_ends_at_nothing(kind):
    settings = {} if kind == "constant" else {"end_step": 40}
    values = factors(range(60), kind=kind, **settings)
    assert values[0] == 1.0
    assert all(later <= earlier for earlier, later in pairwise(values))
    assert values[40] == (1.0 if kind == "constant" else pytest.approx(0.0, abs=1e-15))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "linear"}, "needs end_step"),
        ({"kind": "constant", "end_step": 5}, "neither start_step nor end_step"),
        ({"kind": "stop", "start_step": 2, "end_step": 5}, "no start_step"),
        ({"kind": "cosine", "start_step": 5, "end_step": 5}, "is not before end_step"),
        ({"kind": "cosin"}, "did you mean 'cosine'"),
    ],
)
def test_faults_of_the_configuration(settings, message):
    with pytest.raises(ConfigError, match=message):
        validated(ScheduleConfig, settings, source="test")
