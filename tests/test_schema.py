"""Sections: strictness, messages, former names, and loading from files and overrides."""

import logging
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from srepa_ds.config.yaml_text import to_yaml
from srepa_ds.documents.yaml_reader import parse_yaml
from srepa_ds.errors import ConfigError, Fault, nearest
from srepa_ds.schema import (
    Section,
    load_section,
    one_of,
    replaced,
    to_tree,
    validated,
    with_current_names,
)
from srepa_ds.trees import apply_overrides, load_tree, merged


class Kernel(Section):
    """The filter's kernel."""

    former_names = {"width": "size"}

    size: int = Field(default=3, ge=1)
    """Its side,
    in pixels."""

    name: Annotated[str, one_of("kernel", {"gauss": 1, "box": 2})] = "gauss"
    """Its shape."""


class Filter(Section):
    """A section with a little of everything."""

    former_names = {"core": "kernel", "cores": "kernels", "reserve": "spare", "speed": "rate"}

    rate: float = Field(gt=0)
    """A number."""

    steps: int = 5
    """A whole number."""

    flag: bool = False
    """Yes or no."""

    mode: Literal["same", "valid"] = "same"
    """A choice."""

    folder: Path = Path("out")
    """A path."""

    betas: tuple[float, float] = (0.9, 0.99)
    """A pair."""

    side: int | tuple[int, int] = 8
    """One or two numbers."""

    note: str = ""
    """Any text."""

    kernel: Kernel = Kernel()
    """A section below."""

    spare: Kernel | None = None
    """A section that may be absent."""

    kernels: tuple[Kernel, ...] = ()
    """A list of sections."""


def build(tree: dict, **arguments) -> Filter:
    return validated(Filter, tree, source="test", **arguments)


def faults(tree: dict, **arguments) -> list[Fault]:
    with pytest.raises(ConfigError) as caught:
        build(tree, **arguments)
    return list(caught.value.faults)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("1E5", 1e5), ("-2.5e+3", -2500.0), (".5", 0.5), ("3.", 3.0),
        ("7", 7), ("-7", -7), ("true", True), ("null", None), ("1e", "1e"), ("e5", "e5"),
        ("2026-01-31", "2026-01-31"), ("'1e-4'", "1e-4"), ("[1e-1, 2]", [0.1, 2]),
    ],
)  # fmt: skip
def test_plain_scalars(text, value):
    found = parse_yaml(text)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("rate", "yes"), ("rate", "'1e-4'"), ("rate", "null"), ("rate", "[1]"), ("rate", ".nan"),
        ("rate", ".inf"), ("rate", "0"), ("steps", "1.0"), ("steps", "1e3"), ("steps", "true"),
        ("steps", "'3'"), ("flag", "1"), ("flag", "'yes'"), ("mode", "full"), ("folder", "3"),
        ("betas", "[1.0]"), ("betas", "[1.0, 0.5, 0.2]"), ("side", "[1]"), ("side", "1.5"),
        ("note", "5"), ("kernel", "3"), ("kernel", "null"), ("kernels", "{}"), ("spare", "[]"),
    ],
)  # fmt: skip
def test_what_is_not_of_the_type_is_refused(field, text):
    assert {
        fault.path.split(".")[0] for fault in faults({"rate": 1.0, field: parse_yaml(text)})
    } == {field}


def test_what_json_cannot_tell_apart_is_accepted():
    tree = parse_yaml("{rate: 2, folder: a/b, betas: [0, 1e-2], side: [4, 6], kernels: [{}]}")
    config = build(tree)
    assert config.rate == 2.0
    assert config.folder == Path("a/b")
    assert config.betas == (0.0, 0.01)
    assert config.side == (4, 6)
    assert config.kernels == (Kernel(),)


def test_a_section_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        build({"rate": 1}).steps = 3


