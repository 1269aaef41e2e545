"""One process may train several times, as a notebook does."""

from builders import metrics_of

from srepa_ds.cli import run


def test_two_trainings_in_one_process_are_the_same(small_world, tmp_path):
    folders = [tmp_path / name for name in ("first", "second")]
    for folder in folders:
        settings = [f"run.folder={folder}", "train.steps=2"]
        assert run(["train", str(small_world.config), *settings]) == 0
    first, second = ([line["loss_total"] for line in metrics_of(folder)] for folder in folders)
    assert first == second
