import importlib
import json
import subprocess
import sys

import pytest
import torch
from places import ROOT

TOOL = ROOT / "tools" / "bench_gram.py"


@pytest.fixture
def tool(monkeypatch):
    """Imports a file next to the tool, as the tool does."""
    monkeypatch.syspath_prepend(TOOL.parent)
    return importlib.import_module


@pytest.mark.parametrize("kind", ["mse", "kl"])
def test_every_algorithm_computes_what_the_paper_prints(tool, kind):
    measure = tool("gram_measure")
    student, teacher = (x.double() for x in measure.tokens(2, 33, 12, "cpu"))
    table = measure.losses(kind, "cpu")
    assert {measure.PRINTED, "dense", "tiled"} <= set(table)
    expected = table[measure.PRINTED](student, teacher)
    (gradient,) = torch.autograd.grad(expected, student)
    for loss in table.values():
        value = loss(student, teacher)
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=0)
        torch.testing.assert_close(torch.autograd.grad(value, student)[0], gradient)


def test_memory_is_what_a_known_function_takes(tool):
    measure = tool("gram_measure")
    student, teacher = measure.tokens(1, 64, 16, "cpu")

    def outer(s, t):
        return (s @ t.mT).square().sum()

    # Product, its square and, in backward, two gradients of its size; at least two at a time.
    _, peak = measure.traced(outer, student, teacher)
    assert 2 * 4 * 64**2 <= peak <= 5 * 4 * 64**2


def test_memory_is_predicted_from_small_runs(tool, monkeypatch):
    measure = tool("gram_measure")
    monkeypatch.setattr(measure, "PROBES", (512, 1024))
    for name in (measure.PRINTED, "tiled"):
        loss = measure.losses("kl", "cpu")[name]
        predicted = measure.predicted_bytes(loss, images=1, count=2048, width=16, device="cpu")
        _, peak = measure.traced(loss, *measure.tokens(1, 2048, 16, "cpu"))
        assert predicted == pytest.approx(peak, rel=0.05)


def test_what_does_not_fit_is_not_run_but_listed(tool, monkeypatch):
    bench = tool("bench_gram")
    monkeypatch.setattr(bench, "free_bytes", lambda device: 1)
    rows = bench.measure("cpu", "kl", 8192, 8, 1, 1)
    assert all(row.seconds is None and row.needed_bytes > 0 for row in rows)
    table = tool("gram_report").markdown(rows)
    assert table.count("does not fit: needs ") == len(rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused(tmp_path):
    command = [sys.executable, TOOL, "--devices", "cuda", "--output", tmp_path / "out"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "--devices cuda: torch sees no GPU here" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_tool_writes_table_json_and_plot(tmp_path):
    options = ["--devices", "cpu", "--tokens", "8", "24", "--widths", "6", "--rounds", "2"]
    subprocess.run(
        [sys.executable, TOOL, *options, "--output", tmp_path], cwd=ROOT, check=True, timeout=120
    )
    rows = json.loads((tmp_path / "results.json").read_text())
    found = [row for row in rows if row["device"] == "cpu"]
    assert {row["tokens"] for row in found} == {8, 24}
    for kind, names in {
        "mse": ["Algorithm 1", "dense", "tiled", "feature", "auto (dense)"],
        "kl": ["Algorithm 1", "dense", "tiled", "auto (dense)"],
    }.items():
        of_kind = [row for row in found if row["kind"] == kind and row["tokens"] == 8]
        assert [row["algorithm"] for row in of_kind] == names
        assert all(row["seconds"] >= row["fastest_seconds"] > 0 for row in of_kind)
        assert all(row["extra_bytes"] > 0 for row in of_kind)
    assert len((tmp_path / "table.md").read_text().splitlines()) == 2 + len(rows)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