@pytest.mark.parametrize(
    ("tree", "path", "words"),
    [
        ({"stpes": 3}, "stpes", "did you mean 'steps'?"),
        ({"kernel": {"siez": 3}}, "kernel.siez", "did you mean 'size'?"),
        ({"spare": {"nane": "box"}}, "spare.nane", "did you mean 'name'?"),
        ({"kernels": [{}, {"sise": 1}]}, "kernels.1.sise", "did you mean 'size'?"),
        ({"no-tes": 3}, "no-tes", "did you mean 'note'?"),
        ({"kernels": [{"name": "bix"}]}, "kernels.0.name", "did you mean 'box'?"),
        ({"zzz": 3}, "zzz", "known: betas, flag, folder, kernel,"),
        (
            {"kernel": {"name": "gaus"}},
            "kernel.name",
            "unknown kernel 'gaus'; did you mean 'gauss'?",
        ),
        ({"steps": "many"}, "steps", "(given: 'many')"),
        ({"kernel": {"size": 0}}, "kernel.size", "greater than or equal to 1 (given: 0)"),
        ({"side": "wide"}, "side", "(given: 'wide')"),
    ],
)
def test_a_fault_has_a_path_and_says_what_to_do(tree, path, words):
    found = faults({"rate": 1.0, **tree})
    assert {fault.path for fault in found} == {path}
    assert words in found[0].message


def test_all_faults_come_at_once():
    found = faults({"rate": -1, "steps": "x", "kernel": {"size": 0, "x": 1}, "colour": "red"})
    paths = {fault.path for fault in found}
    assert paths == {"rate", "steps", "kernel.size", "kernel.x", "colour"}
    assert [fault.message for fault in faults({})] == ["is required"]


def too_many_steps(steps: int, kernel: Kernel):
    if steps > kernel.size:
        yield Fault("steps", f"{steps} is more than {kernel.size}")


CROSS = {"cross_checks": {("steps", "kernel"): (too_many_steps,)}}


@pytest.mark.parametrize("tree", [{}, {"rate": "fast"}, {"rate": 1, "betas": 3}, {"unknown": 1}])
def test_cross_checks_run_although_other_parts_are_broken(tree):
    found = faults({"steps": 9, "kernel": {"size": 4}, **tree}, **CROSS)
    assert Fault("steps", "9 is more than 4") in found
    assert len(found) > 1 or tree.get("rate") == 1
    assert Fault("steps", "5 is more than 3") in faults(tree, **CROSS), "with defaults"


@pytest.mark.parametrize("broken", [{"steps": "x"}, {"kernel": {"size": "x"}}])
def test_cross_checks_wait_for_the_parts_they_need(broken):
    tree = {"rate": 1, "steps": 9, "kernel": {"size": 4}, **broken}
    assert len(faults(tree, **CROSS)) == 1


def test_cross_checks_alone_refuse():
    assert faults({"rate": 1, "steps": 9}, **CROSS) == [Fault("steps", "9 is more than 3")]
    assert build({"rate": 1, "steps": 2}, **CROSS).steps == 2


def test_the_message_lists_every_fault_under_its_source():
    error = ConfigError("file.yaml", [Fault("a.b", "is wrong"), Fault("", "is odd")])
    lines = ["file.yaml: 2 faults", "  a.b: is wrong", "  (whole file): is odd"]
    assert str(error).splitlines() == lines


def test_nearest():
    assert nearest("heum", ["euler", "heun"]) == "did you mean 'heun'?"
    assert nearest("x", ["b", "a"]) == "known: a, b"


def test_values_json_cannot_hold_are_a_fault():
    with pytest.raises(ConfigError, match="holds a value JSON cannot"):
        build({"rate": 1, "note": {1, 2}})


TREE = {"rate": 1, "kernel": {"size": 3}, "kernels": [{"size": 1}, {"size": 2}], "spare": None}


def test_overrides_edit_a_copy():
    edits = ["rate=1e-3", "kernel.size=5", "kernels.1.size=7", "note='a=b'", "betas=[0.1, 0.2]"]
    found = apply_overrides(TREE, edits)
    assert found["rate"] == 1e-3
    assert found["kernel"] == {"size": 5}
    assert found["kernels"] == [{"size": 1}, {"size": 7}]
    assert found["note"] == "a=b"
    assert found["betas"] == [0.1, 0.2]
    assert TREE["rate"] == 1
    assert TREE["kernels"][1] == {"size": 2}


def test_an_override_may_name_a_section_that_is_absent_or_off():
    found = apply_overrides(TREE, ["spare.size=2", "other.deep.key=1"])
    assert found["spare"] == {"size": 2}
    assert found["other"] == {"deep": {"key": 1}}


def test_an_override_of_an_unknown_key_meets_the_same_validator():
    found = faults(apply_overrides({"rate": 1}, ["kernel.siez=2", "steps=no"]))
    assert {fault.path for fault in found} == {"kernel.siez", "steps"}


