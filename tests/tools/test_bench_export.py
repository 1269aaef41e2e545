import subprocess
import sys

import pytest
import torch
from places import ROOT

from srepa_ds.checkpoint.folder import newest_valid
from srepa_ds.checkpoint.reader import CheckpointReader
from srepa_ds.config.experiment import load_config

TOOL = ROOT / "tools" / "bench_export.py"


@pytest.mark.slow
def test_time_and_memory_are_printed_and_nothing_is_left(tmp_path):
    command = [sys.executable, str(TOOL), str(tmp_path / "bench"), "--variant", "SiT-Ti/2"]
    said = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    for words in ("SiT-Ti/2: a checkpoint of 0.", "export srepa_ds: ", "export repa: ", "RssAnon"):
        assert words in said
    assert "failed" not in said.split("import")[0]
    assert list(tmp_path.iterdir()) == []


def test_its_checkpoint_is_whole(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(TOOL.parent)
    import bench_export

    changes = [f"run.folder={tmp_path}", "model.variant=SiT-Ti/2", "model.depth=1"]
    config = load_config(ROOT / bench_export.CONFIG, [*changes, "alignments.0.depth=1"])
    size = bench_export.write_checkpoint(config)
    folder = newest_valid(config.run_folder.checkpoints)
    assert size == sum(
        path.stat().st_size for path in folder.iterdir() if path.name != "manifest.json"
    )
    reader = CheckpointReader(folder)
    assert reader.kinds() == ["ema", "exp_avg", "exp_avg_sq", "master"]
    for name in reader.names("master"):
        masters, averages = (reader.tensor(kind, name) for kind in ("master", "ema"))
        assert masters.shape == reader.shape(name)
        assert not torch.equal(masters, averages)
