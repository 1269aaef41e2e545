import math
import os
import subprocess
import sys
from functools import cache, partial

import pytest
import torch
from places import GOLDEN as GOLDEN_FOLDER
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from triton_interpreter import needs_interpreter

from srepa_ds.alignment.gram import structural_kl, structural_mse
from srepa_ds.alignment.gram_algorithms.choice import (
    KL_ALGORITHMS,
    MSE_ALGORITHMS,
    image_groups,
    resolve_algorithm,
)

GOLDEN = load_file(GOLDEN_FOLDER / "structural.safetensors")
LOSSES = {
    "mse": structural_mse,
    "kl": structural_kl,
    "kl_t0.1_s0.4": partial(structural_kl, tau_teacher=0.1, tau_student=0.4),
}
# The kernels have tests of their own; here they are reached in test_triton_is_a_row_like_others.
CASES = [
    (name, algorithm)
    for name in LOSSES
    for algorithm in ["auto", *(MSE_ALGORITHMS if name == "mse" else KL_ALGORITHMS)]
    if algorithm != "triton"
]
# images, tokens, student width, teacher width: odd counts, both sides of the tile and of the width.
SHAPES = [
    (1, 2, 8, 8),
    (2, 3, 1536, 384),
    (3, 17, 8, 12),
    (2, 33, 20, 9),
    (1, 131, 48, 64),
    (2, 50, 768, 1536),
    (1, 40, 1536, 8),
    (1, 301, 150, 131),
]
TILE = 16


