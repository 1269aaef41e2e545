"""The preparation of one part of a data set: what is missing of it, shared by ranks and shares."""

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NoReturn

from srepa_ds.codec.latent_codec import LatentCodec
from srepa_ds.data.latent_file import latent_name
from srepa_ds.data.prepared_folder import PreparedFolder, prepared_index
from srepa_ds.data.receipts import ShardReceipt, shards_of
from srepa_ds.data.shard_file import shard_name
from srepa_ds.data.shard_index import (
    LatentDescription,
    LatentFileEntry,
    LatentIndex,
    ShardEntry,
    ShardIndex,
)
from srepa_ds.data.shards import Parts, ShardDataset
from srepa_ds.data.sources.source import Source
from srepa_ds.distributed import ranks
from srepa_ds.distributed.ranks import Rank
from srepa_ds.errors import DataError, OutputError
from srepa_ds.preparation.config import PrepareConfig
from srepa_ds.preparation.encoder import Encoder
from srepa_ds.preparation.image_pass import ImagePass
from srepa_ds.preparation.latent_pass import LatentPass
from srepa_ds.preparation.parts import Part
from srepa_ds.preparation.preview import write_preview
from srepa_ds.preparation.progress import run_through
from srepa_ds.preparation.remarks import (
    about_missing,
    about_other_latents,
    about_other_settings,
    about_skipped,
    summary,
)
from srepa_ds.preparation.share import Share

log = logging.getLogger("srepa_ds")


