"""A teacher in YAML: valid sections, the documentation's examples, and users' mistakes."""

import re

import pytest
import torch
from places import ROOT
from teacher_models import PLAIN, SMALL, images, plain_encoder, preprocessed, saved, scrambled

from srepa_ds.config.yaml_text import to_yaml
from srepa_ds.documents.yaml_reader import parse_yaml
from srepa_ds.encoders.teacher import (
    TEACHERS,
    TeacherConfig,
    TeacherSpec,
    build_encoder,
    load_teacher,
)
from srepa_ds.errors import ConfigError
from srepa_ds.schema import to_tree, validated

DOCUMENT = ROOT / "docs" / "teachers.md"

OTHER_VIT = """
spec:
  architecture: eva02_tiny_patch14_224
  arguments: {depth: 2, embed_dim: 24, num_heads: 2, num_reg_tokens: 3}
  layout: timm
  width: 24
  patch_size: 14
  input_size: [28, 42]
  input_size_per_256: null
  resize: bilinear
  antialias: true
  order: resize_then_normalise
  mean: [0.48, 0.46, 0.41]
  std: [0.27, 0.26, 0.28]
  num_prefix_tokens: 4
  has_cls: true
  final_norm: false
  num_classes: 0
weights: WEIGHTS
dtype: fp32
compile: false
"""


def test_any_other_vit_is_a_row_in_yaml(tmp_path):
    spec = validated(TeacherConfig, {"spec": parse_yaml(OTHER_VIT)["spec"]}, source="test").spec
    source = scrambled(plain_encoder(spec, (2, 3)))
    text = OTHER_VIT.replace("WEIGHTS", str(saved(source, tmp_path)))
    config = validated(TeacherConfig, parse_yaml(text), source="test")
    assert set(parse_yaml(text)["spec"]) == set(TeacherSpec.model_fields)
    teacher = load_teacher(config, resolution=(48, 80), device="cpu")
    pixels = images((48, 80))
    tokens = teacher.tokens(pixels)
    with torch.no_grad():
        inputs, rope = source._pos_embed(source.patch_embed(preprocessed(spec, (28, 42), pixels)))
        for block in source.blocks:
            inputs = block(inputs, rope=rope)
    assert teacher.grid == (2, 3)
    assert torch.allclose(tokens.patches, inputs[:, 4:], atol=1e-5)
    assert torch.allclose(tokens.cls, inputs[:, 0], atol=1e-5)


@pytest.mark.parametrize("name", TEACHERS)
def test_every_row_can_be_said_in_yaml(name):
    spec = TEACHERS[name]
    text = to_yaml(TeacherConfig(spec=spec), documented=True)
    assert validated(TeacherConfig, parse_yaml(text), source="test").resolved == spec


@pytest.mark.parametrize(
    ("tree", "path", "message"),
    [
        ({}, "", "exactly one of name and spec"),
        ({"name": "dinov2-vit-b", "spec": to_tree(PLAIN)}, "", "exactly one of name and spec"),
        ({"name": "dinov2-vit-bb"}, "name", "did you mean 'dinov2-vit-b'"),
        ({"name": "mocov3-vit-h"}, "name", "did you mean 'mocov3-vit-"),
        (
            {"spec": {**to_tree(PLAIN), "architecture": "vit_tiny_patch16_225"}},
            "",
            "did you mean 'vit_tiny_patch16_224'",
        ),
        (
            {"spec": {**to_tree(PLAIN), "architecture": "vit_base_patch16_224.dinos"}},
            "",
            "no weights 'dinos' of 'vit_base_patch16_224'; did you mean 'vit_base_patch16_224.di",
        ),
        (
            {"spec": {**to_tree(PLAIN), "architecture": "vit_small_patch16_18x2_224.in1k"}},
            "",
            "leave out the tag",
        ),
        (
            {"spec": {**to_tree(PLAIN), "layout": "mocov4"}},
            "spec.layout",
            "unknown layout 'mocov4'; did you mean 'mocov3'?",
        ),
        (
            {"spec": {**to_tree(PLAIN), "input_size_per_256": 224}},
            "spec",
            "exactly one of input_size",
        ),
        ({"spec": {**to_tree(PLAIN), "num_prefix_tokens": 0}}, "spec", "has_cls"),
        ({"spec": {**to_tree(PLAIN), "std": [0.2, 0.0, 0.2]}}, "spec", "std must be positive"),
        (
            {"spec": {**to_tree(PLAIN), "arguments": {"img_size": 3}}},
            "spec",
            "img_size cannot be given",
        ),
    ],
)
def test_faults_of_the_configuration(tree, path, message):
    with pytest.raises(ConfigError) as caught:
        validated(TeacherConfig, tree, source="test")
    (fault,) = caught.value.faults
    assert fault.path == path
    assert message in fault.message


