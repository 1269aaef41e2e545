import numpy as np
import pytest
import torch

from srepa_ds.report.similarity import gram_correlation, similarity_to, spread_queries


def tokens(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_similarities_are_cosines(dtype):
    given = tokens(2, 7, 5).to(dtype)
    queries = torch.tensor([[3, 0], [6, 6]])
    found = similarity_to(given, queries)
    assert found.dtype == torch.float32
    for image in range(2):
        for row, query in enumerate(queries[image].tolist()):
            for other in range(7):
                expected = cosine(given[image, query].float(), given[image, other].float())
                assert found[image, row, other] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("num_tokens", "widths"), [(2, (3, 4)), (9, (5, 5)), (17, (2, 31))])
def test_correlation_is_that_of_all_pairs(num_tokens, widths):
    first, second = (tokens(3, num_tokens, width, seed=width) for width in widths)
    second = second.double()
    pairs = [(i, j) for i in range(num_tokens) for j in range(num_tokens) if i != j]
    found = gram_correlation(first, second)
    for image in range(3):
        a = [cosine(first[image, i].double(), first[image, j].double()) for i, j in pairs]
        b = [cosine(second[image, i], second[image, j]) for i, j in pairs]
        if num_tokens == 2:
            # One pair says nothing about how pairs vary together.
            assert found[image].isnan()
        else:
            assert float(found[image]) == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-6)


def test_the_same_geometry_correlates_wholly():
    given = tokens(2, 6, 4).double()
    rotation, _ = torch.linalg.qr(tokens(4, 4, seed=1).double())
    scale = tokens(2, 6, 1, seed=2).double().abs() + 0.1
    torch.testing.assert_close(
        gram_correlation(given @ rotation * scale, given), torch.ones(2, dtype=torch.float64)
    )


def test_tokens_all_alike_have_no_correlation():
    alike = torch.ones(1, 5, 3).double()
    assert gram_correlation(alike, tokens(1, 5, 3)).isnan().all()


def test_queries_are_the_ones_least_like_those_before():
    given = tokens(3, 12, 4)
    found = spread_queries(given, first=5, count=4)
    for image, queries in enumerate(found.tolist()):
        assert queries[0] == 5
        for place in range(1, 4):
            largest = [
                max(cosine(given[image, i], given[image, q]) for q in queries[:place])
                for i in range(12)
            ]
            assert queries[place] == int(np.argmin(largest))


def test_queries_differ_even_if_the_tokens_do_not():
    found = spread_queries(torch.ones(1, 4, 3), first=2, count=4)
    assert sorted(found[0].tolist()) == [0, 1, 2, 3]
