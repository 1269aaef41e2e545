import json
import math
import sys
from importlib.util import find_spec

import pytest
import torch
from ranks import run_worker
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize
from triton_interpreter import needs_interpreter

from srepa_ds.alignment.gram_algorithms.kl import kl_dense
from srepa_ds.alignment.gram_algorithms.mse import mse_tiled
from srepa_ds.alignment.gram_algorithms.parts import Temperatures
from srepa_ds.alignment.gram_algorithms.triton import TILINGS, unavailable

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

TEMPERATURES = {"kl": Temperatures(0.2, 0.2), "kl_sharp": Temperatures(0.4, 0.1)}
LOSSES = ["mse", *TEMPERATURES]
DTYPES = {"float64": (torch.float64, 1e-10), "float32": (torch.float32, 1e-5)}
# images, tokens, student width, teacher width: below, on and above the tiles' sizes.
SHAPES = {
    "pair": (1, 2, 8, 8),
    "three": (3, 3, 24, 40),
    "odd": (2, 17, 24, 40),
    "tile": (1, 64, 8, 8),
    "above_tile": (1, 65, 8, 20),
    "two_tiles": (1, 100, 8, 12),
    "wide": (1, 5, 96, 1536),
    "strided": (2, 9, 33, 7),
    "one_channel": (1, 4, 1, 1),
    "identical_student": (2, 33, 12, 10),
    "identical_both": (1, 33, 12, 12),
    "same": (2, 33, 24, 24),
    "zeros": (2, 21, 12, 10),
}


