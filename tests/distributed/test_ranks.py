"""The process group: who a rank is, and what all ranks decide together."""

import pickle
import shutil

import pytest
import torch
from ranks import WORKERS, run_worker, start_ranks

from srepa_ds.distributed import devices, ranks
from srepa_ds.errors import ConfigError, Fault, OutputError, TopologyError


def test_two_ranks_do_things_together(tmp_path):
    run_worker("collectives", 2, tmp_path)


@pytest.fixture
def no_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


def test_float32_convolutions_are_not_tf32_ones(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    devices.local_device()
    assert not torch.backends.cudnn.allow_tf32


@pytest.mark.usefixtures("no_launcher")
def test_a_process_alone_is_a_group_of_one():
    assert not ranks.joined()
    try:
        rank = ranks.initialize()
        assert ranks.initialize() == rank
        assert (rank.number, rank.world_size, rank.is_main) == (0, 1, True)
        assert ranks.joined()
        assert ranks.gather(3) == [3]
        assert ranks.together(lambda: 5) == 5
    finally:
        ranks.close()
    assert not ranks.joined()
    ranks.close()


@pytest.mark.usefixtures("no_launcher")
def test_incomplete_variables_name_what_is_missing(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TopologyError, match="did not set MASTER_ADDR, MASTER_PORT"):
        ranks.initialize()
    assert not ranks.joined()


@pytest.mark.usefixtures("no_launcher")
def test_an_attempt_that_finds_its_predecessors_answers_says_so(monkeypatch):
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True)
    place = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    place |= {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    try:
        assert ranks.initialize().world_size == 1
        ranks.close()
        with pytest.raises(TopologyError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
            ranks.initialize()
    finally:
        ranks.close()


def test_an_error_of_the_machine_is_shared_like_a_user_s():
    def fail():
        raise OSError(28, "No space left on device", "runs/x")

    with pytest.raises(OutputError, match="runs/x: No space left on device"):
        ranks.together(fail)


def test_a_process_alone_raises_what_nobody_foresaw_as_it_is():
    with pytest.raises(ZeroDivisionError):
        ranks.together(lambda: 1 / 0)


@pytest.mark.usefixtures("no_launcher")
def test_without_a_group_everything_is_its_own():
    assert ranks.rank() == 0
    assert ranks.world_size() == 1
    assert ranks.broadcast("x") == "x"
    assert ranks.averaged(torch.ones(2)).tolist() == [1, 1]
    assert not ranks.any_rank(False)
    ranks.barrier()


def test_a_rank_is_known_before_it_joins(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    assert ranks.rank() == 3


def test_an_error_stays_itself_on_its_way_to_other_ranks():
    error = ConfigError("file", [Fault("a", "b")])
    error.on_all_ranks = True
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is ConfigError
    assert (str(copy), copy.source, copy.faults) == (str(error), error.source, error.faults)


@pytest.mark.slow
def test_what_goes_wrong_on_one_rank_is_said_once(small_world, tmp_path):
    world = tmp_path / "world"
    shutil.copytree(small_world.folder, world)
    text = small_world.config.read_text().replace(str(small_world.folder), str(world))
    (world / small_world.config.name).write_text(text)
    run_worker("differing_ranks", 2, world)


@pytest.mark.parametrize(
    ("seen", "words"),
    [
        ("none", ("rank 1 (", "local rank 1 has no GPU: this node shows 1;")),
        ("other", ("rank 0 (", "sees no GPU, rank 1 (", "has one; mend its driver")),
    ],
)
def test_ranks_that_cannot_join_say_so_once_and_end_together(seen, words):
    command = [str(WORKERS / "rank_without_gpu.py"), seen]
    rank = start_ranks(command, 2)
    outputs = [process.output() for process in rank]
    assert [process.returncode for process in rank] == [2, 2], outputs
    assert outputs[0].count("error:") == 1
    assert not [word for word in words if word not in outputs[0]], outputs
    assert "error" not in outputs[1]
    assert "Traceback" not in outputs[0] + outputs[1]
