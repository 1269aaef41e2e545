"""The table of sources: `SOURCES`, a row for each, and the section that chooses one."""

from typing import Annotated

from pydantic import Field

from srepa_ds.data.sources.digits import DigitsConfig
from srepa_ds.data.sources.image_folder import ImageFolderConfig
from srepa_ds.data.sources.lightningdit import LightningDitConfig
from srepa_ds.data.sources.parquet import ParquetConfig
from srepa_ds.data.sources.repa import RepaConfig

SourceConfig = Annotated[
    DigitsConfig | ImageFolderConfig | ParquetConfig | RepaConfig | LightningDitConfig,
    Field(discriminator="kind"),
]
"""The source of the images: the section of one row of `SOURCES`."""

SOURCES = {
    "digits": DigitsConfig,
    "image_folder": ImageFolderConfig,
    "parquet": ParquetConfig,
    "repa": RepaConfig,
    "lightningdit": LightningDitConfig,
}
"""The section of each source by its `kind`; `opened` returns the source."""
