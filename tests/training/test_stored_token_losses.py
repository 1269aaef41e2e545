"""The losses with stored tokens, and the guide's numbers about them."""

import re

import pytest
import torch
import yaml
from places import ROOT

from srepa_ds.alignment.gram import structural_kl, structural_mse
from srepa_ds.alignment.losses import pointwise_cosine
from srepa_ds.config.experiment import load_config
from srepa_ds.data.stored_tokens import as_stored
from srepa_ds.data.token_index import TokenDescription
from srepa_ds.encoders.teacher import Teacher, TeacherSpec, build_encoder

LOSSES = {
    "mse": lambda student, teacher: structural_mse(student, teacher, algorithm="dense"),
    "kl": lambda student, teacher: structural_kl(student, teacher, algorithm="dense"),
    "cosine": pointwise_cosine,
}

# The numbers of docs/stored-tokens.md: the teacher's part in the student, the loss and its value,
# and for bf16 and int8 the change of that value and the relative change of its gradient.
# Random weights differ between versions of timm, and with them the loss by a quarter.
MEASURED = [
    (0.0, "mse", 0.2475, (1.8e-6, 1.5e-4), (2.9e-5, 6.7e-4)),
    (0.0, "kl", 1.135, (4.8e-6, 2.6e-4), (4.5e-5, 1.2e-3)),
    (0.0, "cosine", -0.0014, (8.7e-7, 1.7e-3), (1.0e-5, 7.6e-3)),
    (0.5, "mse", 0.0621, (1.1e-6, 2.6e-4), (1.5e-5, 1.1e-3)),
    (0.5, "kl", 0.1947, (3.3e-6, 4.5e-4), (2.6e-5, 2.0e-3)),
    (0.5, "cosine", -0.7080, (3.6e-7, 2.4e-3), (2.8e-5, 1.1e-2)),
]


@pytest.fixture(scope="module")
def live() -> torch.Tensor:
    """Tokens of two blocks of DINOv2-B with random weights, for smooth random images."""
    spec = TeacherSpec(
        architecture="vit_base_patch14_dinov2.lvd142m",
        arguments={"depth": 2},
        width=768,
        patch_size=14,
        input_size_per_256=224,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        # timm draws random weights from the global generator, which build_encoder restores.
        encoder = build_encoder(spec, resolution=256)
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(2, 3, 8, 8, generator=generator) * 255
    images = torch.nn.functional.interpolate(coarse, size=(256, 256), mode="bilinear").byte()
    return Teacher(encoder, spec, resolution=256, dtype=torch.float32).tokens(images).patches


def value_and_gradient(loss, student, teacher):
    leaf = student.clone().requires_grad_()
    value = loss(leaf, teacher)
    return value.item(), torch.autograd.grad(value, leaf)[0]


@pytest.mark.parametrize(
    ("part", "name", "value", "bf16", "int8"), MEASURED, ids=lambda x: str(x).replace(" ", "")
)
def test_losses_hardly_see_that_tokens_were_stored(live, part, name, value, bf16, int8):
    noise = torch.randn(live.shape, generator=torch.Generator().manual_seed(2)) * live.std()
    student = part * live + (1 - part) * noise
    exact, gradient = value_and_gradient(LOSSES[name], student, live)
    assert exact == pytest.approx(value, rel=0.4, abs=3e-3)
    for storage, (value_change, gradient_change) in (("bf16", bf16), ("int8", int8)):
        stored = as_stored(live, None, storage=storage).patches_float32()
        found, other = value_and_gradient(LOSSES[name], student, stored)
        # Changes below the second number are the rounding of a float32 loss.
        assert abs(found - exact) <= max(5 * value_change, 1e-5)
        change = ((other - gradient).norm() / gradient.norm()).item()
        # Bounded from both sides, so that the documentation stays true.
        assert gradient_change / 2 <= change <= 2 * gradient_change


GUIDE = (ROOT / "docs" / "stored-tokens.md").read_text(encoding="utf-8")


def test_the_guide_shows_a_valid_experiment(small_world, tmp_path):
    (shown,) = re.findall(r"```yaml\n(.*?)```", GUIDE, re.DOTALL)
    model = {"variant": "SiT-B/2", "input_size": 32, "in_channels": 4, "num_classes": 1000}
    small = yaml.safe_load(small_world.config.read_text())
    tree = {**small, "model": model, **yaml.safe_load(shown)}
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(tree))
    assert load_config(tmp_path / "experiment.yaml").alignments[0].stored_tokens == "int8"


def test_the_guide_tells_the_sizes_that_are_announced():
    rows = re.findall(r"\| (\d+) \| \d+ px \| (\d+) \| ([\d,]+) GB \| ([\d,]+) GB \|", GUIDE)
    assert len(rows) == 4
    images, per_shard = 1_281_167, 10_000
    for width, num_tokens, *sizes in rows:
        for storage, size in zip(("bf16", "int8"), sizes, strict=True):
            described = TokenDescription(
                dataset_id="0" * 16,
                teacher={},
                storage=storage,
                grid=(int(num_tokens), 1),
                width=int(width),
                has_cls=True,
            )
            counts = (*[per_shard] * (images // per_shard), images % per_shard)
            total = sum(described.file_bytes(count, shard_sha256="0" * 64) for count in counts)
            assert f"{total / 1e9:,.0f}" == size


def test_the_guide_tells_the_differences_that_are_tested():
    rows = re.findall(r"^\| (?:noise|half) \| [^|]+ \| (.*) \|$", GUIDE, re.MULTILINE)
    told = [[float(cell.removesuffix(" %")) for cell in row.split(" | ")] for row in rows]
    measured = [
        [value, bf16[0], int8[0], 100 * bf16[1], 100 * int8[1]]
        for _, _, value, bf16, int8 in MEASURED
    ]
    for row, expected in zip(told, measured, strict=True):
        assert row == pytest.approx(expected)
