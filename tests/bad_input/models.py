"""What is wrong with checkpoints, exported models and sample sets."""

from bad_input.arrangements import (
    empty_samples,
    no_valid_checkpoint,
    nothing,
    other_pictures,
    sampled,
    torn_export,
    torn_samples,
    trained,
)
from bad_input.case import Case

CASES = [
    # Checkpoints and exported models.
    Case("resume without a valid checkpoint", no_valid_checkpoint, "train CONFIG",
         ("holds no valid checkpoint", "step-0000005: state.json has 2 bytes")),
    Case("export without a valid checkpoint", no_valid_checkpoint, "export CONFIG",
         ("holds no valid checkpoint", "step-0000005: state.json has 2 bytes")),
    Case("export without a checkpoint", nothing, "export CONFIG", ("train first",)),
    Case("export of an unknown step", trained, "export CONFIG export.step=7",
         ("step-0000007 is not valid", "checkpoints: step-0000005")),
    Case("resume with another model", trained, "train CONFIG model.depth=2 run.seed=3",
         ("holds a run of another configuration", "--allow-config-change to continue: 2 faults",
          "model.depth: was 3, is 2", "run.seed: was 0, is 3")),
    Case("resume beside other pictures", other_pictures, "train CONFIG",
         ("holds a run of another configuration", "to continue: 1 fault",
          "data.shards: the contents have changed: their hash was")),
    Case("resume with another model, insisting", trained,
         "train CONFIG model.depth=2 --allow-config-change",
         ("is of another model", "sit.blocks.2.attn.qkv.weight: (144, 48) there, none in")),
    Case("sample without a model", nothing, "sample CONFIG",
         ("does not hold an exported model", "srepa-ds export")),
    Case("sample of a torn model", torn_export, "sample CONFIG",
         ("does not hold an exported model",)),
    # Scores.
    Case("evaluate without samples", nothing, "evaluate CONFIG",
         ("samples.npz is not a finished sample set", "srepa-ds sample")),
    Case("evaluate torn samples", torn_samples, "evaluate CONFIG", ("not a finished sample set",)),
    Case("evaluate empty samples", empty_samples, "evaluate CONFIG",
         ("not a finished sample set",)),
    Case("nothing to evaluate with", sampled, "evaluate CONFIG evaluate=null",
         ("evaluate: is required",)),
    Case("evaluate against no shards", sampled, "evaluate CONFIG evaluate.reference=none",
         ("none: no such data folder",)),
    Case("evaluate images of another size", lambda place: sampled(place, 8), "evaluate CONFIG",
         ("samples holds images of (8, 8) px", "shards of (16, 16)", "evaluate.reference")),
]  # fmt: skip
