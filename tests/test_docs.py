"""What the guides show is what the program takes."""

import re

import pytest
from places import ROOT

from srepa_ds.config.experiment import config_from
from srepa_ds.trees import parse_yaml

DOCS = ROOT / "docs"
BASE = {
    "run": {"folder": "runs/test"},
    "data": {"folder": "data/test"},
    "model": {"variant": "SiT-XL/2", "input_size": 32, "in_channels": 4, "num_classes": 1000},
    "train": {"steps": 400_000},
}


def shown() -> list[tuple[str, str]]:
    """Every YAML block of the guides, with the page it stands on."""
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


@pytest.mark.parametrize(
    "page", ["README.md", *sorted(f"docs/{p.name}" for p in DOCS.glob("*.md"))]
)
def test_links_between_pages_lead_somewhere(page):
    path = DOCS.parent / page
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{page} links to {target}"
