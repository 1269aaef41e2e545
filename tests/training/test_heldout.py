"""The held-out flow loss against its definition: any batch size, with and without class token."""

import pytest
import torch
from builders import TEACHER, write_shards, write_teacher

from srepa_ds.codec.identity import IdentityCodec
from srepa_ds.config.sections import MonitorConfig
from srepa_ds.data.shards import ShardDataset
from srepa_ds.distributed.ranks import Rank
from srepa_ds.encoders.teacher import TeacherConfig, TeacherSpec, load_teacher
from srepa_ds.errors import DataError
from srepa_ds.interpolant import INTERPOLANTS
from srepa_ds.model.sit import SiTOutput
from srepa_ds.model.variants import SiTConfig
from srepa_ds.training.heldout import HeldoutLoss

MODEL = {"variant": "SiT-Ti/2", "input_size": 16, "in_channels": 3, "num_classes": 10}


class Zero:
    """Predicts no movement, and keeps what it was asked."""

    config = SiTConfig(**MODEL)

    def __init__(self):
        self.asked = []

    def __call__(self, x_t, t, labels, *, cls_t=None):
        self.asked.append((x_t, t, labels, cls_t))
        return SiTOutput(velocity=torch.zeros_like(x_t), hidden=())

    def all(self, number):
        return torch.cat([asked[number] for asked in self.asked])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("heldout") / "shards"
    write_shards(folder, num_samples=50)
    return folder


def loss_of(folder, *, teacher=None, path="linear", **settings) -> HeldoutLoss:
    width = {} if teacher is None else {"class_token_width": teacher.width}
    return HeldoutLoss(
        MonitorConfig(heldout=folder, heldout_every_steps=1, **settings),
        folder,
        model=SiTConfig(**{**MODEL, **width}),
        codec=IdentityCodec(),
        interpolant=INTERPOLANTS[path],
        teacher=teacher,
        rank=Rank(0, 1, torch.device("cpu")),
    )


def test_it_is_the_mean_squared_velocity_of_a_model_that_predicts_none(folder):
    model = Zero()
    found = loss_of(folder, heldout_batch_size=50).measure(model)
    images = ShardDataset(folder).read(torch.arange(50)).pixels.double() / 127.5 - 1
    x_t, t = model.all(0).double(), model.all(1).double()[:, None, None, None]
    noise = (x_t - (1 - t) * images) / t
    assert found == pytest.approx(float((noise - images).square().mean()), rel=1e-4)
    assert abs(float(noise.mean())) < 0.02
    assert abs(float(noise.std()) - 1) < 0.02


def test_times_cover_the_unit_interval_evenly(folder):
    model = Zero()
    loss_of(folder, heldout_batch_size=50).measure(model)
    times = model.all(1)
    assert torch.allclose(times.sort().values, (torch.arange(50) + 0.5) / 50)
    assert not torch.equal(times, times.sort().values)


@pytest.mark.parametrize("size", [1, 7, 32, 64])
def test_it_does_not_depend_on_the_batch(folder, size):
    expected = loss_of(folder, heldout_batch_size=50).measure(Zero())
    assert loss_of(folder, heldout_batch_size=size).measure(Zero()) == pytest.approx(expected)


def test_fewer_samples_are_spread_over_the_data(folder):
    model = Zero()
    loss_of(folder, num_heldout=10, heldout_batch_size=10).measure(model)
    labels = ShardDataset(folder).labels
    assert model.all(2).tolist() == labels[torch.arange(10) * 5].tolist()


def test_it_is_the_same_every_time(folder):
    loss = loss_of(folder)
    first, second = Zero(), Zero()
    assert loss.measure(first) == loss.measure(second)
    assert torch.equal(first.all(0), second.all(0))


def test_a_class_token_is_noised_at_the_same_time(folder, tmp_path):
    write_teacher(tmp_path / "teacher.safetensors")
    config = TeacherConfig(
        spec=TeacherSpec(**TEACHER), weights=tmp_path / "teacher.safetensors", dtype="fp32"
    )
    teacher = load_teacher(config, resolution=(16, 16), device="cpu")
    model = Zero()
    loss_of(folder, teacher=teacher, heldout_batch_size=50).measure(model)
    t, cls_t = model.all(1)[:, None], model.all(3)
    clean = teacher.tokens(ShardDataset(folder).read(torch.arange(50)).pixels).cls
    noise = (cls_t - (1 - t) * clean) / t
    assert abs(float(noise.std()) - 1) < 0.1


def test_data_that_do_not_fit_the_model_are_refused(tmp_path):
    write_shards(tmp_path / "other", num_samples=5, size=(8, 8))
    with pytest.raises(DataError, match=r"gives latents of shape \(3, 8, 8\) in 10 classes"):
        loss_of(tmp_path / "other")