def unit_tokens(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(shape[0], 1, shape[2], generator=generator, dtype=torch.float64)
    own = torch.randn(shape, generator=generator, dtype=torch.float64)
    return normalize(0.7 * common + own, dim=-1)


def make_pair(name):
    images, count, d_student, d_teacher = SHAPES[name]
    student = unit_tokens((images, count, d_student), 1)
    teacher = unit_tokens((images, count, d_teacher), 2)
    if name.startswith("identical"):
        student[:] = student[:, :1]
    if name == "identical_both":
        teacher[:] = teacher[:, :1]
    if name == "same":
        teacher = student.clone()
    if name == "zeros":
        student[0, 4], teacher[0, 7], student[1, 9], teacher[1, 9] = 0, 0, 0, 0
        student[1, 20] = 0
    return student, teacher


def run_all(device, folder):
    tokens = {}
    for name in SHAPES:
        for suffix, (dtype, _) in DTYPES.items():
            student, teacher = make_pair(name)
            tokens[f"{name}_{suffix}.student"] = student.to(dtype)
            tokens[f"{name}_{suffix}.teacher"] = teacher.to(dtype)
    save_file(tokens, folder / "tokens.safetensors")
    run_worker(
        "gram_triton_values", 1, device, folder / "tokens.safetensors", folder / "out.safetensors"
    )
    return tokens, load_file(folder / "out.safetensors")


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    return run_all("cpu", tmp_path_factory.mktemp("interpreted"))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return run_all("cuda", tmp_path_factory.mktemp("compiled"))


def by_loops(loss, student, teacher):
    """Eq. 6 and Eq. 8 summed row by row, gradient by autograd."""
    student = student.clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for s, t in zip(student, teacher, strict=True):
        for i in range(len(s)):
            others = [j for j in range(len(s)) if j != i]
            row_s, row_t = s[others] @ s[i], t[others] @ t[i]
            if loss == "mse":
                total = total + (row_s - row_t).square().sum()
            else:
                log_s = torch.log_softmax(row_s / TEMPERATURES[loss].student, 0)
                log_t = torch.log_softmax(row_t / TEMPERATURES[loss].teacher, 0)
                total = total + (log_t.exp() * (log_t - log_s)).sum()
    return total.detach(), torch.autograd.grad(total, student)[0]


def by_products(loss, student, teacher):
    if loss == "mse":
        return mse_tiled(student, teacher, with_gradient=True, tile=student.shape[1])
    return kl_dense(student, teacher, with_gradient=True, temperatures=TEMPERATURES[loss])


def check(run, reference, name, suffix, loss):
    """Compares with the float64 reference on tokens that were rounded to the kernel's dtype."""
    tokens, results = run
    dtype, tolerance = DTYPES[suffix]
    student = tokens[f"{name}_{suffix}.student"].double()
    teacher = tokens[f"{name}_{suffix}.teacher"].double()
    value, gradient = reference(loss, student, teacher)
    actual = {
        key: results[f"{name}_{suffix}.{loss}.{key}"]
        for key in ("value", "value_alone", "gradient")
        if key != "value_alone" or SHAPES[name][1] < 64
    }
    assert actual["value"].dtype == torch.float64
    assert actual["gradient"].dtype == dtype
    assert torch.equal(actual["value"], actual.get("value_alone", actual["value"]))
    # Where a result is zero in exact arithmetic, the Gram entries that cancel still have rounding.
    images, count, _ = student.shape
    rounding = tolerance / 100
    assert abs(actual["value"] - value) <= tolerance * abs(value) + rounding * images * count
    error = (actual["gradient"].double() - gradient).flatten(1).norm(dim=1)
    size = gradient.flatten(1).norm(dim=1)
    assert (error <= tolerance * size + rounding * 4 * count * math.sqrt(count)).all()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("suffix", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
class TestAgrees:
    @needs_interpreter
    def test_with_plain_loops(self, interpreted, name, suffix, loss):
        check(interpreted, by_loops, name, suffix, loss)

    @needs_interpreter
    def test_with_dense(self, interpreted, name, suffix, loss):
        check(interpreted, by_products, name, suffix, loss)

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_compiled_with_plain_loops(self, compiled, name, suffix, loss):
        check(compiled, by_loops, name, suffix, loss)


@needs_interpreter
@pytest.mark.parametrize("suffix", DTYPES)
def test_what_must_be_exactly_zero(interpreted, suffix):
    _, results = interpreted
    for loss in TEMPERATURES:
        # The only other token has probability 1 on both sides.
        assert results[f"pair_{suffix}.{loss}.value"] == 0
        assert results[f"pair_{suffix}.{loss}.gradient"].abs().max() == 0
    for name, loss in (("same", "mse"), ("same", "kl"), ("identical_both", "mse")):
        assert results[f"{name}_{suffix}.{loss}.value"].abs() < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_builds_for_hopper_with_tiles_and_operands_in_registers(tmp_path, monkeypatch, dtype):
    import triton

    try:
        triton.knobs.nvidia.cuobjdump.path  # noqa: B018
    except RuntimeError as missing:
        pytest.skip(f"this triton brings no assembler: {missing}")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    run_worker("gram_triton_build", 1, dtype, tmp_path / "figures.json")
    figures = json.loads((tmp_path / "figures.json").read_text())
    unavailable = figures.pop("unavailable")
    assert unavailable["cuda"] is None
    assert "TRITON_INTERPRET=1" in unavailable["cpu"]
    assert len(figures) == 4
    element = getattr(torch, dtype)
    tiling, itemsize = TILINGS[element], element.itemsize
    threads = 32 * tiling.num_warps
    for kernel in figures.values():
        # A version's register allocator may put some numbers aside, but no part of the work: a
        # thread's share of a tile's operand, the smallest, would be 32 bytes.
        assert kernel["stack_bytes"] < tiling.rows * tiling.chunk * itemsize / threads
        # Two programs share a multiprocessor's 64 Ki registers and 227 KiB.
        assert kernel["registers"] * threads <= 32 * 1024
        assert kernel["shared_bytes"] <= 227 * 1024 // 2
        assert kernel["tensor_core_products"] > 0


def test_says_that_triton_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "not installed" in unavailable(torch.device("cuda"))
