"""`srepa-ds export --push` to a stand-in for the Hub, and the way back by `srepa-ds fetch`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from builders import contents, objective_of, pieces_of
from hub_stand_in import Repository, hub_stand_in
from places import ROOT
from safetensors.torch import load

from srepa_ds.checkpoint import saving
from srepa_ds.cli import run
from srepa_ds.config.experiment import load_config
from srepa_ds.schema import to_tree

NAME = "someone/digits"
TOKEN = "hf_secretsecret"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in that takes the token, the only Hub there is."""
    constants = pytest.importorskip("huggingface_hub.constants")
    with hub_stand_in() as stand_in:
        stand_in.writers.add(TOKEN)
        monkeypatch.setenv("HF_ENDPOINT", stand_in.address)
        monkeypatch.setenv("SREPA_FETCHED", str(tmp_path / "fetched"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        for name in ("HF_HUB_CACHE", "HF_TOKEN_PATH"):
            monkeypatch.setattr(constants, name, str(tmp_path / name))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        for name in ("RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        yield stand_in


@pytest.fixture
def settings(small_world, tmp_path):
    """The command line's settings of a run with a checkpoint of step 5."""
    given = [str(small_world.config), f"run.folder={tmp_path}/digits"]
    save(given, 5)
    return given


def save(given, step: int) -> None:
    config = load_config(Path(given[0]), given[1:])
    model = objective_of(config, generator=torch.Generator().manual_seed(step))
    weights = {name: value.detach() for name, value in model.named_parameters()}
    pieces = [p for kind in ("master", "ema") for p in pieces_of(weights, kind=kind)]
    state = {"step": step, "adam_step": step, "config": to_tree(config)}
    saving.save(config.run_folder.checkpoints, step=step, pieces=pieces, state=state, rank=0)


def said(capsys) -> str:
    captured = capsys.readouterr()
    return captured.out + captured.err


def push(settings, *options: str) -> int:
    return run(["export", *settings, "--push", NAME, *options])


def test_a_pushed_model_comes_back_bit_for_bit(hub, settings, tmp_path, capsys):
    assert push(settings, "--private") == 0
    words, repository = said(capsys), hub.repositories[NAME]
    assert f"pushed to {hub.address}/{NAME}, commit {repository.commit}" in words
    assert repository.private
    assert repository.messages == ["step 5 of digits"]
    exported = contents(tmp_path / "digits/export")
    assert {".gitattributes": repository.files[".gitattributes"], **exported} == repository.files
    named = f"sample.weights={NAME}"
    assert run(["fetch", *settings, named]) == 0
    fetched = contents(tmp_path / "fetched/someone--digits")
    assert fetched == {name: exported[name] for name in ("config.json", "model.safetensors")}
    assert run(["verify", str(tmp_path / "fetched/someone--digits")]) == 0
    small = ["sample.num_samples=10", "sample.num_steps=2"]
    for weights, place in ((named, "there"), ("sample.weights=null", "here")):
        drawn = f"sample.folder={tmp_path}/{place}"
        assert run(["sample", *settings, weights, drawn, *small]) == 0
    there, here = (contents(tmp_path / place) for place in ("there", "here"))
    assert there["samples.npz"] == here["samples.npz"]
    assert there["provenance.json"] == here["provenance.json"]
    asked, words = hub.tokens, words + said(capsys)
    assert asked == {f"Bearer {TOKEN}"}
    kept = b"".join(v or b"" for v in contents(tmp_path).values())
    assert "secret" not in words
    assert TOKEN.encode() not in kept


def test_only_the_model_is_uploaded_and_leftovers_of_the_last_one_go(hub, settings, tmp_path):
    assert push(settings) == 0
    files = hub.repositories[NAME].files
    # As of an earlier export in two files, and what its owner has put there.
    files |= {"model-00001-of-00002.safetensors": b"old", "LICENSE": b"mine"}
    save(settings, 10)
    (tmp_path / "digits/export/.DS_Store").write_bytes(b"private")
    assert push(settings) == 0
    assert hub.repositories[NAME].messages == ["step 5 of digits", "step 10 of digits"]
    assert files.keys() == {
        ".gitattributes", "LICENSE", "README.md", "config.json", "model.safetensors",
    }  # fmt: skip


def test_a_push_that_broke_off_goes_on(hub, settings, tmp_path, capsys):
    hub.broken_commits = 1
    assert push(settings) == 2
    message = said(capsys)
    assert message.count("error:") == 1
    assert "the upload broke off" in message
    assert "run the same command again" in message
    exported = (tmp_path / "digits/export/model.safetensors").read_bytes()
    assert hub.repositories[NAME].messages == []
    assert push(settings) == 0
    assert hub.repositories[NAME].files["model.safetensors"] == exported
    sent = [request for request in hub.requests if request.startswith("PUT /lfs/")]
    assert len(sent) == 1, "what has arrived is not sent again"


def test_somebody_else_s_commit_meanwhile_is_not_overwritten(hub, settings, capsys):
    def change():
        hub.repositories[NAME].files["note.txt"] = b"theirs"

    hub.on_commit = change
    assert push(settings) == 2
    assert "somebody else has changed the repository meanwhile" in said(capsys)
    assert "model.safetensors" not in hub.repositories[NAME].files


_FACES = b'{"format": "srepa_ds.diffusers", "run_id": "faces"}'


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"config.json": b'{"model_type": "bert"}'}, "another program (config.json)"),
        ({"weights.bin": b"x"}, "another program (weights.bin)"),
        ({"transformer/x.safetensors": b"x", "provenance.json": _FACES}, "the run faces in"),
        ({"config.json": b"{"}, "another program (config.json)"),
    ],
)
def test_another_model_is_replaced_only_when_told(hub, settings, tmp_path, capsys, files, words):
    hub.repositories[NAME] = Repository(dict(files))
    assert push(settings) == 2
    message = said(capsys)
    assert words in message
    assert "digits [" in message
    assert "add --replace" in message
    assert hub.repositories[NAME].files == files
    assert (tmp_path / "digits/export/model.safetensors").exists(), "the export stays"
    assert push(settings, "--replace") == 0
    assert load(hub.repositories[NAME].files["model.safetensors"])


