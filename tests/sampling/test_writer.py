import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from srepa_ds.errors import OutputError
from srepa_ds.sampling.config import SamplerConfig
from srepa_ds.sampling.generate import ImageBatch, plan_chunks
from srepa_ds.sampling.provenance import describe
from srepa_ds.sampling.writer import ChunkWriter

CONFIG = SamplerConfig(num_samples=23, batch_size=5)
CHUNKS = plan_chunks(CONFIG)


def provenance(config=CONFIG, **changes):
    facts = {
        "checkpoint_sha256": "ab" * 32,
        "ema": "0.9999",
        "path": "linear",
        "codec": {"kind": "identity"},
        "class_token": False,
        "versions": {"torch": "2.11"},
    }
    return describe(config, **{**facts, **changes})


def drawn(chunk, *, classes=4):
    ids = chunk.sample_ids()
    pixels = ids[:, None, None, None] * 10 + torch.arange(6 * 4 * 3).reshape(6, 4, 3)
    return ImageBatch((pixels % 256).to(torch.uint8), ids % classes, ids, chunk)


def everything():
    batches = [drawn(chunk) for chunk in CHUNKS]
    return tuple(
        torch.cat([getattr(batch, name) for batch in batches]).numpy()
        for name in ("images", "labels")
    )


def files_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def finished(folder):
    writer = ChunkWriter(folder, provenance())
    for chunk in CHUNKS:
        writer.write(drawn(chunk))
    writer.assemble(CHUNKS, num_classes=4)
    return writer


def test_assembles_the_adm_archive(tmp_path):
    folder = tmp_path / "runs" / "samples"
    finished(folder)
    with np.load(folder / "samples.npz") as archive:
        images, labels = archive["arr_0"], archive["arr_1"]
    expected_images, expected_labels = everything()
    np.testing.assert_array_equal(images, expected_images)
    np.testing.assert_array_equal(labels, expected_labels)
    assert images.dtype == np.uint8
    assert files_in(folder) == ["contact_sheet.png", "provenance.json", "samples.npz"]
    facts = json.loads((folder / "provenance.json").read_text())
    assert facts["sampler"]["solver"] == "euler_maruyama"
    assert facts["checkpoint_sha256"] == "ab" * 32


def test_equal_samples_are_equal_files(tmp_path):
    contents = []
    for name in "ab":
        finished(tmp_path / name)
        contents.append((tmp_path / name / "samples.npz").read_bytes())
    assert contents[0] == contents[1]


def test_two_ranks_share_the_folder(tmp_path):
    writers = [ChunkWriter(tmp_path, provenance()) for _ in range(2)]
    for rank, writer in enumerate(writers):
        mine = CHUNKS[rank::2]
        assert writer.missing(mine) == mine
        for chunk in mine:
            writer.write(drawn(chunk))
    writers[0].assemble(CHUNKS, num_classes=4)
    with np.load(tmp_path / "samples.npz") as archive:
        np.testing.assert_array_equal(archive["arr_0"], everything()[0])


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    writer = ChunkWriter(tmp_path, provenance())
    for chunk in CHUNKS[:3]:
        writer.write(drawn(chunk))
    # A kill in the middle of a write, and a part truncated by a bad disk.
    (tmp_path / "parts" / "chunk-000003.safetensors.host-1.partial").write_bytes(b"half")
    damaged = tmp_path / "parts" / "chunk-000001.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-7])

    again = ChunkWriter(tmp_path, provenance())
    assert again.remove_damaged(CHUNKS) == 1
    missing = again.missing(CHUNKS)
    assert [chunk.index for chunk in missing] == [1, 3, 4]
    with pytest.raises(OutputError, match=r"3 of 5 chunks are missing.*chunk-000001"):
        again.assemble(CHUNKS, num_classes=4)
    for chunk in missing:
        again.write(drawn(chunk))
    again.assemble(CHUNKS, num_classes=4)
    with np.load(tmp_path / "samples.npz") as archive:
        np.testing.assert_array_equal(archive["arr_0"], everything()[0])
    assert not (tmp_path / "parts").exists()


def test_a_finished_set_is_not_drawn_again(tmp_path):
    finished(tmp_path)
    before = (tmp_path / "samples.npz").stat().st_mtime_ns
    writer = ChunkWriter(tmp_path, provenance())
    assert writer.is_complete()
    assert writer.missing(CHUNKS) == ()
    writer.assemble(CHUNKS, num_classes=4)
    assert (tmp_path / "samples.npz").stat().st_mtime_ns == before
    assert files_in(tmp_path) == ["contact_sheet.png", "provenance.json", "samples.npz"]


@pytest.mark.parametrize("class_token", [False, True])
def test_the_class_tokens_guidance_is_a_fact_of_models_that_have_one(class_token):
    sampler = provenance(class_token=class_token).facts["sampler"]
    assert ("cls_cfg_scale" in sampler) == class_token
    # Of older sets, which must remain what they were.
    assert {*sampler} - {"cls_cfg_scale"} == {
        "solver", "num_steps", "cfg_scale", "guidance_low", "guidance_high", "label_mode",
        "num_samples", "batch_size", "seed", "precision",
    }  # fmt: skip


def test_another_provenance_is_refused_and_named(tmp_path):
    ChunkWriter(tmp_path, provenance()).write(drawn(CHUNKS[0]))
    before = files_in(tmp_path)
    config = CONFIG.model_copy(update={"seed": 3})
    with pytest.raises(OutputError) as caught:
        ChunkWriter(tmp_path, provenance(config, ema="0.999"))
    message = str(caught.value)
    assert "ema: '0.9999' there, '0.999' now" in message
    assert "sampler.seed: 0 there, 3 now" in message
    assert "codec" not in message
    assert files_in(tmp_path) == before


