"""Configurations and settings that cannot be, and what is known before anything is begun."""

import os
from collections.abc import Callable

from bad_input.arrangements import a_file, nothing
from bad_input.case import CONFIGS, Case, Place

from srepa_ds.schema import to_tree


def one_token(place: Place) -> None:
    place.edit(model={**to_tree(place.config)["model"], "patch_size": 16})


def a_pipe(place: Place) -> None:
    os.mkfifo(place.folder / "pipe")


def alias_bomb(place: Place) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]
    (place.folder / "experiment.yaml").write_text("\n".join(lines))


def yaml_of(text: str) -> Callable[[Place], object]:
    return lambda place: (place.folder / "experiment.yaml").write_text(text)


def deepspeed_of(text: str) -> Callable[[Place], object]:
    return lambda place: (place.folder / "ds.json").write_text(text)


def parent_of_data(place: Place) -> None:
    (place.folder / "digits").mkdir()
    place.shards.rename(place.folder / "digits" / "train")


def dangling_run(place: Place) -> None:
    (place.folder / "link").symlink_to("nowhere")


def changed_copy(place: Place) -> None:
    (place.folder / "configs").mkdir()
    (place.folder / "configs" / "digits-reg.yaml").write_text("changed")


_DEEPSPEED = "train CONFIG engine.deepspeed={folder}/ds.json"

CASES = [
    # YAML and JSON.
    Case("an alias bomb", alias_bomb, "train CONFIG", ("more than 10,000 values",)),
    Case("an alias of itself", yaml_of("a: &a [*a]"), "export CONFIG",
         ("an alias stands for what it lies in (line 1)",)),
    Case("deep YAML", yaml_of("[" * 5000), "sample CONFIG", ("nested more than 100 levels",)),
    Case("a key that is a number", yaml_of("run: {}\n1: x"), "train CONFIG",
         ("the key '1' is not text", "(line 2)")),
    Case("two documents in a file", yaml_of("a: 1\n---\nb: 2"), "report CONFIG",
         ("another document", "(line 2)")),
    Case("a foreign tag", yaml_of("a: !!set {b}"), "train CONFIG",
         ("the tag !!set means nothing here",)),
    Case("half a character", yaml_of(r'a: "\ud800"'), "train CONFIG", ("half of a character",)),
    Case("a DeepSpeed list", deepspeed_of("[]"), _DEEPSPEED, ("must be a JSON object",)),
    Case("a deep DeepSpeed file", deepspeed_of("[" * 5000), _DEEPSPEED,
         ("nested too deeply",)),
    # Values.
    Case("a number beyond all", nothing, "train CONFIG optimizer.learning_rate=1e400",
         ("optimizer.learning_rate", "1e400 is too large")),
    Case("a truth in words", nothing, "train CONFIG engine.compile=yes",
         ("engine.compile", "write true or false")),
    Case("a number with underscores", nothing, "train CONFIG train.steps=1_000",
         ("train.steps", "without _")),
    Case("an item beyond a list", nothing, "train CONFIG optimizer.betas.2=1",
         ("optimizer.betas has 2 items",)),
    Case("a setting as an option", nothing, "train CONFIG --train.steps 5",
         ("write a setting as train.steps=VALUE",)),
    Case("an unknown preset", nothing, "sample CONFIG sample.preset=rep",
         ("sample.preset: unknown preset 'rep'", "repa")),
    Case("an interval upside down", nothing,
         "sample CONFIG sample.guidance_low=0.9 sample.guidance_high=0.2",
         ("guidance_low (0.9) is above guidance_high (0.2)",)),
    Case("an interval against a preset", nothing,
         "sample CONFIG sample.preset=repa sample.guidance_low=0.8",
         ("guidance_low (0.8) is above guidance_high (0.7)",)),
    Case("labels of two origins", nothing,
         "sample CONFIG sample.labels=[3] sample.label_file=labels.txt",
         ("labels and label_file both name classes",)),
    Case("graphs of models that are not compiled", nothing, "sample CONFIG sample.cuda_graphs=true",
         ("cuda_graphs needs compiled models",)),
    # Paths.
    Case("an unset variable", nothing, "train CONFIG run.folder=$NOT_SET_ANYWHERE/x",
         ("run.folder", "'NOT_SET_ANYWHERE' is not set")),
    Case("an unknown user", nothing, "train CONFIG run.folder=~nobody_at_all/x",
         ("run.folder", "~nobody_at_all is not known")),
    Case("a long name in a path", nothing, f"export CONFIG export.folder={'x' * 300}",
         ("export.folder", "is too long")),
    Case("a pipe for several ranks", a_pipe, "train {folder}/pipe --ranks 2",
         ("a pipe can be read once",)),
    Case("a prepare file to train", nothing, f"train {CONFIGS}/digits-prepare.yaml",
         ("1 fault", "of kind 'prepare'", "srepa-ds prepare")),
    Case("a teacher file to export", nothing, f"export {CONFIGS}/digits-teacher.yaml",
         ("1 fault", "srepa-ds teacher")),
    Case("the parent of a data set", parent_of_data, "train CONFIG data.folder={folder}/digits",
         ("train/ in it is a data set",)),
    Case("a run in a lost link", dangling_run, "train CONFIG run.folder={folder}/link",
         ("is a link to nowhere, which does not exist",)),
    Case("init over other files", changed_copy, "init {folder}",
         ("other versions of configs/digits-reg.yaml",)),
    Case("init into a file", a_file, "init {folder}/file", ("Not a directory",)),
    # The machine and the model.
    Case("one token", one_token, "train CONFIG",
         ("compares pairs of tokens, and the model has one",)),
    Case("a batch beyond memory", nothing, "train CONFIG train.batch_size=1000000000",
         ("train.batch_size", "a rank needs at least")),
    Case("a model beyond memory", nothing, "train CONFIG model.hidden_size=3000000000",
         ("model: has some", "a rank needs at least")),
    # The demo.
    Case("a demo of no steps", nothing, "demo --steps 0", ("--steps",)),
    Case("a demo of no ranks", nothing, "demo --ranks 0", ("--ranks: must be at least 1",)),
    Case("a demo of 3 ranks", nothing, "demo --ranks 3", ("--ranks: cannot share batches of",)),
    Case("a demo of 3 images", nothing, "demo --images 3", ("--images: must be at least 4",)),
    Case("a demo with a seed below zero", nothing, "demo --seed -1", ("--seed",)),
]  # fmt: skip
