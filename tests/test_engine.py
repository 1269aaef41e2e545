"""The engine behaves the same under every ZeRO stage, precision and number of ranks.

`workers/engine_facts.py` runs the engines and records what they do; the tests here judge it. An
arrangement is a file of `ds_configs`: a ZeRO stage, with or without offload.
"""

from collections.abc import Callable, Iterable
from functools import cache
from shutil import which

import pytest
import torch
from builders import distance
from ranks import run_worker
from safetensors.torch import load_file
from torch import Tensor

from srepa_ds.model.precision import PRECISIONS

KINDS = ("master", "ema", "exp_avg", "exp_avg_sq")
ARRANGEMENTS = ("0", "1", "2", "3", "2-offload", "3-offload")
# Stage 2 first: the others restore its checkpoint.
ORDER = sorted(ARRANGEMENTS, key=lambda arrangement: arrangement != "2")
QUICK, SLOW = ("2-fp32", "0-fp32"), [pytest.mark.slow]
SAVED_STEP, LAST_STEP = 3, 4
EMA_DECAY = 0.7
# The masters' change in bf16 against fp32's, whose gradients they follow to some percent.
BF16_CHANGE = 0.1
# bf16 sums of differently many samples differ in their last bits.
BF16_SPLIT_CHANGE, BF16_SPLIT_NORM = 0.02, 5e-3
# Trained tensors of the objective (`builders.odd_sizes`); with offload each may cost a read.
NUM_WEIGHTS = 47

Facts = dict[str, Tensor]
Lookup = Callable[[int, str, str], Facts]


def arrangements_on(world_size: int, precision: str) -> list[str]:
    """All arrangements on two ranks; on one rank those with code of their own for it."""
    if world_size == 2:
        return ORDER
    return [] if precision == "bf16_autocast" else [name for name in ORDER if len(name) == 1]


def cases(*, ranks: tuple[int, ...] = (2, 1), precisions: Iterable[str] = PRECISIONS):
    """All topologies as parameters, slow except two ranks in fp32 at stages 0 and 2."""
    topologies = [
        (world_size, arrangement, precision)
        for world_size in ranks
        for precision in precisions
        for arrangement in arrangements_on(world_size, precision)
    ]
    return [
        pytest.param(*topology, id="{}ranks-zero{}-{}".format(*topology), marks=marks_of(*topology))
        for topology in topologies
    ]


def marks_of(world_size: int, arrangement: str, precision: str) -> list[pytest.MarkDecorator]:
    return [] if batch_with(f"{arrangement}-{precision}", world_size, precision) == QUICK else SLOW


def batch_with(case: str, world_size: int, precision: str) -> tuple[str, ...]:
    """The cases that one worker runs, of one precision: autocast leaves traces in DeepSpeed."""
    if world_size == 2 and case in QUICK:
        return QUICK
    batch = [f"{name}-{precision}" for name in arrangements_on(world_size, precision)]
    return tuple(name for name in batch if world_size == 1 or name not in QUICK)


@pytest.fixture(scope="module")
def lookup(tmp_path_factory: pytest.TempPathFactory) -> Lookup:
    """Gives the facts of a topology; runs its worker when it is first asked for."""
    folder = tmp_path_factory.mktemp("facts")

    @cache
    def failure(world_size: int, batch: tuple[str, ...]) -> Exception | None:
        try:
            run_worker("engine_facts", world_size, folder, *batch)
        except AssertionError as error:
            return error  # Cached, so that the worker does not run again for each test.

    def find(world_size: int, arrangement: str, precision: str) -> Facts:
        if (world_size, arrangement) != (2, "2"):
            find(2, "2", precision)
        case = f"{arrangement}-{precision}"
        if error := failure(world_size, batch_with(case, world_size, precision)):
            raise error
        return load_file(folder / f"{world_size}-{case}.safetensors")

    return find


each_case = pytest.mark.parametrize(("world_size", "arrangement", "precision"), cases())


