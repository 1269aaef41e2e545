"""What the guides show is what the program takes."""

import re
from pathlib import Path

import pytest
import yaml

from srepa_ds.config import config_from

DOCS = Path(__file__).parents[1] / "docs"
BASE = {
    "run": {"folder": "runs/test"},
    "data": {"folder": "data/test"},
    "model": {"variant": "SiT-XL/2", "input_size": 32, "in_channels": 4, "num_classes": 1000},
    "train": {"steps": 400_000},
}


def blocks(name: str) -> list[str]:
    return re.findall(r"```yaml\n(.*?)```", (DOCS / name).read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("text", blocks("methods.md"))
def test_every_method_shown_is_a_valid_experiment(text):
    shown = yaml.safe_load(text)
    tree = {**BASE, **shown, "model": {**BASE["model"], **shown.get("model", {})}}
    config = config_from(tree, source="docs/methods.md")
    assert len(config.alignments) == len(shown["alignments"])


@pytest.mark.parametrize("text", blocks("training.md"))
def test_every_setting_of_a_run_shown_is_one(text):
    shown = yaml.safe_load(text)
    extractor = {"name": "dinov2-vit-b"}
    tree = {**BASE, "evaluate": {"reference": "data/test", "extractor": extractor}, **shown}
    config = config_from(tree, source="docs/training.md")
    for section, settings in shown.items():
        for name in settings:
            assert getattr(getattr(config, section), name) is not None


@pytest.mark.parametrize(
    "page", ["README.md", *sorted(f"docs/{p.name}" for p in DOCS.glob("*.md"))]
)
def test_links_between_pages_lead_somewhere(page):
    path = DOCS.parent / page
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{page} links to {target}"
