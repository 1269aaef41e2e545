"""Access to DeepSpeed's private attributes, with a clear error where a version lacks one."""

from typing import Any

import deepspeed

from srepa_ds.errors import SRepaError, raised_on_all_ranks

TESTED = ("0.19.8",)
"""The versions of DeepSpeed whose private attributes have been read and tested."""


def private(owner: Any, name: str, *, needed_for: str) -> Any:
    """Returns DeepSpeed's private attribute `name` of `owner`.

    Raises SRepaError, naming the attribute, `needed_for` and the tested versions, if the installed
    DeepSpeed does not have it.
    """
    try:
        return getattr(owner, name)
    except AttributeError as error:
        kind = getattr(owner, "__name__", None) or type(owner).__name__
        unknown = SRepaError(
            f"DeepSpeed {deepspeed.__version__} has no {kind}.{name}, which srepa_ds needs for "
            f"{needed_for}; tested with DeepSpeed {', '.join(TESTED)}: "
            f'pip install "deepspeed~={TESTED[-1]}"'
        )
        # All ranks have the same DeepSpeed: one message is enough.
        raise raised_on_all_ranks(unknown) from error
