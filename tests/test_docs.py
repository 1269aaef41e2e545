"""The guides agree with the program and the tree, and hold no placeholder."""

import re
import shlex

import pytest
import typer
from latent_world import write_latent_world
from places import ROOT

from srepa_ds.cli import _any_config, app, run
from srepa_ds.config.experiment import config_from
from srepa_ds.documents.yaml_reader import parse_yaml

DOCS = ROOT / "docs"
BASE = {
    "run": {"folder": "runs/test"},
    "data": {"folder": "data/test"},
    "model": {"variant": "SiT-XL/2", "input_size": 32, "in_channels": 4, "num_classes": 1000},
    "train": {"steps": 400_000},
}


def shown() -> list[tuple[str, str]]:
    """Returns every YAML block of the guides, with the page that shows it."""
    pages = ((page.name, page.read_text(encoding="utf-8")) for page in sorted(DOCS.glob("*.md")))
    return [
        (name, block)
        for name, text in pages
        for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    ]


@pytest.mark.parametrize(("page", "block"), shown())
def test_every_setting_shown_is_one(page, block):
    settings = parse_yaml(block)
    if "teacher" in settings:
        settings = {"alignments": [{**settings, "depth": 8, "pointwise": {"weight": 1.0}}]}
    extractor = {"name": "dinov2-vit-b"}
    tree = {**BASE, "evaluate": {"reference": "data/test", "extractor": extractor}}
    for section, value in settings.items():
        tree[section] = {**BASE.get(section, {}), **value} if isinstance(value, dict) else value
    config = config_from(tree, source=f"docs/{page}")
    assert len(config.alignments) == len(settings.get("alignments", []))


def commands_of_evaluation() -> list[str]:
    """Returns every command line of this package that the guide to evaluation shows."""
    text = (DOCS / "evaluation.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if "srepa" in line]


@pytest.mark.parametrize("line", commands_of_evaluation())
def test_every_command_of_the_guide_to_evaluation_is_one(line):
    _, _, arguments = line.replace("-m srepa_ds", "srepa-ds").partition("srepa-ds ")
    name, *given = shlex.split(arguments, comments=True)
    found = typer.main.get_command(app).commands[name].make_context(name, given).params
    assert _any_config(found["path"], list(found["overrides"] or ())).kind in (
        "experiment",
        "parity",
    )


PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{p.name}" for p in DOCS.glob("*.md"))]


@pytest.mark.parametrize("page", PAGES)
def test_links_between_pages_lead_somewhere(page):
    path = DOCS.parent / page
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{page} links to {target}"


@pytest.mark.parametrize("page", PAGES)
def test_no_placeholder_is_left(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    # TIME_WEIGHTINGS is a table of the package.
    placeholder = r"\bTIME_(?!WEIGHTINGS\b)[A-Z]+\b|VERSIONS_SEEN|TODO|FIXME"
    assert not re.findall(placeholder, text)


def top_of_the_package() -> list[str]:
    """Returns what `ls srepa_ds/` shows; a folder's name ends with a slash."""
    entries = [path for path in (ROOT / "srepa_ds").iterdir() if path.name != "__pycache__"]
    return sorted(f"{path.name}/" if path.is_dir() else path.name for path in entries)


def test_few_files_lie_at_the_top_of_the_package():
    """A newcomer reads the folders as a map."""
    files = [name for name in top_of_the_package() if not name.endswith("/")]
    assert len(files) <= 14


def test_the_map_names_all_of_them():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    map_of_the_house = set(re.findall(r"[\w.]+/?", text))
    assert set(top_of_the_package()) - {"__init__.py"} <= map_of_the_house


def test_the_data_are_read_as_the_guide_shows(tmp_path, monkeypatch, capsys):
    world = write_latent_world(tmp_path / "world")
    assert run(["prepare", str(world.prepare)]) == 0
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "imagenet256").symlink_to(world.data)
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", (DOCS / "data.md").read_text(), re.DOTALL)
    exec(block, {})
    assert capsys.readouterr().out == "(32, 32) tench, Tinca tinca (4, 8, 8) float16\n"
