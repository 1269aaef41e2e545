import json

import pytest
import torch
from builders import randomised
from golden_sit import golden_reg_sit, golden_sit

from srepa_ds.codec.identity import IdentityCodec
from srepa_ds.errors import ConfigError
from srepa_ds.interpolant import INTERPOLANTS
from srepa_ds.model.sit import SiT
from srepa_ds.model.variants import SiTConfig
from srepa_ds.noise import NoiseStream, normal
from srepa_ds.sampling.config import SamplerConfig
from srepa_ds.sampling.generate import (
    draw_labels,
    even_chunks,
    generate,
    plan_chunks,
)
from srepa_ds.sampling.guidance import GuidedModel
from srepa_ds.sampling.solvers import SOLVERS, Dynamics, integrate
from srepa_ds.schema import to_tree, validated

CONFIG = SamplerConfig(num_steps=3, num_samples=11, batch_size=4, cfg_scale=1.5, seed=7)


@pytest.fixture(scope="module")
def model():
    return model_with(class_token_width=None)


@pytest.fixture(scope="module")
def reg_model():
    return model_with(class_token_width=7)


def model_with(*, class_token_width):
    sit = SiT(
        SiTConfig(
            variant="SiT-S/2",
            input_size=(6, 4),
            in_channels=3,
            num_classes=5,
            class_token_width=class_token_width,
            depth=2,
            hidden_size=32,
            num_heads=2,
        ),
        torch.Generator().manual_seed(0),
    )
    # Zero gates would make every image its noise; labels have to count.
    randomised(sit, seed=1, scale=0.1)
    with torch.no_grad():
        if class_token_width is not None:
            # One token among seven would hardly be seen in the pixels.
            sit.wg_norm.weight.fill_(3.0)
            for block in sit.blocks:
                block.attn.proj.weight.mul_(5)
    return sit


def images_of(model, config, *, world_size=1, chunks=None, path="linear"):
    found = {}
    for rank in range(world_size):
        mine = plan_chunks(config)[rank::world_size] if chunks is None else chunks
        for batch in generate(
            model, IdentityCodec(), INTERPOLANTS[path], config, chunks=mine, device="cpu"
        ):
            assert batch.sample_ids.tolist() == list(range(batch.chunk.start, batch.chunk.stop))
            for number, image, label in zip(
                batch.sample_ids.tolist(), batch.images, batch.labels.tolist(), strict=True
            ):
                assert number not in found
                found[number] = (image, label)
    return found


@pytest.mark.parametrize("solver", SOLVERS)
def test_any_number_of_ranks_draws_the_same_images(model, solver):
    config = CONFIG.model_copy(update={"solver": solver})
    alone = images_of(model, config)
    assert sorted(alone) == list(range(11))
    assert alone[0][0].shape == (6, 4, 3)
    assert alone[0][0].dtype == torch.uint8
    for world_size in (2, 3, 11):
        shared = images_of(model, config, world_size=world_size)
        assert sorted(shared) == sorted(alone)
        for number, (image, label) in alone.items():
            assert torch.equal(image, shared[number][0])
            assert label == shared[number][1]


@pytest.mark.parametrize("solver", SOLVERS)
def test_any_number_of_ranks_draws_the_same_images_with_a_class_token(reg_model, solver):
    config = CONFIG.model_copy(update={"solver": solver, "cls_cfg_scale": 1.3})
    alone = images_of(reg_model, config)
    assert 20 < torch.stack([image for image, _ in alone.values()]).float().std() < 120
    shared = images_of(reg_model, config, world_size=2)
    assert sorted(shared) == sorted(alone)
    assert all(torch.equal(image, shared[number][0]) for number, (image, _) in alone.items())


def test_one_chunk_or_two_draw_the_same_images_with_a_class_token(reg_model):
    one, two = (CONFIG.model_copy(update={"batch_size": size}) for size in (12, 6))
    together, apart = images_of(reg_model, one), images_of(reg_model, two)
    for number, (image, label) in together.items():
        assert label == apart[number][1]
        # Another batch size may round otherwise.
        assert (image.int() - apart[number][0].int()).abs().max() <= 1


def test_the_class_tokens_guidance_reaches_the_pixels(reg_model):
    plain = images_of(reg_model, CONFIG)
    guided = images_of(reg_model, CONFIG.model_copy(update={"cls_cfg_scale": 60.0}))
    assert max((guided[i][0].int() - plain[i][0].int()).abs().max() for i in plain) > 3


