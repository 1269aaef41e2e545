"""Chunks are taken, not dealt: a slow or dead process does not hold the others."""

import json
import os
import threading
import time
from contextlib import ExitStack

import numpy as np
import pytest
import torch

from srepa_ds.errors import OutputError
from srepa_ds.sampling.claims import Claims, Process
from srepa_ds.sampling.config import SamplerConfig
from srepa_ds.sampling.generate import ImageBatch, plan_chunks
from srepa_ds.sampling.provenance import Provenance
from srepa_ds.sampling.units import Units
from srepa_ds.sampling.writer import ChunkWriter

CHUNKS = plan_chunks(SamplerConfig(num_samples=40, batch_size=4))


def drawn(chunk):
    ids = chunk.sample_ids()
    images = ids[:, None, None, None].expand(-1, 4, 4, 3).to(torch.uint8).contiguous()
    return ImageBatch(images, ids % 3, ids, chunk)


def writer_of(folder):
    return ChunkWriter(folder, Provenance({"seed": 0}))


def draw(folder, *, seconds=0.0, goes_on=lambda: True, claim_seconds=None) -> list[int]:
    """Draws as one process does, so long for each chunk; returns the numbers of its chunks."""
    writer, own = writer_of(folder), []
    with Claims(writer.parts.folder, seconds=claim_seconds) as claims:
        units = Units(writer, CHUNKS, claims, goes_on=goes_on)
        for run in units.runs():
            for chunk in run:
                time.sleep(seconds)
                writer.write(drawn(chunk))
                units.done(chunk)
                own.append(chunk.index)
    return own


def assemble(folder):
    writer_of(folder).assemble(CHUNKS, num_classes=3)
    with np.load(folder / "samples.npz") as archive:
        assert archive["arr_0"][:, 0, 0, 0].tolist() == list(range(40))
    names = {path.name for path in folder.iterdir()}
    assert names == {"samples.npz", "provenance.json", "contact_sheet.png"}


def test_a_slow_process_draws_less_and_every_chunk_is_drawn_once(tmp_path):
    found = {}

    def go(name, seconds):
        found[name] = draw(tmp_path, seconds=seconds)

    threads = [
        threading.Thread(target=go, args=(name, seconds))
        for name, seconds in (("slow", 0.5), ("fast", 0.02))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(found["slow"] + found["fast"]) == list(range(10))
    assert 0 < len(found["slow"]) < len(found["fast"])
    assemble(tmp_path)


def test_a_dead_owners_chunks_are_drawn_and_a_living_ones_are_waited_for(tmp_path):
    writer = writer_of(tmp_path)
    dead = json.dumps(Process.own()._replace(start="1")._asdict())
    for number in (2, 3, 4):
        (writer.parts.folder / f"chunk-{number:06d}.claim").write_text(dead)
    lost = writer.parts.folder / "chunk-000005.claim"
    lost.write_text(json.dumps(Process.own()._replace(host="node-7")._asdict()))
    os.utime(lost, (1, 1))
    with Claims(writer.parts.folder) as living:
        assert living.take("chunk-000007")

        def finish():
            time.sleep(0.5)
            writer.write(drawn(CHUNKS[7]))

        owner = threading.Thread(target=finish)
        owner.start()
        own = draw(tmp_path)
        owner.join()
    assert sorted(own) == [0, 1, 2, 3, 4, 5, 6, 8, 9]
    assemble(tmp_path)


def test_a_process_that_is_overtaken_by_the_end_of_the_set_writes_nothing(tmp_path):
    writer = writer_of(tmp_path)
    draw(tmp_path)
    assemble(tmp_path)
    writer.write(drawn(CHUNKS[3]))
    assert draw(tmp_path) == []
    writer.tidy_up()
    assemble(tmp_path)


def test_what_was_taken_early_is_not_waited_for(tmp_path):
    """A generator that draws ahead holds two claims; when nothing is free, its run ends."""
    writers = [writer_of(tmp_path) for _ in range(2)]
    with ExitStack() as stack:
        runs = []
        for writer in writers:
            claims = stack.enter_context(Claims(writer.parts.folder))
            units = Units(writer, CHUNKS[:4], claims)
            runs.append((writer, units, next(units.runs())))
        held = [[next(run), next(run)] for _, _, run in runs]
        assert sorted(chunk.index for own in held for chunk in own) == [0, 1, 2, 3]
        for (writer, units, run), own in zip(runs, held, strict=True):
            assert next(run, None) is None
            for chunk in own:
                writer.write(drawn(chunk))
                units.done(chunk)
    assert not writers[0].missing(CHUNKS[:4])


def test_no_more_is_taken_once_another_rank_has_failed(tmp_path):
    answers = iter([True, True, True, True])
    assert len(draw(tmp_path, goes_on=lambda: next(answers, False))) == 3


def test_a_removed_folder_of_parts_is_made_again(tmp_path):
    writer = writer_of(tmp_path)
    writer.parts.folder.rmdir()
    assert len(draw(tmp_path)) == 10
    assemble(tmp_path)


def test_a_file_in_the_place_of_the_parts_is_named(tmp_path):
    writer = writer_of(tmp_path)
    writer.parts.folder.rmdir()
    writer.parts.folder.write_text("in the way")
    with pytest.raises(OutputError, match=r"cannot write .*(Not a directory|File exists)"):
        draw(tmp_path)


def test_a_chunk_whose_owner_hangs_is_drawn_in_the_end(tmp_path):
    """The claim is touched by its thread all the time, and its chunk is never drawn."""
    writer, deadline = writer_of(tmp_path), time.monotonic() + 60
    with Claims(writer.parts.folder, seconds=0.4) as hanging:
        assert hanging.take("chunk-000007")
        own = draw(tmp_path, claim_seconds=0.4, goes_on=lambda: time.monotonic() < deadline)
        assert (own[-1], sorted(own)) == (7, list(range(10)))
        assert (writer.parts.folder / "chunk-000007.claim").exists()
    assemble(tmp_path)


@pytest.mark.slow
def test_a_slower_owner_is_waited_for_as_long_as_two_chunks_take(tmp_path):
    writer, begun, deadline = writer_of(tmp_path), {}, time.monotonic() + 60
    with ExitStack() as stack:
        slower, own = (
            stack.enter_context(Claims(writer.parts.folder, seconds=1.0)) for _ in range(2)
        )
        assert slower.take("chunk-000002")
        units = Units(writer, CHUNKS[:3], own, goes_on=lambda: time.monotonic() < deadline)
        for run in units.runs():
            for chunk in run:
                begun[chunk.index] = time.monotonic()
                time.sleep(0.8)
                writer.write(drawn(chunk))
                units.done(chunk)
    assert list(begun)[-1] == 2
    # From the end of the last own chunk.
    assert begun[2] - max(begun[0], begun[1]) > 0.8 + 2 * 0.8