@pytest.mark.parametrize("size", [0, [16, 0], [16], "16"])
def test_an_input_has_one_side_or_two(size):
    with pytest.raises(ConfigError) as caught:
        validated(TeacherConfig, {"spec": {**to_tree(PLAIN), "input_size": size}}, source="test")
    assert {fault.path.removesuffix(".1") for fault in caught.value.faults} == {"spec.input_size"}


@pytest.mark.parametrize(
    ("update", "message"),
    [
        ({"width": 25}, "teacher.spec.width: is 25, but the model's is 24"),
        ({"num_prefix_tokens": 2}, "teacher.spec.num_prefix_tokens: is 2"),
        ({"patch_size": 8}, "teacher.spec.patch_size: is 8, but the model's is 4"),
        ({"has_cls": False}, "teacher.spec.has_cls: is False, but the model's is True"),
        (
            {"arguments": {**PLAIN.arguments, "global_pool": "avg", "fc_norm": True}},
            "teacher.spec.final_norm: is True, but the model has no normalisation",
        ),
        ({"architecture": "resnet18"}, "timm cannot build 'resnet18'"),
        (
            {"architecture": "swin_tiny_patch4_window7_224", "arguments": {}},
            "teacher.spec.architecture: 'swin_tiny_patch4_window7_224' is not a vision transformer",
        ),
        ({"arguments": {**PLAIN.arguments, "blocks": 2}}, "unexpected keyword argument 'blocks'"),
        ({"arguments": {**SMALL, "patch_size": 4, "num_heads": 5}}, "timm cannot build"),
        ({"input_size": 18}, "18 px, which is not a multiple of its patch size 4"),
        ({"input_size": (16, 18)}, "16 x 18 px, which is not a multiple of its patch size 4"),
    ],
)
def test_specs_that_describe_no_model_are_refused(update, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        build_encoder(PLAIN.model_copy(update=update), resolution=16)


def test_all_contradictions_are_named_at_once():
    wrong = PLAIN.model_copy(update={"width": 25, "num_prefix_tokens": 0, "has_cls": False})
    with pytest.raises(ConfigError) as caught:
        build_encoder(wrong, resolution=16)
    assert [fault.path.rpartition(".")[2] for fault in caught.value.faults] == [
        "width",
        "num_prefix_tokens",
        "has_cls",
    ]


def test_a_resolution_without_whole_patches_is_refused():
    spec = TEACHERS["dinov2-vit-b"]
    with pytest.raises(ConfigError, match=r"87\.5 px"):
        spec.input_size_at(100)
    with pytest.raises(ConfigError, match=r"256 x 100 px .* 224 x 87\.5 px"):
        spec.input_size_at((256, 100))


def test_one_side_does_not_fit_images_that_are_not_square():
    with pytest.raises(ConfigError, match=r"16 x 32 px .* set input_size to \[height, width\]"):
        PLAIN.input_size_at((16, 32))
    assert PLAIN.input_size_at((32, 32)) == (16, 16)


def table_row(name):
    spec = TEACHERS[name]
    sizes = [spec.input_size_at(resolution)[0] for resolution in (256, 512)]
    tokens = [(size // spec.patch_size) ** 2 for size in sizes]
    first, _, second = spec.order.partition("_then_")
    resize = f"{spec.resize}, antialiased" if spec.antialias else spec.resize
    steps = {"normalise": "normalise", "resize": resize}
    norm = {0.485: "ImageNet", 0.48145466: "CLIP", 0.5: "0.5 / 0.5", 0.3: "0.3 / 0.38"}
    cells = (
        f"`{name}`",
        f"`{spec.architecture}`",
        " / ".join(map(str, sizes)),
        f"{steps[first]}, {steps[second]}",
        norm[spec.mean[0]],
        str(spec.width),
        " / ".join(map(str, tokens)),
        str(spec.num_prefix_tokens),
        "yes" if spec.has_cls else "no",
        "yes" if spec.final_norm else "no",
        "timm" if TeacherConfig(name=name).weights_fault() is None else "local file",
    )
    return f"| {' | '.join(cells)} |"


def test_the_documents_table_is_the_table():
    lines = DOCUMENT.read_text(encoding="utf-8").splitlines()
    found = [line for line in lines if line.startswith("| `") and line.count("|") == 12]
    assert found == [table_row(name) for name in TEACHERS]


SNIPPETS = re.findall(r"```yaml\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_the_documents_snippets_are_valid(number):
    tree = parse_yaml(SNIPPETS[number])
    assert set(tree) == {"teacher"}
    config = validated(TeacherConfig, tree["teacher"], source="docs/teachers.md")
    assert config.weights_fault() is None
    spec = config.resolved.model_copy(
        update={"arguments": {**config.resolved.arguments, "depth": 1}}
    )
    with torch.device("meta"):
        build_encoder(spec, resolution=256)


def test_the_document_has_snippets():
    assert len(SNIPPETS) >= 4
