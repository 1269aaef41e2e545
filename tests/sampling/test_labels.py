"""Labels that a file lists."""

import hashlib
import struct

import pytest
import torch

from srepa_ds.config.sections import SampleConfig
from srepa_ds.errors import ConfigError
from srepa_ds.sampling.config import SamplerConfig
from srepa_ds.sampling.labels import draw_labels, hash_of_labels, labels_of_set, read_label_file
from srepa_ds.schema import to_tree, validated


@pytest.fixture
def listed(tmp_path):
    """Returns a function that writes a label file."""

    def write(content: str | bytes):
        path = tmp_path / "labels.txt"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.mark.parametrize("text", ["3\n0\n12\n", "3\r\n 0\r\n12", "\ufeff3\n0\n12\n\n \n"])
def test_a_class_per_line(listed, text):
    assert read_label_file(listed(text)).tolist() == [3, 0, 12]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("3\ncat\n", r"line 2: 'cat' is no class"),
        ("3\n\n4\n", r"line 2: '' is no class"),
        ("-1\n", r"line 1: '-1' is no class"),
        ("1.5\n", r"line 1: '1.5' is no class"),
        ("9" * 5000, r"line 1: '9{40}\.\.\.' is no class"),
        ("٣\n", "line 1: '٣' is no class"),
        ("\n\n", "is empty"),
        (b"\xff\xfe\x00", "is no text"),
        ("3\n4\n5\n", r"has 3 line\(s\) for 4 images"),
        ("3\n4\n5\n10\n", r"line 4: class 10, and the model has 10 classes, 0 to 9"),
    ],
)
def test_each_fault_has_one_message(listed, content, words):
    with pytest.raises(ConfigError, match=rf"sample\.label_file: .*{words}") as caught:
        labels_of_set(listed(content), num_samples=4, num_classes=10)
    assert len(caught.value.faults) == 1


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.txt: No such file"):
        read_label_file(tmp_path / "none.txt")


def test_a_set_takes_the_first_lines_and_its_hash_is_theirs(listed):
    path = listed("3\n0\n9\n99\n")
    labels = labels_of_set(path, num_samples=3, num_classes=10)
    assert labels.tolist() == [3, 0, 9]
    assert hash_of_labels(labels) == hashlib.sha256(struct.pack("<3q", 3, 0, 9)).hexdigest()
    config, ids = SamplerConfig(num_samples=3), torch.tensor([2, 0])
    assert draw_labels(config, ids, num_classes=10, listed=labels).tolist() == [9, 3]


def sample(tree) -> SampleConfig:
    return validated(SampleConfig, tree, source="test")


def test_the_number_of_images_is_that_of_the_lines(listed):
    path = str(listed("3\n0\n9\n"))
    config = sample({"label_file": path})
    assert config.num_samples == 3
    assert sample(to_tree(config)) == config
    assert sample({"label_file": path, "preset": "repa"}).num_samples == 3
    assert sample({"label_file": path, "num_samples": 2}).num_samples == 2
    # A configuration is read where its label file is not.
    assert sample({"label_file": "gone.txt"}).num_samples == 50_000


def test_labels_have_one_origin(listed):
    with pytest.raises(ConfigError, match="labels and label_file both name classes"):
        sample({"label_file": str(listed("3")), "labels": [3]})
