"""`prepare` of a folder of images: shares, threads, restarts, broken images, what it says first."""

import json
import logging
import os
import shutil
from collections import namedtuple

import pytest
import torch
from builders import contents
from image_tree import config_of, write_tree
from ranks import run_function
from small_vae import write_vae

from srepa_ds.commands.prepare import dry_run, prepare
from srepa_ds.data.prepared_folder import MARKER_NAME, SKIPPED_NAME, PreparedFolder
from srepa_ds.data.shard_index import DatasetDescription
from srepa_ds.data.shards import ShardDataset
from srepa_ds.errors import ConfigError, DataError, OutputError
from srepa_ds.preparation import estimate
from srepa_ds.preparation.image_pass import ImagePass
from srepa_ds.preparation.share import Share


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return write_tree(tmp_path_factory.mktemp("source") / "tree")


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return write_vae(tmp_path_factory.mktemp("vae") / "vae")


def latents(vae, **changes):
    return {"codec": {"kind": "vae", "weights": str(vae)}, "batch_size": 3, **changes}


@pytest.fixture(scope="module")
def undisturbed(tree, vae, tmp_path_factory):
    place = tmp_path_factory.mktemp("undisturbed")
    prepare(config_of(place / "p.yaml", tree, place / "out", latents=latents(vae)))
    return contents(place / "out")


@pytest.mark.parametrize("threads", [1, 4])
def test_the_number_of_threads_changes_no_byte(tree, vae, undisturbed, tmp_path, threads):
    config = config_of(
        tmp_path / "p.yaml", tree, tmp_path / "out", latents=latents(vae), threads=threads
    )
    prepare(config)
    assert contents(tmp_path / "out") == undisturbed


def test_shares_one_after_another_give_the_same_and_the_last_one_finishes(
    tree, vae, undisturbed, tmp_path
):
    config = config_of(tmp_path / "p.yaml", tree, tmp_path / "out", latents=latents(vae))
    for number in (2, 0):
        assert prepare(config, share=Share(number, 3)) == {}
        assert not list((tmp_path / "out").glob("*/index.json"))
    done = prepare(config, share=Share(1, 3))
    assert {name: len(part) for name, part in done.items()} == {"train": 36, "heldout": 9}
    assert contents(tmp_path / "out") == undisturbed
    assert prepare(config, share=Share(2, 3)).keys() == {"train", "heldout"}


def test_what_a_killed_share_began_is_cleared_by_the_same_share_alone(tree, tmp_path):
    config = config_of(tmp_path / "p.yaml", tree, tmp_path / "out", holdout_fraction=0.0)
    prepare(config, share=Share(0, 2))
    begun = [tmp_path / "out/train" / f"shard-0000{n}.safetensors.node-1.partial" for n in (1, 4)]
    for path in begun:
        path.write_bytes(b"half")
    prepare(config, share=Share(0, 2))
    assert [path.exists() for path in begun] == [True, False]
    prepare(config, share=Share(1, 2))
    assert not begun[0].exists()
    assert (tmp_path / "out/train/index.json").exists()


def test_a_share_that_meets_another_ones_first_file_begins(tree, tmp_path):
    config = config_of(tmp_path / "p.yaml", tree, tmp_path / "out", holdout_fraction=0.0)
    (tmp_path / "out/train").mkdir(parents=True)
    (tmp_path / "out/train" / f"{MARKER_NAME}.node-17.partial").write_text("{")
    assert prepare(config, share=Share(0, 2)) == {}
    assert len(list((tmp_path / "out/train").glob("shard-*.safetensors"))) == 4


def test_a_share_accepts_that_another_one_has_finished_first(tree, tmp_path, monkeypatch):
    config = config_of(tmp_path / "p.yaml", tree, tmp_path / "out", holdout_fraction=0.0)
    other = config_of(tmp_path / "o.yaml", tree, tmp_path / "other", holdout_fraction=0.0)
    prepare(other)
    expected = contents(tmp_path / "other")
    prepare(config, share=Share(0, 2))

    def finish(folder, index, skipped=()):
        """Does what happens when the other share wins: it removes this one's file."""
        shutil.rmtree(folder.folder)
        shutil.copytree(tmp_path / "other/train", folder.folder)
        raise OutputError("cannot write index.json: No such file or directory")

    monkeypatch.setattr("srepa_ds.data.prepared_folder.PreparedFolder.finish", finish)
    assert len(prepare(config, share=Share(1, 2))["train"]) == 45
    assert contents(tmp_path / "out") == expected


