import os
import re

import pytest
import small_trees
from small_trees import IMAGES, keys_of

from srepa_ds.data.sources.file_list import FileList
from srepa_ds.errors import DataError

FIRST, SECOND = sorted(IMAGES)[:2]


@pytest.fixture
def root(tmp_path):
    return small_trees.write_tree(tmp_path / "tree")


def listed(root, text, name="list.csv"):
    path = root.parent / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return FileList(path, root=root)


def test_order_names_and_paths(root):
    source = listed(root, f'"./{SECOND}","tench, the fish"\r\n\r\n{FIRST} , "ant"\r\n')
    assert keys_of(source) == [SECOND, FIRST]
    assert (source.labels.tolist(), source.class_ids) == ([1, 0], ("ant", "tench, the fish"))
    assert source.item(0).image == IMAGES[SECOND]


def test_numbers_and_a_mark_of_a_spreadsheet(root):
    source = listed(root, f"\ufeffpath,label\n{FIRST},007\n{SECOND},2\n")
    assert (source.labels.tolist(), source.class_ids) == ([7, 2], ())
    source = listed(root, f"\n\npath,label\n{FIRST},1\n{SECOND},0\n")
    assert source.labels.tolist() == [1, 0]


FAULTS = {
    "empty": ("", "lists no images"),
    "only names of columns": ("path,label\n", "lists no images"),
    "one column": (f"{FIRST}\n", "line 1 has 1 columns"),
    "three columns": (f"{FIRST},1,2\n", "line 1 has 3 columns; without names of columns"),
    "names among numbers": (f"{FIRST},7\n{SECOND},two\n", "line 2 has the label 'two', and"),
    "other names of columns": (f"filename,class\n{FIRST},7\n", "name the columns path and label"),
    "a short line": (f"{FIRST},1\n{SECOND}\n", "line 2 has 1 columns"),
    "no label": (f"{FIRST},\n", "line 1 has no label"),
    "no path": (f"{FIRST},1\n,1\n", "line 2 has no path"),
    "an open quote": (f'"{FIRST},1\n', "correct the list"),
    "an absolute path": ("/etc/passwd,1\n", "line 1: the path '/etc/passwd' leads out"),
    "a parent": (f"{FIRST},1\n../x.jpg,1\n", "line 2: the path '../x.jpg' leads out"),
    "a hidden parent": ("n01440764/../../x.jpg,1\n", "leads out of the folder"),
    "a path twice": (f"{FIRST},1\n./{FIRST},2\n", "is in line 1 too"),
    "a label beyond all": (f"{FIRST},123456789\n", "the label 123456789 is not from 0"),
    "not UTF-8": (b"M\xfcnchen.jpg,1\n", "codec can't decode"),
    "NUL": (b"a\0.jpg,1\n", "NUL"),
}
JSON_FAULTS = {
    "no JSON": ("{\n", "line 1 is not JSON"),
    "a list": ('["a.jpg", 1]\n', "line 1 needs"),
    "no label": (f'{{"path": "{FIRST}"}}', "line 1 needs"),
    "a truth": (f'{{"path": "{FIRST}", "label": true}}', "line 1 needs"),
    "a fraction": (f'{{"path": "{FIRST}", "label": 1.5}}', "line 1 needs"),
    "below zero": (f'{{"path": "{FIRST}", "label": -1}}', "the label -1 is not from 0"),
    "a mixture": (
        f'{{"path": "{FIRST}", "label": 1}}\n{{"path": "{SECOND}", "label": "1"}}',
        "some labels are numbers and others names",
    ),
    "NUL": (r'{"path": "a\u0000.jpg", "label": 1}', "holds the character NUL"),
}
CASES = [("list.csv", name) for name in FAULTS] + [("list.jsonl", name) for name in JSON_FAULTS]


@pytest.mark.parametrize(("file", "name"), CASES)
def test_faults_of_a_list(file, name, root):
    text, words = (FAULTS if file == "list.csv" else JSON_FAULTS)[name]
    with pytest.raises(DataError, match=re.escape(words)):
        listed(root, text, file)


def test_files_that_cannot_be_read_are_their_own_error(root):
    (root / "out.jpg").symlink_to(root.parent / "list.csv")
    os.mkfifo(root / "pipe.jpg")
    source = listed(root, f"missing.jpg,1\nout.jpg,1\npipe.jpg,1\n{FIRST},0\n")
    for index, words in enumerate(["No such file", "is a link out of the folder", "is not a file"]):
        with pytest.raises(DataError, match=words):
            source.item(index)
    assert source.item(3).image == IMAGES[FIRST]


def test_a_missing_list(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.csv: No such file"):
        FileList(tmp_path / "nowhere.csv")
    with pytest.raises(DataError, match="Is a directory"):
        FileList(tmp_path)
