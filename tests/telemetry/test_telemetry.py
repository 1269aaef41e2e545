"""The record of a run: the means of a window, the lines after a kill, the messages of ranks."""

import json
import logging
import re
import sys
import time
from collections.abc import Iterator

import pytest
import torch
from builders import DeviceReads, largest_file, metrics_of
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from srepa_ds.console import set_up_logging, steps_shown
from srepa_ds.errors import OutputError
from srepa_ds.telemetry.environment import environment
from srepa_ds.telemetry.metrics_log import Telemetry
from srepa_ds.telemetry.window import Window

log = logging.getLogger("srepa_ds")


def record(folder, steps: range, *, first_step: int = 0, is_main: bool = True) -> None:
    telemetry = Telemetry(folder, first_step=first_step, total_steps=9, is_main=is_main)
    for step in steps:
        telemetry.record(step, {"loss": step / 2, "rate": 0.1})
    telemetry.close()


def board_of(folder) -> EventAccumulator:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return events


def test_a_line_per_step_and_tensorboard_as_a_view(tmp_path):
    record(tmp_path, range(1, 4))
    assert metrics_of(tmp_path) == [{"step": s, "loss": s / 2, "rate": 0.1} for s in (1, 2, 3)]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 0.5), (2, 1), (3, 1.5)]


def test_a_full_disk_costs_a_warning_and_the_lines_it_had_no_room_for(tmp_path, caplog, capfd):
    telemetry = Telemetry(tmp_path, first_step=0, total_steps=9, is_main=True)
    telemetry.record(1, {"loss": 1.0})
    board = next((tmp_path / "tensorboard").iterdir())
    with largest_file(board.stat().st_size + 3):
        for step in (2, 3):
            telemetry.record(step, {"loss": float(step)})
    telemetry.record(4, {"loss": 4.0})
    telemetry.close()
    assert caplog.text.count("cannot write tensorboard: File too large") == 2
    assert capfd.readouterr().err == ""
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 4]


def test_a_line_is_on_disk_before_the_next_step(tmp_path):
    telemetry = Telemetry(tmp_path, first_step=0, total_steps=2, is_main=True)
    telemetry.record(1, {"loss": 1.0})
    assert [line["step"] for line in metrics_of(tmp_path)] == [1]
    telemetry.close()


def test_other_ranks_write_nothing(tmp_path):
    record(tmp_path, range(1, 4), is_main=False)
    assert list(tmp_path.iterdir()) == []


def test_a_resumed_run_takes_its_later_steps_again(tmp_path):
    record(tmp_path, range(1, 8))
    record(tmp_path, range(5, 7), first_step=4)
    assert [line["step"] for line in metrics_of(tmp_path)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("restarts", [False, True])
def test_what_is_taken_back_leaves_no_picture(tmp_path, restarts):
    def telemetry(first_step: int) -> Telemetry:
        return Telemetry(tmp_path, first_step=first_step, total_steps=9, is_main=True)

    run = telemetry(0)
    for step in (2, 4, 6):
        run.picture(step, Image.new("RGB", (4, 4), (step, 0, 0)))
    for mine in ("step-mine.png", "step-²².png"):
        (tmp_path / "pictures" / mine).touch()
    if restarts:
        run.close()
        run = telemetry(4)
    else:
        run.rewind(4)
    run.picture(8, Image.new("RGB", (4, 4)))
    run.close()
    names = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    steps = ["step-0000002.png", "step-0000004.png", "step-0000008.png"]
    assert names == [*steps, "step-mine.png", "step-²².png"]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Images("samples")] == [2, 4, 8]


@pytest.mark.parametrize("torn", ['{"step": 4, "lo', '{"st', "3", '{"loss": 1}', "\0\0\0", ""])
def test_a_torn_last_line_is_dropped(tmp_path, torn):
    record(tmp_path, range(1, 4))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    record(tmp_path, range(4, 6), first_step=3)
    assert [line["step"] for line in metrics_of(tmp_path)] == [1, 2, 3, 4, 5]
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "tensorboard"}


def test_damaged_lines_never_keep_a_run_from_resuming(tmp_path, caplog):
    record(tmp_path, range(1, 6))
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1] = b'{"step": 2, "loss": "\xfc"}\n'
    lines[3] = b"\0" * 100 + b"\n"
    path.write_bytes(b"".join(lines))
    record(tmp_path, range(5, 7), first_step=4)
    assert [line["step"] for line in metrics_of(tmp_path)] == [1, 3, 5, 6]
    assert (tmp_path / "metrics.jsonl.bad").read_bytes() == lines[1] + lines[3]
    assert "2 damaged lines (the first is line 2); moved to metrics.jsonl.bad" in caplog.text


