"""The process group: who a rank is, and what all ranks decide together."""

import pickle

import pytest
import torch
from ranks import run_worker

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
    devices.take_device()
    assert torch.backends.cudnn.allow_tf32
    devices.use_exact_float32()
    assert not torch.backends.cudnn.allow_tf32


def test_asking_for_a_device_takes_none(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert devices.local_device(1) == torch.device("cuda", 1)
    with pytest.raises(TopologyError, match="local rank 2 has no GPU"):
        devices.take_device(2)
    assert not taken
    assert devices.take_device(1) == taken[0] == torch.device("cuda", 1)


@pytest.mark.usefixtures("no_launcher")
def test_a_process_alone_is_a_group_of_one(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert not ranks.joined()
    try:
        rank = ranks.initialize()
        assert ranks.initialize() == rank
        assert (rank.number, rank.world_size, rank.is_main) == (0, 1, True)
        assert not torch.backends.cudnn.allow_tf32
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
    with pytest.raises(TopologyError, match="MASTER_ADDR, MASTER_PORT not set"):
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