def test_a_share_that_another_one_overtakes_writes_nothing(tree, vae, tmp_path, monkeypatch):
    changes = {"holdout_fraction": 0.0, "latents": latents(vae)}
    config = config_of(tmp_path / "p.yaml", tree, tmp_path / "out", **changes)
    begin = PreparedFolder._begin

    def overtaken(folder, *, keep):
        begin(folder, keep=keep)
        monkeypatch.setattr(PreparedFolder, "_begin", begin)
        for number in (1, 0):
            prepare(config, share=Share(number, 2))

    monkeypatch.setattr(PreparedFolder, "_begin", overtaken)
    prepare(config, share=Share(0, 2))["train"].verify()
    assert not list((tmp_path / "out/train").glob("*.json.*"))
    assert sorted(path.name for path in (tmp_path / "out/train").glob("*.json")) == ["index.json"]


def prepare_on_rank(path, tree, output, vae):
    from pathlib import Path

    config = config_of(Path(path), Path(tree), Path(output), latents=latents(vae))
    return {name: len(part) for name, part in prepare(config).items()}


@pytest.mark.slow
def test_the_number_of_ranks_changes_no_byte(tree, vae, undisturbed, tmp_path):
    place = (tmp_path / "p.yaml", tree, tmp_path / "out", vae)
    # Each writes its own copy of the configuration; they are the same.
    found = run_function(prepare_on_rank, 2, *place)
    assert found == [{"train": 36, "heldout": 9}] * 2
    assert contents(tmp_path / "out") == undisturbed


def prepare_of_own_copy(path, trees, output):
    from pathlib import Path

    tree = Path(trees[int(os.environ["RANK"])])
    try:
        prepare(config_of(Path(path), tree, Path(output)))
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_ranks_that_see_different_images_are_refused(tree, tmp_path):
    other = shutil.copytree(tree, tmp_path / "other")
    (other / "n0000" / "more.png").write_bytes(b"1234")
    said = run_function(
        prepare_of_own_copy, 2, tmp_path / "p.yaml", [str(tree), str(other)], tmp_path / "out"
    )
    for text in said:
        assert "ranks see different files in the source; give all of them the same copy" in text
        assert "train" in text
    assert not (tmp_path / "out").exists()


def fail_on_rank(path, tree, output):
    from pathlib import Path

    config = config_of(
        Path(path), Path(tree), Path(output), holdout_fraction=0.0, samples_per_shard=5, threads=1
    )
    read, slow = ImagePass._read, torch.distributed.get_rank

    def slowly(self, index):
        import time

        time.sleep(0.2 if slow() == 0 else 0.02)
        return read(self, index)

    ImagePass._read = slowly
    try:
        prepare(config)
    except DataError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_a_rank_that_fails_ends_the_others_and_keeps_what_is_finished(tmp_path):
    # Rank 1 has the pieces 1, 3, ...; image 17, of the last class, is in its fourth.
    tree = write_tree(tmp_path / "tree", num_images=90, broken=(77,))
    key = "n0002/image 077.png"
    number = sorted(p.relative_to(tree).as_posix() for p in tree.rglob("image*")).index(key)
    assert number // 5 % 2 == 1
    said = run_function(fail_on_rank, 2, tmp_path / "p.yaml", tree, tmp_path / "out")
    assert said[0] == said[1]
    assert said[0].startswith(f"{key}: ")
    written = {int(p.stem[6:]) for p in (tmp_path / "out/train").glob("shard-*.safetensors")}
    # The other rank would have taken 9 s for its nine pieces, and stops before.
    assert {1, 3, 5} <= written
    assert {number for number in written if number % 2 == 0} < {0, 2, 4, 6, 8, 10, 12, 14, 16}
    assert not (tmp_path / "out/train/index.json").exists()


def test_images_that_cannot_be_read_are_listed(tmp_path):
    tree = write_tree(tmp_path / "tree", broken=(4, 7, 11, 20))
    changes = {"holdout_fraction": 0.0, "on_error": "skip"}
    part = prepare(config_of(tmp_path / "p.yaml", tree, tmp_path / "out", **changes))["train"]
    lines = (tmp_path / "out/train" / SKIPPED_NAME).read_text().splitlines()
    assert len(part) == 41
    assert part.index.num_skipped == 4
    assert {json.loads(line)["key"].split()[-1].split(".")[0] for line in lines} == {
        "004", "007", "011", "020",
    }  # fmt: skip
    part.verify()


