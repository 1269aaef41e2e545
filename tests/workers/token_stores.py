"""Stores teacher tokens. Usage: token_stores.py CONFIG BATCH_SIZE OVERRIDES [LAST_WORDS].

OVERRIDES are joined by ';'. The process kills itself as soon as it says LAST_WORDS; if they begin
with STOP, it stops at what follows, until it is continued.
"""

import logging
import os
import signal
import sys
from pathlib import Path

from srepa_ds.commands.store_teacher_tokens import store_tokens
from srepa_ds.config.experiment import load_config
from srepa_ds.distributed import ranks


class KilledAt(logging.Handler):
    """Kills the process, as an out-of-memory killer would, or stops it, once words are logged."""

    def __init__(self, words: str):
        super().__init__()
        self._words = words.removeprefix("STOP ")
        self._signal = signal.SIGSTOP if words.startswith("STOP ") else signal.SIGKILL

    def emit(self, record: logging.LogRecord) -> None:
        if self._words in record.getMessage():
            os.kill(os.getpid(), self._signal)


if len(sys.argv) > 4:
    log = logging.getLogger("srepa_ds")
    log.addHandler(KilledAt(sys.argv[4]))
    log.setLevel(logging.INFO)
config = load_config(Path(sys.argv[1]), sys.argv[3].split(";"))
store_tokens(config, batch_size=int(sys.argv[2]))
ranks.leave(0)
