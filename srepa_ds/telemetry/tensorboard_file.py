"""The file of events that TensorBoard reads, written by the caller, who gets the errors.

The usual writer hands events to a thread, which prints its own traceback when the disk is full.
"""

import io
import os
import re
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[attr-defined]
from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[attr-defined]
from tensorboard.summary.writer.record_writer import RecordWriter

_NAME = "events.out.tfevents"


class TensorBoardFile:
    """Appends scalars and images to a new file; each is written when the call returns.

    Points after `first_step` in earlier files of the folder no longer show, wherever the clock was
    set in between. The methods that write raise OSError, and then leave the file as it was; if it
    was removed, another is begun.
    """

    def __init__(self, folder: Path, *, first_step: int):
        self._folder = folder
        self._first_step = first_step
        self._file: BinaryIO | None = None
        self._wall_time = 0.0

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds a point to each of the named curves."""
        points = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._write(Event(step=step, summary=Summary(value=points)))

    def image(self, step: int, tag: str, image: Image.Image) -> None:
        """Adds an image in RGB."""
        encoded = io.BytesIO()
        image.convert("RGB").save(encoded, format="PNG")
        value = Summary.Image(
            width=image.width,
            height=image.height,
            colorspace=3,
            encoded_image_string=encoded.getvalue(),
        )
        self._write(Event(step=step, summary=Summary(value=[Summary.Value(tag=tag, image=value)])))

    def close(self) -> None:
        """Closes the file; a later write starts another."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, event: Event) -> None:
        if self._file is not None and not Path(self._file.name).exists():
            self.close()
        file = self._file = self._file or self._opened()
        begin = file.tell()
        beginning = [] if begin else self._beginning()
        records = io.BytesIO()
        for record in (*beginning, event):
            self._wall_time = record.wall_time = max(time.time(), self._wall_time)
            RecordWriter(records).write(record.SerializeToString())
        rest = records.getbuffer()
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            # Readers stop at the first torn record of a file.
            file.truncate(begin)
            file.seek(begin)
            raise

    def _opened(self) -> BinaryIO:
        """Returns a new file whose name and times come after those of the files in the folder."""
        self._folder.mkdir(parents=True, exist_ok=True)
        number = time.time_ns()
        for path in self._folder.glob(f"{_NAME}.*"):
            self._wall_time = max(self._wall_time, path.lstat().st_mtime)
            if found := re.match(r"[0-9]{19}\.", path.name.removeprefix(f"{_NAME}.")):
                number = max(number, int(found[0][:-1]) + 1)
        # Files are read in the order of their names.
        name = f"{_NAME}.{number:019d}.{socket.gethostname()}.{os.getpid()}"
        return (self._folder / name).open("xb", buffering=0)

    def _beginning(self) -> list[Event]:
        restart = SessionLog(status=SessionLog.START)
        return [
            Event(file_version="brain.Event:2"),
            Event(step=self._first_step + 1, session_log=restart),
        ]
