"""The table, the plot and the pictures of a sweep."""

from dataclasses import fields

import numpy as np
import pytest
import torch

from srepa_ds.evaluation.sweep_rows import SweepRow, best_first, deciding_score
from srepa_ds.metrics.scores import SMALLER_IS_BETTER, Scores
from srepa_ds.report.sweep import contact_strip, markdown, sweep_page
from srepa_ds.report.sweep_plot import draw_plot, plot_of


def row(distance: float, **changes) -> SweepRow:
    facts = {
        "weights": "ema",
        "solver": "heun",
        "num_steps": 50,
        "cfg_scale": 1.5,
        "interval": (0.0, 1.0),
        "scores": {"frechet_distance": distance, "inception_score": 200.0},
        "evaluations": 99,
        "seconds": 61.0,
        "digest": f"{distance}" * 10,
        "measured_with": {"num_images": 1000},
    }
    return SweepRow(**{**facts, **changes})


def test_the_table_has_the_names_of_each_extractor():
    further = {"dinov2-vit-b": {"frechet_distance": 80.25}}
    text = markdown([row(4.0), row(2.5, further_scores=further)], ["inception", "dinov2-vit-b"])
    head, _, best, other = text.splitlines()
    assert head == (
        "| weights | solver | steps | scale | interval | NFE | FID | IS | FD-dinov2-vit-b | time |"
    )
    assert best.startswith(
        "| **ema** | **heun** | **50** | **1.5** | **[0, 1]** | **99** | **2.5**"
    )
    assert other == "| ema | heun | 50 | 1.5 | [0, 1] | 99 | 4 | 200 |  | 1 min 1 s |"


def test_lines_differ_in_what_varies_beside_the_axis():
    rows = [
        row(9.0, cfg_scale=1.0),
        row(4.0, cfg_scale=2.0),
        row(5.0, cfg_scale=2.0, interval=(0.0, 0.7)),
        row(8.0, cfg_scale=1.0, weights="master"),
        row(6.0, cfg_scale=2.0, weights="master"),
    ]
    plot = plot_of(rows)
    assert plot.axis == "guidance scale"
    lines = {line.name: (line.places, line.scores) for line in plot.lines}
    # A point without guidance begins the lines of both intervals.
    assert lines == {
        "ema, guided in [0, 1]": ((1.0, 2.0), (9.0, 4.0)),
        "ema, guided in [0, 0.7]": ((1.0, 2.0), (9.0, 5.0)),
        "master, guided in [0, 1]": ((1.0, 2.0), (8.0, 6.0)),
        "master, guided in [0, 0.7]": ((1.0,), (8.0,)),
    }
    pngs = [draw_plot(plot, score="FID", theme=theme) for theme in ("light", "dark")]
    assert all(png.startswith(b"\x89PNG") for png in pngs)
    assert pngs[0] != pngs[1]


def test_steps_are_the_axis_if_the_scale_does_not_vary():
    plot = plot_of([row(4.0, num_steps=20), row(3.0, num_steps=10)])
    assert (plot.axis, plot.lines[0].places) == ("steps", (10, 20))
    assert plot_of([row(4.0), row(3.0, weights="master")]) is None


def test_the_page_escapes_what_it_shows_and_names_what_is_missing(tmp_path):
    rows = [row(4.0, weights="<script>"), row(3.0)]
    page = sweep_page(rows, ["inception"], folder=tmp_path / "run<1>" / "sweep")
    assert "<script>" not in page
    assert "<td>&lt;script&gt;</td>" in page
    assert "Sweep: run&lt;1&gt;" in page
    assert "No plot: neither the guidance scale nor the number of steps varies." in page
    assert "No images of ema, heun, 50 steps, scale 1.5" in page
    assert "2 points of 1,000 images each" in page


@pytest.mark.parametrize(("count", "shape"), [(3, (48, 144)), (8, (48, 384)), (11, (96, 384))])
def test_images_lie_in_rows_of_eight(count, shape):
    images = torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8)
    strip = np.asarray(contact_strip(images))
    assert strip.shape == (*shape, 3)
    top, left = divmod(count - 1, 8)
    tile = strip[48 * top : 48 * top + 48 : 3, 48 * left : 48 * left + 48 : 3]
    assert np.array_equal(tile, images[-1].permute(1, 2, 0).numpy())
    if count == 11:
        assert (strip[48:, 3 * 48 :] == 255).all()


def test_large_images_are_reduced():
    images = torch.zeros(16, 3, 512, 512, dtype=torch.uint8)
    assert contact_strip(images).size == (1024, 256)


@pytest.mark.parametrize(
    ("scores", "first", "name"),
    [
        (({"inception_score": 90.0}, {"inception_score": 200.0}), 1, "largest IS"),
        (
            ({"precision": 0.7, "recall": 0.1}, {"precision": 0.6, "recall": 0.9}),
            0,
            "largest precision",
        ),
        (({"kernel_distance": 0.2}, {"kernel_distance": 0.1}), 1, "smallest KID"),
        (
            ({"recall": 0.9, "frechet_distance": 3.0}, {"recall": 0.8, "frechet_distance": 2.0}),
            1,
            "smallest FID",
        ),
    ],
)
def test_points_are_ordered_by_the_first_score_in_its_direction(tmp_path, scores, first, name):
    rows = [row(0.0, scores=one, cfg_scale=2.0 + n) for n, one in enumerate(scores)]
    assert best_first(rows)[0] is rows[first]
    page = sweep_page(rows, ["inception"], folder=tmp_path / "run" / "sweep")
    assert f"The {name} is first." in page
    score = name.split()[1]
    assert f"{score} against guidance scale" in page
    assert f"<td><b>{rows[first].cfg_scale:g}</b></td>" in page
    field = deciding_score(rows)
    assert plot_of(rows).lines[0].scores == tuple(one[field] for one in scores)


def test_every_score_has_a_direction():
    assert list(SMALLER_IS_BETTER) == [field.name for field in fields(Scores)]
