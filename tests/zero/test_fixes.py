"""The table of changes to DeepSpeed, and the message about an attribute that a version lacks."""

import importlib
import json
from functools import reduce
from types import SimpleNamespace

import pytest
from deepspeed import __version__ as installed
from ranks import run_worker

from srepa_ds.errors import SRepaError
from srepa_ds.zero.fixes import FIXES, Fix, check_attributes
from srepa_ds.zero.private import TESTED, private

each = pytest.mark.parametrize("fix", FIXES, ids=lambda fix: fix.name.replace(" ", "-"))


def engine_with(paths: tuple[str, ...]) -> SimpleNamespace:
    """Returns an object that has an attribute at the end of each path."""
    engine = SimpleNamespace()
    for path in paths:
        owner = engine
        for name in path.split("."):
            owner = vars(owner).setdefault(name, SimpleNamespace())
    return engine


def message_about(fix: Fix, name: str) -> str:
    return rf"DeepSpeed {installed} has no [\w.]+\.{name}, .* for {fix.name}; tested with"


def test_the_installed_version_has_all_attributes_and_every_row_is_used(tmp_path):
    run_worker("fixed_engines", 1, tmp_path)
    applied = json.loads((tmp_path / "applied.json").read_text())
    names = [fix.name for fix in FIXES]
    assert len(set(names)) == len(names)
    assert {name for found in applied.values() for name in found} == set(names)
    # No row applies everywhere but those that come before there is an engine.
    everywhere = set(names).intersection(*applied.values())
    assert everywhere == {fix.name for fix in FIXES if fix.phase == "before"}


@each
def test_a_row_says_what_why_and_where(fix):
    assert all((fix.name, fix.changes, fix.why, fix.upstream))
    assert fix.read_in in TESTED


@each
def test_a_missing_attribute_is_named(fix, monkeypatch):
    engine = engine_with(fix.relies_on)
    for path in fix.relies_on:
        module, _, names = path.rpartition(":")
        *above, name = names.split(".")
        owner = importlib.import_module(module) if module else reduce(getattr, above, engine)
        with monkeypatch.context() as patch:
            patch.delattr(owner, name)
            with pytest.raises(SRepaError, match=message_about(fix, name)):
                check_attributes(fix, engine)
    check_attributes(fix, engine)


def test_the_message_names_the_cure():
    assert private(SimpleNamespace(fp16_groups=[1]), "fp16_groups", needed_for="masters") == [1]
    with pytest.raises(SRepaError) as caught:
        private(SimpleNamespace(), "fp16_groups", needed_for="finding masters")
    assert caught.value.exit_code == 2
    assert str(caught.value) == (
        f"DeepSpeed {installed} has no SimpleNamespace.fp16_groups, which srepa_ds needs for "
        'finding masters; tested with DeepSpeed 0.19.8: pip install "deepspeed~=0.19.8"'
    )