@pytest.mark.parametrize("cfg_scale", [1.0, 1.5])
@pytest.mark.parametrize("solver", SOLVERS)
@torch.no_grad()
def test_without_a_class_token_the_state_is_the_image_and_nothing_else(model, solver, cfg_scale):
    config = CONFIG.model_copy(update={"solver": solver, "cfg_scale": cfg_scale})
    ids = torch.arange(4)

    def step_noise(step):
        return normal(7, NoiseStream.SAMPLE_STEP, ids, (3, 6, 4), draw=step, dtype=torch.float64)

    guided = GuidedModel(
        lambda x_t, t, labels: model(x_t, t, labels).velocity,
        draw_labels(config, ids, num_classes=5),
        null_label=5,
        guidance=config.guidance,
    )
    latents = integrate(
        Dynamics(guided, INTERPOLANTS["linear"].score, step_noise),
        normal(7, NoiseStream.SAMPLE_START, ids, (3, 6, 4)),
        solver=solver,
        num_steps=3,
    )
    expected = IdentityCodec().decode(latents.float())
    found = images_of(model, config, chunks=plan_chunks(config)[:1])
    assert all(torch.equal(found[number][0], expected[number]) for number in range(4))


@torch.no_grad()
def test_a_class_token_starts_and_moves_by_noise_of_its_own(reg_model):
    config = CONFIG.model_copy(update={"cls_cfg_scale": 2.5})
    ids = torch.arange(4)

    def draw(image, cls, **options):
        parts = normal(7, image, ids, (72,), **options), normal(7, cls, ids, (7,), **options)
        return torch.cat(parts, dim=1)

    def step_noise(step):
        streams = NoiseStream.SAMPLE_STEP, NoiseStream.SAMPLE_CLS_STEP
        return draw(*streams, draw=step, dtype=torch.float64)

    def velocity(state, t, labels):
        image, cls_t = state[:, :72].reshape(-1, 3, 6, 4), state[:, 72:]
        output = reg_model(image, t, labels, cls_t=cls_t)
        return torch.cat((output.velocity.flatten(1), output.cls_velocity), dim=1)

    scales = torch.tensor([1.5] * 72 + [2.5] * 7, dtype=torch.float64)
    labels = draw_labels(config, ids, num_classes=5)
    guided = GuidedModel(velocity, labels, 5, config.guidance, scales=scales)
    state = integrate(
        Dynamics(guided, INTERPOLANTS["linear"].score, step_noise),
        draw(NoiseStream.SAMPLE_START, NoiseStream.SAMPLE_CLS_START),
        solver="euler_maruyama",
        num_steps=3,
    )
    expected = IdentityCodec().decode(state[:, :72].reshape(-1, 3, 6, 4).float())
    found = images_of(reg_model, config, chunks=plan_chunks(config)[:1])
    for number in range(4):
        assert (found[number][0].int() - expected[number].int()).abs().max() <= 1


def test_images_differ_from_each_other_and_between_seeds(model):
    first = images_of(model, CONFIG)
    other = images_of(model, CONFIG.model_copy(update={"seed": 8}))
    assert not torch.equal(first[0][0], first[1][0])
    assert not torch.equal(first[0][0], other[0][0])
    # Not saturated: such images would agree whatever was drawn.
    assert 20 < torch.stack([image for image, _ in first.values()]).float().std() < 120


def test_a_single_chunk_can_be_drawn_again(model):
    everything = images_of(model, CONFIG)
    [_, second, _] = plan_chunks(CONFIG)
    again = images_of(model, CONFIG, chunks=[second])
    assert sorted(again) == [4, 5, 6, 7]
    assert all(torch.equal(image, everything[number][0]) for number, (image, _) in again.items())


def test_batch_size_changes_images_by_rounding_only(model):
    small = images_of(model, CONFIG)
    large = images_of(model, CONFIG.model_copy(update={"batch_size": 11}))
    for number, (image, label) in small.items():
        assert label == large[number][1]
        assert (image.int() - large[number][0].int()).abs().max() <= 1


def test_guidance_and_path_reach_the_pixels(model):
    guided = images_of(model, CONFIG)[0][0]
    plain = images_of(model, CONFIG.model_copy(update={"cfg_scale": 1.0}))[0][0]
    cosine = images_of(model, CONFIG, path="cosine")[0][0]
    assert not torch.equal(guided, plain)
    assert not torch.equal(guided, cosine)


