import subprocess
import sys

import numpy as np
import pytest
from places import ROOT

TOOL = ROOT / "tools" / "bench_evaluate.py"


@pytest.mark.slow
def test_scores_and_the_memory_are_printed(tmp_path):
    sizes = ("--images", "110", "--reference", "101", "--size", "20", "--folder", str(tmp_path))
    metrics = ("--metrics", "inception_score", "precision_recall")
    command = [sys.executable, str(TOOL), *sizes, *metrics]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    for word in ("110 images of 20 px", "inception_score ", "recall ", "gb at most"):
        assert word in said
    assert list(tmp_path.iterdir()) == []


def test_made_up_images_are_read_as_any_others(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(TOOL.parent)
    import bench_evaluate

    bench_evaluate.write_images(tmp_path / "samples.npz", 503, 12, seed=0)
    with np.load(tmp_path / "samples.npz") as archive:
        images = archive["arr_0"]
    assert images.shape == (503, 12, 12, 3)
    assert images.dtype == np.uint8
    assert len({image.tobytes() for image in images}) == 503