def test_a_public_repository_does_not_get_a_private_model(hub, settings, capsys):
    hub.repositories[NAME] = Repository({"README.md": b"about it"})
    assert push(settings, "--private") == 2
    assert "exists and is public" in said(capsys)
    assert hub.repositories[NAME].files == {"README.md": b"about it"}
    assert push(settings) == 0


@pytest.mark.parametrize(
    ("token", "fault", "words"),
    [
        ("hf_readsecret", None, ("answers with 403", "may not write there")),
        (TOKEN, "GatedRepo", ("its owner grants access",)),
        (TOKEN, "RepoNotFound", ("no such repository",)),
        (TOKEN, "Down", ("answers with 500", "try again later")),
    ],
)
def test_a_hub_that_refuses_is_one_message(
    hub, settings, tmp_path, capsys, monkeypatch, token, fault, words
):
    monkeypatch.setenv("HF_TOKEN", token)
    hub.repositories[NAME] = Repository({}, fault=fault)
    assert push(settings) == 2
    message = said(capsys)
    assert message.count("error:") == 1
    assert not [word for word in words if word not in message], message
    assert "secret" not in message
    assert (tmp_path / "digits/export/config.json").exists()


def test_what_is_seen_before_the_export(hub, settings, tmp_path, capsys, monkeypatch):
    def refused(*options, words, given=()):
        assert run(["export", *settings, *given, *options]) == 2
        message = said(capsys)
        assert message.count("error:") == 1, message
        assert words in message
        assert not (tmp_path / "digits/export").exists()
        assert hub.requests == []

    refused("--push", "digits", words="not the name of a repository: give OWNER/NAME")
    refused("--push", "a/b@main", words="not the name of a repository")
    refused("--private", words="--private needs --push")
    repa = ["export.format=repa"]
    refused("--push", NAME, given=repa, words="'repa' is not pushed; choose srepa_ds or diffusers")
    monkeypatch.delenv("HF_TOKEN")
    refused("--push", NAME, words="there is no token of the Hub; log in with `hf auth login`")


def test_no_network_is_one_message(hub, settings, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert push(settings) == 2
    message = said(capsys)
    assert "http://127.0.0.1:9 cannot be reached" in message
    assert (tmp_path / "digits/export/config.json").exists()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert push(settings) == 2
    assert "HF_HUB_OFFLINE is set; unset it" in said(capsys)


def test_damage_on_the_way_back_is_named(hub, settings, tmp_path, capsys):
    assert push(settings) == 0
    hub.damaged.add("model.safetensors")
    named = f"sample.weights={NAME}"
    assert run(["fetch", *settings, named]) == 2
    assert "model.safetensors: damaged on its way" in said(capsys)
    assert run(["sample", *settings, named]) == 2
    words = said(capsys)
    assert f"sample.weights: {NAME}: no such file or folder" in words
    assert "run `srepa-ds fetch CONFIG`" in words


def test_the_program_itself_goes_online_for_a_push_alone(hub, settings, tmp_path):
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "SREPA_"))}
    own = {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "srepa_ds", "export", *settings, "--push", NAME]
    done = subprocess.run(
        command,
        env={**inherited, **own, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"pushed to {hub.address}/{NAME}" in done.stderr
    assert "secret" not in done.stdout + done.stderr
    assert "model.safetensors" in hub.repositories[NAME].files


def test_without_the_option_nothing_is_asked(hub, settings):
    assert run(["export", *settings]) == 0
    assert hub.requests == []


def test_a_public_model_is_described_by_names_alone(hub, settings, tmp_path):
    """The folders of the machine are in config.json, as in each export, but not on the page."""
    assert push(settings) == 0
    card = hub.repositories[NAME].files["README.md"].decode()
    assert str(tmp_path) not in card
    document = json.loads(hub.repositories[NAME].files["config.json"])
    assert document["provenance"]["step"] == 5
