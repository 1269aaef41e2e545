"""Classes by number or by one of their names."""

import pytest

from srepa_ds.pipeline.class_names import ClassNames

NAMES = ClassNames({
    0: "tench, Tinca tinca",
    134: "crane",
    207: "golden retriever",
    517: "crane",
})  # fmt: skip


def test_numbers_and_exact_synonyms():
    labels = [207, "golden retriever", "Tinca tinca", "tench"]
    assert NAMES.numbers_of(labels, num_classes=1000) == [207, 207, 0, 0]
    assert NAMES.numbers == {"Tinca tinca": 0, "golden retriever": 207, "tench": 0}


@pytest.mark.parametrize(("label", "says"), [
    ("golden retreiver", "did you mean 'golden retriever'"),
    ("Tench", "no class is called 'Tench'"),
    ("tench, Tinca tinca", "no class is called"),
    ("crane", "the name of classes 134 and 517; give the number"),
    (1000, "class 1000 is not one of the model's, 0 to 999"),
    (-1, "class -1 is not one"),
])  # fmt: skip
def test_unknown_and_ambiguous_labels_are_named(label, says):
    with pytest.raises(ValueError, match=says):
        NAMES.numbers_of([label], num_classes=1000)


def test_without_names_only_numbers():
    with pytest.raises(ValueError, match="the model has no names, or give its number"):
        ClassNames({}).numbers_of(["tench"], num_classes=10)
