import io

import matplotlib
import numpy as np
import pytest
from PIL import Image

from srepa_ds.report.curves import THEMES, Curve, curves_of, draw, panel


def lines(count=8, **values):
    names = values.items()
    return [{"step": 10.0 * n, **{k: float(v(n)) for k, v in names}} for n in range(1, count + 1)]


def test_terms_that_a_run_does_not_have_are_left_out():
    found = curves_of(
        lines(
            loss_total=lambda n: 3 / n,
            loss_flow=lambda n: 2 / n,
            loss_pointwise=lambda n: -0.1 * n,
            loss_structural=lambda n: 0.0,
            gradient_norm=lambda n: n,
            skipped=lambda n: 0.0,
        )
    )
    titles = [curve.title.split(" (")[0] for curve in found]
    assert titles == [
        "total loss",
        "flow matching",
        "point-wise",
        "gradient norm before clipping",
    ]
    assert found[0].steps == tuple(range(10, 81, 10))
    assert found[2].values == tuple(-0.1 * n for n in range(1, 9))


def test_the_total_of_one_term_is_not_shown_twice():
    found = curves_of(lines(loss_total=lambda n: n, loss_flow=lambda n: n, loss_cls=lambda n: 0.0))
    assert [curve.title for curve in found] == ["flow matching"]


def test_a_term_of_another_day_is_shown_by_its_name():
    found = curves_of(lines(loss_class_token=lambda n: n, loss_flow=lambda n: n))
    assert [curve.title for curve in found] == ["flow matching", "class token"]


def test_steps_without_a_value_are_skipped():
    record = [
        {"step": 1.0, "gradient_norm": 2.0},
        {"step": 2.0},
        {"step": 3.0, "gradient_norm": 4.0},
    ]
    (curve,) = curves_of(record)
    assert (curve.steps, curve.values) == ((1, 3), (2.0, 4.0))


def opaque(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))[..., 3] > 0


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize(
    "values",
    [[1.0], [3.0, 3.0], [-1.0, 5.0], [1e-9, 1e3], [0.0, 100.0], np.linspace(9, 1, 300).tolist()],
    ids=["point", "flat", "negative", "wide", "from zero", "smoothed"],
)
def test_any_values_are_drawn_on_a_transparent_ground(values, theme):
    before = dict(matplotlib.rcParams)
    drawn = opaque(draw(Curve("x", range(len(values)), values), THEMES[theme]))
    assert drawn.any()
    assert drawn.mean() < 0.5
    assert dict(matplotlib.rcParams) == before


def test_values_far_apart_are_on_a_logarithmic_axis():
    exponential = draw(Curve("x", range(5), [10.0**-k for k in range(5)]), THEMES["light"])
    straight = draw(Curve("x", range(5), [5.0 - k / 2 for k in range(5)]), THEMES["light"])
    # Both lines fall straight through the picture: half way along they are half way down.
    for png in (exponential, straight):
        picture = np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))
        is_line = (picture[..., 3] > 128) & (picture[..., 2] > picture[..., 0] + 100.0)
        rows, columns = np.nonzero(is_line)
        middle = rows[abs(columns - (columns.min() + columns.max()) / 2) < 3].mean()
        assert abs(middle - (rows.min() + rows.max()) / 2) < 6


def test_a_panel_names_its_last_value():
    assert "<b>0.25</b>" in panel(Curve("flow <matching>", [1, 2], [1.0, 0.25]))
    assert "flow &lt;matching&gt;" in panel(Curve("flow <matching>", [1, 2], [1.0, 0.25]))