def test_a_piece_without_any_readable_image_leaves_no_shard_and_no_latents(tmp_path, vae):
    # The first class has every third image, and a piece has five of them.
    tree = write_tree(tmp_path / "tree", broken=tuple(range(0, 15, 3)))
    changes = {"holdout_fraction": 0.0, "on_error": "skip", "samples_per_shard": 5}
    config = config_of(tmp_path / "p.yaml", tree, tmp_path / "out", latents=latents(vae), **changes)
    part = prepare(config)["train"]
    assert len(part) == 40
    assert part.index.shards[0].file == "shard-00001.safetensors"
    assert part.index.latents.files[0].file == "latents-00001.safetensors"
    part.verify()


def test_where_no_image_can_be_read_the_first_is_named(tmp_path):
    tree = write_tree(tmp_path / "tree", num_images=6, broken=tuple(range(6)))
    config = config_of(
        tmp_path / "p.yaml", tree, tmp_path / "out", on_error="skip", holdout_fraction=0.0
    )
    with pytest.raises(DataError, match=r"none of 6 images could be read; .* n0000/image 000.JPEG"):
        prepare(config)


def test_images_once_left_out_are_tried_again_where_they_must_not_fail(tmp_path):
    tree = write_tree(tmp_path / "tree", broken=(4,))
    whole = write_tree(tmp_path / "whole")
    changes = {"holdout_fraction": 0.0}
    skip = config_of(tmp_path / "p.yaml", tree, tmp_path / "out", on_error="skip", **changes)
    prepare(skip, share=Share(0, 2))
    fail = config_of(tmp_path / "p.yaml", tree, tmp_path / "out", **changes)
    with pytest.raises(DataError, match="image 004"):
        prepare(fail, share=Share(0, 2))
    name = "n0001/image 004.JPEG"
    # The size of a file is part of the source's fingerprint.
    damaged = (tree / name).stat().st_size
    assert damaged < (whole / name).stat().st_size


def test_a_source_that_has_changed_in_between_is_refused(tmp_path):
    tree = write_tree(tmp_path / "tree")
    config = config_of(tmp_path / "p.yaml", tree, tmp_path / "out", holdout_fraction=0.0)
    prepare(config, share=Share(0, 2))
    before = contents(tmp_path / "out")
    (tree / "n0000" / "more.png").write_bytes(b"1234")
    again = config_of(tmp_path / "p.yaml", tree, tmp_path / "out", holdout_fraction=0.0, seed=3)
    with pytest.raises(OutputError, match=r"seed was 0 and is 3; the files of the source have ch"):
        prepare(again, share=Share(0, 2))
    assert contents(tmp_path / "out") == before


def test_latents_are_added_later_and_others_are_refused(tree, vae, undisturbed, tmp_path):
    prepare(config_of(tmp_path / "p.yaml", tree, tmp_path / "out"))
    images = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("shard-*")}
    added = config_of(tmp_path / "p.yaml", tree, tmp_path / "out", latents=latents(vae))
    assert prepare(added)["train"].latents is not None
    assert contents(tmp_path / "out") == undisturbed
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("shard-*")} == images
    other = latents(vae, dtype="fp32")
    with pytest.raises(OutputError, match=r"latents made otherwise \(dtype is 'fp16' there"):
        prepare(config_of(tmp_path / "p.yaml", tree, tmp_path / "out", latents=other))
    # Without latents in the configuration, those that are there are no obstacle.
    assert prepare(config_of(tmp_path / "p.yaml", tree, tmp_path / "out"))["train"].latents


def test_unfinished_latents_of_another_precision_are_made_again(tree, vae, tmp_path):
    changes = {"holdout_fraction": 0.0}
    one = config_of(tmp_path / "p.yaml", tree, tmp_path / "out", latents=latents(vae), **changes)
    prepare(one, share=Share(0, 2))
    other = latents(vae, dtype="fp32")
    two = config_of(tmp_path / "p.yaml", tree, tmp_path / "out", latents=other, **changes)
    part = prepare(two)["train"]
    part.verify()
    assert part.read(torch.arange(45)).moments.dtype == torch.float32


