"""From batches to inputs: order, schedules, what names a bad sample, and preparing one ahead."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from builders import DeviceReads
from torch import Tensor
from torch.utils._pytree import tree_leaves

from srepa_ds.codec.identity import IdentityCodec
from srepa_ds.config.experiment import Config, load_config
from srepa_ds.data.batch import Batch
from srepa_ds.data.loader import BatchLoader
from srepa_ds.data.shards import ShardDataset
from srepa_ds.data.stored_tokens import StoredTokens
from srepa_ds.encoders.teacher import load_teacher
from srepa_ds.objective import TrainingInputs, draw_inputs
from srepa_ds.schema import to_tree
from srepa_ds.training.feed import Feed
from srepa_ds.training.side_stream import side_stream

CPU = torch.device("cpu")
MICRO_BATCH, NUM_TOKENS, WIDTH = 4, 64, 32


class RecordingStream:
    """Stands for the device's queues: what is launched there, waited for and kept, in order."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.kept: list[list[Tensor]] = []
        self._launched = 0

    @contextmanager
    def work(self) -> Iterator[int]:
        """Gives a number as the event."""
        number, self._launched = self._launched, self._launched + 1
        yield number
        self.log.append(f"launch {number}")

    def hand_over(self, ready: int, tensors: Iterable[Tensor]) -> None:
        """Keeps the tensors."""
        self.log.append(f"wait {ready}")
        self.kept.append(list(tensors))


@pytest.fixture(scope="module")
def experiment(small_world):
    """Gives the small experiment with overrides."""

    def load(*overrides: str) -> Config:
        return load_config(small_world.config, list(overrides))

    return load


def batch(number: int, *, with_tokens: bool = True) -> Batch:
    """Micro batch `number`: samples with ids of their own, and stored tokens."""
    generator = torch.Generator().manual_seed(number)
    positions = torch.arange(number * MICRO_BATCH, (number + 1) * MICRO_BATCH)
    patches = torch.randn(MICRO_BATCH, NUM_TOKENS, WIDTH, generator=generator).bfloat16()
    return Batch(
        images=torch.randint(0, 256, (MICRO_BATCH, 3, 16, 16), generator=generator).byte(),
        moments=None,
        labels=positions % 10,
        sample_ids=positions + 1000,
        positions=positions,
        teacher_tokens=(StoredTokens(patches, None, None) if with_tokens else None,),
    )


def feed_of(config: Config, batches: Iterable[Batch], **settings) -> Feed:
    settings = {"device": CPU, "first_step": 0, **settings}
    teachers = (None,) * len(config.alignments)
    return Feed(config, iter(batches), IdentityCodec(), teachers, **settings)


def same(one: TrainingInputs, two: TrainingInputs) -> bool:
    pairs = zip(tree_leaves(one), tree_leaves(two), strict=True)
    return all(a.equal(b) if isinstance(a, Tensor) else a == b for a, b in pairs)


ahead_or_not = pytest.mark.parametrize(
    "queue", [lambda: None, RecordingStream], ids=["in turn", "ahead"]
)


@ahead_or_not
def test_micro_batches_come_in_order_and_name_their_samples(experiment, queue):
    config = experiment("train.batch_size=12", "train.accumulation_steps=3")
    feed = feed_of(config, map(batch, range(9)), ahead_on=queue())
    for step in range(3):
        labels = torch.cat([inputs.latents.flatten(1)[:, 0] for inputs in feed.step()])
        numbers = range(3 * step, 3 * step + 3)
        expected = [IdentityCodec().encode(batch(n), seed=0).flatten(1)[:, 0] for n in numbers]
        assert torch.equal(labels, torch.cat(expected))
        assert feed.sample_ids() == list(range(1000 + 12 * step, 1012 + 12 * step))
        assert feed.unusable() == {}


def test_inputs_are_drawn_by_position_and_carry_the_stored_tokens(experiment):
    config = experiment("run.seed=7")
    (inputs,) = feed_of(config, [batch(3)]).step()
    given = batch(3)
    drawn = draw_inputs(
        config.objective,
        config.model,
        IdentityCodec().encode(given, seed=7),
        given.labels,
        positions=given.positions,
        seed=7,
    )
    assert same(inputs._replace(teacher_patches=(), teacher_cls=(), term_weights=None), drawn)
    assert torch.equal(inputs.teacher_patches[0], given.teacher_tokens[0].patches_float32())
    assert inputs.term_weights == (config.alignments[0].weights_at(0),)


