"""Which published things there are, and where they are looked for."""

from dataclasses import replace
from pathlib import Path

import pytest
import timm

from srepa_ds.encoders.publications import PUBLISHED, HubFiles, repository_of, vae
from srepa_ds.encoders.published import local_file, local_folder
from srepa_ds.encoders.table import TEACHERS
from srepa_ds.errors import DataError

TAGGED = [spec.architecture for spec in TEACHERS.values() if "." in spec.architecture]


@pytest.fixture(autouse=True)
def empty(monkeypatch, tmp_path):
    monkeypatch.setenv("SREPA_FETCHED", str(tmp_path / "fetched"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("stabilityai/sd-vae-ft-mse", ("stabilityai/sd-vae-ft-mse", None)),
        ("a/b.c@v1.0", ("a/b.c", "v1.0")),
        ("a/b@refs/pr/3", ("a/b", "refs/pr/3")),
        *((name, None) for name in ("vae", "/a/b", "a/b/c", "../b", "a/../b", "a/b@", "~/b", "")),
        *((name, None) for name in ("a/b@../c", "a\\b/c", "a/b\n", "a b/c")),
    ],
)
def test_names_of_repositories(name, expected):
    assert repository_of(name) == expected


def test_names_of_folders_are_plain():
    assert vae("a/b@refs/pr/3").folder_name == "a--b@refs--pr--3"


@pytest.mark.parametrize("architecture", TAGGED)
def test_every_teacher_with_a_tag_is_safetensors_on_the_hub(architecture):
    if "ijepa" in architecture:
        with pytest.raises(DataError, match=r"no safetensors file.*yourself \(https://"):
            PUBLISHED["timm"](architecture)
        return
    published = PUBLISHED["timm"](architecture)
    assert published.repository.startswith("timm/")
    assert published.wanted[0][0].endswith("model.safetensors")


def test_the_file_that_timm_names_is_looked_for(monkeypatch):
    """Earlier versions of timm name OpenCLIP's pickle, beside which there is a safetensors file."""
    found = timm.models.get_pretrained_cfg("vit_base_patch16_224.augreg_in21k")
    changed = replace(found, hf_hub_filename="open_clip_pytorch_model.bin")
    monkeypatch.setattr("timm.models.get_pretrained_cfg", lambda name: changed)
    published = PUBLISHED["timm"]("vit_base_patch16_224.augreg_in21k")
    assert published.wanted == (
        ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors"),
    )


def test_of_each_group_the_first_file_is_taken():
    published = HubFiles("a/b", (("x",), ("y", "z")))
    assert published.chosen({"x", "y", "z", "w"}) == ("x", "y")
    assert published.chosen({"x", "z"}) == ("x", "z")
    assert published.chosen({"y", "z"}) is None


def test_a_folder_of_ones_own_is_taken_as_it_is(tmp_path):
    (tmp_path / "some/vae").mkdir(parents=True)
    assert local_folder(Path("some/vae"), setting="codec.weights") == Path("some/vae")


def test_what_is_nowhere_is_one_message(tmp_path):
    words = rf"codec\.weights: some/vae is not a folder \(looked for at {tmp_path}/some/vae\)"
    with pytest.raises(DataError, match=words):
        local_folder(Path("some/vae"), setting="codec.weights")
    with pytest.raises(DataError, match=r"codec\.weights: /no/such/vae: not a folder, and not"):
        local_folder(Path("/no/such/vae"), setting="codec.weights")


def test_files_of_ones_own_come_before_published_names(tmp_path):
    (tmp_path / "adm-imagenet256").mkdir()
    for name in ("adm-imagenet256", "real/images.npz", "/nowhere"):
        assert local_file(Path(name), setting="evaluate.reference") == Path(name)


def test_a_published_name_must_be_fetched_and_is_suggested(tmp_path):
    words = r"evaluate\.reference: 'adm-imagenet256' \(https://.*not fetched.*give the path"
    with pytest.raises(DataError, match=words):
        local_file(Path("adm-imagenet256"), setting="evaluate.reference")
    words = r"evaluate\.samples: adm-imagnet256: no such file.*did you mean 'adm-imagenet256'\?"
    with pytest.raises(DataError, match=words):
        local_file(Path("adm-imagnet256"), setting="evaluate.samples")