@pytest.mark.parametrize(
    "override",
    ["steps", "=3", "kernels.2.size=1", "kernels.x.size=1", "rate.deep=1", "rate.very.deep=1",
     "kernels.first=1", "note=[1", "note={a: 1"],
)  # fmt: skip
def test_malformed_overrides(override):
    with pytest.raises(ConfigError, match="command line: 1 fault"):
        apply_overrides(TREE, [override])


def test_malformed_overrides_are_listed_together():
    with pytest.raises(ConfigError) as caught:
        apply_overrides(TREE, ["steps", "rate.x=1", "rate=5", "note=[1"])
    assert [fault.path for fault in caught.value.faults] == ["steps", "rate.x", "note"]


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder / "main.yaml"


def test_base_files_are_merged_key_by_key(tmp_path):
    (tmp_path / "common").mkdir()
    (tmp_path / "common" / "root.yaml").write_text("rate: 1\nkernel: {size: 3, name: box}\n")
    write(tmp_path / "common", middle="base: root.yaml\nsteps: 4\nkernels: [{size: 1}]\n")
    path = write(tmp_path, main="base: common/middle.yaml\nkernel: {size: 9}\nkernels: []\n")
    assert load_tree(path) == {
        "rate": 1, "kernel": {"size": 9, "name": "box"}, "steps": 4, "kernels": []
    }  # fmt: skip


def test_merged_leaves_its_arguments_alone():
    base = {"a": {"b": 1}, "c": [1]}
    assert merged(base, {"a": {"d": 2}, "c": 3, "e": {}}) == {
        "a": {"b": 1, "d": 2},
        "c": 3,
        "e": {},
    }
    assert base == {"a": {"b": 1}, "c": [1]}


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"main": "base: main.yaml"}, "circle"),
        ({"main": "base: other.yaml", "other": "base: main.yaml"}, "circle"),
        ({"main": "base: nowhere.yaml"}, "nowhere.yaml: 1 fault\n.*No such file"),
        ({"main": "a: [1"}, "not valid YAML"),
        ({"main": "a: 1\na: {b"}, "not valid YAML"),
        ({"main": "a: {x: 1}\nb: 2\na: {y: 3}"}, "key 'a' is given twice .line 3"),
        ({"main": "[1, 2]"}, "must be a mapping"),
        ({"main": ""}, "must be a mapping"),
        ({}, "No such file"),
    ],
)
def test_files_that_cannot_be_loaded(tmp_path, files, words):
    with pytest.raises(ConfigError, match=words):
        load_tree(write(tmp_path, **files))


def test_a_binary_file_or_a_folder_is_no_yaml(tmp_path):
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_tree(tmp_path / "bytes")
    with pytest.raises(ConfigError, match="directory"):
        load_tree(tmp_path)


@pytest.mark.parametrize("documented", [False, True])
@pytest.mark.parametrize(
    "tree",
    [
        {"rate": 1e-5},
        {"rate": 2, "note": "1e-4", "folder": "1e5", "mode": "valid"},
        {"rate": 2, "note": "2026-01-31", "folder": "a b/ü: #c", "flag": True},
        {"rate": 2, "note": "ends in ...", "side": [3, 4]},
        {"rate": 2, "note": "yes", "spare": {"size": 2}, "kernels": [{"size": 1}, {"name": "box"}]},
        {"rate": 2, "note": "a 'b' \"c\" \\ # " + "long " * 60},
    ],
    ids=range(6),
)
def test_printed_text_reads_back_as_the_same_section(tree, documented):
    config = build(tree)
    text = to_yaml(config, documented=documented)
    assert build(parse_yaml(text)) == config
    assert build(to_tree(config)) == config


def test_documentation_stands_above_every_field():
    lines = to_yaml(build({"rate": 2, "kernels": [{}]}), documented=True).splitlines()
    assert lines[:2] == ["# A number.", "rate: 2.0"]
    assert "  # Its side, in pixels." in lines
    assert sum("Its side" in line for line in lines) == 2


