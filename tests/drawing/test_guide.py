"""Autoguidance: which guides are taken, what they change, and which are refused."""

import numpy as np
import pytest
import torch
from drawn_sets import drawn, facts, images, official, save_checkpoint, write_export, write_repa
from safetensors.torch import save_file

from srepa_ds.errors import CheckpointError, ConfigError
from srepa_ds.schema import replaced, to_tree
from srepa_ds.weights.exported import write_model


def test_the_guide_of_another_size_decides_the_images(configured, tmp_path):
    config = configured("sample.cfg_scale=2.5")
    write_export(config.export_folder, config)
    write_export(
        tmp_path / "guide", replaced(config, model=replaced(config.model, depth=1)), seed=1
    )
    guide = f"sample.guide={tmp_path}/guide"
    sets = [
        drawn(configured(*overrides, f"sample.folder={tmp_path}/set-{number}"))
        for number, overrides in enumerate(
            [
                ("sample.cfg_scale=2.5", guide),
                ("sample.cfg_scale=2.5",),
                ("sample.cfg_scale=1", guide),
                ("sample.cfg_scale=1",),
                ("sample.cfg_scale=2.5", guide, "sample.guidance_high=0.3"),
            ]
        )
    ]
    guided, by_label, at_one, plain, late = map(images, sets)
    assert not np.array_equal(guided, by_label)
    assert not np.array_equal(guided, plain)
    assert not np.array_equal(guided, late)
    np.testing.assert_array_equal(at_one, plain)
    assert facts(sets[0])["evaluations"] == {"conditional": 2, "unconditional": 0, "guide": 2}
    # Steps begin at 1 and 0.04.
    assert facts(sets[4])["evaluations"] == {"conditional": 2, "unconditional": 0, "guide": 1}
    assert "guide_sha256" not in facts(sets[2])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"input_size": 8}, r"latents of \(3, 8, 8\), not \(3, 16, 16\)"),
        ({"num_classes": 4}, "number of classes 4, not 10"),
        ({"class_token_width": 32}, "class_token_width 32, not None"),
    ],
)
def test_a_guide_of_other_images_is_refused(configured, tmp_path, changes, words):
    config = configured()
    write_export(config.export_folder, config)
    other = replaced(config, model=replaced(config.model, **changes))
    write_export(tmp_path / "guide", other)
    with pytest.raises(ConfigError, match=rf"sample\.guide: .* has {words}; give a guide"):
        drawn(configured(f"sample.guide={tmp_path}/guide"))


def test_a_guide_of_another_path_is_refused(configured, tmp_path):
    config = configured()
    write_export(config.export_folder, config)

    def cosine(tree):
        tree["objective"]["interpolant"]["path"] = "cosine"
        return tree

    write_export(tmp_path / "guide", config, edit=cosine)
    with pytest.raises(ConfigError, match=r"sample\.guide: .* has path cosine, not linear"):
        drawn(configured(f"sample.guide={tmp_path}/guide"))


def test_a_class_token_is_autoguided_with_its_own_scale(configured, tmp_path):
    overrides = ("model.class_token_width=32", "sample.cfg_scale=2")
    config = configured(*overrides)
    write_export(config.export_folder, config)
    write_export(tmp_path / "guide", config, seed=1)
    sets = [
        images(drawn(configured(*overrides, f"sample.cls_cfg_scale={scale}",
                                f"sample.guide={tmp_path}/guide", f"sample.folder={tmp_path}/{n}")))
        for n, scale in enumerate((0, 9))
    ]  # fmt: skip
    assert not np.array_equal(*sets)


@pytest.mark.parametrize("form", ["file", "repa", "checkpoint"])
def test_a_guide_is_read_in_every_form(configured, tmp_path, form):
    config = configured("sample.cfg_scale=2.5", "run.folder=" + str(tmp_path / "weaker"))
    save_checkpoint(config, 7)
    places = {
        "file": tmp_path / "guide.safetensors",
        "repa": tmp_path / "0400000.pt",
        "checkpoint": tmp_path / "weaker/checkpoints/step-0000007",
    }
    # Of a checkpoint, the average of the step is the guide.
    guide = {
        "file": official(config, 2),
        "repa": official(config, 2),
        "checkpoint": official(config, 8),
    }[form]
    save_file(guide, places["file"])
    write_repa(places["repa"], config)
    write_export(configured().export_folder, configured())
    own = ("sample.cfg_scale=2.5", f"sample.folder={tmp_path}/own")
    found = drawn(configured(*own, f"sample.guide={places[form]}"))
    model = {k: v for k, v in guide.items() if not k.startswith("projectors.")}
    provenance = {"checkpoint": "none", "step": 5, "weights": "ema"}
    write_model(tmp_path / "as-export", model, config=to_tree(config), provenance=provenance)
    expected = ("sample.cfg_scale=2.5", f"sample.folder={tmp_path}/expected")
    exported = drawn(configured(*expected, f"sample.guide={tmp_path}/as-export"))
    np.testing.assert_array_equal(images(found), images(exported))
    assert ("guide" in facts(found)) == (form != "checkpoint")


def test_a_guide_that_is_nothing_of_the_kind_names_what_would_be(configured, tmp_path):
    config = configured("sample.cfg_scale=2.5")
    write_export(config.export_folder, config)
    (tmp_path / "empty").mkdir()
    for guide, words in (
        ("empty", r"sample\.guide: .*does not hold an exported model.* or give a checkpoint"),
        ("absent", r"sample\.guide: .*absent/config\.json: no such file.* or give a checkpoint"),
    ):
        with pytest.raises(CheckpointError, match=words):
            drawn(configured("sample.cfg_scale=2.5", f"sample.guide={tmp_path / guide}"))
    torch.save({"model": official(config, 1), "opt": {}}, tmp_path / "no-ema.pt")
    with pytest.raises(CheckpointError, match=r"does not hold 'ema'.*set sample\.guide to a file"):
        drawn(configured("sample.cfg_scale=2.5", f"sample.guide={tmp_path}/no-ema.pt"))
