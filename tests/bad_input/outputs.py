"""Places that cannot be written to."""

from bad_input.arrangements import (
    a_file,
    exported,
    exported_beside_a_file,
    foreign_export,
    sampled_beside_a_file,
    trained_beside_a_file,
)
from bad_input.case import CONFIGS, Case

CASES = [
    # Places that cannot be written to.
    Case("run folder below a file", a_file, "train CONFIG run.folder={folder}/file/run",
         ("file/run: Not a directory", "choose another run.folder")),
    Case("export folder below a file", trained_beside_a_file,
         "export CONFIG export.folder={folder}/file/export",
         ("cannot write", "Not a directory")),
    Case("export into a foreign folder", foreign_export, "export CONFIG",
         ("other than an exported model (thesis.txt)", "choose another")),
    Case("samples below a file", exported_beside_a_file,
         "sample CONFIG sample.folder={folder}/file/samples",
         ("cannot write", "Not a directory", "room for the samples")),
    Case("samples where there is no room", exported,
         "sample CONFIG sample.folder=/sys/kernel/samples",
         ("/sys/kernel/samples: parts and outputs need about", "room for the samples")),
    Case("a share of samples that is not there", exported, "sample CONFIG --share 2/2",
         ("--share: must be i/n", "given: '2/2'")),
    Case("a shard that is no number", exported, "sample CONFIG --shard first",
         ("--share: must be i/n", "given: 'first'")),
    Case("an output there is not", exported, "sample CONFIG sample.outputs=[jpg]",
         ("sample.outputs.0", "'npz', 'png' or 'shards'")),
    Case("shards below a file", a_file,
         f"prepare {CONFIGS}/digits-prepare.yaml output={{folder}}/file/digits",
         ("cannot write", "Not a directory")),
    Case("scores below a file", sampled_beside_a_file,
         "evaluate CONFIG run.folder={folder}/file/run evaluate.samples={folder}/run/samples",
         ("cannot write", "Not a directory")),
]  # fmt: skip
