"""Ends a program without warning at each moment in which it touches its files."""

import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

_TOUCHES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}
_KILLED = 9


def killed_at(moment: int, action: Callable[[], object], folder: Path) -> bool:
    """Returns whether `action` was killed before it touched `folder` for the `moment`-th time.

    It runs in a forked process that ends like a killed one: nothing is cleaned up.
    """
    with warnings.catch_warnings():
        # Of processes with threads; the child runs none.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        _end_at(moment, folder)
        try:
            action()
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, _KILLED), code
    return code == _KILLED


def _end_at(moment: int, folder: Path) -> None:
    left = moment

    def hook(event: str, arguments: tuple) -> None:
        nonlocal left
        if event in _TOUCHES and str(folder) in str(arguments[0]):
            left -= 1
            if left <= 0:
                os._exit(_KILLED)

    sys.addaudithook(hook)
