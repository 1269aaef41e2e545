"""Six AdamW steps through the real engine against the reference trainer's numbers."""

import pytest
import torch
from places import GOLDEN, ROOT
from ranks import run_worker
from safetensors.torch import load_file

# Columns of the log: flow, pointwise, structural, total, gradient norm. The reference also logs
# terms it does not train on.
TRAINED_COLUMNS = {
    "sit": [0, 3, 4],
    "repa": [0, 1, 3, 4],
    "srepa_mse": [0, 1, 2, 3, 4],
    "srepa_kl": [0, 1, 2, 3, 4],
}
MODES = tuple(TRAINED_COLUMNS)


QUICK = [(0, 1), (2, 2)]
SLOW = [pytest.param(pair, marks=pytest.mark.slow) for pair in [(0, 2), (1, 2), (3, 2)]]


@pytest.fixture(scope="module", params=QUICK + SLOW, ids=str)
def trajectory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    stage, world_size = request.param
    output = tmp_path_factory.mktemp("trajectory") / "result.safetensors"
    run_worker("trajectory", world_size, ROOT / f"ds_configs/zero{stage}.json", output)
    return load_file(output)


@pytest.mark.parametrize("mode", MODES)
def test_losses_and_gradient_norms(trajectory, mode):
    expected = load_file(GOLDEN / "trajectory.safetensors")[f"{mode}.log"]
    columns = TRAINED_COLUMNS[mode]
    found = trajectory[f"{mode}.log"]
    torch.testing.assert_close(found[:, columns], expected[:, columns], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["param", "ema"])
def test_final_weights(trajectory, mode, kind):
    expected = load_file(GOLDEN / "trajectory.safetensors")
    compared = 0
    for key, value in expected.items():
        if key.startswith(f"{mode}.{kind}.") and key in trajectory:
            difference = (trajectory[key] - value).norm() / value.norm()
            assert difference < 1e-4, f"{key}: {difference:.2e}"
            compared += 1
    assert compared == (6 if mode == "sit" else 7)