@each_case
def test_it_starts_from_the_initial_weights_to_the_bit(lookup, world_size, arrangement, precision):
    facts = lookup(world_size, arrangement, precision)
    initial = facts["plain.0.master"]
    assert not torch.equal(initial, initial.bfloat16().float())
    assert torch.equal(facts["0.master"], initial)
    assert torch.equal(facts["0.ema"], initial)
    assert facts["adam_step_at_build"] == 0
    assert facts["0.counts"].tolist() == [0, 0]
    for moment in ("exp_avg", "exp_avg_sq"):
        assert not facts[f"0.{moment}"].any()


@each_case
def test_deepspeed_waits_as_long_as_the_ranks_agreed_on(lookup, world_size, arrangement, precision):
    facts = lookup(world_size, arrangement, precision)
    # Not gloo's default, half an hour, nor NCCL's, a third of that.
    assert facts["timeout"] == 420


@each_case
def test_all_ranks_fragments_are_every_weight_once(lookup, world_size, arrangement, precision):
    facts = lookup(world_size, arrangement, precision)
    for moment in ("0", "1", "bad", f"{LAST_STEP}", "split.2", "restored", "restored.next"):
        for kind in KINDS:
            assert (facts[f"{moment}.{kind}.times"] == 1).all(), (moment, kind)


@each_case
def test_each_rank_keeps_its_share_of_the_average(lookup, world_size, arrangement, precision):
    facts = lookup(world_size, arrangement, precision)
    total = facts["0.ema"].numel() * 4
    shares = facts["ema_bytes"].tolist()
    assert len(shares) == world_size
    assert sum(shares) == total
    assert max(shares) <= total / world_size * 1.05


@each_case
def test_the_average_is_the_unsharded_recursion(lookup, world_size, arrangement, precision):
    facts = lookup(world_size, arrangement, precision)
    # In float64: rounding twice would use up most of the 1e-7 (weights reach 0.9).
    average = facts["plain.0.master"].double()
    for step in (1, 2, 3, LAST_STEP):
        average = EMA_DECAY * average + (1 - EMA_DECAY) * facts[f"{step}.master"].double()
        torch.testing.assert_close(facts[f"{step}.ema"].double(), average, rtol=0, atol=1e-7)
        assert distance(facts[f"{step}.ema"], facts[f"{step}.master"], start=facts["0.ema"]) > 0.1


@pytest.mark.parametrize(("world_size", "arrangement", "precision"), cases(precisions=("fp32",)))
def test_fp32_is_the_plain_loop(lookup, world_size, arrangement, precision):
    facts = lookup(world_size, arrangement, precision)
    start = facts["plain.0.master"]
    for step in range(1, LAST_STEP + 1):
        plain = {key: facts[f"plain.{step}.{key}"] for key in ("losses", "norm", "master")}
        torch.testing.assert_close(facts[f"{step}.losses"], plain["losses"], rtol=1e-5, atol=1e-6)
        norms = facts[f"{step}.norms"]
        # Above 0.5, to which it is clipped: the comparison includes clipping.
        assert plain["norm"] > 1
        torch.testing.assert_close(norms, plain["norm"].expand_as(norms), rtol=1e-5, atol=0)
        torch.testing.assert_close(facts[f"{step}.master"], plain["master"], rtol=1e-5, atol=1e-6)
        assert distance(facts[f"{step}.master"], plain["master"], start=start) < 1e-5


