"""Faults that several ranks meet. They go through the real launcher: ranks must agree."""

from bad_input.arrangements import misspelt_keys, nothing, trained
from bad_input.case import Case

CASES = [
    Case("an experiment prepared on ranks", nothing, "prepare CONFIG --ranks 2",
         ("kind 'experiment', not 'prepare'", "srepa-ds train")),
    Case("a sweep of no model on ranks", nothing, "sweep CONFIG sweep.num_steps=[1] --ranks 2",
         ("does not hold an exported model", "srepa-ds export")),
    Case("a batch that ranks cannot share", nothing, "train CONFIG train.batch_size=15 --ranks 2",
         ("train.batch_size 15 cannot be split over 2 ranks", "a multiple of 2")),
    Case("a DeepSpeed file with typos", misspelt_keys,
         "train CONFIG engine.deepspeed={folder}/ds.json --ranks 2",
         ("did you mean 'zero_optimization'?", "gradient_cliping")),
    Case("ranks that resume with other settings", trained,
         "train CONFIG model.depth=2 run.seed=3 --ranks 2",
         ("--allow-config-change to continue: 2 faults", "model.depth: was 3, is 2")),
    Case("ranks that resume with another model", trained,
         "train CONFIG model.depth=2 --allow-config-change --ranks 2",
         ("is of another model", "sit.blocks.2.attn.qkv.weight: (144, 48) there, none in")),
]  # fmt: skip