def tokens(shape, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(shape[0], 1, shape[2], generator=generator, dtype=torch.float64)
    own = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (3 * (0.7 * common + own)).to(dtype)


def pair(shape, dtype=torch.float64):
    images, count, d_student, d_teacher = shape
    student = tokens((images, count, d_student), 1, dtype).requires_grad_()
    return student, tokens((images, count, d_teacher), 2, dtype)


def reference(name, student, teacher):
    """Eq. 6 and Eq. 8, image by image and row by row, gradient by autograd."""
    tau_teacher, tau_student = (0.1, 0.4) if name == "kl_t0.1_s0.4" else (0.2, 0.2)
    per_image = []
    for s, t in zip(student, teacher, strict=True):
        s, t = (torch.nn.functional.normalize(x, dim=-1, eps=1e-12) for x in (s, t))
        per_row = []
        for i in range(len(s)):
            others = [j for j in range(len(s)) if j != i]
            row_s, row_t = s[others] @ s[i], t[others] @ t[i]
            if name == "mse":
                per_row.append((row_s - row_t).square().mean())
            else:
                log_s = torch.log_softmax(row_s / tau_student, 0)
                log_t = torch.log_softmax(row_t / tau_teacher, 0)
                per_row.append((log_t.exp() * (log_t - log_s)).sum())
        per_image.append(torch.stack(per_row).mean())
    return torch.stack(per_image).mean()


def with_gradient(loss, student):
    return loss.detach(), torch.autograd.grad(loss, student)[0]


def relative(actual, expected):
    """The error of each image's tensor relative to its size."""
    actual, expected = actual.double(), expected.double()
    assert torch.isfinite(actual).all()
    scale = expected.flatten(1).norm(dim=1) if expected.ndim > 1 else expected.abs()
    error = actual - expected
    error = error.flatten(1).norm(dim=1) if expected.ndim > 1 else error.abs()
    return (error / scale.clamp_min(1e-300)).max().item()


@pytest.mark.parametrize(("name", "algorithm"), CASES)
@pytest.mark.parametrize("case", ["c0", "c1", "c2", "c3"])
def test_golden(name, algorithm, case):
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        student = GOLDEN[f"{case}.student"].to(dtype).requires_grad_()
        teacher = GOLDEN[f"{case}.teacher"].to(dtype)
        loss = LOSSES[name](student, teacher, algorithm=algorithm, tile=TILE)
        value, gradient = with_gradient(loss, student)
        assert value.dtype == dtype
        assert relative(value, GOLDEN[f"{case}.{name}.loss"][0]) < tolerance
        assert relative(gradient, GOLDEN[f"{case}.{name}.grad_student"]) < tolerance


@cache
def expected_in(name, shape, dtype):
    """The float64 reference on inputs that were rounded to `dtype`."""
    student, teacher = pair(shape, dtype)
    wide = student.detach().double().requires_grad_()
    return with_gradient(reference(name, wide, teacher.double()), wide)


@pytest.mark.parametrize(("name", "algorithm"), CASES)
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_plain_loops(name, algorithm, shape):
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        student, teacher = pair(shape, dtype)
        loss = LOSSES[name](student, teacher, algorithm=algorithm, tile=TILE)
        value, gradient = with_gradient(loss, student)
        expected = expected_in(name, shape, dtype)
        assert value.dtype == gradient.dtype == dtype
        if name != "mse" and shape[1] == 2:
            # The only other token has probability 1 on both sides.
            assert value == 0
            assert gradient.abs().max() == 0
        else:
            assert relative(value, expected[0]) < tolerance
            assert relative(gradient, expected[1]) < tolerance


@pytest.mark.parametrize(("name", "algorithm"), CASES)
def test_bfloat16_inputs_are_computed_in_float32(name, algorithm):
    shape = (2, 33, 48, 40)
    student, teacher = pair(shape, torch.bfloat16)
    exact = expected_in(name, shape, torch.bfloat16)
    value, gradient = with_gradient(
        LOSSES[name](student, teacher, algorithm=algorithm, tile=TILE), student
    )
    assert value.dtype == torch.float32
    assert gradient.dtype == torch.bfloat16
    assert relative(value, exact[0]) < 1e-5
    # The gradient itself is exact to 1e-5; handing it to a bfloat16 leaf rounds it once.
    assert relative(gradient, exact[1]) < 2**-8
    wide = student.detach().float().requires_grad_()
    _, unrounded = with_gradient(LOSSES[name](wide, teacher, algorithm=algorithm, tile=TILE), wide)
    assert relative(unrounded, exact[1]) < 1e-5
    assert torch.equal(unrounded.bfloat16(), gradient)


@pytest.mark.parametrize(("name", "algorithm"), CASES)
def test_zero_and_identical_tokens(name, algorithm):
    student, teacher = pair((3, 21, 12, 10))
    with torch.no_grad():
        student[0, 4], teacher[0, 7], student[0, 9], teacher[0, 9] = 0, 0, 0, 0
        # Shorter than the clamp: scaled by a constant, not made a unit vector.
        student[0, 2] *= 1e-14
        student[1] = student[1, :1]
        teacher[2, 3] = teacher[2, 5]
    expected = with_gradient(reference(name, student, teacher), student)
    value, gradient = with_gradient(
        LOSSES[name](student, teacher, algorithm=algorithm, tile=TILE), student
    )
    assert relative(value, expected[0]) < 1e-10
    # A zero token's gradient is 1e12 times its neighbours', so each token has its own scale.
    scale = expected[1].norm(dim=-1).clamp_min(1e-6)
    assert ((gradient - expected[1]).norm(dim=-1) / scale).max() < 1e-9
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("name", "algorithm"), [case for case in CASES if case[0] != "kl_t0.1_s0.4"]
)
def test_a_student_like_its_teacher_has_no_loss(name, algorithm):
    student, _ = pair((2, 40, 24, 24))
    rotation = torch.linalg.qr(tokens((1, 24, 24), 5)[0]).Q
    loss = LOSSES[name](student, (2 * student.detach()) @ rotation, algorithm=algorithm)
    value, gradient = with_gradient(loss, student)
    assert 0 <= value + 1e-15 < 1e-12
    assert gradient.abs().max() < 1e-12


