"""The table of sources: `SOURCES`, a row for each, and the section that chooses one."""

from typing import Annotated

from pydantic import Field

from srepa_ds.data.sources.archive import ArchiveConfig
from srepa_ds.data.sources.digits import DigitsConfig
from srepa_ds.data.sources.file_list import FileListConfig
from srepa_ds.data.sources.image_folder import ImageFolderConfig
from srepa_ds.data.sources.lightningdit import LightningDitConfig
from srepa_ds.data.sources.parquet import ParquetConfig
from srepa_ds.data.sources.repa import RepaConfig
from srepa_ds.data.sources.web_dataset import WebDatasetConfig

SourceConfig = Annotated[
    ArchiveConfig
    | DigitsConfig
    | FileListConfig
    | ImageFolderConfig
    | LightningDitConfig
    | ParquetConfig
    | RepaConfig
    | WebDatasetConfig,
    Field(discriminator="kind"),
]
"""The source of the images: the section of one row of `SOURCES`."""

SOURCES = {
    "archive": ArchiveConfig,
    "digits": DigitsConfig,
    "file_list": FileListConfig,
    "image_folder": ImageFolderConfig,
    "lightningdit": LightningDitConfig,
    "parquet": ParquetConfig,
    "repa": RepaConfig,
    "web_dataset": WebDatasetConfig,
}
"""The section of each source by its `kind`; `opened` returns the source."""
