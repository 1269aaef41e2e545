import math

import numpy as np
import pytest
import torch
from places import GOLDEN
from safetensors.torch import load_file

from srepa_ds.metrics import structure
from srepa_ds.metrics.structure import (
    correlation_decay_slope,
    local_distant_similarity,
    region_self_similarity,
    spatial_contrast,
)


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "structure_metrics.safetensors")


def assert_agrees(found, golden, name):
    close = {"rtol": 1e-5, "atol": 1e-5, "equal_nan": True}
    torch.testing.assert_close(found, golden[name], **close)
    if f"{name}.mean" in golden:
        torch.testing.assert_close(found.nanmean(), golden[f"{name}.mean"], **close)


def values(golden, settings):
    tokens, grid = golden["in.features"], tuple(golden["in.grid"].tolist())
    masks = golden["in.masks"].bool()
    far, dmax, near, negative, root = settings
    return {
        "lds": local_distant_similarity(tokens, grid, far_distance=far),
        "cds": correlation_decay_slope(tokens, grid, max_distance=dmax),
        "srss": region_self_similarity(
            tokens, masks, grid, near_distances=(1, near), far_distance=negative
        ),
        "rmsc": spatial_contrast(tokens, takes_root=root),
    }


@pytest.mark.parametrize(
    ("case", "settings"), [("default", (6, 8, 1, 6, True)), ("other", (4, 5, 2, 4, False))]
)
@pytest.mark.parametrize("held", [8_000_000, 5 * 256 * 7])
def test_agrees_with_the_reference_however_tokens_are_sliced(
    golden, monkeypatch, case, settings, held
):
    monkeypatch.setattr(structure, "_SLICE_ELEMENTS", held)
    for name, found in values(golden, settings).items():
        assert_agrees(found, golden, f"out.{case}.{name}")
    if case == "default":
        assert values(golden, settings)["srss"].isnan().tolist() == [False] * 3 + [True] * 2


def test_distances_beyond_the_grid_are_skipped(golden):
    tokens, grid = golden["in.features"], tuple(golden["in.grid"].tolist())
    assert_agrees(local_distant_similarity(tokens, grid, far_distance=99), golden, "out.lds_far99")
    assert_agrees(correlation_decay_slope(tokens, grid, max_distance=40), golden, "out.cds_dmax40")


@pytest.mark.parametrize("grid", [(3, 7), (9, 2), (1, 11), (12, 8)])
def test_agrees_with_plain_loops_on_oblong_grids(grid):
    height, width = grid
    number = height * width
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randn(2, number, 5, generator=generator) + 0.3
    masks = torch.rand(2, number, generator=generator) < 0.6

    def distance(i, j):
        return abs(i // width - j // width) + abs(i % width - j % width)

    def mean(found):
        return float(np.mean(found)) if found else math.nan

    expected = {"lds": [], "cds": [], "srss": []}
    for image, mask in zip(tokens.double(), masks, strict=True):
        unit = image / image.norm(dim=1, keepdim=True)
        gram = (unit @ unit.T).tolist()
        pairs = [(i, j, distance(i, j)) for i in range(number) for j in range(number)]
        near = mean([gram[i][j] for i, j, d in pairs if d == 1])
        far = [gram[i][j] for i, j, d in pairs if d >= 6]
        expected["lds"].append(near - (mean(far) if far else 0))
        present = [d for d in range(1, 9) if any(p[2] == d for p in pairs)]
        means = [mean([gram[i][j] for i, j, p in pairs if p == d]) for d in present]
        expected["cds"].append(-np.polyfit(present, means, 1)[0])
        scores = []
        for i in range(number):
            own = [gram[i][j] for j in range(number) if mask[j] and distance(i, j) == 1]
            other = [gram[i][j] for j in range(number) if not mask[j] and distance(i, j) >= 6]
            if mask[i] and own and other:
                scores.append(mean(own) - mean(other))
        expected["srss"].append(mean(scores))
    found = {
        "lds": local_distant_similarity(tokens, grid),
        "cds": correlation_decay_slope(tokens, grid),
        "srss": region_self_similarity(tokens, masks, grid),
    }
    for name, per_image in expected.items():
        np.testing.assert_allclose(found[name], per_image, rtol=1e-4, atol=1e-5)


def test_images_without_structure():
    alike = torch.ones(1, 16, 3)
    assert local_distant_similarity(alike, (4, 4)).item() == pytest.approx(0, abs=1e-6)
    assert correlation_decay_slope(alike, (4, 4)).item() == pytest.approx(0, abs=1e-6)
    assert spatial_contrast(alike).item() == pytest.approx(0, abs=1e-6)
    # A single token has no neighbour.
    assert local_distant_similarity(alike[:, :1], (1, 1)).isnan().all()
    assert correlation_decay_slope(alike[:, :2], (1, 2)).isnan().all()


@pytest.mark.parametrize("inside", [0, 1, 64])
def test_regions_that_are_missing_give_no_value(inside):
    tokens = torch.randn(1, 64, 4, generator=torch.Generator().manual_seed(0))
    masks = (torch.arange(64) < inside)[None]
    found = region_self_similarity(tokens, masks, (8, 8), near_distances=(0, 1))
    assert found.isnan().all()


def test_tokens_that_do_not_fill_the_grid_are_refused():
    with pytest.raises(ValueError, match="grid of 3 x 5"):
        local_distant_similarity(torch.ones(1, 16, 2), (3, 5))