@pytest.mark.parametrize(
    ("shape", "difference", "loss"),
    [
        ((1, 301, 150), 0.33, 1e-3),
        ((1, 1000, 384), 0.58, 1e-3),
        ((1, 301, 150), 0.034, 1e-5),
        ((1, 1000, 384), 0.054, 1e-5),
    ],
)
def test_feature_is_as_exact_as_documented_where_student_and_teacher_nearly_agree(
    shape, difference, loss
):
    value_bound, gradient_bound = {1e-3: (5e-6, 2e-5), 1e-5: (3e-4, 2e-4)}[loss]
    student = tokens(shape, 1, torch.float32).requires_grad_()
    rotation = torch.linalg.qr(tokens((1, shape[2], shape[2]), 5, torch.float32)[0]).Q
    teacher = (student.detach() + difference * tokens(shape, 2, torch.float32)) @ rotation
    wide = student.detach().double().requires_grad_()
    exact = with_gradient(structural_mse(wide, teacher.double(), algorithm="dense"), wide)
    found = with_gradient(structural_mse(student, teacher, algorithm="feature"), student)
    assert loss / 1.2 < exact[0] < loss * 1.2
    assert relative(found[0], exact[0]) < value_bound
    assert relative(found[1], exact[1]) < gradient_bound


@pytest.mark.parametrize(("name", "algorithm"), [case for case in CASES if case[1] == "tiled"])
def test_tile_size_changes_rounding_only(name, algorithm):
    student, teacher = pair((2, 45, 16, 16))
    whole = with_gradient(LOSSES[name](student, teacher, algorithm=algorithm, tile=45), student)
    for tile in (1, 7, 44, 46, 1000):
        value, gradient = with_gradient(
            LOSSES[name](student, teacher, algorithm=algorithm, tile=tile), student
        )
        assert relative(value, whole[0]) < 1e-13
        assert relative(gradient, whole[1]) < 1e-13


@pytest.mark.parametrize(
    ("name", "algorithm", "shape"),
    [
        ("mse", "dense", (5, 600, 8, 8)),
        ("mse", "tiled", (5, 600, 8, 8)),
        ("mse", "feature", (3, 64, 512, 512)),
        ("kl", "dense", (5, 600, 8, 8)),
    ],
)
def test_images_do_not_depend_on_their_batch(name, algorithm, shape):
    student, teacher = pair(shape, torch.float32)
    loss = partial(LOSSES[name], algorithm=algorithm, tile=600)
    value, gradient = with_gradient(loss(student, teacher), student)
    alone = [
        with_gradient(loss(student[i : i + 1], teacher[i : i + 1]), student)
        for i in range(len(student))
    ]
    assert relative(value, torch.stack([one for one, _ in alone]).mean()) < 1e-6
    assert relative(gradient, sum(g for _, g in alone) / len(alone)) < 1e-6


@pytest.mark.parametrize(("name", "algorithm"), CASES)
def test_autocast_changes_nothing(name, algorithm):
    student, teacher = pair((2, 33, 24, 24), torch.float32)
    loss = partial(LOSSES[name], algorithm=algorithm, tile=TILE)
    plain = with_gradient(loss(student, teacher), student)
    with torch.autocast("cpu", torch.bfloat16):
        inside = with_gradient(loss(student, teacher), student)
    assert torch.equal(plain[0], inside[0])
    assert torch.equal(plain[1], inside[1])


def test_reduced_precision_products_are_left_as_found():
    student, teacher = pair((2, 33, 24, 24), torch.float32)
    plain = structural_mse(student, teacher)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        reduced = structural_mse(student, teacher)
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(plain, reduced)


@pytest.mark.parametrize(
    ("name", "algorithm"),
    [("mse", "dense"), ("mse", "tiled"), ("mse", "feature"), ("kl_t0.1_s0.4", "tiled")],
)
def test_gradcheck(name, algorithm):
    student, teacher = pair((2, 7, 4, 3))
    loss = partial(LOSSES[name], algorithm=algorithm, tile=3)
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher), student)


