"""The sources by name, a row each."""

from typing import Annotated

from srepa_ds.data.sources.digits import Digits
from srepa_ds.data.sources.source import Source
from srepa_ds.schema import Section, known_in

SOURCES: dict[str, type[Source]] = {"digits": Digits}


class SourceConfig(Section):
    """Where the images come from."""

    kind: Annotated[str, known_in("source", SOURCES)]
    """`digits`: scikit-learn's handwritten digits."""


def build_source(config: SourceConfig) -> Source:
    """Returns the opened source; raises DataError if it is not there."""
    return SOURCES[config.kind]()
