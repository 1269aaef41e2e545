"""Trees of plain values: flattened and compared."""

from srepa_ds.trees import Difference, differences, leaves


def test_leaves_are_the_plain_values_by_path():
    tree = {"a": 1, "b": {"c": [2, {"d": None}], "empty": {}}}
    assert dict(leaves(tree)) == {"a": 1, "b.c.0": 2, "b.c.1.d": None, "b.empty": {}}
    assert dict(leaves({"x": 3}, "below")) == {"below.x": 3}


def test_differences_are_told_value_by_value():
    old = {"same": 1, "changed": 2, "gone": 3, "list": [1, 2]}
    new = {"same": 1, "changed": 4, "list": [1, 5], "added": {"deep": 6}}
    assert differences(old, new) == [
        Difference("changed", 2, 4),
        Difference("gone", 3, None),
        Difference("list.1", 2, 5),
        Difference("added.deep", None, 6),
    ]
    assert differences(old, old) == []


def test_an_empty_mapping_differs_from_a_filled_one_by_what_fills_it():
    assert differences({"arguments": {}}, {"arguments": {"depth": 3}}) == [
        Difference("arguments.depth", None, 3)
    ]
    assert differences({"arguments": {"depth": 3}}, {"arguments": {}}) == [
        Difference("arguments.depth", 3, None)
    ]
    assert differences({"arguments": {}}, {}) == [Difference("arguments", {}, None)]