@pytest.mark.parametrize("name", LOSSES)
def test_only_the_student_gets_a_gradient(name):
    student, teacher = pair((1, 8, 6, 6))
    teacher.requires_grad_()
    (3 * LOSSES[name](student, teacher)).backward()
    assert teacher.grad is None
    _, expected = with_gradient(reference(name, student, teacher), student)
    assert relative(student.grad, 3 * expected) < 1e-10
    assert not LOSSES[name](student.detach(), teacher).requires_grad


@pytest.mark.parametrize("name", LOSSES)
def test_is_differentiable_once(name):
    student, teacher = pair((1, 8, 6, 6))
    (gradient,) = torch.autograd.grad(LOSSES[name](student, teacher), student, create_graph=True)
    with pytest.raises(RuntimeError, match="once, not twice"):
        gradient.square().sum().backward()


def profiled(loss, student, teacher, backward=True):
    """The peak of extra CPU memory in bytes, and the number of matrix products."""
    with torch.profiler.profile(profile_memory=True) as profile:
        value = loss(student, teacher)
        if backward and value.requires_grad:
            torch.autograd.grad(value, student)
    current = peak = products = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            current += event.nbytes()
            peak = max(peak, current)
        products += event.name() in ("aten::bmm", "aten::baddbmm", "aten::baddbmm_")
    return peak, products


@pytest.mark.parametrize(
    ("name", "algorithm"), [("mse", "tiled"), ("mse", "feature"), ("kl", "tiled")]
)
def test_memory_grows_linearly(name, algorithm):
    loss = partial(LOSSES[name], algorithm=algorithm, tile=32)
    counts = (256, 1024, 4096, 16384)
    inputs = [pair((1, count, 24, 24), torch.float32) for count in counts]
    peaks = [profiled(loss, *tensors)[0] for tensors in inputs]
    assert peaks[0] > 0
    for peak, count in zip(peaks[1:], counts[1:], strict=True):
        assert peak < 1.1 * peaks[0] * count / counts[0]
    whole_matrix = 4 * counts[-1] ** 2
    assert peaks[-1] < whole_matrix / 4
    dense = profiled(partial(LOSSES[name], algorithm="dense"), *inputs[1])[0]
    assert dense > 4 * counts[1] ** 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("name", "algorithm"), CASES)
def test_backward_remembers_no_more_than_the_student(name, algorithm, dtype):
    student, teacher = pair((2, 64, 10, 10), dtype)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, id):
        LOSSES[name](student, teacher.float(), algorithm=algorithm, tile=TILE)
    assert sum(saved) == student.nbytes


@pytest.mark.parametrize("algorithm", ["dense", "tiled"])
@pytest.mark.parametrize("name", ["mse", "kl"])
def test_memory_at_512_pixels_with_a_bfloat16_student(name, algorithm):
    """32 images need below 64 MiB beyond the inputs; all but the gradient is for one at a time."""
    loss = partial(LOSSES[name], algorithm=algorithm)
    student, teacher = pair((3, 1024, 768, 768), torch.float32)
    student = student.detach().bfloat16().requires_grad_()
    few, more = (profiled(loss, student[:n], teacher[:n])[0] for n in (2, 3))
    gradient = student[0].nbytes
    assert more - few == pytest.approx(gradient, rel=0.01)
    assert more + (32 - 3) * gradient < 64 * 2**20


def test_groups_of_images_are_bounded_on_every_device():
    for kind, table in (("mse", MSE_ALGORITHMS), ("kl", KL_ALGORITHMS)):
        for algorithm in table:
            for device in ("cpu", "meta"):
                student = torch.empty(70, 1024, 768, device=device, dtype=torch.bfloat16)
                groups = list(
                    image_groups(student, student, kind=kind, algorithm=algorithm, tile=256)
                )
                images = torch.arange(70)
                assert torch.equal(torch.cat([images[group] for group in groups]), images)
                # The fused kernels need many images at once to fill a GPU.
                most = 8 if algorithm == "triton" else 1
                assert max(len(images[group]) for group in groups) == most


