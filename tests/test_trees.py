"""Trees of plain values: read from YAML and JSON, flattened and compared."""

import json
import os
import re
import threading
import time
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import yaml
from generated import QUICK, bounded, trees
from hypothesis import example, given
from hypothesis import strategies as st
from places import ROOT

from srepa_ds.config.experiment import config_of, load_config
from srepa_ds.documents.json_reader import parse_json
from srepa_ds.documents.yaml_reader import YamlDumper, parse_yaml
from srepa_ds.errors import ConfigError
from srepa_ds.trees import Difference, apply_overrides, differences, leaves, load_tree


def test_leaves_are_the_plain_values_by_path():
    tree = {"a": 1, "b": {"c": [2, {"d": None}], "empty": {}}}
    assert dict(leaves(tree)) == {"a": 1, "b.c.0": 2, "b.c.1.d": None, "b.empty": {}}
    assert dict(leaves({"x": 3}, "below")) == {"below.x": 3}


def test_differences_are_told_value_by_value():
    old = {"same": 1, "changed": 2, "gone": 3, "list": [1, 2]}
    new = {"same": 1, "changed": 4, "list": [1, 5], "added": {"deep": 6}}
    assert differences(old, new) == [
        Difference("changed", 2, 4),
        Difference("gone", 3, None),
        Difference("list.1", 2, 5),
        Difference("added.deep", None, 6),
    ]
    assert differences(old, old) == []


def test_an_empty_mapping_differs_from_a_filled_one_by_what_fills_it():
    assert differences({"arguments": {}}, {"arguments": {"depth": 3}}) == [
        Difference("arguments.depth", None, 3)
    ]
    assert differences({"arguments": {"depth": 3}}, {"arguments": {}}) == [
        Difference("arguments.depth", 3, None)
    ]
    assert differences({"arguments": {}}, {}) == [Difference("arguments", {}, None)]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0100", 100), ("0000500", 500), ("-007", -7), ("+3", 3), ("0o17", 15), ("0x1F", 31),
        ("1:30", "1:30"), ("1_000", "1_000"), ("08", 8), ("0b11", "0b11"), ("1.2.3", "1.2.3"),
        ("yes", "yes"), ("No", "No"), ("on", "on"), ("OFF", "OFF"), ("y", "y"),
        ("True", True), ("FALSE", False), ("tRUE", "tRUE"), ("Null", None), ("~", None),
        ("", None), ("nULL", "nULL"), ("1e3", 1000.0), ("-.Inf", float("-inf")), ("1.", 1.0),
        (".", "."), ("+.5", 0.5), ("=", "="), ("<<: {a: 1}", {"a": 1}),
        ("2001-12-14t21:59:43.10-05:00", "2001-12-14t21:59:43.10-05:00"),
        ("!!str 0100", "0100"), ("!!int '0100'", 100), ("!!float 5", 5.0), ("'0100'", "0100"),
        ("18446744073709551615", 2**64 - 1), (r'"\ud83d\ude00"', "😀"), ("\ufeffa: 1", {"a": 1}),
    ],
)  # fmt: skip
def test_plain_scalars_are_those_of_yaml_1_2(text, value):
    found = parse_yaml(text)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1e400", "the number 1e400 is too large (line 1)"),
        ("a: " + "9" * 5000, "of 5000 characters is too large"),
        ("a: 18446744073709551616", "is too large"),
        ("b: 1\na: &a [*a]", "an alias stands for what it lies in (line 2)"),
        ("&a {b: {c: *a}}", "an alias stands for what it lies in"),
        ("[" * 150 + "]" * 150, "nested more than 100 levels deep"),
        ("[" * 100_000, "nested more than 100 levels deep"),
        ("- " * 100_000, "nested more than 100 levels deep"),
        ("a: 1\n1: x", "the key '1' is not text; put it in quotes (line 2)"),
        ("null: x", "the key 'null' is not text"), ("[a]: x", "the key is not text"),
        ("{}: x", "the key is not text"), ("true: x", "the key 'true' is not text"),
        ("a: !!binary aGk=", "the tag !!binary means nothing here"),
        ("a: !!set {b}", "the tag !!set means nothing"), ("a: !!omap [b: 1]", "!!omap"),
        ("a: !!timestamp 2001-12-14", "!!timestamp"), ("!!python/name:os.system x", "!!python"),
        ("a: !own x", "the tag !own means nothing"), ("!!int x", "'x' is no int"),
        (r'a: "\ud800"', "half of a character is escaped (line 1)"),
        (r'a: "\Uffffffff"', "an escape that is no character"),
        ("a: \0", "special characters are not allowed"), ("a: \x07", "special characters"),
        ("a:\n\tb: 1", "(line 2)"), ("a: 1\n---\nb: 2", "but found another document (line 2)"),
        ("a: *b", "found undefined alias 'b' (line 1)"), ("a: {b: 1, b: 2}", "given twice"),
        ("x" * (1 << 19), "more than 256 thousand characters"),
    ],
)  # fmt: skip
def test_yaml_that_is_refused(tmp_path, text, words):
    with bounded(), pytest.raises(yaml.YAMLError):
        parse_yaml(text)
    path = tmp_path / "file.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=re.escape(words)) as caught:
        load_tree(path)
    assert len(str(caught.value).splitlines()) == 2


