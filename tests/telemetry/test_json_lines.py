"""Files of JSON lines: damaged lines are set aside and named, good ones keep every bit."""

import pytest
from builders import largest_file

from srepa_ds.telemetry import json_lines
from srepa_ds.telemetry.json_lines import append_line, is_count, keep_lines, read_lines

GOOD = b'{"step": 1,  "note": "M\xc3\xbcnchen"}\n'
DAMAGED = {
    "one byte that is not UTF-8": b'{"step": 2, "note": "M\xfcnchen"}',
    "no JSON": b'{"step": 2, "lo',
    "zeros": b"\0" * 512,
    "zeros before a line": b"\0\0" + GOOD.strip(),
    "no object": b"[2]",
    "a number": b"2",
    "empty object": b"{}",
    "lacking its key": b'{"loss": 1.0}',
    "a key of text": b'{"step": "2"}',
    "a key of truth": b'{"step": true}',
    "a fraction": b'{"step": 2.5}',
    "a negative step": b'{"step": -2}',
    "a huge step": b'{"step": 1' + b"0" * 400 + b"}",
    "more digits than Python reads": b'{"step": 1' + b"0" * 5000 + b"}",
    "not a number": b'{"step": NaN}',
    "a key twice": b'{"step": 2, "step": 2}',
    "half a surrogate pair": b'{"step": 2, "note": "\\ud800"}',
    "nested too deeply": b"[" * 100_000,
    "a byte order mark": b"\xef\xbb\xbf" + GOOD.strip(),
}


def check(line) -> bool:
    return is_count(line.get("step"))


@pytest.mark.parametrize("damaged", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_line_is_set_aside_and_named(tmp_path, caplog, damaged):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(GOOD + damaged + b"\n" + GOOD)
    lines = read_lines(path, check)
    assert [line.number for line in lines.good] == [1, 3]
    assert [line.number for line in lines.bad] == [2]
    keep_lines(lines, lines.good)
    assert path.read_bytes() == GOOD + GOOD
    assert (tmp_path / "metrics.jsonl.bad").read_bytes() == damaged + b"\n"
    (warning,) = caplog.messages
    assert str(path) in warning
    assert "1 damaged line (the first is line 2); moved to metrics.jsonl.bad" in warning


def test_damaged_lines_of_later_restarts_are_added(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for content in (b"one\n", b"two\nthree\n"):
        path.write_bytes(content + GOOD)
        lines = read_lines(path, check)
        keep_lines(lines, lines.good)
    assert (tmp_path / "metrics.jsonl.bad").read_bytes() == b"one\ntwo\nthree\n"
    assert path.read_bytes() == GOOD


@pytest.mark.parametrize("rest", [b"", b"\n \n\n", b'{"step": 2', b"\0\0\0", b"7", b'{"a": 1}'])
def test_empty_lines_and_a_torn_end_are_nothing_to_speak_of(tmp_path, caplog, rest):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(GOOD + rest)
    lines = read_lines(path, check)
    assert (len(lines.good), lines.bad) == (1, ())
    keep_lines(lines, lines.good)
    assert list(tmp_path.iterdir()) == [path]
    assert caplog.messages == []


def test_a_line_longer_than_any_of_ours_is_damaged(tmp_path, monkeypatch):
    monkeypatch.setattr(json_lines, "_LONGEST_LINE", 64)
    path = tmp_path / "metrics.jsonl"
    long = b'{"step": 2, "note": "' + b"a" * 200 + b'"}\n'
    path.write_bytes(GOOD + long + GOOD)
    lines = read_lines(path, check)
    assert [(len(lines.good)), len(lines.bad)] == [2, 1]
    keep_lines(lines, lines.good)
    assert (tmp_path / "metrics.jsonl.bad").read_bytes() == long
    assert path.read_bytes() == GOOD + GOOD


def test_only_the_chosen_lines_stay(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(GOOD + GOOD.replace(b"1", b"2") + GOOD.replace(b"1", b"3").strip())
    lines = read_lines(path, check)
    keep_lines(lines, lines.good[::2])
    assert path.read_bytes() == GOOD + GOOD.replace(b"1", b"3")


def test_a_line_is_appended_whole_or_not_at_all(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(GOOD + b'{"torn')
    append_line(path, {"step": 2})
    begun = path.read_bytes()
    assert begun == GOOD + b'{"torn\n{"step": 2}\n'
    with largest_file(len(begun) + 5), pytest.raises(OSError, match="large"):
        append_line(path, {"step": 3})
    assert path.read_bytes() == begun
