"""`srepa-ds fetch` against a stand-in for the Hub, and what other commands find afterwards."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from builders import TEACHER, contents, largest_file
from hub_stand_in import hub_stand_in
from places import ROOT
from safetensors.torch import save
from teacher_models import SMALL, images, plain_encoder, scrambled

from srepa_ds.cli import run
from srepa_ds.commands.fetch import named_weights
from srepa_ds.config.experiment import load_config
from srepa_ds.encoders.publications import PUBLISHED, WEB_FILES
from srepa_ds.encoders.teacher import TeacherConfig, TeacherSpec, load_teacher
from srepa_ds.errors import DataError

VAE = "stabilityai/sd-vae-ft-mse"
TIMM = "timm/vit_tiny_patch16_224.augreg_in21k"
SPEC = {
    "architecture": "vit_tiny_patch16_224.augreg_in21k",
    "arguments": {**SMALL, "patch_size": 2},
    "width": 24,
    "patch_size": 2,
    "input_size": 16,
}
PARSED = TeacherSpec(**SPEC)
VAE_FILES = {
    "config.json": b'{"_class_name": "AutoencoderKL"}',
    "diffusion_pytorch_model.safetensors": save({"x": torch.arange(5000)}),
    "diffusion_pytorch_model.bin": b"a pickle",
    "README.md": b"about it",
}


@pytest.fixture(scope="module")
def teacher_file():
    return save(scrambled(plain_encoder(PARSED, 8)).state_dict())


@pytest.fixture
def hub(monkeypatch, tmp_path, teacher_file):
    """A stand-in with a VAE and a teacher, the only Hub there is."""
    constants = pytest.importorskip("huggingface_hub.constants")
    files = {"model.safetensors": teacher_file, "pytorch_model.bin": b"a pickle"}
    with hub_stand_in({VAE: VAE_FILES, TIMM: files}) as stand_in:
        monkeypatch.setenv("HF_ENDPOINT", stand_in.address)
        monkeypatch.setenv("SREPA_FETCHED", str(tmp_path / "fetched"))
        monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        for name in ("RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        yield stand_in


@pytest.fixture
def config(small_world, tmp_path):
    """An experiment that names a VAE and one teacher, which it uses twice."""
    path = tmp_path / "experiment.yaml"
    tree = yaml.safe_load(small_world.config.read_text())
    tree["alignments"][0]["teacher"] = {"spec": SPEC, "dtype": "fp32"}
    tree["evaluate"]["extractor"] = {"spec": SPEC}
    tree["codec"] = {"kind": "vae", "weights": VAE}
    tree["model"]["in_channels"] = 4
    path.write_text(yaml.safe_dump(tree))
    return path


def said(capsys) -> str:
    captured = capsys.readouterr()
    return captured.out + captured.err


def test_what_a_configuration_names_is_fetched_once(hub, config, tmp_path, capsys, teacher_file):
    assert run(["fetch", str(config)]) == 0
    folder, words = tmp_path / "fetched", said(capsys)
    found = contents(folder)
    assert found.pop("stabilityai--sd-vae-ft-mse", 0) is None
    assert found.pop("timm--vit_tiny_patch16_224.augreg_in21k", 0) is None
    document = json.loads(found.pop("fetched.json"))
    vae = "stabilityai--sd-vae-ft-mse"
    names = ("config.json", "diffusion_pytorch_model.safetensors")
    assert found == {
        **{f"{vae}/{name}": VAE_FILES[name] for name in names},
        "timm--vit_tiny_patch16_224.augreg_in21k/model.safetensors": teacher_file,
    }
    entry = document["fetched"][vae]
    assert entry["revision"] == hub.repositories[VAE].commit
    assert entry["source"] == f"{hub.address}/{VAE}"
    assert entry["files"] == {
        name: {
            "num_bytes": len(VAE_FILES[name]),
            "sha256": hashlib.sha256(VAE_FILES[name]).hexdigest(),
        }
        for name in names
    }
    settings = ("codec.weights", "alignments.0.teacher", "evaluate.extractor")
    assert all(re.search(rf"^{re.escape(s)} .* in {folder}/", words, re.M) for s in settings), words
    asked = len(hub.requests)
    assert len(hub.gets("/model.safetensors")) == 1
    assert run(["fetch", str(config)]) == 0
    assert len(hub.requests) == asked, "there is nothing left to ask for"
    assert hub.tokens == {"Bearer hf_secretsecret"}
    assert "secret" not in words + said(capsys) + json.dumps(document)


def test_a_dry_run_only_lists(hub, config, tmp_path, capsys):
    assert run(["fetch", str(config), "--dry-run"]) == 0
    words = said(capsys)
    assert re.search(rf"codec.weights +{VAE} +0.0 MB +to be fetched from {hub.address}", words)
    assert not (tmp_path / "fetched").exists()
    assert not [request for request in hub.requests if "/resolve/" in request]


def test_the_fetched_teacher_has_the_published_weights(hub, config, monkeypatch, teacher_file):
    assert run(["fetch", str(config)]) == 0
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    found = load_teacher(TeacherConfig(spec=PARSED, dtype="fp32"), resolution=16, device="cpu")
    expected = scrambled(plain_encoder(PARSED, 8))
    for key, value in found.encoder.state_dict().items():
        assert torch.equal(value, expected.state_dict()[key])
    assert found.tokens(images(16)).patches.shape == (2, 64, 24)


def test_a_preparation_and_a_training_of_a_teacher(hub, tmp_path, capsys):
    latents = f"latents={{codec: {{kind: vae, weights: {VAE}}}}}"
    assert run(["fetch", str(ROOT / "configs/digits-prepare.yaml"), latents]) == 0
    assert re.search(rf"^latents.codec.weights +{VAE}", said(capsys), re.M)
    assert run(["fetch", str(ROOT / "configs/digits-teacher.yaml")]) == 0
    assert "nothing to fetch" in said(capsys)


def test_files_of_ones_own_are_left_to_their_owner(hub, config, tmp_path, capsys):
    (tmp_path / "vae").mkdir()
    own = [f"codec.weights={tmp_path}/vae", f"evaluate.extractor.weights={tmp_path}/none.pt"]
    own += ["alignments=[]", "--dry-run"]
    assert run(["fetch", str(config), *own]) == 0
    words = said(capsys)
    assert re.search(r"codec.weights .* your own$", words, re.M)
    assert re.search(r"extractor.weights .* your own, and missing$", words, re.M)
    assert hub.requests == []


def test_a_revision_may_be_named(hub, config, tmp_path):
    commit = hub.repositories[VAE].commit
    assert run(["fetch", str(config), f"codec.weights={VAE}@{commit}"]) == 0
    assert (tmp_path / f"fetched/stabilityai--sd-vae-ft-mse@{commit}/config.json").is_file()


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("GatedRepo", ("its owner grants access", f"/{VAE}", "hf auth login")),
        ("RepoNotFound", ("no such repository", "private", "correct the name")),
        ("Down", ("answers with 500", "try again later")),
    ],
)
def test_a_hub_that_refuses_is_one_message(hub, config, tmp_path, capsys, fault, words):
    hub.repositories[VAE].fault = fault
    assert run(["fetch", str(config)]) == 2
    message = said(capsys)
    assert message.count("error:") == 1
    assert not [word for word in words if word not in message], message
    assert "secret" not in message
    assert not (tmp_path / "fetched").exists()


def test_what_cannot_be_had_is_one_message(hub, config, tmp_path, capsys, monkeypatch):
    def refused(*words, settings=()):
        assert run(["fetch", str(config), *settings]) == 2
        message = said(capsys)
        assert message.count("error:") == 1, message
        assert not [word for word in words if word not in message], message
        assert not (tmp_path / "fetched").exists()

    nobody = "codec.weights=nobody/nothing"
    refused("nobody/nothing: there is no such repository", settings=[nobody])
    refused("no revision 'v9'", settings=[f"codec.weights={VAE}@v9"])
    refused("codec.weights", "not the name of a repository", settings=["codec.weights=a/b/c"])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused("HF_HUB_OFFLINE is set")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    refused("http://127.0.0.1:9 cannot be reached", "where there is a network")


def test_pickles_are_refused(hub, config, tmp_path, capsys):
    del hub.repositories[VAE].files["diffusion_pytorch_model.safetensors"]
    assert run(["fetch", str(config)]) == 2
    message = said(capsys)
    assert "only diffusion_pytorch_model.bin, a pickle" in message
    assert "convert it to safetensors" in message


def test_damage_on_the_way_is_found(hub, config, tmp_path, capsys):
    hub.damaged.add("diffusion_pytorch_model.safetensors")
    assert run(["fetch", str(config)]) == 2
    assert "damaged on its way" in said(capsys)
    assert not (tmp_path / "fetched/stabilityai--sd-vae-ft-mse").exists()
    hub.damaged.clear()
    assert run(["fetch", str(config)]) == 0


def test_damage_afterwards_is_found_and_mended(hub, config, tmp_path, capsys):
    assert run(["fetch", str(config)]) == 0
    path = tmp_path / "fetched/timm--vit_tiny_patch16_224.augreg_in21k/model.safetensors"
    whole = path.read_bytes()
    teacher = TeacherConfig(spec=PARSED)
    load_teacher(teacher, resolution=16, device="cpu")
    for damaged, words in ((whole[:-1], "bytes"), (whole[:-1] + b"?", "contents changed")):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=rf"model.safetensors: .*{words}.*srepa-ds fetch"):
            load_teacher(teacher, resolution=16, device="cpu")
    capsys.readouterr()
    assert run(["fetch", str(config)]) == 0
    assert "is fetched again" in said(capsys)
    assert path.read_bytes() == whole


def test_a_broken_list_of_what_was_fetched(hub, config, tmp_path, capsys):
    (tmp_path / "fetched").mkdir()
    for text in ("{", "[]", '{"format": "srepa_ds.fetched", "version": 3, "fetched": {}}'):
        (tmp_path / "fetched/fetched.json").write_text(text)
        assert run(["fetch", str(config)]) == 2
        assert "fetched.json" in said(capsys)
    paths = {"source": "x", "when": "x", "files": {"../../etc/passwd": {}}}
    (tmp_path / "fetched/fetched.json").write_text(json.dumps({"fetched": {"a": paths}}))
    assert run(["fetch", str(config)]) == 2
    assert "is not the name of a file" in said(capsys)


def test_a_full_disk_is_one_message(hub, config, tmp_path, capsys, monkeypatch):
    with largest_file(20_000):
        assert run(["fetch", str(config)]) == 2
    message = said(capsys)
    assert "cannot write" in message
    assert "SREPA_FETCHED" in message
    assert "Traceback" not in message
    assert not (tmp_path / "fetched/fetched.json").exists()
    usage = type("usage", (), {"free": 10})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    assert run(["fetch", str(config)]) == 2
    assert "are to be fetched, and its disk has" in said(capsys)


def test_the_hub_s_own_cache_is_a_second_place(hub, config, tmp_path, capsys):
    from huggingface_hub import hf_hub_download

    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        cache = tmp_path / "cache"
        path = hf_hub_download(VAE, name, cache_dir=cache, endpoint=hub.address)
    assert run(["fetch", str(config)]) == 0
    assert re.search(rf"codec.weights +{VAE} +in {tmp_path}/cache", said(capsys))
    assert not (tmp_path / "fetched/stabilityai--sd-vae-ft-mse").exists()
    os.chmod(path, 0o644)
    with open(path, "r+b") as file:
        file.write(b"?")
    assert run(["fetch", str(config)]) == 0
    assert "is fetched again" in said(capsys)
    assert (tmp_path / "fetched/stabilityai--sd-vae-ft-mse").is_dir()


def test_every_section_is_searched(small_world):
    config = load_config(small_world.config)
    settings = [named.setting for named in named_weights(config)]
    assert settings == ["alignments.0.teacher.weights", "evaluate.extractor.weights"]
    assert TEACHER["architecture"]


def test_extractors_and_files_of_an_evaluation_are_found(small_world, tmp_path, monkeypatch):
    extractors = [
        "evaluate.extractor={name: inception}",
        "evaluate.further_extractors=[{name: fdr-mae}, {name: dinov2-vit-s}, "
        "{name: fdr-clip, weights: own.pth}]",
    ]
    files = ["evaluate.samples=adm-imagenet256-samples", "evaluate.reference=adm-imagenet512"]

    def found(*overrides):
        config = load_config(small_world.config, ["alignments=[]", *overrides])
        return {named.setting: named.published for named in named_weights(config)}

    assert found(*extractors, *files) == {
        "evaluate.samples": WEB_FILES["adm-imagenet256-samples"],
        "evaluate.reference": WEB_FILES["adm-imagenet512"],
        "evaluate.extractor": WEB_FILES["inception"],
        "evaluate.further_extractors.0": PUBLISHED["timm"]("vit_large_patch16_224.mae"),
        "evaluate.further_extractors.1": PUBLISHED["timm"]("vit_small_patch14_dinov2.lvd142m"),
        "evaluate.further_extractors.2.weights": Path("own.pth"),
    }
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adm-imagenet512").mkdir()
    assert "evaluate.reference" not in found(*extractors, *files), "a folder of that name is meant"


@pytest.mark.slow
def test_a_killed_fetch_goes_on(hub, config, tmp_path):
    """Kills the command while the last file arrives; the next one keeps the files before."""
    slow = hub.repositories[TIMM].files
    slow["model.safetensors"] += bytes(64 << 20)
    command = [sys.executable, "-m", "srepa_ds", "fetch", str(config)]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_CACHE": str(tmp_path / "cache")}
    with subprocess.Popen(command, env=variables, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not hub.gets("/model.safetensors"):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert (tmp_path / "fetched/stabilityai--sd-vae-ft-mse").is_dir()
    done = hub.gets("diffusion_pytorch_model.safetensors")
    assert run(["fetch", str(config)]) == 0
    assert hub.gets("diffusion_pytorch_model.safetensors") == done
    assert not list((tmp_path / "fetched").glob("*.partial"))


@pytest.mark.parametrize("size", ["256", "512", "1024"])
def test_the_decoder_of_the_shipped_configurations_is_found(size):
    config = load_config(ROOT / f"configs/imagenet{size}/sit-xl2-srepa-mse.yaml")
    found = {named.setting: named.published for named in named_weights(config)}
    assert found["codec.weights"] == PUBLISHED["vae"]("stabilityai/sd-vae-ft-mse")
    assert found["sample.decoder"] == PUBLISHED["vae"]("stabilityai/sd-vae-ft-ema")
