"""Exported models, checkpoints and files of random weights, and the sets drawn from them."""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from builders import objective_of, pieces_of, randomised

from srepa_ds.checkpoint import saving
from srepa_ds.commands.sample import sample
from srepa_ds.config.experiment import Config
from srepa_ds.distributed import ranks
from srepa_ds.model.sit import SiT
from srepa_ds.objective import official_name
from srepa_ds.preparation.share import EVERYTHING, Share
from srepa_ds.schema import to_tree
from srepa_ds.weights.exported import write_model


def drawn(config: Config, share: Share = EVERYTHING) -> Path:
    """Draws a set in this process and returns its folder."""
    try:
        return sample(config, share=share)
    finally:
        ranks.close()


def images(folder: Path) -> np.ndarray:
    with np.load(folder / "samples.npz") as archive:
        return archive["arr_0"]


def facts(folder: Path) -> dict:
    return json.loads((folder / "provenance.json").read_text())


def save_checkpoint(
    config: Config, step: int, *, kinds=("master", "ema"), edit=lambda tree: tree
) -> None:
    """Writes a checkpoint whose weights are random, in pieces as of several ranks."""
    pieces = [
        piece
        for number, kind in enumerate(kinds)
        for piece in pieces_of(
            dict(randomised(objective_of(config), seed=step + number).named_parameters()),
            kind=kind,
            run=1000,
        )
    ]
    state = {"step": step, "adam_step": step, "config": edit(to_tree(config))}
    saving.save(config.run_folder.checkpoints, step=step, pieces=pieces, state=state, rank=0)


def write_export(folder: Path, config: Config, *, seed: int = 0, edit=lambda tree: tree) -> SiT:
    """Writes an exported model with random weights, and returns the model."""
    model = randomised(SiT(config.model), seed=seed)
    provenance = {"checkpoint": "none", "step": 5, "weights": "ema"}
    tree = edit(to_tree(config))
    write_model(folder, model.state_dict(), config=tree, provenance=provenance)
    return model


def official(config: Config, seed: int) -> dict[str, torch.Tensor]:
    objective = randomised(objective_of(config), seed=seed)
    return {official_name(name): value for name, value in objective.state_dict().items()}


def write_repa(path: Path, config: Config) -> None:
    """Writes a checkpoint as REPA's training does: weights, averages, pickled settings."""
    content = {
        "model": official(config, 1),
        "ema": official(config, 2),
        "opt": {"state": {}, "param_groups": []},
        "args": argparse.Namespace(model="SiT-XL/2"),
        "steps": 400_000,
    }
    torch.save(content, path)


def without_dropout(tree):
    tree["objective"]["label_dropout"] = 0.0
    return tree
