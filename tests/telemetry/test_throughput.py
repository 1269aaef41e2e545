import pytest
import torch

from srepa_ds.model.flops import training_flops
from srepa_ds.model.variants import SiTConfig
from srepa_ds.telemetry.throughput import peak_tflops, throughput

XL = SiTConfig(variant="SiT-XL/2", input_size=32, in_channels=4, num_classes=1000)
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989.0),
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_peaks_are_found_by_the_devices_own_name(name, peak):
    assert peak_tflops(name) == peak


def test_operations_are_those_of_all_images_shared_by_the_ranks():
    found = throughput(XL, images_per_second=2044.0, world_size=8, device=CPU)
    assert found["tflops_per_rank"] == pytest.approx(2044 * training_flops(XL) / 8e12)
    assert "mfu" not in found
