"""The table of sources: `SOURCES`, a row for each, and the section that chooses one."""

from typing import Annotated

from srepa_ds.data.sources.digits import Digits
from srepa_ds.data.sources.source import Source
from srepa_ds.schema import Section, one_of

SOURCES: dict[str, type[Source]] = {"digits": Digits}


class SourceConfig(Section):
    """The source of the images."""

    kind: Annotated[str, one_of("source", SOURCES)]
    """`digits`: scikit-learn's handwritten digits."""


def build_source(config: SourceConfig) -> Source:
    """Returns the source that `config` names, opened; raises DataError if it is not available."""
    return SOURCES[config.kind]()
