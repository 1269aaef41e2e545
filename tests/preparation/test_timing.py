"""The time that a preparation announces."""

import re
import time
from pathlib import Path

import pytest
import yaml
from image_tree import config_of, write_tree
from small_vae import write_vae

from srepa_ds.commands.prepare import dry_run, prepare
from srepa_ds.data.sources.digits import Digits, DigitsConfig
from srepa_ds.errors import DataError
from srepa_ds.preparation.config import PrepareConfig
from srepa_ds.preparation.timing import Workers
from srepa_ds.schema import load_section

TIME = re.compile(r"about (\d+) s for the images, (\d+) s for the latents, on 2 ranks of 1 thread$")


def digits(place: Path, **changes) -> PrepareConfig:
    """Returns a preparation of 1,797 images, in two parts."""
    settings = {
        "kind": "prepare",
        "source": {"kind": "digits"},
        "image_size": 16,
        "output": str(place / "out"),
        "holdout_fraction": 0.2,
        "threads": 1,
        **changes,
    }
    (place / "p.yaml").write_text(yaml.safe_dump(settings))
    return load_section(PrepareConfig, place / "p.yaml", ())


class Slow(Digits):
    """Takes 10 ms for each image."""

    def item(self, index):
        time.sleep(0.01)
        return super().item(index)


class Damaged(Digits):
    """Holds images that cannot be read."""

    def item(self, index):
        raise DataError("cannot be decoded")


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return write_vae(tmp_path_factory.mktemp("vae") / "vae")


def test_time_of_images_and_latents_is_measured(tmp_path, vae, monkeypatch):
    monkeypatch.setattr(DigitsConfig, "opened", lambda self: Slow())
    config = digits(tmp_path, latents={"codec": {"kind": "vae", "weights": str(vae)}})
    began = time.monotonic()
    said = dry_run(config, ranks_here=2)
    assert time.monotonic() - began < 10
    found = TIME.search(said)
    assert found, said
    # 1,797 images of 10 ms and a little more, by two threads or as many as there are cores.
    busy = Workers(num_ranks=2, threads=1, ranks_here=2).busy_threads
    assert 17.9 / busy <= int(found[1]) + 1 < 40 / busy
    assert not (tmp_path / "out").exists()


def test_it_is_logged_before_the_work_and_not_after_it(tmp_path, caplog):
    config = digits(tmp_path, image_size=2, pixels="raw")
    caplog.set_level("INFO", logger="srepa_ds")
    prepare(config)
    assert re.search(r"about 0 s for the images, on 1 rank of 1 thread\n", caplog.text)
    assert "time  " not in dry_run(config)


def test_few_images_are_not_measured(tmp_path):
    tree = write_tree(tmp_path / "tree")
    assert "time  " not in dry_run(config_of(tmp_path / "p.yaml", tree, tmp_path / "out"))


def test_images_that_cannot_be_read_leave_it_unsaid(tmp_path, monkeypatch):
    monkeypatch.setattr(DigitsConfig, "opened", lambda self: Damaged())
    assert "time  " not in dry_run(digits(tmp_path))


def test_threads_beyond_the_cores_do_not_count(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(16)))
    assert Workers(num_ranks=16, threads=2, ranks_here=8).busy_threads == 32
    assert Workers(num_ranks=8, threads=16, ranks_here=8).busy_threads == 16
