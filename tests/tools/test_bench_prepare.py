import importlib
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from places import ROOT

from srepa_ds.data.images import center_crop

TOOL = ROOT / "tools" / "bench_prepare.py"


@pytest.fixture
def tool(monkeypatch):
    """Imports a file next to the tool, as the tool does."""
    monkeypatch.syspath_prepend(TOOL.parent)
    return importlib.import_module


def test_the_reference_stores_the_same_pixels(tool, tmp_path):
    source = tool("prepare_images").write_photographs(tmp_path / "source", 5)
    tool("repa_preprocessing").preprocess(source, tmp_path / "out", 64)
    labels = json.loads((tmp_path / "out/images/dataset.json").read_text())["labels"]
    assert [label for _, label in labels] == [0, 1, 2, 3, 4]
    for path, (name, _) in zip(sorted(source.rglob("*.JPEG")), labels, strict=True):
        stored = np.asarray(Image.open(tmp_path / "out/images" / name))
        assert np.array_equal(stored, center_crop(Image.open(path), 64))


@pytest.mark.slow
def test_the_tool_writes_table_and_json(tmp_path):
    options = ["--images", "4", "--start", "2", "--size", "32", "--rounds", "1"]
    options += ["--pixels", "webp", "--output", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, TOOL, *options], check=True, capture_output=True, text=True, timeout=200
    )
    found = json.loads((tmp_path / "out/results.json").read_text())
    assert [(row["pixels"], row["ranks"]) for row in found["runs"]] == [
        ("REPA", 1), ("webp", 1), ("webp", 2),
    ]  # fmt: skip
    assert all(row["num_bytes"] > 0 for row in found["runs"])
    assert [one["name"] for one in found["storages"]] == ["raw", "png", "webp"]
    assert done.stdout.strip() == (tmp_path / "out/table.md").read_text().strip()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