def test_a_record_that_cannot_be_written_to_is_an_error_at_the_start(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(OutputError, match=r"metrics\.jsonl: Is a directory; move it away"):
        record(tmp_path, range(1, 3))


def test_a_view_that_cannot_be_written_costs_a_warning(tmp_path, caplog):
    (tmp_path / "tensorboard").write_text("a file")
    (tmp_path / "pictures").write_text("a file")
    telemetry = Telemetry(tmp_path, first_step=0, total_steps=9, is_main=True)
    telemetry.record(1, {"loss": 1.0})
    telemetry.picture(1, Image.new("RGB", (4, 4)))
    telemetry.close()
    assert [line["step"] for line in metrics_of(tmp_path)] == [1]
    assert "cannot write tensorboard: File exists" in caplog.text
    assert "cannot write pictures: File exists" in caplog.text


@pytest.mark.parametrize("name", ["metrics.jsonl", "tensorboard"])
def test_what_is_moved_away_meanwhile_is_begun_again(tmp_path, name):
    telemetry = Telemetry(tmp_path, first_step=0, total_steps=9, is_main=True)
    telemetry.record(1, {"loss": 1.0})
    (tmp_path / name).rename(tmp_path / "rotated")
    telemetry.record(2, {"loss": 2.0})
    telemetry.rewind(1)
    telemetry.record(2, {"loss": 3.0})
    telemetry.close()
    found = {"metrics.jsonl": [line["step"] for line in metrics_of(tmp_path)]}
    found["tensorboard"] = [event.step for event in board_of(tmp_path).Scalars("train/loss")]
    assert found.pop(name) == [2]
    assert list(found.values()) == [[1, 2]]


@pytest.mark.parametrize("name", ["step-\u00b2.png", "step-x.png", "step-.png", "step-9e9.png"])
def test_pictures_of_other_names_are_left_alone(tmp_path, name):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / name).touch()
    (tmp_path / "pictures" / "step-0000009.png").mkdir()
    record(tmp_path, range(1, 3))
    assert len(list((tmp_path / "pictures").iterdir())) == 2


@pytest.mark.parametrize("seconds", [-1e9, -3600.0, 0.0, 1e9])
def test_a_clock_that_is_set_between_launches_costs_tensorboard_nothing(
    tmp_path, monkeypatch, seconds
):
    record(tmp_path, range(1, 6))
    now = time.time() + seconds
    monkeypatch.setattr(time, "time", lambda: now)
    monkeypatch.setattr(time, "time_ns", lambda: int(now * 1e9))
    record(tmp_path, range(5, 8), first_step=4)
    record(tmp_path, range(8, 10), first_step=7)
    events = board_of(tmp_path).Scalars("train/loss")
    assert [event.step for event in events] == list(range(1, 10))
    times = [event.wall_time for event in events]
    assert times == sorted(times)


def test_files_of_others_in_the_folder_of_tensorboard_do_no_harm(tmp_path):
    board = tmp_path / "tensorboard"
    board.mkdir()
    for name in ("events.out.tfevents", "events.out.tfevents.5", "events.out.tfevents.x.host"):
        (board / name).write_bytes(b"no events")
    (board / "events.out.tfevents.1700000000.host.1.v2").mkdir()
    record(tmp_path, range(1, 4))
    ours = [path.name for path in board.iterdir() if path.stat().st_size > 100]
    assert any(re.fullmatch(r"events\.out\.tfevents\.\d{19}\..+", name) for name in ours)


def test_a_window_is_the_mean_since_the_last(tmp_path):
    window = Window()
    for value in (1.0, 2.0, 6.0):
        window.add({"a": torch.tensor(value), "b": torch.tensor(-value, dtype=torch.bfloat16)})
    means = window.close()
    assert means.scalars() == {"a": pytest.approx(3.0), "b": pytest.approx(-3.0)}
    assert means.step_seconds > 0
    window.add({"a": torch.tensor(5.0)})
    assert window.close().scalars() == {"a": 5.0}


def test_tensors_keep_their_shape_and_waiting_is_a_share_of_the_time():
    window = Window()
    parts = torch.arange(6.0).reshape(2, 3)
    for factor in (1, 3):
        window.add({"loss": torch.tensor(1.0), "parts": parts * factor})
        time.sleep(0.02)
    window.waited(0.01)
    means = window.close()
    assert torch.equal(means.tensors["parts"], parts * 2)
    assert means.scalars() == {"loss": 1.0}
    assert 0 < means.data_wait_share < 0.5


def test_adding_to_a_window_reads_nothing_from_the_device():
    window = Window()
    loss = torch.tensor(1.0, requires_grad=True) * 2
    with DeviceReads() as reads:
        for _ in range(5):
            window.add({"loss": loss, "norm": loss.detach()})
        assert reads.count == 0
        loss.item()
        assert reads.count == 1
    assert window.close().scalars()["loss"] == 2.0


def test_the_environment_names_versions_and_machine():
    found = environment()
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"srepa_ds", "python", "deepspeed", "timm", "device", "command"} <= found.keys()
    assert found["world_size"] == 1
    json.dumps(found)


@pytest.mark.parametrize(("is_main", "shown"), [(True, ["note", "worry"]), (False, ["worry"])])
def test_messages_of_other_ranks_are_warnings_only(capsys, is_main, shown):
    set_up_logging(is_main=is_main)
    set_up_logging(is_main=is_main)
    log.info("note")
    log.warning("worry")
    assert [line.split()[-1] for line in capsys.readouterr().err.splitlines()] == shown


def test_a_long_iteration_speaks_now_and_then(capsys):
    set_up_logging(is_main=True)

    def numbers() -> Iterator[int]:
        yield from range(40)

    assert list(steps_shown(numbers(), total=40, what="chunk", is_main=True)) == list(range(40))
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 10
    assert "chunk 40/40" in said[-1]
    assert not sys.stderr.isatty()


def test_skipped_steps_are_counted_and_leave_the_means_alone():
    window = Window()
    for value, applied in ((1.0, True), (float("nan"), False), (3.0, True)):
        window.add({"loss": torch.tensor(value)}, applied=applied)
    line = window.close()
    assert (line.scalars()["loss"], line.skipped) == (2.0, 1)
    window.add({"loss": torch.tensor(float("nan"))}, applied=False)
    line = window.close()
    assert (line.scalars(), line.skipped) == ({}, 1)


def test_a_pause_is_no_time_of_steps():
    window = Window()
    window.add({"loss": torch.tensor(1.0)})
    with window.paused():
        time.sleep(0.3)
    assert window.close().step_seconds < 0.2