def test_a_teacher_sees_the_pixels(experiment):
    config = experiment()
    teacher = load_teacher(config.alignments[0].teacher, resolution=(16, 16), device=CPU)
    given = batch(0, with_tokens=False)
    feed = Feed(config, iter([given]), IdentityCodec(), (teacher,), device=CPU, first_step=0)
    (inputs,) = feed.step()
    tokens = teacher.tokens(given.pixels)
    assert torch.equal(inputs.teacher_patches[0], tokens.patches)
    assert torch.equal(inputs.teacher_cls[0], tokens.cls)


def test_each_alignment_takes_its_own_tokens(experiment):
    """The first teacher runs, the tokens of the second are stored."""
    (first,) = experiment().alignments
    tree = to_tree(first)
    both = json.dumps([tree, {**tree, "stored_tokens": "bf16"}])
    config = experiment(f"alignments={both}")
    teacher = load_teacher(first.teacher, resolution=(16, 16), device=CPU)
    given = batch(0)
    given = replace(given, teacher_tokens=(None, *given.teacher_tokens))
    teachers = (teacher, None)
    feed = Feed(config, iter([given]), IdentityCodec(), teachers, device=CPU, first_step=0)
    (inputs,) = feed.step()
    asked, stored = inputs.teacher_patches
    assert torch.equal(asked, teacher.tokens(given.pixels).patches)
    assert torch.equal(stored, given.teacher_tokens[1].patches_float32())


SCHEDULED = (
    "alignments.0.pointwise.schedule={kind: linear, end_step: 4}",
    "alignments.0.structural.schedule={kind: stop, end_step: 2}",
)


def weights(feed: Feed) -> list[tuple[float | None, float | None]]:
    """Those of each micro batch of a step."""
    return [inputs.term_weights[0] for inputs in feed.step()]


@ahead_or_not
def test_schedules_count_optimizer_steps(experiment, queue):
    config = experiment("train.accumulation_steps=2", *SCHEDULED)
    feed = feed_of(config, map(batch, range(100)), first_step=1, ahead_on=queue())
    assert [weights(feed) for _ in range(3)] == [
        [(0.75, 2)] * 2,
        [(0.5, None)] * 2,
        [(0.25, None)] * 2,
    ]
    inputs = next(iter(feed.step()))
    # Both terms are over, so no tokens are needed.
    assert inputs.term_weights == ((None, None),)
    assert inputs.teacher_patches == (None,)


def test_it_continues_at_another_step(experiment):
    config = experiment("train.accumulation_steps=2", *SCHEDULED)
    feed = feed_of(config, map(batch, range(100)), first_step=1)
    for _ in range(2):
        weights(feed)
    feed.continue_at(0)
    assert [weights(feed) for _ in range(2)] == [[(1.0, 2)] * 2, [(0.75, 2)] * 2]
    # The data goes on: the fourth step's.
    assert feed.sample_ids() == list(range(1024, 1032))


def test_what_is_ahead_keeps_its_weights_when_it_continues_elsewhere(experiment):
    config = experiment("train.accumulation_steps=2", *SCHEDULED)
    feed = feed_of(config, map(batch, range(100)), first_step=1, ahead_on=RecordingStream())
    for _ in range(2):
        weights(feed)
    feed.continue_at(0)
    assert weights(feed) == [(0.25, None), (1.0, 2)]
    assert [weights(feed) for _ in range(2)] == [[(0.75, 2)] * 2, [(0.5, None)] * 2]
    # Nothing is ahead of a feed that has not begun.
    begun = feed_of(config, map(batch, range(9)), first_step=3, ahead_on=RecordingStream())
    begun.continue_at(0)
    assert weights(begun) == [(1.0, 2)] * 2


def test_samples_without_finite_tokens_are_named(experiment):
    config = experiment("train.accumulation_steps=2")
    batches = [batch(number) for number in range(4)]
    for number, row, value in ((0, 2, torch.nan), (1, 0, torch.inf), (1, 3, -torch.inf)):
        batches[number].teacher_tokens[0].patches[row, 5, 1] = value
    feed = feed_of(config, batches)
    list(feed.step())
    assert feed.unusable() == {0: [1002, 1004, 1007]}
    list(feed.step())
    assert feed.unusable() == {}


