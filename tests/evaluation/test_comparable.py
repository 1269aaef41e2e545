"""Which scores can be put beside published ones, and why others cannot."""

import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srepa_ds.encoders.publications import WEB_FILES
from srepa_ds.evaluation.comparable import comparable, in_words, reasons

PUBLISHABLE = {
    "scores": {"frechet_distance": 2.0, "spatial_frechet_distance": 4.0, "precision": 0.8},
    "num_images": 50_000,
    "settings": {
        "extractor": {"name": "inception"},
        "distance_arithmetic": None,
        "num_manifold_images": 10_000,
    },
    "extractors": {
        "inception": {"name": "inception", "weights_sha256": WEB_FILES["inception"].sha256}
    },
    "reference": {
        "file": "VIRTUAL_imagenet256_labeled.npz",
        "num_images": 10_000,
        "pooled_statistics": "abc",
        "spatial_statistics": "def",
    },
    "samples": {
        "checkpoint_sha256": "0" * 64,
        "sampler": {"solver": "euler_maruyama", "num_samples": 50_000},
        "preset": "repa",
        "deviations": {},
    },
}


def changed(path: str, value: object) -> dict:
    """Returns the publishable results with one value set, or removed if it is None."""
    document = copy.deepcopy(PUBLISHABLE)
    *above, last = path.split(".")
    node = document
    for key in above:
        node = node[key]
    if value is None:
        del node[last]
    else:
        node[last] = value
    return document


def test_scores_as_they_are_published():
    assert reasons(PUBLISHABLE) == []
    verdict = comparable(PUBLISHABLE)
    assert verdict == {"with": "repa", "answer": "yes", "because": []}
    assert in_words(verdict) == "comparable with repa"


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        ("settings.extractor", {"name": "dinov2-vit-b"}, "those of dinov2-vit-b, not of Inception"),
        ("settings.extractor", {"spec": {"architecture": "vit"}}, "those of vit, not of Inception"),
        ("num_images", 10_000, "10,000 images, and published scores are of 50,000"),
        ("extractors.inception.weights_sha256", "0" * 64, "has other weights than the published"),
        ("extractors", {}, "which weights Inception has is not known"),
        ("reference.pooled_statistics", None, "the reference has no stored statistics, and ADM's"),
        ("reference.spatial_statistics", None, "no stored statistics for sFID"),
        ("reference.file", "own.npz", "not known to be ADM's (it is called own.npz, not VIRTUAL"),
        ("settings.num_manifold_images", 5_000, "of 5,000 real images, and published ones of 10,"),
        ("reference.num_images", None, "number of real images for precision and recall is not"),
        ("settings.distance_arithmetic", "fp32", "precision and recall are of distances in fp32"),
        ("samples.preset", None, "the sampler follows no preset"),
        ("samples", {}, "how the images were drawn is not known"),
        (
            "samples.deviations",
            {"cfg_scale": {"preset": 1.8, "here": 1.5}},
            "cfg_scale is 1.5, and repa has 1.8",
        ),
        (
            "samples.deviations",
            {"guide_sha256": {"preset": None, "here": "abc"}},
            "guide_sha256 is set, and repa has none",
        ),
        (
            "samples.sampler",
            {"rounding": "round", "num_samples": 50_000},
            "pixels are rounded to the nearest",
        ),
    ],
)
def test_each_departure_is_a_reason(path, value, reason):
    document = changed(path, value)
    (found,) = reasons(document)
    assert reason in found
    verdict = comparable(document)
    assert verdict["answer"] == "no"
    other = verdict["with"] or "published scores"
    assert in_words(verdict) == f"not comparable with {other}: {found}"


def test_distances_in_fp32_matter_to_precision_alone():
    document = changed("settings.distance_arithmetic", "fp32")
    document["scores"] = {"frechet_distance": 2.0}
    assert reasons(document) == []


def test_real_images_matter_to_precision_and_recall_alone():
    document = changed("settings.num_manifold_images", 5_000)
    document["scores"] = {"frechet_distance": 2.0}
    assert reasons(document) == []


def test_all_images_of_adms_own_reference_are_as_many_as_published():
    document = changed("reference.num_images", 1_000)
    assert reasons(document) == []
    document["reference"]["file"] = "own.npz"
    _, few = reasons(document)
    assert few == "precision and recall are of 1,000 real images, and published ones of 10,000"


def test_another_seed_is_as_good_and_images_are_counted_once():
    document = changed("num_images", 100)
    values = {"seed": (0, 7), "num_samples": (50_000, 100)}
    document["samples"]["deviations"] = {
        name: {"preset": preset, "here": here} for name, (preset, here) in values.items()
    }
    assert reasons(document) == ["100 images, and published scores are of 50,000"]


def test_a_rounding_that_deviates_is_told_once():
    document = changed("samples.sampler", {"rounding": "round", "num_samples": 50_000})
    deviation = {"rounding": {"preset": "truncate", "here": "round"}}
    document["samples"]["deviations"] = deviation
    assert reasons(document) == ["rounding is round, and repa has truncate"]


def test_a_preset_that_rounds_is_followed_by_rounding():
    document = changed("samples.sampler", {"rounding": "round", "num_samples": 50_000})
    document["samples"]["preset"] = "sit"
    assert reasons(document) == []


PARTS = (PUBLISHABLE[part] for part in ("samples", "settings", "reference", "extractors"))
NAMES = st.sampled_from((*PUBLISHABLE, *(name for part in PARTS for name in part), "name"))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=8,
)


@given(document=st.dictionaries(NAMES, VALUES, max_size=6))
def test_any_document_has_an_answer(document):
    found = comparable(document)
    assert found["answer"] == ("no" if found["because"] else "yes")
    assert "comparable with " in in_words(found)