def test_samples_of_unknown_origin_are_refused(tmp_path):
    (tmp_path / "samples.npz").write_bytes(b"somebody's")
    with pytest.raises(OutputError, match=r"without provenance\.json"):
        ChunkWriter(tmp_path, provenance())
    assert files_in(tmp_path) == ["samples.npz"]


def test_a_folder_of_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    for folder in (tmp_path, Path("/")):
        with pytest.raises(OutputError, match=r"holds other files \(.*give an empty output folder"):
            ChunkWriter(folder, provenance())
    assert files_in(tmp_path) == ["thesis.txt"]
    # The sets of other steps, and what other ranks are about to write, are not foreign.
    (tmp_path / "samples" / "step-0000005").mkdir(parents=True)
    (tmp_path / "samples" / "provenance.json.node-7.partial").touch()
    ChunkWriter(tmp_path / "samples", provenance())


def test_an_unwritable_folder_leaves_nothing_behind(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="cannot write"):
        ChunkWriter(tmp_path / "file" / "deep" / "samples", provenance())
    # The folder can be made here, but a name this long cannot.
    with pytest.raises(OutputError, match="cannot write"):
        ChunkWriter(tmp_path / "new" / ("x" * 300), provenance())
    assert files_in(tmp_path) == ["file"]


def test_a_failed_assembly_leaves_no_half_archive(tmp_path):
    writer = ChunkWriter(tmp_path, provenance())
    for chunk in CHUNKS:
        writer.write(drawn(chunk))
    # A folder in the way stands for any failure of the last step, such as a full disk.
    (tmp_path / "contact_sheet.png").mkdir()
    with pytest.raises(OutputError, match="cannot write"):
        writer.assemble(CHUNKS, num_classes=4)
    assert not (tmp_path / "samples.npz").exists()
    assert not [name for name in files_in(tmp_path) if name.endswith(".partial")]
    assert writer.missing(CHUNKS) == ()


def test_contact_sheet_has_a_row_per_class(tmp_path):
    finished(tmp_path)
    with Image.open(tmp_path / "contact_sheet.png") as picture:
        sheet = np.asarray(picture)
    images, labels = everything()
    zoom, gap = 12, 2
    assert sheet.shape == (4 * (6 * zoom + gap) + gap, 10 * (4 * zoom + gap) + gap, 3)
    for label in range(4):
        for column, image in enumerate(images[labels == label][:10]):
            top, left = label * (6 * zoom + gap) + gap, column * (4 * zoom + gap) + gap
            tile = sheet[top : top + 6 * zoom : zoom, left : left + 4 * zoom : zoom]
            np.testing.assert_array_equal(tile, image)


def test_one_class_fills_the_sheet(tmp_path):
    writer = ChunkWriter(tmp_path, provenance())
    for chunk in CHUNKS:
        writer.write(drawn(chunk, classes=1))
    writer.assemble(CHUNKS, num_classes=4)
    with Image.open(tmp_path / "contact_sheet.png") as sheet:
        assert sheet.height == 3 * (6 * 12 + 2) + 2


def test_a_sheet_of_what_is_drawn_so_far(tmp_path):
    writer = ChunkWriter(tmp_path, provenance())
    writer.write_sheet(CHUNKS)
    assert not (tmp_path / "contact_sheet.png").exists()
    heights = []
    for chunk in CHUNKS:
        # One image of each class and then more.
        writer.write(drawn(chunk, classes=chunk.index + 3))
        writer.write_sheet(CHUNKS)
        with Image.open(tmp_path / "contact_sheet.png") as sheet:
            heights.append(sheet.height)
    assert heights == sorted(heights)
    assert heights[0] == 3 * (6 * 12 + 2) + 2 < heights[-1]
    writer.assemble(CHUNKS, num_classes=7)
    final = (tmp_path / "contact_sheet.png").read_bytes()
    writer.write_sheet(CHUNKS)
    assert (tmp_path / "contact_sheet.png").read_bytes() == final


def notes_in(folder):
    return json.loads((folder / "provenance.json").read_text())


def test_notes_are_renewed_and_facts_stay(tmp_path):
    plain = finished(tmp_path).provenance
    preset = provenance(SamplerConfig(preset="unguided", num_samples=23, batch_size=5))
    assert preset.digest() == plain.digest()
    assert "preset" not in notes_in(tmp_path)
    ChunkWriter(tmp_path, preset)
    assert notes_in(tmp_path) == json.loads(preset.text())
    ChunkWriter(tmp_path, plain)
    assert notes_in(tmp_path) == json.loads(plain.text())
    assert files_in(tmp_path) == ["contact_sheet.png", "provenance.json", "samples.npz"]


def test_devices_of_all_that_drew_are_noted(tmp_path):
    first = ChunkWriter(tmp_path, provenance(devices=["cuda A"]))
    assert first.note_devices() == ["cuda A"]
    second = ChunkWriter(tmp_path, provenance(devices=["cpu B"]))
    # One that finds nothing to draw says nothing of its device.
    assert notes_in(tmp_path)["devices"] == ["cuda A"]
    assert second.note_devices() == ["cuda A"]
    assert notes_in(tmp_path)["devices"] == ["cpu B", "cuda A"]
    assert first.note_devices() == ["cpu B", "cuda A"]
