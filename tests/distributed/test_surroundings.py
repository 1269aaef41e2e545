"""The launcher's variables: a place, or one message that names all that is wrong."""

import pytest

from srepa_ds.distributed.surroundings import Place, check_surroundings, launched, place
from srepa_ds.errors import TopologyError

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
STARTERS = ("OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "PMI_SIZE")
SOUND = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def variables(monkeypatch):
    """Sets the launcher's variables to those given, and no others."""

    def set_only(given: dict[str, str]) -> None:
        for name in (*NAMES, *STARTERS, "SLURM_NTASKS", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"):
            monkeypatch.delenv(name, raising=False)
        for name, value in given.items():
            monkeypatch.setenv(name, value)

    return set_only


def test_a_place(variables):
    variables(SOUND | {"LOCAL_RANK": "1"})
    assert launched()
    assert place() == Place(rank=1, world_size=2, local_rank=1)


def test_alone(variables):
    variables({})
    assert not launched()
    assert place() == Place(0, 1, 0)


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"])
@pytest.mark.parametrize("text", ["", "one", "-1", "1.0", "²", "9" * 50, " 1"])
def test_no_number(variables, name, text):
    variables(SOUND | {name: text})
    with pytest.raises(TopologyError, match=f"{name} is '"):
        check_surroundings()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"RANK": "2"}, "RANK 2 is not below WORLD_SIZE 2"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT 0 is not a port"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT 65536 is not a port"),
        ({"MASTER_ADDR": " "}, "MASTER_ADDR is empty"),
        ({"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "0"}, "LOCAL_RANK 0 is not below LOCAL_WORLD"),
        ({"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"}, "LOCAL_RANK 2 is not below LOCAL_WORLD"),
    ],
)
def test_no_such_place(variables, given, words):
    variables(SOUND | given)
    with pytest.raises(TopologyError, match=words):
        place()


def test_without_a_launcher_other_variables_are_somebody_else_s(variables):
    variables({"MASTER_PORT": "tcp://10.96.0.1:80", "LOCAL_WORLD_SIZE": "0"})
    assert place() == Place(0, 1, 0)
    variables({"LOCAL_RANK": "one"})
    with pytest.raises(TopologyError, match="LOCAL_RANK is 'one'"):
        place()


def test_half_a_place(variables):
    variables({"RANK": "0"})
    with pytest.raises(TopologyError, match="RANK is set and WORLD_SIZE is not"):
        place()


def test_all_faults_at_once(variables):
    variables({"RANK": "x", "WORLD_SIZE": "", "MASTER_PORT": "99999"})
    with pytest.raises(TopologyError) as caught:
        check_surroundings()
    for words in ("RANK is 'x'", "WORLD_SIZE is ''", "MASTER_ADDR not set", "MASTER_PORT 99999"):
        assert words in str(caught.value)


@pytest.mark.parametrize("name", STARTERS)
def test_mpirun_without_a_place(variables, name):
    variables({name: "4"})
    with pytest.raises(TopologyError, match=r"mpirun started 4 processes .* do not know"):
        check_surroundings()
    variables({name: "1"})
    check_surroundings()
    variables(SOUND | {name: "2"})
    check_surroundings()


def test_srun_without_a_place(variables):
    variables({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"})
    with pytest.raises(TopologyError, match="srun started 2 processes"):
        place()


def test_a_batch_script_is_one_process(variables):
    variables({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"})
    assert place() == Place(0, 1, 0)