def test_only_asking_for_bad_samples_waits_for_the_device(experiment):
    config = experiment()
    teacher = load_teacher(config.alignments[0].teacher, resolution=(16, 16), device=CPU)
    batches = (batch(number, with_tokens=False) for number in range(9))
    feed = Feed(config, batches, IdentityCodec(), (teacher,), device=CPU, first_step=0)
    with DeviceReads() as reads:
        list(feed.step())
        assert reads.count == 0
        feed.unusable()
        assert reads.count == 1


def test_waiting_for_batches_is_counted_once(experiment):
    feed = feed_of(experiment(), map(batch, range(3)))
    assert feed.waited() == 0
    list(feed.step())
    assert feed.waited() > 0
    assert feed.waited() == 0


def test_one_is_prepared_before_its_predecessor_is_used(experiment):
    config, stream = experiment(), RecordingStream()
    (first,) = feed_of(config, [batch(0)]).step()
    feed = feed_of(config, map(batch, range(3)), ahead_on=stream)
    found, sample_ids = [], []
    for _ in range(3):
        for inputs in feed.step():
            stream.log.append("use")
            found.append(inputs)
        sample_ids += feed.sample_ids()
    assert list(feed.step()) == []
    assert stream.log == [
        *("launch 0", "launch 1", "wait 0", "use"),
        *("launch 2", "wait 1", "use"),
        # The end of the data.
        *("launch 3", "wait 2", "use"),
    ]
    assert same(found[0], first)
    assert sample_ids == list(range(1000, 1012))


def test_everything_a_step_reads_outlives_its_queue(experiment):
    stream = RecordingStream()
    feed = feed_of(experiment(), [batch(0)], ahead_on=stream)
    (inputs,) = feed.step()
    (kept,) = stream.kept
    used = {leaf.data_ptr() for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)}
    assert len(used) == 5
    # The others name bad samples: ids, and whether the tokens of each are finite.
    others = [tensor.tolist() for tensor in kept if tensor.data_ptr() not in used]
    assert sorted(others) == [[True] * MICRO_BATCH, feed.sample_ids()]
    assert used < {tensor.data_ptr() for tensor in kept}


@ahead_or_not
def test_an_error_in_reading_reaches_training(experiment, queue):
    def failing() -> Iterator[Batch]:
        yield batch(0)
        raise ZeroDivisionError

    config = experiment("train.accumulation_steps=2")
    feed = feed_of(config, failing(), ahead_on=queue())
    with pytest.raises(ZeroDivisionError):
        list(feed.step())


@ahead_or_not
@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_that_stops_early_leaves_nothing_waiting(experiment, small_world, queue, workers):
    """As after a signal, in the middle of an epoch, and then at the end of a second one."""
    config = experiment(f"data.num_workers={workers}")
    teacher = load_teacher(config.alignments[0].teacher, resolution=(16, 16), device=CPU)
    dataset = ShardDataset(small_world.folder / "shards", [None])
    for steps in (2, 13):
        with BatchLoader(dataset, config.data, seed=1, micro_batch_size=16) as batches:
            feed = Feed(
                config,
                batches,
                IdentityCodec(),
                (teacher,),
                device=CPU,
                first_step=0,
                ahead_on=queue(),
            )
            positions = [len(inputs.labels) for _ in range(steps) for inputs in feed.step()]
            assert positions == [16] * steps
    assert not torch.multiprocessing.active_children()


def test_without_a_gpu_nothing_is_prepared_ahead(experiment):
    assert side_stream(CPU, overlaps=True) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_stream_gives_the_same_inputs(experiment):
    device = torch.device("cuda")
    config = experiment("engine.overlap_teachers=true")
    assert side_stream(device, overlaps=False) is None
    stream = side_stream(device, overlaps=True)
    feeds = [
        feed_of(config, map(batch, range(20)), device=device, ahead_on=ahead)
        for ahead in (None, stream)
    ]
    for _ in range(10):
        (one,), (two,) = (list(feed.step()) for feed in feeds)
        assert same(one, two)
        assert feeds[0].sample_ids() == feeds[1].sample_ids()