def test_an_override_changes_one_place_even_of_aliased_ones():
    tree = parse_yaml("a: &shared {w: 1}\nb: *shared\n")
    assert apply_overrides(tree, ["b.w=2"]) == {"a": {"w": 1}, "b": {"w": 2}}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"speed": 2}, {"rate": 2}),
        ({"rate": 1, "core": {"size": 5}}, {"rate": 1, "kernel": {"size": 5}}),
        ({"rate": 1, "kernel": {"width": 5}}, {"rate": 1, "kernel": {"size": 5}}),
        ({"rate": 1, "core": {"width": 5}}, {"rate": 1, "kernel": {"size": 5}}),
        ({"rate": 1, "reserve": {"width": 5}}, {"rate": 1, "spare": {"size": 5}}),
        ({"rate": 1, "reserve": None}, {"rate": 1, "spare": None}),
        ({"rate": 1, "cores": [{}, {"width": 5}]}, {"rate": 1, "kernels": [{}, {"size": 5}]}),
    ],
)
def test_a_former_name_counts_as_the_current_one(caplog, old, new):
    assert build(old) == build(new)
    assert with_current_names(Filter, old) == new
    assert "core" not in to_yaml(build(old))
    assert not caplog.records, "stored trees are read without a warning"


def test_a_fault_below_a_former_name_is_found():
    assert [fault.path for fault in faults({"rate": 1, "core": {"width": 0}})] == ["kernel.size"]
    assert {fault.path for fault in faults({"core": {"wdth": 5}})} == {"rate", "kernel.wdth"}
    found = faults({"speed": 1, "steps": 9, "core": {"width": 4}}, **CROSS)
    assert found == [Fault("steps", "9 is more than 4")]


def test_a_former_name_beside_the_current_one_is_a_fault():
    found = faults({"rate": 1, "kernel": {"size": 3, "width": 3}, "core": {}})
    message = "is the former name of '{}', and both are given; remove one"
    assert found == [
        Fault("kernel.width", message.format("size")),
        Fault("core", message.format("kernel")),
    ]


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_file_with_former_names_is_read_with_one_warning_for_each(
    tmp_path, caplog, monkeypatch, rank
):
    monkeypatch.setenv("RANK", rank)
    path = write(tmp_path, main="speed: 1\ncores: [{width: 5}, {width: 6}]\n")
    with caplog.at_level(logging.WARNING, "srepa_ds"):
        found = load_section(Filter, path, ["core.width=7", "cores.1.width=8", "core.name=box"])
    kernels = [{"size": 5}, {"size": 8}]
    kernel = {"size": 7, "name": "box"}
    assert found == build({"rate": 1, "kernel": kernel, "kernels": kernels})
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == len(set(told)) == (6 if rank == "0" else 0)
    for old, new in {"cores": "kernels", "core": "kernel", "kernel.width": "kernel.size"}.items():
        assert rank != "0" or f"the key '{old}' is now '{new}'; please rename it" in told


@pytest.mark.parametrize(
    "override",
    ["kernel.size=7", "kernel.width=7", "core.size=7", "core.width=7", "core={width: 7}"],
)
@pytest.mark.parametrize("text", ["kernel: {size: 5}", "core: {size: 5}", "core: {width: 5}"])
def test_an_override_wins_under_either_name(tmp_path, text, override):
    found = load_section(Filter, write(tmp_path, main=f"rate: 1\n{text}\n"), [override])
    assert found.kernel.size == 7


def test_overrides_under_former_names_are_merged_with_the_file(tmp_path):
    path = write(tmp_path, main="rate: 1\nkernel: {name: box}\nspare: null\n")
    found = load_section(Filter, path, ["core.width=7", "reserve.width=2"])
    assert found == build({"rate": 1, "kernel": {"name": "box", "size": 7}, "spare": {"size": 2}})


@pytest.mark.parametrize("base", ["kernel: {size: 5, name: box}", "core: {width: 5, name: box}"])
@pytest.mark.parametrize("child", ["kernel: {size: 7}", "core: {width: 7}"])
def test_a_file_is_merged_over_its_base_under_either_name(tmp_path, base, child):
    write(tmp_path, base=f"rate: 1\n{base}\n")
    path = write(tmp_path, main=f"base: base.yaml\n{child}\n")
    found = load_section(Filter, path)
    assert found == build({"rate": 1, "kernel": {"size": 7, "name": "box"}})


def test_replaced_validates():
    config = build({"rate": 1, "kernels": [{"size": 2}]})
    changed = replaced(config, steps=7, kernel=Kernel(size=4))
    assert changed == build(
        {"rate": 1, "kernels": [{"size": 2}], "steps": 7, "kernel": {"size": 4}}
    )
    assert config.steps == 5
    for changes in ({"rate": -1.0}, {"steps": "7"}, {"stpes": 7}):
        with pytest.raises(ValueError, match=next(iter(changes))):
            replaced(config, **changes)


