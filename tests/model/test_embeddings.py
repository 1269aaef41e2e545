import math

import pytest
import torch

from srepa_ds.model.embeddings import (
    LabelEmbedding,
    PatchEmbedding,
    TimestepEmbedding,
    drop_labels,
    position_embedding,
    timestep_sinusoid,
)


def test_position_embedding_has_the_references_numbers():
    embedding = position_embedding((4, 4), 48)
    assert embedding.shape == (1, 16, 48)
    assert embedding.dtype == torch.float32
    channels = [0, 11, 12, 23, 24, 35, 36, 47]
    expected = [0.841470985, 0.000215443, 0.540302306, 0.999999977] * 2
    torch.testing.assert_close(embedding[0, 5, channels], torch.tensor(expected), rtol=0, atol=1e-8)
    assert abs(embedding.double().sum().item() - 390.959252404) < 1e-5


@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (5, 3), (1, 7), (64, 64)])
@pytest.mark.parametrize("width", [4, 12, 64])
def test_position_embedding_encodes_column_then_row(grid, width):
    rows, columns = grid
    embedding = position_embedding(grid, width)[0]
    quarter = width // 4
    for row, column in [(0, 0), (rows - 1, 0), (0, columns - 1), (rows // 2, columns // 2)]:
        expected = []
        for position in (column, row):
            angles = [position * 10000 ** (-k / quarter) for k in range(quarter)]
            expected += [math.sin(angle) for angle in angles]
            expected += [math.cos(angle) for angle in angles]
        token = embedding[row * columns + column]
        torch.testing.assert_close(token, torch.tensor(expected), rtol=0, atol=1e-7)


def test_timestep_sinusoid_has_the_references_numbers():
    sinusoid = timestep_sinusoid(torch.tensor([0.31, 0.0]))
    assert sinusoid.shape == (2, 256)
    channels = [0, 1, 127, 128, 129, 255]
    expected = torch.tensor([0.9523336, 0.9586782, 1.0, 0.3050586, 0.2844928, 3.33e-05])
    torch.testing.assert_close(sinusoid[0, channels], expected, rtol=0, atol=1e-7)
    assert torch.equal(sinusoid[1], torch.cat((torch.ones(128), torch.zeros(128))))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_timestep_sinusoid_is_float32_whatever_t_is(dtype):
    t = torch.tensor([0.25, 0.5], dtype=dtype)
    assert torch.equal(timestep_sinusoid(t), timestep_sinusoid(t.float()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_embeddings_take_float32_into_modules_of_any_dtype(dtype):
    patches = PatchEmbedding(3, 8, patch_size=2).to(dtype)
    assert patches(torch.zeros(2, 3, 4, 6)).dtype == dtype
    time = TimestepEmbedding(8).to(dtype)
    assert time(torch.zeros(2)).dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("autocast", [False, True])
def test_time_is_embedded_in_float32_whatever_the_precision(weights, autocast):
    embedding = TimestepEmbedding(24).to(weights)
    t = torch.linspace(0, 1, 7)
    first, second = ({k: v.float() for k, v in embedding.mlp[n].named_parameters()} for n in (0, 2))
    hidden = timestep_sinusoid(t) @ first["weight"].T + first["bias"]
    expected = hidden * hidden.sigmoid() @ second["weight"].T + second["bias"]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        embedded = embedding(t)
    torch.testing.assert_close(embedded, expected, rtol=1e-5, atol=1e-6)
    embedded.square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == weights for p in embedding.parameters())


@pytest.mark.parametrize(("patch_size", "size"), [(1, (3, 5)), (2, (4, 6)), (3, (9, 3))])
def test_patches_are_projected_row_by_row(patch_size, size):
    embedding = PatchEmbedding(2, 5, patch_size=patch_size).double()
    x = torch.arange(2 * 2 * math.prod(size), dtype=torch.float64).reshape(2, 2, *size).sin()
    tokens = embedding(x)
    kernel = embedding.proj.weight.flatten(1)
    columns = size[1] // patch_size
    for token in range(tokens.shape[1]):
        top, left = token // columns * patch_size, token % columns * patch_size
        patch = x[:, :, top : top + patch_size, left : left + patch_size].flatten(1)
        expected = patch @ kernel.T + embedding.proj.bias
        torch.testing.assert_close(tokens[:, token], expected, rtol=1e-12, atol=1e-12)


def test_the_label_table_has_a_row_for_no_class():
    table = LabelEmbedding(10, 4)
    weight = table.embedding_table.weight
    assert weight.shape == (11, 4)
    # Until a model sets them, its rows are uninitialised memory.
    torch.nn.init.normal_(weight)
    assert torch.equal(table(torch.tensor([10, 3])), weight[[10, 3]])


@pytest.mark.parametrize(
    ("probability", "expected"),
    [(0.0, [0, 7, 3, 9]), (0.1, [10, 10, 3, 9]), (1.0, [10, 10, 10, 10])],
)
def test_labels_drop_where_the_draw_is_below_the_probability(probability, expected):
    labels = torch.tensor([0, 7, 3, 9])
    uniforms = torch.tensor([1e-7, 0.0999, 0.1001, 0.999])
    dropped = drop_labels(labels, uniforms, probability=probability, null_label=10)
    assert dropped.tolist() == expected
    assert dropped.dtype == torch.int64
    assert labels.tolist() == [0, 7, 3, 9]
