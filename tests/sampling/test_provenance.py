"""What decides a set, and what is only noted beside it."""

import hashlib
import json

from srepa_ds.sampling.config import SamplerConfig
from srepa_ds.sampling.provenance import Further, describe, differences

VERSIONS = {"srepa_ds": "1", "torch": "2"}


ORDINARY = SamplerConfig()


def described(config=ORDINARY, **options):
    return describe(
        config,
        checkpoint_sha256="abc",
        ema="ema",
        path="linear",
        codec={"kind": "identity"},
        class_token=False,
        versions=VERSIONS,
        **options,
    )


def test_ordinary_sets_have_the_digest_of_earlier_releases():
    facts = {
        "checkpoint_sha256": "abc",
        "codec": "identity",
        "ema": "ema",
        "path": "linear",
        "sampler": {
            "batch_size": 64,
            "cfg_scale": 1.0,
            "guidance_high": 1.0,
            "guidance_low": 0.0,
            "label_mode": "random",
            "num_samples": 50_000,
            "num_steps": 250,
            "precision": "fp32",
            "seed": 0,
            "solver": "euler_maruyama",
        },
        "versions": VERSIONS,
    }
    text = json.dumps(facts, indent=2, sort_keys=True) + "\n"
    assert described().digest() == hashlib.sha256(text.encode()).hexdigest()
    assert differences(facts, described().facts) == []


def test_evaluations_presets_and_deviations_are_noted_and_decide_nothing():
    preset = described(SamplerConfig(preset="repa", seed=3))
    written_out = described(SamplerConfig(cfg_scale=1.8, guidance_high=0.7, seed=3))
    document = json.loads(preset.text())
    assert document["evaluations"] == {"conditional": 250, "unconditional": 172, "guide": 0}
    assert document["preset"] == "repa"
    assert document["deviations"] == {"seed": {"preset": 0, "here": 3}}
    assert preset.digest() == written_out.digest()
    assert differences(document, written_out.facts) == []
    assert "preset" not in json.loads(written_out.text())


def test_a_guide_listed_labels_and_compiled_models_decide():
    digests = {described().digest()}
    for further in (
        Further(guide_sha256="g"),
        Further(labels_sha256="l"),
        Further(compiled=True),
    ):
        digests.add(described(further=further).digest())
    assert len(digests) == 4
    assert (
        described(SamplerConfig(preset="repa"), further=Further(compiled=True)).notes["deviations"]
        == {}
    )
    heads = [described(further=Further(model={"num_heads": heads})).digest() for heads in (2, 4)]
    assert len({*digests, *heads}) == 6
    config = SamplerConfig(preset="repa")
    guided = described(config, further=Further(guide_sha256="g"))
    assert guided.notes["evaluations"] == {"conditional": 250, "unconditional": 0, "guide": 172}
    assert guided.notes["deviations"] == {"guide_sha256": {"preset": None, "here": "g"}}
    [line] = differences(described(config).facts, guided.facts)
    assert line == "guide_sha256: None there, 'g' now"


def test_decoder_and_devices_are_noted_and_decide_nothing():
    config = SamplerConfig(preset="repa")
    noted = described(config, decoder="some/vae", devices=("cuda B", "cuda A", "cuda B"))
    assert noted.notes["devices"] == ["cuda A", "cuda B"]
    assert noted.notes["decoder"] == noted.notes["deviations"]["decoder"]["here"] == "some/vae"
    assert noted.digest() == described(config).digest()
    assert differences(json.loads(noted.text()), described(config).facts) == []
