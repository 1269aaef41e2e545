"""Installed as users do it: from a built wheel, away from the checkout, with each extra."""

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from configparser import ConfigParser
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from places import ROOT

SETUP = ConfigParser()
SETUP.read(ROOT / "setup.cfg", encoding="utf-8")
EXTRAS = {
    extra: [Requirement(line) for line in packages.strip().splitlines()]
    for extra, packages in SETUP["options.extras_require"].items()
    if extra != "dev"
}
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]

pytestmark = pytest.mark.slow


def succeeded(command: list[str | Path], **settings) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, **settings)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy: setuptools leaves its own files where it builds."""
    asked = [*PIP, "download", "--no-deps", "--dest", tmp_path_factory.mktemp("x"), "setuptools"]
    if subprocess.run(asked, capture_output=True, timeout=60).returncode:
        pytest.skip("no package index can be reached")
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("srepa_ds", "configs", "ds_configs", "constraints"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    succeeded([*PIP, "wheel", "--no-deps", "--wheel-dir", target, source])
    (built,) = target.glob("*.whl")
    return built


def test_the_wheel_ships_every_config(wheel):
    with zipfile.ZipFile(wheel) as archive:
        shipped = {name.partition("/share/srepa_ds/")[2] for name in archive.namelist()}
    kept = [path for folder in ("configs", "ds_configs") for path in (ROOT / folder).rglob("*.*")]
    assert len(kept) > 10
    assert {str(path.relative_to(ROOT)) for path in kept} <= shipped
    assert "constraints/tested.txt" in shipped


def test_the_wheel_offers_every_extra(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
    assert set(metadata.get_all("Provides-Extra")) == {*EXTRAS, "dev"}
    offered = [Requirement(text) for text in metadata.get_all("Requires-Dist")]
    for extra, packages in EXTRAS.items():
        named = {
            one.name for one in offered if one.marker and one.marker.evaluate({"extra": extra})
        }
        assert {package.name for package in packages} <= named


@pytest.fixture(scope="session")
def elsewhere(wheel, tmp_path_factory) -> Path:
    """The programs of an environment with the wheel; its dependencies are those of the tests."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    (library,) = (folder / "lib").glob("python*/site-packages")
    installed = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (library / "dependencies.pth").write_text("\n".join(installed))
    succeeded([*PIP, "--python", folder / "bin" / "python", "install", "--no-deps", wheel])
    return folder / "bin"


def test_the_wheel_works_in_an_empty_folder(elsewhere, tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    settings = {"cwd": tmp_path, "env": environment}
    where = "import srepa_ds; print(srepa_ds.__file__)"
    assert str(elsewhere.parent) in succeeded([elsewhere / "python", "-c", where], **settings)
    assert "torch " in succeeded([elsewhere / "srepa-ds", "version"], **settings)
    find = "import sys, pathlib, srepa_ds.files as f; print(f.shipped(pathlib.Path(sys.argv[1])))"
    for name in ("ds_configs/zero2.json", "configs/digits-srepa-mse.yaml"):
        found = Path(succeeded([elsewhere / "python", "-c", find, name], **settings).strip())
        assert found.read_bytes() == (ROOT / name).read_bytes()
        assert elsewhere.parent in found.parents
    # The experiment names a DeepSpeed file by a relative path, which is not in this folder either.
    assert "zero" in succeeded([elsewhere / "srepa-ds", "config", found], **settings)
    assert list(tmp_path.iterdir()) == []
    mine = "configs/digits-srepa-mse.yaml"
    printed = succeeded([elsewhere / "srepa-ds", "config", mine], **settings)
    assert "runs/digits-srepa-mse" in printed, "shipped configurations are found by their names"
    succeeded([elsewhere / "srepa-ds", "init", "copied"], **settings)
    assert (tmp_path / "copied" / mine).read_bytes() == (ROOT / mine).read_bytes()
    assert (tmp_path / "copied/ds_configs/zero3.json").is_file()


@pytest.mark.parametrize("extra", EXTRAS)
def test_every_extra_can_be_resolved(wheel, tmp_path, monkeypatch, extra):
    report = tmp_path / "report.json"
    # flash-attn is built from source, and asks the torch that is installed how.
    options = ["--no-build-isolation"] if extra == "flash" else []
    monkeypatch.setenv("FLASH_ATTENTION_SKIP_CUDA_BUILD", "TRUE")
    wanted = f"srepa_ds[{extra}] @ {wheel.as_uri()}"
    succeeded([*PIP, "install", "--dry-run", *options, "--report", report, wanted])
    resolved = {
        canonicalize_name(row["metadata"]["name"])
        for row in json.loads(report.read_text())["install"]
    }
    for requirement in EXTRAS[extra]:
        name = canonicalize_name(requirement.name)
        assert name in resolved or not _missing(name)


def _missing(name: str) -> bool:
    shown = subprocess.run([*PIP, "show", name], capture_output=True, timeout=60, check=False)
    return shown.returncode != 0
