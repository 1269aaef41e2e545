"""The tables of a page: whatever a damaged or foreign document holds, a section is built of it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srepa_ds.report.scores import score_table, scores_section
from srepa_ds.report.tables import environment_section, timings_section

NAMES = st.sampled_from(
    (
        *("scores", "settings", "samples", "extractor", "spec", "sampler", "class_accuracy", "ema"),
        *("reference_class_accuracy", "reference_id", "extractor_sha256", "reference", "train"),
        *("further_scores", "class_precision", "preset", "deviations", "evaluations", "notes"),
        *("extractors", "num_images", "rounding", "precision", "here", "3", "fdr", "fdr6"),
    )
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    | st.sampled_from([10**400, -(10**400)]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=10,
)  # fmt: skip


@pytest.mark.parametrize(
    "build", [score_table, scores_section, environment_section, timings_section]
)
@settings(max_examples=150, deadline=None)
@given(document=st.dictionaries(NAMES, VALUES, max_size=8))
def test_no_document_is_an_error(build, document):
    assert "<table" in build(document)


def test_relative_distances_stand_beside_the_scores():
    scores = {"frechet_distance": 3.36}
    text = score_table({"scores": scores, "fdr": {"fdr-mae": 2.5}, "fdr6": 4.25})
    assert "FDr-mae" in text
    assert "2.5" in text
    assert "FDr6" in text
    assert "4.25" in text
    assert "FDr" not in score_table({"scores": scores})
