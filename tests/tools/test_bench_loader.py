import importlib
import subprocess
import sys

import pytest
import torch
from places import ROOT

TOOL = ROOT / "tools" / "bench_loader.py"


@pytest.fixture
def tool(monkeypatch):
    """Imports a file next to the tool, as the tool does."""
    monkeypatch.syspath_prepend(TOOL.parent)
    return importlib.import_module


def test_both_layouts_hold_the_same_samples(tool, tmp_path):
    case = tool("loader_case")
    tool("loader_data").write(tmp_path, size=32, samples=5, storages=["webp", "raw"])
    theirs = case.OneFilePerImage(tmp_path / "repa", has_images=True)
    for storage in ("webp", "raw"):
        ours = case.ShardDataset(tmp_path / storage).read(torch.arange(5))
        for number in range(5):
            pixels, moments, label = theirs[number]
            assert torch.equal(ours.images[number], pixels)
            assert torch.equal(ours.moments[number], moments)
            assert ours.labels[number] == label
    moments, label = case.OneFilePerImage(tmp_path / "repa", has_images=False)[3]
    assert (tuple(moments.shape), int(label)) == ((8, 4, 4), 3)


def test_the_photographs_parts_differ(tool):
    pixels_of = tool("loader_data").pixels_of
    parts = {pixels_of(number, 64).tobytes() for number in range(12)}
    assert len(parts) == 12


@pytest.mark.slow
def test_the_tool_prints_a_row_for_each_case(tmp_path):
    options = ["--sizes", "16", "--samples", "700", "--seconds", "0.2", "--rounds", "1"]
    options += ["--workers", "1", "--output", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", TOOL, *options],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines()[2:] if line]
    # Two parts, warm and cold, by two readers; and raw pixels warm and cold.
    assert len(rows) == 2 * 2 * 2 + 2
    for row in rows:
        assert float(row[5].replace(",", "")) > 0
        if row[4] == "repa":
            assert row[6] == row[8] == "1.00x"
    assert (tmp_path / "table.md").read_text() in done.stdout
