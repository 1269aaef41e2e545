"""The versions that setup.cfg promises, those the tests run with, and those a user is shown."""

from configparser import ConfigParser
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version as PackageVersion
from places import ROOT

from srepa_ds.cli import run
from srepa_ds.commands import version

SETUP = ConfigParser()
SETUP.read(ROOT / "setup.cfg", encoding="utf-8")


def listed(text: str) -> list[Requirement]:
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return [Requirement(line) for line in lines if line]


def pins(name: str) -> dict[str, PackageVersion]:
    found = {}
    for requirement in listed((ROOT / "constraints" / name).read_text(encoding="utf-8")):
        (pin,) = requirement.specifier
        assert pin.operator == "=="
        found[canonicalize_name(requirement.name)] = PackageVersion(pin.version)
    return found


NEEDED = {
    canonicalize_name(requirement.name): requirement
    for text in (
        SETUP["options"]["install_requires"],
        *(SETUP["options.extras_require"][extra] for extra in ("demo", "parquet", "vae", "eval")),
    )
    for requirement in listed(text)
}


def test_the_oldest_versions_are_the_lower_bounds():
    oldest = pins("oldest.txt")
    assert oldest.keys() == NEEDED.keys()
    for name, requirement in NEEDED.items():
        (bound,) = requirement.specifier
        assert bound.operator in (">=", "~=")
        lower = PackageVersion(bound.version).base_version
        assert oldest[name] == PackageVersion(lower), name


@pytest.mark.parametrize("name", NEEDED)
def test_the_tested_version_is_one_that_is_promised(name):
    assert NEEDED[name].specifier.contains(pins("tested.txt")[name])


@pytest.mark.parametrize("build", ["2.11.0a0+a1b2c3d.nv26.3", "2.11.0", "2.15.0+cpu"])
def test_torch_may_be_a_build_of_nvidias(build):
    assert NEEDED["torch"].specifier.contains(build)
    assert not NEEDED["torch"].specifier.contains("2.10.1")


def test_only_the_minor_version_of_deepspeed_that_was_read_is_taken():
    promised = NEEDED["deepspeed"].specifier
    assert promised.contains("0.19.9")
    assert not promised.contains("0.20.0")


def test_version_prints_what_is_installed_beside_what_was_tested(capsys):
    assert run(["version"]) == 0
    printed = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in printed.splitlines() if line}
    assert rows.keys() >= {"torch", "deepspeed", "triton", "matplotlib", "diffusers", "flash-attn"}
    assert "pytest" not in rows
    tested = pins("tested.txt")
    assert rows["torch"][2] == str(tested["torch"])
    assert rows["deepspeed"][1] == metadata.version("deepspeed")


@pytest.mark.parametrize(
    ("installed", "tested", "note"),
    [
        ("2.14.1", "2.14.1", ""),
        ("2.14.1+cu130", "2.14.1", ""),
        ("2.11.0", "2.14.1", "differs"),
        (None, "2.14.1", "not installed"),
        ("0.1", None, "not tested"),
    ],
)
def test_what_stands_out_is_named(installed, tested, note):
    row = version.Version("torch", installed, tested)
    assert row.note == note
    assert version.table([row]).splitlines()[-1].endswith(note)
