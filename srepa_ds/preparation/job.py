"""The preparation of one part of a data set: what is missing of it, shared by ranks and shares."""

import logging
import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from srepa_ds.codec.latent_codec import LatentCodec
from srepa_ds.console import steps_shown
from srepa_ds.data.prepared_folder import PreparedFolder, prepared_index
from srepa_ds.data.shard_index import (
    LatentDescription,
    LatentFileEntry,
    LatentIndex,
    ShardIndex,
)
from srepa_ds.data.shards import Parts, ShardDataset
from srepa_ds.data.sources.source import Source
from srepa_ds.distributed import ranks
from srepa_ds.distributed.ranks import Rank
from srepa_ds.errors import OutputError
from srepa_ds.preparation.config import PrepareConfig
from srepa_ds.preparation.encoder import Encoder
from srepa_ds.preparation.image_pass import ImagePass
from srepa_ds.preparation.latent_pass import LatentPass
from srepa_ds.preparation.parts import Part
from srepa_ds.preparation.preview import write_preview
from srepa_ds.preparation.share import Share
from srepa_ds.trees import differences

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
        return PreparedFolder(place, self.part.description, is_shared=self.share.total > 1)

    def index(self) -> ShardIndex | None:
        """Returns the index that is already there; not collective.

        Raises OutputError if the folder holds another data set or other latents.
        """
        index = prepared_index(self.folder.folder, self.part.description)
        if index is not None and index.latents is not None and self.latents is not None:
            there = index.latents.model_dump(mode="json", exclude={"files"})
            found = differences(there, self.latents.model_dump(mode="json"))
            if found:
                listing = "; ".join(
                    f"{d.path} is {d.old!r} there and {d.new!r} here" for d in found
                )
                raise OutputError(
                    f"{self.folder.folder}: holds latents made otherwise ({listing}); choose "
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
            return True
        with ExitStack() as claims:
            ranks.on_main(lambda: claims.enter_context(self.folder.claimed()))
            index = index or self._write_images()
            if index is not None and not self.is_finished(index):
                index = self._write_latents(index)
        if not self.is_finished(index):
            log.info("%s: this share is done, others are not yet", self.folder.folder)
        return self.is_finished(index)

    @property
    def latents_come_along(self) -> bool:
        """Whether a shard and its latents are written together, in the first pass."""
        is_only_chance = self.latents is not None and self.part.description.pixels is None
        return self.source.latents is not None or is_only_chance

    def missing_images(self) -> list[int]:
        """Returns the shards that nobody has written yet; not collective."""
        numbers = range(self.part.num_shards)
        return [number for number in numbers if not self._is_written(number)]

    def _is_written(self, number: int) -> bool:
        receipt = self.folder.receipt(number)
        if receipt is None or receipt.shard is None or not self.latents_come_along:
            return receipt is not None
        return self._latent_entries([(number, receipt.shard.sha256)]) != [None]

    def _write_images(self) -> ShardIndex | None:
        """Writes this share's missing shards; returns the index if all are there then."""
        own = self._own(ranks.on_main(self.missing_images))
        images = ImagePass(
            self.source,
            self.part,
            self.folder,
            skips=self.config.on_error == "skip",
            latents=self.latents if self.latents_come_along else None,
            encoder=self._encoder(),
        )
        threads = self.config.threads_for(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        total = sum(len(self.part.of_shard(number)) for number in own)
        self._run_through(images.write(own, threads=threads), what="images", total=total)
        return ranks.on_main(self._finish_images)

    def _encoder(self) -> Encoder | None:
        """Returns the encoder of images that are not stored, None if nothing is encoded now."""
        if self.source.latents is not None or not self.latents_come_along:
            return None
        assert self.codec is not None
        assert self.config.latents is not None
        wanted = self.config.latents
        return Encoder(self.codec, batch_size=wanted.batch_size, mirrored=wanted.mirrored)

    def _finish_images(self) -> ShardIndex | None:
        if self.missing_images():
            return None
        found = [self.folder.receipt(number) for number in range(self.part.num_shards)]
        receipts = [receipt for receipt in found if receipt is not None]
        latents = None
        if self.latents_come_along:
            shards = [
                (number, receipt.shard.sha256)
                for number, receipt in enumerate(receipts)
                if receipt.shard is not None
            ]
            latents = self._latent_index(shards)
        index = self.folder.finish(receipts, latents)
        write_preview(self.folder)
        log.info(
            "%s: %d images in %d classes%s",
            self.folder.folder,
            index.num_samples,
            index.num_classes,
            f", {index.num_skipped} left out (skipped.jsonl)" if index.num_skipped else "",
        )
        return index

    def _write_latents(self, index: ShardIndex) -> ShardIndex | None:
        """Writes this share's missing latents; returns the index if all are there then."""
        assert self.latents is not None
        assert self.codec is not None
        assert self.config.latents is not None
        shards = list(enumerate(entry.sha256 for entry in index.shards))
        missing = ranks.on_main(
            lambda: [n for n, entry in enumerate(self._latent_entries(shards)) if entry is None]
        )
        own = self._own(missing)
        parts = Parts(moments=False)
        dataset = ranks.together(lambda: ShardDataset(self.folder.folder, parts=parts))
        batch_size = self.config.latents.batch_size
        latents = LatentPass(self.codec, dataset, self.folder, self.latents, batch_size)
        total = sum(-(-index.shards[number].num_samples // batch_size) for number in own)
        self._run_through(latents.write(own), what="latents, batches", total=total)
        complete = ranks.on_main(self._latent_index, shards)
        if complete is None:
            return None
        return ranks.on_main(self.folder.add_latents, index, complete)

    def _latent_entries(self, shards: Sequence[tuple[int, str]]) -> list[LatentFileEntry | None]:
        assert self.latents is not None
        return [
            self.folder.latents(number, self.latents, shard_sha256=sha256)
            for number, sha256 in shards
        ]

    def _latent_index(self, shards: Sequence[tuple[int, str]]) -> LatentIndex | None:
        """Returns the index of the latents of all shards, None if some are missing."""
        assert self.latents is not None
        entries = self._latent_entries(shards)
        files = tuple(entry for entry in entries if entry is not None)
        complete = len(files) == len(entries)
        return LatentIndex(**dict(self.latents), files=files) if complete else None

    def _own(self, missing: Sequence[int]) -> list[int]:
        """Returns the pieces that fall to this rank of this share."""
        of_share = [number for number in missing if number % self.share.total == self.share.number]
        return of_share[self.rank.number :: self.rank.world_size]

    def _run_through(self, steps: Iterable[object], *, what: str, total: int) -> None:
        def go() -> None:
            shown = f"{self.part.name}: {what}"
            for _ in steps_shown(steps, total=total, what=shown, is_main=self.rank.is_main):
                pass

        ranks.together(go)