@pytest.mark.parametrize("load", [golden_sit, golden_reg_sit])
def test_bf16_is_near_fp32_and_not_equal(load):
    sit = load()

    class LatentsAsImages(IdentityCodec):
        def decode(self, latents, *, rounding="truncate"):
            return super().decode(latents[:, :3] / 4)

    def draw(precision):
        config = SamplerConfig(
            solver="euler", num_steps=4, num_samples=4, batch_size=4, precision=precision
        )
        chunks = plan_chunks(config)
        [batch] = generate(
            sit, LatentsAsImages(), INTERPOLANTS["linear"], config, chunks=chunks, device="cpu"
        )
        return batch.images.int()

    difference = (draw("fp32") - draw("bf16")).abs()
    assert 0 < difference.max() < 16


@pytest.mark.parametrize(
    ("num_samples", "sizes"), [(103, [10] * 10 + [3]), (20, [10, 10]), (1, [1])]
)
def test_chunks_cover_the_set_once(num_samples, sizes):
    chunks = plan_chunks(SamplerConfig(num_samples=num_samples, batch_size=10))
    assert [chunk.index for chunk in chunks] == list(range(len(chunks)))
    assert [chunk.stop - chunk.start for chunk in chunks] == sizes
    assert torch.cat([chunk.sample_ids() for chunk in chunks]).tolist() == list(range(num_samples))


@pytest.mark.parametrize("world_size", [1, 2, 4, 7])
def test_even_chunks_give_every_rank_equal_work(world_size):
    shares = [
        even_chunks(23, batch_size=5, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert len({len(share) for share in shares}) == 1
    chunks = sorted((c for share in shares for c in share), key=lambda chunk: chunk.index)
    ids = torch.cat([chunk.sample_ids() for chunk in chunks])
    assert ids.tolist() == list(range(5 * len(chunks)))
    assert 23 <= len(ids) < 23 + 5 * world_size


def test_balanced_labels_are_equal_in_number():
    config = SamplerConfig(label_mode="balanced")
    labels = draw_labels(config, torch.arange(500), num_classes=10)
    assert labels.bincount().tolist() == [50] * 10


def test_random_labels_depend_on_the_index_alone():
    labels = draw_labels(SamplerConfig(), torch.arange(2000), num_classes=10)
    assert torch.equal(
        draw_labels(SamplerConfig(), torch.arange(700, 800), num_classes=10), labels[700:800]
    )
    counts = labels.bincount(minlength=10)
    assert len(counts) == 10
    # Five standard deviations of a binomial count.
    assert (counts - 200).abs().max() < 5 * (2000 * 0.1 * 0.9) ** 0.5
    assert counts.unique().numel() > 1


@pytest.mark.parametrize(
    ("labels", "num_samples", "expected"),
    [
        ([3, 7], 5, [3, 7, 3, 7, 3]),
        ([4], 3, [4, 4, 4]),
        ([3, 3, 7], 6, [3, 3, 7, 3, 3, 7]),
        ({"7": 3, "0": 1, "4": 2}, None, [0, 4, 4, 7, 7, 7]),
    ],
)
def test_chosen_classes_are_drawn_in_turn_or_as_many_as_asked(labels, num_samples, expected):
    tree = {"labels": labels, **({"num_samples": num_samples} if num_samples else {})}
    config = validated(SamplerConfig, tree, source="test")
    assert config.num_samples == len(expected)
    assert validated(SamplerConfig, to_tree(config), source="test") == config
    assert json.loads(json.dumps(to_tree(config)))["labels"] == labels
    ids = torch.arange(len(expected))
    assert draw_labels(config, ids, num_classes=10).tolist() == expected
    # A pure function of the index: any part of the set gets the same labels.
    assert draw_labels(config, ids[2:], num_classes=10).tolist() == expected[2:]


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"labels": []}, "labels names no class"),
        ({"labels": {}}, "labels names no class"),
        ({"labels": 3}, r"labels: Input should be a valid .*\(given: 3\)"),
        ({"labels": [3, -1]}, r"labels\.1: .*greater than or equal to 0 \(given: -1\)"),
        ({"labels": [3, "cat"]}, r"labels\.1: .*valid integer"),
        ({"labels": [True]}, r"labels\.0: .*valid integer"),
        ({"labels": {"cat": 3}}, "labels: 'cat' is no class; write its number"),
        ({"labels": {"3": 1, "03": 2}}, "labels: '03' is no class; write its number"),
        ({"labels": {"3": 0}}, "labels: .*greater than or equal to 1"),
        (
            {"labels": {"3": 10, "4": 5}, "num_samples": 64},
            "labels asks for 15 images in all, num_samples for 64; set num_samples to 15, or leave",
        ),
    ],
)
def test_each_fault_of_labels_has_one_line(tree, words):
    with pytest.raises(ConfigError, match=words) as caught:
        validated(SamplerConfig, tree, source="test")
    assert len(caught.value.faults) == 1