def test_an_alias_bomb_ends_at_once():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]
    with bounded(), pytest.raises(yaml.YAMLError, match="more than 10,000 values"):
        parse_yaml("\n".join(lines))
    chain = ["a0: &a0 [x]", *(f"a{n}: &a{n} [*a{n - 1}]" for n in range(1, 200))]
    with pytest.raises(yaml.YAMLError, match="nested more than"):
        parse_yaml("\n".join(chain))


def test_aliases_are_separate_values():
    tree = parse_yaml("a: &shared {w: 1}\nb: *shared\n")
    tree["b"]["w"] = 2
    assert tree == {"a": {"w": 1}, "b": {"w": 2}}


@QUICK
@given(trees())
@example(["0100", "0o7", "1:30", "yes", "1e400", "~", "", " ", "\n", "a\n b", "#", "- a", ".inf"])
@example({"": "\x85\u2028\ufeff\x00\x1b", "a" * 200: -0.0, "<<": "=", "?": 5e-324})
def test_what_is_dumped_reads_back(tree):
    shared = [tree, tree]
    for style in (False, True):
        text = yaml.dump(shared, Dumper=YamlDumper, sort_keys=False, default_flow_style=style)
        found = parse_yaml(text)
        # NaN differs from itself, and 1 equals True: JSON's spelling tells them apart.
        assert json.dumps(found) == json.dumps(shared)


@QUICK
@given(st.text(max_size=60) | st.text("{}[]:,&*!|>'\"%@-?# \n\tab01.~<=\\u", max_size=40))
def test_any_text_is_yaml_or_refused(text):
    with suppress(yaml.YAMLError):
        json.dumps(parse_yaml(text))


SHIPPED = [path.read_bytes() for path in sorted((ROOT / "configs").glob("*.yaml"))]


@QUICK
@given(st.data())
def test_a_damaged_configuration_is_read_or_refused(data):
    content = bytearray(data.draw(st.sampled_from(SHIPPED)))
    start = data.draw(st.integers(0, len(content)))
    stop = start + data.draw(st.integers(0, 20))
    content[start:stop] = data.draw(st.binary(max_size=20) | st.just(b"&a [*a, *a]"))
    with TemporaryDirectory() as folder:
        path = Path(folder) / "damaged.yaml"
        path.write_bytes(content)
        with suppress(ConfigError):
            load_config(path)


SETTINGS = [
    "train.steps", "optimizer.betas.1", "alignments.0.depth", "alignments.0.teacher.spec", "ema",
    "alignments", "run.folder", "model.input_size.0", "evaluate", "kind", "", ".", "..", "train.",
]  # fmt: skip


@QUICK
@given(
    st.sampled_from(SETTINGS) | st.text(max_size=20) | st.just("a." * 5000),
    st.text(max_size=20) | trees().map(json.dumps) | st.just("[" * 5000),
)
def test_any_override_is_read_or_refused(path, text):
    files = [{"run": {"folder": "x"}, "alignments": [{"depth": 1}], "model": {"input_size": [1]}}]
    with suppress(ConfigError):
        config_of(files, [f"{path}={text}"], source="test")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("kernels.2.size=1", "kernels has 2 items, numbered from 0; to add one, write kernels="),
        ("kernels.last.size=1", "kernels is a list, and its items are addressed by number"),
        ("kernels.-1.size=1", "addressed by number"), ("kernels.².size=1", "addressed by number"),
        ("rate.deep=1", "rate is a plain value"), ("a." * 200 + "b=1", "too many parts"),
        ("rate=1e400", "the number 1e400 is too large"), ("rate=[1", "'[1' is not valid YAML"),
    ],
)  # fmt: skip
def test_an_override_that_has_no_place_is_told_why(override, words):
    tree = {"rate": 1, "kernels": [{"size": 1}, {"size": 2}]}
    with pytest.raises(ConfigError, match=re.escape(words)):
        apply_overrides(tree, [override])


