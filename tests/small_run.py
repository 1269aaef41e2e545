"""A small run's folder, written by hand as training, export, sampling and scoring leave it."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from builders import objective_of, randomised

from srepa_ds.config.experiment import Config, samples_folder
from srepa_ds.config.yaml_text import to_yaml
from srepa_ds.data.shards import ShardDataset
from srepa_ds.files import sha256_of
from srepa_ds.objective import Objective, official_name
from srepa_ds.sampling.sheet import SheetBuilder
from srepa_ds.schema import to_tree
from srepa_ds.weights.exported import WEIGHTS, write_model


@dataclass(frozen=True)
class SmallRun:
    """The configuration of a run, and the objective it has supposedly trained."""

    config: Config
    objective: Objective

    @property
    def folder(self) -> Path:
        return self.config.run.folder

    def write_metrics(self) -> None:
        terms = ("total", "flow", "pointwise", "structural")
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "metrics.jsonl").open("w") as file:
            for step in range(1, 6):
                losses = {f"loss_{name}": 0.5 / step for name in terms}
                rest = {"gradient_norm": 1.0 + step, "skipped": 0.0, "step_seconds": 3.0}
                line = {"step": step, **losses, **rest, "images_per_second": 16 / 3}
                file.write(json.dumps(line) + "\n")
            file.write('{"step": 6, "loss_to')

    def write_documents(self) -> None:
        (self.folder / "config.yaml").write_text(to_yaml(self.config))
        environment = {
            "torch": "2.11",
            "command": ["train", "<script>alert('&')</script>"],
            "world_size": 2,
        }
        (self.folder / "environment.json").write_text(json.dumps(environment))
        (self.folder / "timings.json").write_text(json.dumps({"train": 90.4, "sample": 7.25}))

    def write_export(self, *, step: int = 5) -> None:
        tensors = {official_name(k): v for k, v in self.objective.state_dict().items()}
        write_model(
            self.config.export_folder,
            tensors,
            config=to_tree(self.config),
            provenance={"step": step, "weights": "ema"},
        )

    def write_samples(self, *, checkpoint: str) -> None:
        folder = samples_folder(self.config)
        folder.mkdir(parents=True)
        generator = torch.Generator().manual_seed(0)
        labels = torch.arange(40) % 4
        images = torch.randint(0, 256, (40, 16, 16, 3), generator=generator, dtype=torch.uint8)
        np.savez(folder / "samples.npz", images.numpy(), labels.numpy())
        sheet = SheetBuilder(labels)
        sheet.add(images, labels)
        sheet.image().save(folder / "contact_sheet.png")
        provenance = {"checkpoint_sha256": checkpoint, "sampler": {"solver": "heun"}}
        (folder / "provenance.json").write_text(json.dumps(provenance))

    def write_results(self) -> None:
        provenance = json.loads((samples_folder(self.config) / "provenance.json").read_text())
        document = {
            "scores": {"frechet_distance": 12.3456, "precision": 0.625, "class_accuracy": 0.875},
            "reference_class_accuracy": 0.96875,
            "settings": to_tree(self.config.evaluate),
            "extractor_sha256": sha256_of(self.config.evaluate.extractor.weights),
            "reference_id": ShardDataset(self.config.evaluate.reference).index.dataset_id,
            "samples": provenance,
        }
        (self.folder / "results.json").write_text(json.dumps(document))

    def write_everything(self) -> None:
        self.write_metrics()
        self.write_documents()
        self.write_export()
        self.write_samples(checkpoint=sha256_of(self.config.export_folder / WEIGHTS))
        self.write_results()


def run_of(config: Config) -> SmallRun:
    """Returns the run of a configuration; none of its files are written yet."""
    return SmallRun(config, randomised(objective_of(config)).eval())