def test_unfinished_latents_of_another_batch_size_are_made_again(tree, vae, tmp_path, caplog):
    changes = {"holdout_fraction": 0.0}
    one = config_of(tmp_path / "p.yaml", tree, tmp_path / "out", latents=latents(vae), **changes)
    prepare(one, share=Share(0, 2))
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.safetensors")}
    other = latents(vae, batch_size=2)
    two = config_of(tmp_path / "p.yaml", tree, tmp_path / "out", latents=other, **changes)
    with caplog.at_level(logging.INFO, logger="srepa_ds"):
        prepare(two)
    assert "4 files of latents were encoded with other settings (batch_size was 3" in caplog.text
    again = {p.name for p, written in before.items() if p.stat().st_mtime_ns != written}
    assert again == {f"latents-0000{number}.safetensors" for number in (0, 2, 4, 6)}
    # Of a finished data set they are no part.
    assert prepare(one).keys() == {"train"}


def test_shares_that_encode_with_different_settings_are_told_so(tree, vae, tmp_path, caplog):
    for number, batch_size in enumerate((3, 2)):
        wanted = latents(vae, batch_size=batch_size)
        config = config_of(
            tmp_path / "p.yaml", tree, tmp_path / "out", holdout_fraction=0.0, latents=wanted
        )
        assert prepare(config, share=Share(number, 2)) == {}
    assert "4 files of latents were encoded with other settings" in caplog.text
    assert "give all shares the same settings" in caplog.text


def test_images_left_out_before_are_a_warning_where_they_must_not_fail(tmp_path, caplog):
    tree = write_tree(tmp_path / "tree", broken=(4, 7))
    changes = {"holdout_fraction": 0.0}
    skip = config_of(tmp_path / "p.yaml", tree, tmp_path / "out", on_error="skip", **changes)
    warning = "2 images of the source were left out when it was prepared (skipped.jsonl lists them)"
    for _ in range(2):
        prepare(skip)
        assert warning not in caplog.text
    prepare(config_of(tmp_path / "p.yaml", tree, tmp_path / "out", **changes))
    assert warning in caplog.text


def test_a_finished_data_set_is_not_tidied_up_while_another_command_adds_latents(tree, tmp_path):
    config = config_of(tmp_path / "p.yaml", tree, tmp_path / "out", holdout_fraction=0.0)
    index = prepare(config)["train"].index
    begun = tmp_path / "out/train/latents-00000.safetensors.partial"
    described = DatasetDescription(index.source, index.image_shape, index.class_names)
    with PreparedFolder(tmp_path / "out/train", described).claimed():
        begun.write_bytes(b"half")
        prepare(config)
        assert begun.exists()
    prepare(config)
    assert not begun.exists()


def test_files_that_are_gone_at_the_end_are_named(tree, tmp_path, monkeypatch):
    note = PreparedFolder.note

    def disturbed(folder, number, receipt):
        note(folder, number, receipt)
        if number == 6:
            (folder.folder / "shard-00002.safetensors").unlink()

    monkeypatch.setattr(PreparedFolder, "note", disturbed)
    config = config_of(tmp_path / "p.yaml", tree, tmp_path / "out", holdout_fraction=0.0)
    with pytest.raises(OutputError, match=r"not finished.*: shard-00002.safetensors missing or"):
        prepare(config)
    monkeypatch.undo()
    assert prepare(config).keys() == {"train"}


def test_a_receipt_of_a_shard_that_is_gone_or_cut_is_not_believed(tree, vae, undisturbed, tmp_path):
    config = config_of(tmp_path / "p.yaml", tree, tmp_path / "out", latents=latents(vae))
    prepare(config, share=Share(0, 2))
    train = tmp_path / "out/train"
    (train / "shard-00000.safetensors").unlink()
    (train / "shard-00002.safetensors").write_bytes(b"cut")
    (train / "latents-00004.safetensors").unlink()
    (train / "shard-00004.json").write_text('{"shard": nul')
    prepare(config)
    assert contents(tmp_path / "out") == undisturbed


Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(("pixels", "free"), [("raw", 34_000), ("webp", 7_000)])
def test_a_disk_that_is_too_small_is_refused_first(tree, tmp_path, monkeypatch, pixels, free):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, free))
    config = config_of(tmp_path / "p.yaml", tree, tmp_path / "out/new", pixels=pixels)
    with pytest.raises(OutputError, match=r"needs .*KB, and .* KB are free; choose a folder"):
        prepare(config)
    with pytest.raises(OutputError, match="are free"):
        dry_run(config)
    assert not (tmp_path / "out").exists()


