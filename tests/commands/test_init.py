"""The shipped configurations, copied to be changed."""

import os
import re

import pytest
from places import ROOT

from srepa_ds.commands.init import init
from srepa_ds.config.experiment import load_config
from srepa_ds.errors import OutputError

SHIPPED = {
    path.relative_to(ROOT): path.read_bytes()
    for folder in ("configs", "ds_configs")
    for path in (ROOT / folder).rglob("*.*")
}


def found(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_everything_shipped_is_copied_and_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = init(tmp_path / "mine")
    assert found(tmp_path / "mine") == SHIPPED
    assert f"copied {len(SHIPPED)} files to {tmp_path}/mine" in said
    assert f"cd {tmp_path}/mine\n" in said
    own = tmp_path / "mine/configs/digits-srepa-mse.yaml"
    own.write_text(own.read_text().replace("depth: 2", "depth: 3"))
    assert load_config(own).alignments[0].depth == 3


def test_what_is_there_already_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    init(tmp_path)
    (tmp_path / "ds_configs/zero1.json").unlink()
    (tmp_path / "configs/mine.yaml").write_text("of years")
    said = init(tmp_path)
    assert f"copied 1 files to {tmp_path}; {len(SHIPPED) - 1} were there already" in said
    assert "cd " not in said or str(tmp_path) in said
    assert (tmp_path / "configs/mine.yaml").read_text() == "of years"


def test_nothing_is_copied_where_a_file_differs(tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/digits-reg.yaml").write_text("changed")
    words = "already holds other versions of configs/digits-reg.yaml; nothing was copied"
    with pytest.raises(OutputError, match=re.escape(words)):
        init(tmp_path)
    assert len(found(tmp_path)) == 1


def test_a_place_that_cannot_be_written_to_is_left_alone(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "ds_configs").write_text("a file in the way of the second folder")
    for folder, words in (("file", "Not a directory"), ("file/below", "Not a directory")):
        with pytest.raises(OutputError, match=words):
            init(tmp_path / folder)
    with pytest.raises(OutputError, match="cannot write"):
        init(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["ds_configs", "file"]
