"""Sections as YAML, with the documentation of each field if asked for."""

from typing import Any

import yaml

from srepa_ds.documents.yaml_reader import YamlDumper
from srepa_ds.schema import Section, to_tree


def to_yaml(config: Section, *, documented: bool = False) -> str:
    """Returns `config` as YAML; with `documented`, each field under its documentation."""
    if documented:
        return "\n".join(_documented(config, indent="")) + "\n"
    return yaml.dump(to_tree(config), Dumper=YamlDumper, sort_keys=False, width=100)


def _documented(section: Section, indent: str) -> list[str]:
    lines = []
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        text = " ".join((field.description or "").split())
        lines += [f"{indent}# {text}"] if text else []
        lines += _documented_value(name, value, section, indent)
    return lines


def _documented_value(name: str, value: Any, section: Section, indent: str) -> list[str]:
    if isinstance(value, Section):
        return [f"{indent}{name}:", *_documented(value, indent + "  ")]
    if isinstance(value, tuple) and value and isinstance(value[0], Section):
        lines = [f"{indent}{name}:"]
        for item in value:
            body = _documented(item, indent + "    ")
            lines += [f"{indent}  -", *body]
        return lines
    plain = section.model_dump(mode="json", include={name})[name]
    dumped = yaml.dump(plain, Dumper=YamlDumper, default_flow_style=True, width=10_000).strip()
    return [f"{indent}{name}: {dumped.removesuffix('...').strip()}"]