def test_a_disk_that_may_be_too_small_is_a_warning(tree, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 10_000))
    prepare(config_of(tmp_path / "p.yaml", tree, tmp_path / "out"))
    assert "needs about 16 KB, and 10 KB are free; finished shards stay" in caplog.text


def test_a_dry_run_tells_all_and_writes_nothing(tree, vae, tmp_path):
    config = config_of(
        tmp_path / "p.yaml", tree, tmp_path / "out", latents=latents(vae, mirrored=True), threads=3
    )
    before = contents(tmp_path)
    said = dry_run(config, ranks_here=2)
    assert contents(tmp_path) == before
    for words in (
        "image_folder: 45 images in 3 classes (n0000, n0001, n0002)",
        "16 x 16 px, webp",
        "moments of 4 x 4 x 4, fp16, by codec vae, mirrored ones too",
        "train: 36 images, 6 shards; 6 shards and 6 files of latents missing",
        "heldout: 9 images, 2 shards; 2 shards and 2 files of latents missing",
        "2 ranks, 3 threads each",
    ):
        assert words in said
    prepare(config, share=Share(0, 2))
    assert "36 images, 6 shards; 3 shards and 3 files of latents missing" in dry_run(config)
    prepare(config)
    said = dry_run(config)
    assert said.count("; finished") == 2
    assert "nothing to write" in said


def test_estimates_of_raw_images_and_latents_are_what_is_written(tree, vae, tmp_path):
    changes = {"pixels": "raw", "holdout_fraction": 0.0, "samples_per_shard": 45}
    for mirrored in (False, True):
        output = tmp_path / str(mirrored)
        config = config_of(
            tmp_path / "p.yaml", tree, output, latents=latents(vae, mirrored=mirrored), **changes
        )
        part = prepare(config)["train"]
        described = part.index
        image = estimate.image_bytes(DatasetDescription({}, (3, 16, 16), ()))
        latent = estimate.latent_bytes(described.latents)
        # Beside them there are labels, keys and headers.
        assert 0 < described.shards[0].bytes - 45 * image < 45 * 60
        assert 0 < described.latents.files[0].bytes - 45 * latent < 600


def test_images_that_wait_for_the_encoder_are_counted_in_memory(tree, vae, tmp_path):
    changes = {"holdout_fraction": 0.0, "samples_per_shard": 1, "threads": 3, "image_size": 512}

    def megabytes(**more):
        settings = {**changes, "latents": latents(vae, **more.pop("of_latents", {})), **more}
        said = dry_run(config_of(tmp_path / "p.yaml", tree, tmp_path / "out", **settings))
        return float(said.split("memory")[1].split(" MB for a shard")[0])

    image = 3 * 512**2 / 1e6
    added = megabytes(pixels=None) - megabytes(pixels=None, threads=1)
    # Four for each thread, two threads more.
    assert added == pytest.approx(8 * image, abs=0.2)
    added = megabytes(of_latents={"batch_size": 13}) - megabytes()
    assert added == pytest.approx(2 * 10 * image, abs=0.2)


def test_settings_that_write_nothing_or_cannot_encode_are_refused(tree, tmp_path):
    for changes, message in (
        ({"pixels": None}, "pixels: null leaves nothing to store"),
        ({"latents": {"codec": {"kind": "identity"}}}, "latents.codec.kind: 'identity' has no"),
    ):
        with pytest.raises(ConfigError, match=message):
            prepare(config_of(tmp_path / "p.yaml", tree, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_an_input_that_is_read_only_serves(tree, tmp_path):
    copy = tmp_path / "tree"
    shutil.copytree(tree, copy)
    for path in [copy, *copy.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        assert len(prepare(config_of(tmp_path / "p.yaml", copy, tmp_path / "out"))["train"]) == 36
    finally:
        for path in [copy, *copy.rglob("*")]:
            path.chmod(0o755)


def test_progress_counts_all_images(tree, tmp_path, caplog):
    config = config_of(tmp_path / "p.yaml", tree, tmp_path / "out")
    with caplog.at_level(logging.INFO, logger="srepa_ds"):
        prepare(config)
    assert "45 images and 0 files of latents to write, about 16 KB" in caplog.text
    assert "train: images 36/36" in caplog.text
    assert "/s" in caplog.text
    assert isinstance(ShardDataset(tmp_path / "out/train"), ShardDataset)