def test_paths_are_expanded_wherever_they_stand(tmp_path, monkeypatch):
    class Places(Section):
        one: Path = Path("x")
        maybe: Path | None = None
        many: tuple[Path, ...] = ()
        nested: Filter | None = None

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PLACE", "place")
    tree = {
        "one": "~/a", "maybe": "$PLACE/b", "many": ["~", "${PLACE}"],
        "nested": {"rate": 1, "folder": "~/c"},
    }  # fmt: skip
    found = validated(Places, tree, source="test")
    assert (found.one, found.maybe) == (tmp_path / "a", Path("place/b"))
    assert found.many == (tmp_path, Path("place"))
    assert found.nested is not None
    assert found.nested.folder == tmp_path / "c"
    assert to_tree(found)["one"] == f"{tmp_path}/a", "resolved settings have the path itself"


def test_a_dollar_sign_in_a_path_survives_resolving():
    class Places(Section):
        one: Path
        many: tuple[Path, ...]

    found = validated(Places, {"one": "a$$HOME", "many": ["$$x"]}, source="test")
    assert (found.one, found.many) == (Path("a$HOME"), (Path("$x"),))
    assert validated(Places, to_tree(found), source="test") == found


@pytest.mark.parametrize(
    ("folder", "words"),
    [
        ("$NOT_SET_ANYWHERE/x", "the environment variable 'NOT_SET_ANYWHERE' is not set"),
        ("~nobody_of_that_name", "home folder of ~nobody_of_that_name is not known"),
        ("a\0b", "NUL"), ("x" * 256, "is too long"),
    ],
)  # fmt: skip
def test_a_path_that_stands_for_nothing_is_a_fault(folder, words):
    (fault,) = faults({"rate": 1, "folder": folder})
    assert fault.path == "folder"
    assert words in fault.message


def test_words_for_truths_are_named():
    (fault,) = faults(apply_overrides({"rate": 1}, ["flag=yes"]))
    assert fault.message.endswith("(given: 'yes'); write true or false")
    (fault,) = faults(apply_overrides({"rate": 1}, ["steps=5_000"]))
    assert fault.message.endswith("(given: '5_000'); write the number without _")


@pytest.mark.parametrize(
    ("overrides", "changes"),
    [
        (["betas.1=0.95"], {"betas": (0.9, 0.95)}),
        (["betas.0=0.5", "betas.1=0.6"], {"betas": (0.5, 0.6)}),
    ],
)
def test_an_override_may_address_an_item_of_a_list_left_to_its_default(
    tmp_path, overrides, changes
):
    path = write(tmp_path, main="rate: 1\n")
    assert load_section(Filter, path, overrides) == build({"rate": 1, **changes})
    with pytest.raises(ConfigError, match="betas has 2 items, numbered from 0"):
        load_section(Filter, path, ["betas.2=1"])


def test_an_item_of_a_given_list_is_changed_in_that_list(tmp_path):
    path = write(tmp_path, main="rate: 1\nbetas: [0.1, 0.2]\n")
    assert load_section(Filter, path, ["betas.1=0.5"]).betas == (0.1, 0.5)


def test_a_file_of_another_kind_is_one_fault(tmp_path):
    class Recipe(Section):
        kind: Literal["prepare"]
        output: Path

    path = write(tmp_path, main="kind: teacher\nsteps: 3\n")
    with pytest.raises(ConfigError) as caught:
        load_section(Recipe, path)
    (fault,) = caught.value.faults
    words = f"this file is of kind 'teacher', not 'prepare'; run `srepa-ds teacher {path}`"
    assert fault == Fault("kind", words)
    write(tmp_path, main="model: {}\n")
    with pytest.raises(ConfigError, match=r"kind 'experiment', not 'prepare'; run `srepa-ds train"):
        load_section(Recipe, path)
    write(tmp_path, main="output: x\n")
    with pytest.raises(ConfigError, match="kind: is required"):
        load_section(Recipe, path)
    write(tmp_path, main="kind: [1]\noutput: x\n")
    with pytest.raises(ConfigError, match="kind: Input should be 'prepare'"):
        load_section(Recipe, path)