@dataclass(frozen=True)
class Job:
    """The preparation of one part. Collective, where a method does not say otherwise."""

    config: PrepareConfig
    source: Source
    part: Part
    codec: LatentCodec | None
    latents: LatentDescription | None
    """The latents to write; None for none."""
    share: Share
    rank: Rank

    @property
    def folder(self) -> PreparedFolder:
        """The folder of the part."""
        place = self.config.output / self.part.name
        return PreparedFolder(
            place,
            self.part.description,
            is_shared=self.share.total > 1,
            latent_settings=self._latent_settings,
        )

    @property
    def _latent_settings(self) -> dict[str, Any]:
        """The settings that decide the last bits of latents; none if the source holds them."""
        wanted = self.config.latents
        if wanted is None or self.source.latents is not None:
            return {}
        codec = wanted.codec
        own = {"precision": codec.precision, "tiled": codec.tiled}
        return {**own, "batch_size": wanted.batch_size}

    def index(self) -> ShardIndex | None:
        """Returns the index that is already there; not collective.

        Raises OutputError if the folder holds another data set or other latents.
        """
        index = prepared_index(self.folder.folder, self.part.description)
        if index is not None and index.latents is not None and self.latents is not None:
            if differing := about_other_latents(index.latents, self.latents):
                raise OutputError(
                    f"{self.folder.folder}: holds latents made otherwise ({differing}); choose "
                    "another folder"
                )
        return index

    def is_finished(self, index: ShardIndex | None) -> bool:
        """Returns whether nothing is missing, given the index that is there; not collective."""
        return index is not None and (self.latents is None or index.latents is not None)

    def run(self) -> bool:
        """Does what is missing of this share, and returns whether the part is finished.

        Raises OutputError, and DataError for an image that cannot be read.
        """
        index = ranks.on_main(self.index)
        if self.is_finished(index):
            ranks.on_main(self.folder.tidy_up)
            log.info("%s: already prepared with these settings, nothing to do", self.folder.folder)
            self._warn_of_skipped(index)
            return True
        with ExitStack() as claims:
            ranks.on_main(lambda: claims.enter_context(self.folder.claimed()))
            ranks.on_main(self.folder.remove_beginnings, self.of_share(range(self.num_pieces)))
            index = ranks.on_main(self.index)
            if index is None:
                self._write_images()
            if self.encodes:
                self._write_latents()
            index = ranks.on_main(self._finish)
        if self.is_finished(index):
            self._warn_of_skipped(index)
            return True
        if self.share.total == 1:
            ranks.on_main(self._raise_unfinished)
        log.info("%s: this share is done, others are not yet", self.folder.folder)
        if remark := ranks.on_main(self._about_other_settings, range(self.num_pieces)):
            # Each share would wait for the other for ever.
            self._warn(f"{remark}; give all shares the same settings")
        return False

    @property
    def latents_come_along(self) -> bool:
        """Whether a shard and its latents are written together, in the first pass."""
        is_only_chance = self.latents is not None and self.part.description.pixels is None
        return self.source.latents is not None or is_only_chance

    @property
    def encodes(self) -> bool:
        """Whether a second pass encodes the images of finished shards."""
        return self.latents is not None and not self.latents_come_along

    @property
    def num_pieces(self) -> int:
        """Pieces of the source, each of which becomes a shard."""
        return self.part.num_shards

    def missing_images(self) -> list[int]:
        """Returns the shards that nobody has written yet; not collective."""
        receipts = self._receipts()
        # After the receipts: another share that finishes writes the index before it removes them.
        if self.index() is not None:
            return []
        return [number for number in range(self.num_pieces) if number not in receipts]

    def missing_latents(self, shards: Mapping[int, ShardEntry]) -> list[int]:
        """Returns those of `shards` whose latents nobody has written yet; not collective."""
        return [
            number for number, entry in shards.items() if self._latents_of(number, entry) is None
        ]

    def shards(self) -> dict[int, ShardEntry]:
        """Returns the entries of the shards that are there, by number; not collective."""
        return shards_of(self.index(), self._receipts())

    def _receipts(self) -> dict[int, ShardReceipt]:
        """Returns the receipts of all pieces that need not be written again."""
        found = ((number, self.folder.receipt(number)) for number in range(self.num_pieces))
        return {
            n: receipt for n, receipt in found if receipt is not None and self._is_done(n, receipt)
        }

    def _is_done(self, number: int, receipt: ShardReceipt) -> bool:
        if receipt.skipped and self.config.on_error == "fail":
            # The images may have been repaired; if not, the preparation ends with the first one.
            return False
        if receipt.shard is None or self.latents is None or self.encodes:
            return True
        return self._latents_of(number, receipt.shard) is not None

    def _latents_of(self, number: int, entry: ShardEntry) -> LatentFileEntry | None:
        assert self.latents is not None
        return self.folder.latents(number, self.latents, shard_sha256=entry.sha256)

    def _write_images(self) -> None:
        """Writes this share's missing shards."""
        missing = self.of_share(ranks.on_main(self.missing_images))
        images = ImagePass(
            self.source,
            self.part,
            self.folder,
            skips=self.config.on_error == "skip",
            latents=None if self.encodes else self.latents,
            encoder=self._encoder(),
        )
        threads = self.config.threads_for(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        run_through(
            images.write(self._of_rank(missing), threads=threads),
            total=sum(self.part.num_images(number) for number in missing),
            what=f"{self.part.name}: images",
        )

    def _encoder(self) -> Encoder | None:
        """Returns the encoder of images that are not stored, None if nothing is encoded now."""
        if self.source.latents is not None or not self.latents_come_along:
            return None
        assert self.codec is not None
        assert self.config.latents is not None
        wanted = self.config.latents
        return Encoder(self.codec, batch_size=wanted.batch_size, mirrored=wanted.mirrored)

    def _write_latents(self) -> None:
        """Writes the missing latents of this share's shards."""
        assert self.latents is not None
        assert self.codec is not None
        assert self.config.latents is not None
        shards, missing = ranks.on_main(self._shards_without_latents)
        missing = self.of_share(missing)
        if not missing:
            return
        if remark := ranks.on_main(self._about_other_settings, missing):
            log.info("%s: %s; they are made again", self.folder.folder, remark)
        index = self.folder.index_of(list(shards.values()))
        dataset = ranks.together(
            lambda: ShardDataset(self.folder.folder, parts=Parts(moments=False), index=index)
        )
        batch_size = self.config.latents.batch_size
        latents = LatentPass(self.codec, dataset, self.folder, self.latents, batch_size)
        run_through(
            latents.write(self._of_rank(missing)),
            total=sum(shards[number].num_samples for number in missing),
            what=f"{self.part.name}: latents",
        )

    def _shards_without_latents(self) -> tuple[dict[int, ShardEntry], list[int]]:
        shards = self.shards()
        missing = self.missing_latents(shards)
        return shards, [] if self.is_finished(self.index()) else missing

    def _about_other_settings(self, missing: Iterable[int]) -> str:
        """Returns that some of the `missing` latents are there, made otherwise; empty if none."""
        if self.latents is None:
            return ""
        found = [self.folder.other_latent_settings(number) for number in missing]
        others = [settings for settings in found if settings is not None]
        return about_other_settings(others, self._latent_settings)

    def _finish(self) -> ShardIndex | None:
        """Writes the index if all pieces are there; returns what index there is then."""
        try:
            self._write_index()
        except OutputError:
            # Another share that finishes at the same time clears away what it finds unfinished.
            if not self.is_finished(self.index()):
                raise
        return self.index()

    def _write_index(self) -> None:
        index, receipts = self.index(), self._receipts()
        if self.is_finished(index) or (index is None and len(receipts) < self.num_pieces):
            return
        # Of what was read above: another share may be removing the receipts by now.
        shards = shards_of(index, receipts)
        if index is None:
            self._check_not_empty(shards, receipts)
        latents = self._latent_index(shards)
        if self.latents is not None and latents is None:
            return
        skipped = [one for number in sorted(receipts) for one in receipts[number].skipped]
        complete = self.folder.index_of(
            list(shards.values()),
            num_skipped=len(skipped) if index is None else index.num_skipped,
            latents=latents,
        )
        if index is None:
            write_preview(self.folder, complete)
        self.folder.finish(complete, skipped if index is None else ())
        log.info("%s: %s", self.folder.folder, summary(complete))

    def _check_not_empty(
        self, shards: Mapping[int, ShardEntry], receipts: Mapping[int, ShardReceipt]
    ) -> None:
        if shards:
            return
        skipped = [one for receipt in receipts.values() for one in receipt.skipped]
        raise DataError(
            f"{self.folder.folder}: none of {len(skipped)} images could be read; the first is "
            f"{skipped[0].key}: {skipped[0].reason}"
        )

    def _latent_index(self, shards: Mapping[int, ShardEntry]) -> LatentIndex | None:
        """Returns the index of the latents of all shards, None if some are missing."""
        if self.latents is None:
            return None
        entries = [self._latents_of(number, entry) for number, entry in shards.items()]
        files = tuple(entry for entry in entries if entry is not None)
        complete = len(files) == len(entries)
        return LatentIndex(**dict(self.latents), files=files) if complete else None

    def _warn_of_skipped(self, index: ShardIndex | None) -> None:
        """Says that images are left out although one that fails must end this command."""
        if index is None or self.config.on_error == "skip":
            return
        if remark := about_skipped(index):
            self._warn(remark)

    def _warn(self, remark: str) -> None:
        if self.rank.is_main:
            log.warning("%s: %s", self.folder.folder, remark)

    def _raise_unfinished(self) -> NoReturn:
        """Raises OutputError: files that this command has written are not there any more."""
        images, latents = self.missing_images(), []
        if self.latents is not None:
            latents = self.missing_latents(self.shards())
        missing = [*map(shard_name, images), *map(latent_name, latents)]
        raise OutputError(f"{self.folder.folder}: {about_missing(missing)}")

    def of_share(self, numbers: Iterable[int]) -> list[int]:
        """Returns those of the pieces `numbers` that this share works on; not collective."""
        return [number for number in numbers if number % self.share.total == self.share.number]

    def _of_rank(self, numbers: Sequence[int]) -> Sequence[int]:
        return numbers[self.rank.number :: self.rank.world_size]
