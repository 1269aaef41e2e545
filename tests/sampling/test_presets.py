"""Settings named after papers."""

import pytest
import torch

from srepa_ds.codec.quantised import quantised
from srepa_ds.config.sections import SampleConfig
from srepa_ds.errors import ConfigError
from srepa_ds.sampling.config import SamplerConfig, count_evaluations
from srepa_ds.sampling.presets import PRESETS, decoder_deviation, deviations
from srepa_ds.schema import to_tree, validated


def sampler(**tree) -> SamplerConfig:
    return validated(SamplerConfig, tree, source="test")


# scale, class token's scale, low, high
GUIDANCE = {
    "unguided": (1.0, 0.0, 0.0, 1.0),
    "repa": (1.8, 0.0, 0.0, 0.7),
    "srepa": (1.325, 0.0, 0.0, 1.0),
    "srepa-512": (1.35, 0.0, 0.0, 1.0),
    "reg": (2.3, 2.3, 0.0, 0.85),
    "irepa": (1.0, 0.0, 0.0, 1.0),
    "sit": (1.5, 0.0, 0.0, 1.0),
}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_draws_as_its_paper(name):
    config = sampler(preset=name)
    found = (config.cfg_scale, config.cls_cfg_scale, config.guidance_low, config.guidance_high)
    assert found == GUIDANCE[name]
    assert (config.solver, config.num_steps) == ("euler_maruyama", 250)
    assert (config.label_mode, config.labels, config.seed) == ("random", None, 0)
    assert (config.num_samples, config.guidance_low) == (50_000, 0)
    # SiT's code guides the first three channels and adds 128 where REPA's adds 127.5.
    pixels = ("round", 3) if name == "sit" else ("truncate", None)
    assert (config.rounding, config.guided_channels) == pixels
    assert PRESETS[name].decoder == f"stabilityai/sd-vae-ft-{'mse' if name == 'irepa' else 'ema'}"
    assert deviations(config) == {}
    assert PRESETS[name].source


@pytest.mark.parametrize("name", PRESETS)
def test_rows_set_fields_of_the_sampler_to_valid_values(name):
    settings = PRESETS[name].settings
    tree = to_tree(sampler(**settings))
    assert {field: tree[field] for field in settings} == settings


def test_the_interval_of_repa_guides_172_of_250_steps():
    found = count_evaluations(sampler(preset="repa"))
    assert (found.conditional, found.unconditional, found.guide) == (250, 172, 0)
    assert str(found) == "250 conditional + 172 unconditional"
    assert (found.total, found.calls, found.guided) == (422, 250, 172)


def test_what_is_given_is_kept_and_deviates_if_its_value_differs():
    config = sampler(preset="repa", cfg_scale=2.0, num_steps=250, precision="bf16", num_samples=9)
    assert (config.cfg_scale, config.guidance_high) == (2.0, 0.7)
    assert deviations(config) == {
        "cfg_scale": {"preset": 1.8, "here": 2.0},
        "num_samples": {"preset": 50_000, "here": 9},
        "precision": {"preset": "fp32", "here": "bf16"},
    }


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_the_papers_arithmetic_and_exact_arithmetic_do_not_deviate(precision):
    assert deviations(sampler(preset="repa", precision=precision)) == {}


def test_another_decoder_deviates():
    ema, mse = PRESETS["repa"].decoder, PRESETS["irepa"].decoder
    assert decoder_deviation("repa", ema) == decoder_deviation("irepa", mse) == {}
    assert decoder_deviation("repa", "sd-vae-ft-ema") == decoder_deviation(None, mse) == {}
    assert decoder_deviation("repa", mse) == {"decoder": {"preset": ema, "here": mse}}


def test_the_pixels_of_sit_are_rounded_values():
    decoded = torch.linspace(-1.2, 1.2, 2001)
    of_sit = (127.5 * decoded + 128).clamp(0, 255).to(torch.uint8)
    rounding = sampler(preset="sit").rounding
    found = quantised(decoded[None, None, None].expand(1, 3, 1, -1), rounding)[0, 0, :, 0]
    differing = found != of_sit
    # At exact halves the last bit decides.
    assert differing.float().mean() < 0.002


def test_chosen_classes_deviate():
    assert deviations(sampler(preset="repa", labels={"3": 100}))["labels"]["here"] == {"3": 100}


@pytest.mark.parametrize("schema", [SamplerConfig, SampleConfig])
@pytest.mark.parametrize(
    "tree",
    [{}, {"preset": "reg"}, {"preset": "repa", "cfg_scale": 1.0}, {"preset": "sit", "labels": [3]}],
)
def test_resolved_settings_read_back_are_the_same(schema, tree):
    config = validated(schema, tree, source="test")
    again = validated(schema, to_tree(config), source="test")
    assert again == config
    assert to_tree(again) == to_tree(config)
    assert deviations(again) == deviations(config)


def test_without_a_preset_nothing_deviates():
    assert deviations(sampler(cfg_scale=4.0)) == {}


def test_an_unknown_preset_and_a_preset_against_itself_are_refused():
    with pytest.raises(ConfigError, match=r"preset: unknown preset 'rep'; .*repa"):
        sampler(preset="rep")
    with pytest.raises(ConfigError, match=r"guidance_low \(0\.8\) is above guidance_high \(0\.7\)"):
        sampler(preset="repa", guidance_low=0.8)