def test_a_file_is_opened_once(tmp_path):
    """A pipe is empty the second time, as is `<(...)` of a shell."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_text("a: 1\n"), daemon=True)
    writer.start()
    assert load_tree(pipe) == {"a": 1}
    writer.join(10)


def test_a_missing_file_is_named_with_the_place_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"looked for at {tmp_path}/sub/none.yaml"):
        load_tree(Path("sub/none.yaml"))
    (tmp_path / "main.yaml").write_text("base: sub/base.yaml\n")
    with pytest.raises(ConfigError, match=f"looked for at {tmp_path}/sub/base.yaml"):
        load_tree(Path("main.yaml"))
    with pytest.raises(ConfigError, match="No such file or directory; give"):
        load_tree(tmp_path / "none.yaml")


def test_shipped_files_are_found_by_name_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = load_tree(Path("configs/digits-srepa-mse.yaml"))
    assert found == load_tree(ROOT / "configs/digits-srepa-mse.yaml")
    (tmp_path / "own.yaml").write_text("base: configs/digits-srepa-mse.yaml\n")
    assert load_tree(tmp_path / "own.yaml") == found
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/digits-srepa-mse.yaml").write_text("mine: 1\n")
    assert load_tree(tmp_path / "own.yaml") == {"mine": 1}, "a user's file comes first"


def test_paths_of_configurations_are_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PLACE", str(tmp_path))
    (tmp_path / "base.yaml").write_text("a: 1\n")
    (tmp_path / "main.yaml").write_text("base: ${PLACE}/base.yaml\n")
    assert load_tree(Path("~/main.yaml")) == {"a": 1}
    (tmp_path / "main.yaml").write_text("base: $NOT_SET_ANYWHERE/base.yaml\n")
    with pytest.raises(ConfigError, match="variable 'NOT_SET_ANYWHERE' is not set"):
        load_tree(Path("$PLACE/main.yaml"))


@pytest.mark.parametrize("base", ["[a]", "1", "{a: 1}", "''"])
def test_a_base_must_be_a_path(tmp_path, base):
    (tmp_path / "main.yaml").write_text(f"base: {base}\n")
    with pytest.raises(ConfigError):
        load_tree(tmp_path / "main.yaml")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 101 + "]" * 101, "nested too deeply"), ("[" * 100_000, "nested too deeply"),
        ('{"a": 1, "a": 2}', "'a' is given twice"), ("9" * 5000, "too large"),
        (r'"\ud800"', "surrogates"), (r'{"\udfff": 1}', "surrogates"), ("", "Expecting value"),
    ],
)  # fmt: skip
def test_json_that_is_refused(text, words):
    with bounded(), pytest.raises(ValueError, match=words):
        parse_json(text)


@QUICK
@given(trees())
def test_json_reads_back(tree):
    text = json.dumps(tree)
    assert json.dumps(parse_json(text)) == text


def test_a_merge_key_brings_in_what_is_not_given():
    text = "a: &a {x: 1, y: 2}\nb: &b {y: 3, z: 4}\nc: {<<: [*a, *b], z: 5}\nd: {<<: *a, x: 6}"
    tree = parse_yaml(text)
    assert tree["c"] == {"x": 1, "y": 2, "z": 5}
    assert tree["d"] == {"x": 6, "y": 2}
    assert parse_yaml('"<<": 1') == {"<<": 1}
    with pytest.raises(yaml.YAMLError, match="takes a mapping or a list of them"):
        parse_yaml("<<: 3")


def test_a_key_given_twice_among_many_is_found_at_once():
    names = [f'"{number}": 0' for number in range(100_000)]
    began = time.monotonic()
    with pytest.raises(ValueError, match="the key '99999' is given twice"):
        parse_json(f"{{{', '.join([*names, names[-1]])}}}")
    assert time.monotonic() - began < 5
