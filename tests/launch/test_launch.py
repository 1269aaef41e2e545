"""The scripts that start jobs: the command that each runs in the end."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from places import ROOT

LAUNCH = ROOT / "launch"
SETTINGS = ["train.steps=3", "run.folder=runs/with space"]
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
STARTED = [path for path in SCRIPTS if path.name != "environment.sh"]


def dry_run(script: str, *arguments: str, **environment: str) -> list[list[str]]:
    """Returns the commands that a script would run, in words."""
    variables = {**os.environ, "DRY_RUN": "1", "SREPA_LAUNCH": str(LAUNCH), **environment}
    command = ["bash", str(LAUNCH / script), *arguments]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(("script", "environment", "beginning"), [
    ("one-node.sh", {}, "torchrun --standalone --nproc-per-node gpu -m srepa_ds"),
    ("one-node.sh", {"GPUS": "4"}, "torchrun --standalone --nproc-per-node 4 -m srepa_ds"),
    ("torchrun.sh", {"HEAD": "n0:29500", "NODES": "2", "NODE_RANK": "1", "GPUS": "8"},
     "torchrun --nnodes 2 --node-rank 1 --nproc-per-node 8 --max-restarts 3 --rdzv-backend c10d "
     "--rdzv-endpoint n0:29500 --rdzv-id srepa -m srepa_ds"),
    ("hostfile.sh", {"HOSTFILE": "hosts", "LAUNCHER": "pdsh"},
     "deepspeed --hostfile hosts --launcher pdsh --master_port 29500 --module srepa_ds"),
    ("no-ssh.sh", {"HOSTFILE": "hosts", "HEAD": "n0", "NODE_RANK": "1"},
     "deepspeed --no_ssh --hostfile hosts --node_rank 1 --master_addr n0 --master_port 29500 "
     "--module srepa_ds"),
])  # fmt: skip
def test_the_final_command_with_all_arguments(script, environment, beginning):
    (command,) = dry_run(script, "train", "a.yaml", *SETTINGS, **environment)
    assert command == [*beginning.split(), "train", "a.yaml", *SETTINGS]


@pytest.mark.parametrize(("script", "name"), [
    ("torchrun.sh", "NODES"), ("hostfile.sh", "HOSTFILE"), ("no-ssh.sh", "HOSTFILE"),
])  # fmt: skip
def test_what_is_not_given_is_named(script, name):
    variables = {k: v for k, v in os.environ.items() if k not in ("NODES", "HOSTFILE", "HEAD")}
    command = ["bash", str(LAUNCH / script), "train", "a.yaml"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert f"{name}: " in done.stderr


@pytest.fixture
def of_slurm(tmp_path) -> dict[str, str]:
    """The variables of a job on two nodes, and the one program that is asked for their names."""
    program = tmp_path / "scontrol"
    program.write_text(
        '#!/bin/sh\n[ "$2" = hostnames ] && printf "n1\\nn2\\n" || echo "NodeAddr=10.0.0.1 x"\n'
    )
    program.chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]"}
    array = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "16"}
    return {**job, **array, "PATH": f"{tmp_path}:{os.environ['PATH']}"}


def test_a_job_gives_each_process_its_place(of_slurm):
    (command,) = dry_run("slurm.sbatch", "train", "a.yaml", *SETTINGS, **of_slurm)
    *srun, task, name, verb, config, first, second = command
    assert srun == ["srun", "--kill-on-bad-exit=1", "bash", "-c"]
    assert [verb, config, first, second] == ["train", "a.yaml", *SETTINGS]
    # As bash would run it on a node.
    place = {"SLURM_PROCID": "5", "SLURM_NTASKS": "16", "SLURM_LOCALID": "1"}
    shown = task.replace("exec python -m srepa_ds", "echo $RANK $WORLD_SIZE $LOCAL_RANK")
    done = subprocess.run(
        ["bash", "-c", shown, name, "train", SETTINGS[1]],
        env={**os.environ, **place}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == f"5 16 1 train {SETTINGS[1]}\n"


@pytest.mark.parametrize(("verb", "share"), [("prepare", ["--share", "3/16"]), ("sample", [])])
def test_tasks_of_an_array_share_the_work(of_slurm, verb, share):
    (command,) = dry_run("slurm-array.sbatch", verb, "a.yaml", **of_slurm)
    assert command == ["srun", "python", "-m", "srepa_ds", verb, "a.yaml", *share]


def test_a_container_holds_the_processes(of_slurm):
    (command,) = dry_run("slurm-array.sbatch", "sample", "a.yaml", CONTAINER="a.sqsh", **of_slurm)
    here = Path.cwd()
    assert command[:4] == [
        "srun", "--container-image=a.sqsh", f"--container-mounts={here}",
        f"--container-workdir={here}",
    ]  # fmt: skip


def test_the_chain_waits_for_each_job():
    commands = dry_run("slurm-chain.sh", "p.yaml", "a.yaml", *SETTINGS, NODES="4", TASKS="8")
    jobs = [command[command.index(str(LAUNCH / script)) + 1] for command, script in zip(
        commands,
        ["slurm-array.sbatch", "slurm.sbatch", "slurm.sbatch", "slurm-array.sbatch",
         "slurm.sbatch"],
        strict=True,
    )]  # fmt: skip
    assert jobs == ["prepare", "train", "export", "sample", "evaluate"]
    waits = [[word for word in command if word.startswith("--dependency")] for command in commands]
    assert waits == [[], *([f"--dependency=afterok:{job}"] for job in jobs[:-1])]
    assert "--nodes=4" in commands[1]
    assert commands[1][-2:] == SETTINGS


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_short_and_without_faults(script):
    assert len(script.read_text().splitlines()) <= 45
    if (shellcheck := shutil.which("shellcheck")) is None:
        pytest.skip("shellcheck is not installed")
    excluded = "--exclude=SC2016"
    options = ["-x", "-P", str(LAUNCH), excluded, str(script)]
    done = subprocess.run([shellcheck, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", STARTED, ids=lambda path: path.name)
def test_each_says_how_it_is_started(script):
    text = script.read_text()
    assert f"launch/{script.name} " in text
    assert "set -euo pipefail" in text