@pytest.mark.parametrize(
    ("world_size", "arrangement", "precision"), cases(precisions=("bf16_autocast", "bf16"))
)
def test_bf16_follows_the_plain_loop(lookup, world_size, arrangement, precision):
    facts = lookup(world_size, arrangement, precision)
    start = facts["plain.0.master"]
    for step in (1, 2):
        plain = {key: facts[f"plain.{step}.{key}"] for key in ("losses", "norm", "master")}
        torch.testing.assert_close(facts[f"{step}.losses"], plain["losses"], rtol=0.02, atol=0.02)
        norms = facts[f"{step}.norms"]
        torch.testing.assert_close(norms, plain["norm"].expand_as(norms), rtol=0.05, atol=0)
        assert distance(facts[f"{step}.master"], plain["master"], start=start) < BF16_CHANGE


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "precision"),
    [(2, "fp32"), (2, "bf16_autocast"), (2, "bf16"), (1, "fp32"), (1, "bf16")],
)
def test_the_stages_agree(lookup, world_size, precision):
    two = lookup(world_size, "2", precision)
    # Stages sum in different orders, so that a weight now and then rounds to another bf16 value:
    # masters of single steps then differ by up to 6e-5, under autocast by more.
    losses, weights = {
        "fp32": (1e-5, 1e-5),
        "bf16": (1e-5, 3e-4),
        "bf16_autocast": (0.03, BF16_SPLIT_CHANGE),
    }[precision]
    for arrangement in arrangements_on(world_size, precision):
        facts = lookup(world_size, arrangement, precision)
        for step in range(1, LAST_STEP + 1):
            for key in (f"{step}.losses", f"{step}.norms"):
                torch.testing.assert_close(facts[key], two[key], rtol=losses, atol=losses / 10)
            found, expected = facts[f"{step}.master"], two[f"{step}.master"]
            assert distance(found, expected, start=two["0.master"]) < weights
        assert facts[f"{LAST_STEP}.counts"].tolist() == two[f"{LAST_STEP}.counts"].tolist()


@each_case
def test_accumulation_does_not_change_training(lookup, world_size, arrangement, precision):
    facts = lookup(world_size, arrangement, precision)
    losses, small, norm, weights = 1e-5, 1e-6, 1e-5, 1e-5
    if precision != "fp32":
        # The point-wise term is a mean of cosines of both signs, near zero: measured 0.0012, where
        # bf16 rounds each component by up to 0.002.
        losses, small, norm, weights = 5e-3, 2e-3, BF16_SPLIT_NORM, BF16_SPLIT_CHANGE
    for step in (1, 2):
        found, expected = facts[f"split.{step}.losses"], facts[f"{step}.losses"]
        torch.testing.assert_close(found, expected, rtol=losses, atol=small)
        found, expected = facts[f"split.{step}.norms"], facts[f"{step}.norms"]
        torch.testing.assert_close(found, expected, rtol=norm, atol=0)
    assert distance(facts["split.2.master"], facts["2.master"], start=facts["0.master"]) < weights
    assert facts["split.2.counts"].tolist() == [2, 2]


@each_case
@pytest.mark.parametrize("prefix", ["", "split."])
def test_one_ranks_bad_loss_skips_the_step_on_all(
    lookup, world_size, arrangement, precision, prefix
):
    facts = lookup(world_size, arrangement, precision)
    before, after = (SAVED_STEP, LAST_STEP) if not prefix else (2, 3)
    assert not facts[f"{prefix}bad.applied"].any()
    assert len(facts[f"{prefix}bad.applied"]) == world_size
    assert not facts[f"{prefix}bad.norms"].isfinite().any()
    for kind in KINDS:
        assert torch.equal(facts[f"{prefix}bad.{kind}"], facts[f"{prefix}{before}.{kind}"]), kind
    # The step is counted, but Adam has not taken it.
    assert facts[f"{prefix}bad.counts"].tolist() == [before + 1, before]
    assert facts[f"{prefix}{after}.applied"].all()
    assert facts[f"{prefix}{after}.norms"].isfinite().all()
    assert facts[f"{prefix}{after}.counts"].tolist() == [after + 1, after]
    if precision == "fp32":
        plain, start = facts[f"plain.{after}.master"], facts["plain.0.master"]
        assert distance(facts[f"{prefix}{after}.master"], plain, start=start) < 1e-5


