"""The transformer as diffusers loads it: the first SiT's names, numbers and conventions."""

import copy
import json

import pytest
import torch
from golden_sit import golden_weights
from places import GOLDEN
from safetensors.torch import load_file, save_file

from srepa_ds.errors import CheckpointError, ConfigError
from srepa_ds.pipeline import SiTTransformer2DModel

SIZES = {
    "input_size": 8,
    "hidden_size": 64,
    "depth": 3,
    "num_heads": 4,
    "num_classes": 10,
}


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "sit_original.safetensors")


@pytest.fixture(scope="module")
def model() -> SiTTransformer2DModel:
    """The first SiT's tiny model, with a learned sigma."""
    built = SiTTransformer2DModel(**SIZES)
    built.load_state_dict(golden_weights("sit_original"))
    return built.eval()


def arguments(golden):
    return golden["in.x"], golden["in.t"], golden["in.y"]


def test_velocity_is_that_of_the_first_sit(model, golden):
    with torch.no_grad():
        found = model(*arguments(golden)).sample
    assert found.shape == golden["in.x"].shape
    torch.testing.assert_close(found, golden["out.v"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, golden["out.full"][:, :4], rtol=1e-5, atol=1e-5)


def test_names_are_the_first_sits_and_only_they(model):
    assert model.state_dict().keys() == golden_weights("sit_original").keys()
    assert next(iter(model.state_dict())) == "pos_embed"
    assert SiTTransformer2DModel(**SIZES, learn_sigma=False).state_dict().keys() == (
        model.state_dict().keys()
    )


def test_one_time_for_all_and_a_tuple(model, golden):
    x, _, y = arguments(golden)
    with torch.no_grad():
        alone = model(x, 0.25, y, return_dict=False)
        each = model(x, torch.full((len(x),), 0.25), y, return_dict=False)
    assert isinstance(alone, tuple)
    assert torch.equal(alone[0], each[0])
    with torch.no_grad():
        assert torch.equal(model(x, torch.tensor(1), y).sample, model(x, 1.0, y).sample)


@pytest.mark.parametrize("max_shard_size", ["10GB", "100KB"])
def test_saved_and_loaded(model, golden, tmp_path, max_shard_size):
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    is_sharded = (tmp_path / "diffusion_pytorch_model.safetensors.index.json").exists()
    assert is_sharded == (max_shard_size == "100KB")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["_class_name"] == "SiTTransformer2DModel"
    assert config["learn_sigma"] is True
    assert config["mlp_ratio"] == 4.0
    loaded = SiTTransformer2DModel.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    with torch.no_grad():
        assert torch.equal(loaded(*arguments(golden)).sample, model(*arguments(golden)).sample)


def test_half_precision_keeps_the_positions(model, golden, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = SiTTransformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    dtypes = {name: value.dtype for name, value in loaded.state_dict().items()}
    assert dtypes.pop("pos_embed") == torch.float32
    assert set(dtypes.values()) == {torch.bfloat16}
    with torch.no_grad():
        found = loaded(*arguments(golden)).sample
        half = loaded(golden["in.x"].bfloat16(), *arguments(golden)[1:]).sample
    assert found.dtype == torch.float32
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(found, golden["out.v"], rtol=0.05, atol=0.05)


def test_gradient_checkpointing_changes_no_gradient(model, golden):
    gradients = []
    for recomputed in (False, True):
        one = copy.deepcopy(model)
        if recomputed:
            one.enable_gradient_checkpointing()
        assert one.is_gradient_checkpointing == recomputed
        sample = one(*arguments(golden)).sample
        sample.square().mean().backward()
        gradients.append(one.blocks[0].attn.qkv.weight.grad)
        kept = {kept for kept in one._sit[0]._kept}
        assert kept == ({"nothing"} if recomputed else {"everything"})
    assert torch.equal(*gradients)


def test_a_copy_is_a_model_of_its_own(model, golden):
    other = copy.deepcopy(model).double()
    assert other.pos_embed.dtype == torch.float64
    assert model.pos_embed.dtype == torch.float32
    with torch.no_grad():
        other.pos_embed.zero_()
        assert not torch.equal(
            other(golden["in.x"].double(), golden["in.t"], golden["in.y"]).sample.float(),
            model(*arguments(golden)).sample,
        )


def test_without_dropout_there_is_no_null_label():
    built = SiTTransformer2DModel(**SIZES, class_dropout_prob=0.0)
    assert len(built.y_embedder.embedding_table.weight) == 10
    assert built.null_label is None
    assert SiTTransformer2DModel(**SIZES).null_label == 10


@pytest.mark.parametrize(("change", "says"), [
    ({"mlp_ratio": 2.0}, "mlp_ratio: 2.0 is not supported"),
    ({"hidden_size": 66}, "divided among 4 heads"),
    ({"patch_size": 3}, "cannot be cut into patches of 3"),
    ({"depth": 0}, "depth"),
])  # fmt: skip
def test_sizes_that_cannot_be_are_refused(change, says):
    with pytest.raises(ConfigError, match=says):
        SiTTransformer2DModel(**{**SIZES, **change})


@pytest.mark.parametrize(("edit", "says"), [
    (lambda w: w.pop("blocks.0.mlp.fc1.bias"), r"it lacks blocks\.0\.mlp\.fc1\.bias"),
    (
        lambda w: w.update({"blocks.0.attn.q_norm.weight": torch.ones(16)}),
        r"the model has no blocks\.0\.attn\.q_norm\.weight",
    ),
])  # fmt: skip
def test_weights_of_another_model_are_refused(model, tmp_path, edit, says):
    model.save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    edit(weights)
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=says):
        SiTTransformer2DModel.from_pretrained(tmp_path)
