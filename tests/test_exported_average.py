"""The exported average is the unsharded one, whatever ZeRO stage and number of ranks trained it.

`workers/exported_average.py` trains and exports; here it is judged.
"""

from pathlib import Path

import pytest
from builders import distance, write_shards
from ranks import run_worker
from safetensors.torch import load_file

QUICK = [(2, "1", "3")]
SLOW = [
    pytest.param(case, marks=pytest.mark.slow)
    for case in [(1, "0", "1", "2", "3"), (2, "0", "2"), (4, "0", "1", "2", "3")]
]


@pytest.fixture(params=QUICK + SLOW, ids=str)
def runs(request: pytest.FixtureRequest, tmp_path: Path) -> list[Path]:
    """Folders of runs that were trained under each stage, and exported."""
    world_size, *stages = request.param
    write_shards(tmp_path / "shards", num_samples=23, size=(4, 4), num_classes=6)
    run_worker("exported_average", world_size, tmp_path, *stages)
    return [tmp_path / f"{world_size}-{stage}" for stage in stages]


@pytest.mark.timeout(600)
def test_it_is_the_average_of_the_masters_after_each_step(runs):
    for run in runs:
        found = load_file(run / "export" / "model.safetensors")
        expected = load_file(run / "average.safetensors")
        assert found.keys() == expected.keys() | {"pos_embed"}
        for name, value in expected.items():
            assert value.isfinite().all()
            assert distance(found[name], value) < 1e-6, (run.name, name)
