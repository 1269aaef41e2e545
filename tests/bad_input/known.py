"""Rows that fail for now: their names, and what happens instead of one message."""

_PATHS = "an exception that is no SRepaError: the path cannot exist"

KNOWN: dict[str, str] = {}