@pytest.mark.parametrize("name", ["mse", "kl"])
@pytest.mark.parametrize(("weight", "bound"), [(0.5, 2**-8), (0.3, 2**-7 + 2**-16)])
def test_a_bfloat16_gradient_is_rounded_once_before_its_weight_and_once_after(name, weight, bound):
    student, teacher = pair((2, 33, 48, 40), torch.bfloat16)
    wide = student.detach().float().requires_grad_()
    (exact,) = torch.autograd.grad(LOSSES[name](wide, teacher.float()), wide)
    (found,) = torch.autograd.grad(weight * LOSSES[name](student, teacher.float()), student)
    exact = weight * exact.double()
    error = (found.double() - exact).abs() / exact.abs()
    # The float32 weight and gradient are themselves rounded at 2^-24.
    assert error.max() < bound * (1 + 2**-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_graph_that_is_kept_serves_again(dtype):
    student, teacher = pair((2, 20, 8, 8), dtype)
    loss = 3 * structural_mse(student, teacher)
    first, second = (torch.autograd.grad(loss, student, retain_graph=True)[0] for _ in range(2))
    (last,) = torch.autograd.grad(loss, student)
    assert torch.equal(first, second)
    assert torch.equal(first, last)


@pytest.mark.parametrize("name", LOSSES)
def test_no_gradient_is_formed_where_none_is_wanted(name):
    student, teacher = pair((1, 32, 8, 8))
    loss = partial(LOSSES[name], tile=TILE)
    wanted = profiled(loss, student, teacher)[1]
    with torch.no_grad():
        ungraded = profiled(loss, student, teacher)[1]
    assert 0 < ungraded < wanted
    assert profiled(loss, student.detach(), teacher)[1] == ungraded


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    student, teacher = pair((2, 20, 8, 8))
    expected = with_gradient(structural_mse(student, teacher), student)
    loss = checkpoint(structural_mse, student, teacher, use_reentrant=reentrant)
    loss.backward()
    assert torch.equal(loss.detach(), expected[0])
    assert torch.equal(student.grad, expected[1])


def keep_the_loss(ctx, operator, *args, **kwargs):
    kept = operator == torch.ops.srepa_ds.structural_loss.default
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("name", ["mse", "kl"])
def test_a_checkpointing_policy_spares_the_second_run(name):
    student, teacher = pair((2, 20, 8, 8))

    def block(s, t):
        return LOSSES[name](torch.tanh(s), t)

    contexts = partial(create_selective_checkpoint_contexts, keep_the_loss)
    selective = partial(checkpoint, block, use_reentrant=False, context_fn=contexts)
    whole = partial(checkpoint, block, use_reentrant=False)
    once = profiled(block, student, teacher)[1]
    assert profiled(whole, student, teacher)[1] == 2 * once > 0
    assert profiled(selective, student, teacher)[1] == once
    expected = with_gradient(block(student, teacher), student)
    value, gradient = with_gradient(selective(student, teacher), student)
    assert torch.equal(value, expected[0])
    assert torch.equal(gradient, expected[1])


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("name", ["mse", "kl"])
def test_compiles_without_a_graph_break(name):
    student, teacher = pair((2, 20, 8, 8))
    expected = with_gradient(2 * LOSSES[name](student, teacher), student)
    compiled = torch.compile(
        lambda s, t: 2 * LOSSES[name](s, t), fullgraph=True, backend="aot_eager"
    )
    value, gradient = with_gradient(compiled(student, teacher), student)
    assert torch.equal(value, expected[0])
    assert torch.equal(gradient, expected[1])


@pytest.mark.parametrize(("kind", "algorithm"), [("mse", "tiled"), ("kl", "dense")])
def test_operator_keeps_its_promises_to_torch(kind, algorithm):
    student, teacher = pair((2, 9, 6, 5))
    arguments = (student, teacher, kind, algorithm, 4, 0.2, 0.2, 0.1)
    for wanted in (True, False):
        operator = torch.ops.srepa_ds.structural_loss.default
        checks = ("test_schema", "test_faketensor", "test_autograd_registration")
        torch.library.opcheck(operator, (*arguments, wanted), test_utils=checks)


def test_batch_mean_is_the_sum_over_tokens():
    student, teacher = pair((2, 13, 8, 8))
    mean = structural_kl(student, teacher)
    summed = structural_kl(student, teacher, reduction="batch_mean")
    assert math.isclose(summed.item(), 13 * mean.item(), rel_tol=1e-12)


def test_auto_takes_the_cheaper_algorithm():
    def chosen(kind, count, width, device="cpu"):
        tokens = torch.empty(1, count, width, device=device)
        return resolve_algorithm(kind, "auto", tokens, tokens)

    assert [chosen("mse", count, 768) for count in (256, 1024)] == ["dense", "tiled"]
    assert [chosen("mse", count, 768) for count in (1025, 4096)] == ["tiled", "feature"]
    assert [chosen("kl", count, 768) for count in (1024, 4096)] == ["dense", "tiled"]
    # Few channels: `feature` is cheaper however small the matrix is.
    assert chosen("mse", 256, 64) == "feature"
    # Other devices take the row of GPUs, which is not measured: no whole matrix there.
    assert chosen("mse", 256, 768, "meta") == "tiled"


@needs_interpreter
def test_triton_is_a_row_like_others(tmp_path):
    """In Triton's interpreter, which has to be chosen before the kernels are imported."""
    script = (
        "import sys, torch\n"
        "from safetensors.torch import load_file, save_file\n"
        "from srepa_ds.alignment.gram import structural_kl, structural_mse\n"
        "given = load_file(sys.argv[1])\n"
        "student = given['student'].requires_grad_()\n"
        "for name, loss in (('mse', structural_mse), ('kl', structural_kl)):\n"
        "    value = loss(student, given['teacher'], algorithm='triton')\n"
        "    given[name] = value.detach()\n"
        "    given[name + '.gradient'] = torch.autograd.grad(value, student)[0]\n"
        "save_file({key: tensor.detach() for key, tensor in given.items()}, sys.argv[2])\n"
    )
    student, teacher = pair((3, 17, 12, 9))
    paths = [str(tmp_path / name) for name in ("in.safetensors", "out.safetensors")]
    save_file({"student": student.detach(), "teacher": teacher}, paths[0])
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", script, *paths], env=environment, check=True)
    found = load_file(paths[1])
    for name in ("mse", "kl"):
        expected = with_gradient(reference(name, student, teacher), student)
        assert relative(found[name], expected[0]) < 1e-10
        assert relative(found[f"{name}.gradient"], expected[1]) < 1e-10


@pytest.mark.parametrize("name", ["mse", "kl"])
def test_triton_says_why_it_cannot_run(name):
    student, teacher = pair((1, 5, 4, 4))
    with pytest.raises(ValueError, match="'triton' cannot run here: triton "):
        LOSSES[name](student, teacher, algorithm="triton")


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, t: structural_mse(s, t[:, :4]), "5 tokens of 2 images, the teacher 4 of 2"),
        (lambda s, t: structural_kl(s, t[:1]), "5 tokens of 2 images, the teacher 5 of 1"),
        (lambda s, t: structural_mse(s[:, :1], t[:, :1]), "two tokens"),
        (lambda s, t: structural_kl(s[:0], t[:0]), "at least one image"),
        (lambda s, t: structural_mse(s, t, algorithm="tild"), "did you mean 'tiled'"),
        (lambda s, t: structural_kl(s, t, algorithm="feature"), "for structural kl"),
        (lambda s, t: structural_kl(s, t, tau_teacher=0.0), "must be positive"),
        (lambda s, t: structural_mse(s, t, tile=0), "at least 1 row"),
    ],
)
def test_faults_are_named(call, message):
    student, teacher = pair((2, 5, 4, 4))
    with pytest.raises(ValueError, match=message):
        call(student, teacher)