@each_case
def test_every_rank_computes_with_the_masters(lookup, world_size, arrangement, precision):
    facts = lookup(world_size, arrangement, precision)
    if arrangement.startswith("3"):
        assert "0.copies" not in facts
        return
    dtype = PRECISIONS[precision].weights
    for moment in ("0", "bad", f"{LAST_STEP}", "restored"):
        copies = facts[f"{moment}.copies"]
        assert len(copies) == world_size
        masters = facts[f"{moment}.master"].to(dtype).float()
        assert all(torch.equal(copy, masters) for copy in copies), moment


@each_case
def test_a_checkpoint_of_two_ranks_stage_2_continues(lookup, world_size, arrangement, precision):
    facts, saved = lookup(world_size, arrangement, precision), lookup(2, "2", precision)
    for kind in KINDS:
        assert torch.equal(facts[f"restored.{kind}"], saved[f"{SAVED_STEP}.{kind}"]), kind
    assert facts["restored.counts"].tolist() == [SAVED_STEP, SAVED_STEP]
    assert not torch.equal(saved[f"{SAVED_STEP}.master"], saved["0.master"])
    found, expected = facts["restored.next.losses"], saved[f"{LAST_STEP}.losses"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    found, expected = facts["restored.next.master"], saved[f"{LAST_STEP}.master"]
    # On one rank bf16 sums the whole batch at once.
    bound = 1e-5 if precision == "fp32" or world_size == 2 else BF16_SPLIT_CHANGE
    assert distance(found, expected, start=saved["0.master"]) < bound
    assert facts["restored.next.applied"].all()


@each_case
def test_a_step_waits_for_the_device_to_judge_its_norm_alone(
    lookup, world_size, arrangement, precision
):
    reads = lookup(world_size, arrangement, precision)["reads"]
    assert len(reads) == world_size
    assert (reads >= 1).all()
    # One read to see whether the norm is finite, one to clip. With offload under stage 2 DeepSpeed
    # sums the norm on the host: one more, and one per weight.
    most = NUM_WEIGHTS + 3 if arrangement == "2-offload" else 2
    assert (reads <= most).all(), reads


@each_case
def test_the_flow_loss_by_time_is_not_rounded(lookup, world_size, arrangement, precision):
    facts = lookup(world_size, arrangement, precision)
    for step in ("1", "split.1"):
        sums, counts = facts[f"{step}.flow_by_time"].double()
        flow = facts[f"{step}.losses"][1].double()
        torch.testing.assert_close(sums.sum() / counts.sum(), flow, rtol=1e-6, atol=0)


@each_case
def test_a_resumed_run_is_the_same_to_the_bit(lookup, world_size, arrangement, precision):
    facts = lookup(world_size, arrangement, precision)
    assert not torch.equal(facts["split.3.master"], facts["split.2.master"])
    for key in ("losses", "norms", *KINDS):
        assert torch.equal(facts[f"resumed.3.{key}"], facts[f"split.3.{key}"]), key


@pytest.mark.slow
@pytest.mark.skipif(not (which("g++") and which("ninja")), reason="DeepSpeedCPUAdam needs them")
def test_deepspeeds_cpu_adam_takes_torchs_steps_and_resumes_nearly_exactly(tmp_path):
    run_worker("cpu_adam", 2, tmp_path)
    for arrangement in ("2-offload", "3-offload"):
        facts = load_file(tmp_path / f"{arrangement}.safetensors")
        start = facts["torch.0.master"]
        for kind in KINDS:
            assert torch.equal(facts[f"resumed.2.{kind}"], facts[f"deepspeed.2.{kind}"]), kind
        assert facts["resumed.2.counts"].tolist() == [2, 2]
        for step in range(1, 6):
            found = facts[f"deepspeed.{step}.master"]
            assert distance(found, facts[f"torch.{step}.master"], start=start) < 1e-5
        # Its kernel multiplies powers of the betas up; a fresh process computes them again.
        found, expected = facts["resumed.5.master"], facts["deepspeed.5.master"]
        assert distance(found, expected, start=start) < 1e-5
