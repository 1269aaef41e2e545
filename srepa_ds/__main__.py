"""The program `srepa-ds`, also as `python -m srepa_ds`: what must happen before other imports."""

import os
import sys

if __name__ == "__main__" and sys.path and sys.path[0] in ("", os.getcwd()):
    # `python -m` looks in the working directory first, whatever Python files a user keeps there.
    del sys.path[0]

from srepa_ds.distributed.signals import leave_on_interrupt


def main() -> None:
    """Runs this process's command line and exits."""
    _open_standard_streams()
    leave_on_interrupt()
    from srepa_ds.cli import main as run_command_line

    run_command_line()


def _open_standard_streams() -> None:
    """Opens the standard streams that a daemon or `2>&-` has closed.

    Otherwise the next file to be opened would get their number, and messages with it. Errors go to
    the standard output if that alone is open.
    """
    closed = [number for number in range(3) if not _is_open(number)]
    for _ in closed:
        # The lowest free number is taken.
        os.open(os.devnull, os.O_RDWR)
    if 2 in closed and 1 not in closed:
        os.dup2(1, 2)
    for number, name in ((1, "stdout"), (2, "stderr")):
        if number in closed:
            stream = open(number, "w", buffering=1, errors="backslashreplace", closefd=False)
            setattr(sys, name, stream)


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


if __name__ == "__main__":
    main()
