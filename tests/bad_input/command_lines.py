"""What is wrong with a command line or the configuration it names."""

from bad_input.arrangements import (
    five_faults,
    no_yaml,
    nothing,
    owned_key,
)
from bad_input.case import TEACHER, Case

CASES = [
    # The command line and the file it names.
    Case("no such command", nothing, "trian CONFIG", ("No such command 'trian'", "train")),
    Case("no such option", nothing, "train CONFIG --rank 2", ("No such option: --rank", "--ranks")),
    Case("no config given", nothing, "train", ("Missing argument 'CONFIG'",)),
    Case("ranks is no number", nothing, "train CONFIG --ranks two", ("'--ranks'", "valid integer")),
    Case("no ranks", nothing, "train CONFIG --ranks 0", ("--ranks must be at least 1",)),
    Case("no config file", nothing, "train nowhere.yaml", ("nowhere.yaml", "No such file")),
    Case("a folder as config", nothing, "config {folder}", ("Is a directory", "YAML file")),
    Case("config is no YAML", no_yaml, "train CONFIG", ("experiment.yaml", "not valid YAML")),
    Case("config of another kind", nothing, "prepare CONFIG", ("kind", "source: is required")),
    Case("malformed override", nothing, "train CONFIG train.steps", ("section.field=value",)),
    Case("override of a misspelt key", nothing, "train CONFIG train.stps=3",
         ("train.stps: unknown key; did you mean 'steps'?",)),
    Case("five faults", five_faults, "train CONFIG",
         ("5 faults", "optimizer.learning_rate", "ema.decya", "did you mean 'decay'?",
          "train.steps", "alignments.0.depth: 9 exceeds the model's 3 blocks",
          "engine.precision")),
    Case("unknown teacher", nothing,
         f"train CONFIG {TEACHER}.spec=null {TEACHER}.name=dinov2-vit-c",
         (f"{TEACHER}.name: unknown teacher 'dinov2-vit-c'; did you mean 'dinov2-vit-",)),
    Case("unknown demo mode", nothing, "demo --mode srepa-msee", ("did you mean 'srepa-mse'?",)),
    Case("DeepSpeed sets what is ours", owned_key, "train CONFIG engine.deepspeed={folder}/ds.json",
         ("engine.deepspeed", "train_batch_size belongs to the YAML (train.batch_size)")),
    Case("no DeepSpeed file", nothing, "train CONFIG engine.deepspeed=zero9.json",
         ("engine.deepspeed: zero9.json: No such file",)),
    Case("compiling under stage 3", nothing,
         "train CONFIG engine.compile=true engine.deepspeed=ds_configs/zero3.json",
         ("engine.compile: torch.compile cannot trace the hooks of ZeRO stage 3",)),
]  # fmt: skip
