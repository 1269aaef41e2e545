"""Assembles a set of 640 images of 256 px; prints by how many bytes memory grew.

Arguments: the folder, and the outputs.
"""

import sys
from pathlib import Path

import torch

from srepa_ds.sampling.config import SamplerConfig
from srepa_ds.sampling.generate import ImageBatch, plan_chunks
from srepa_ds.sampling.provenance import Provenance
from srepa_ds.sampling.writer import ChunkWriter

SIZE = 256
CHUNKS = plan_chunks(SamplerConfig(num_samples=640, batch_size=32))


def memory(name: str) -> int:
    """Returns bytes; unlike `ru_maxrss`, they do not begin with those of the parent."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


writer = ChunkWriter(Path(sys.argv[1]), Provenance({"seed": 0}), sys.argv[2:])
for chunk in CHUNKS:
    ids = chunk.sample_ids()
    images = ids.to(torch.uint8)[:, None, None, None].expand(-1, SIZE, SIZE, 3).contiguous()
    writer.write(ImageBatch(images, ids % 10, ids, chunk))
before = memory("VmRSS")
writer.assemble(CHUNKS, num_classes=10)
print(memory("VmHWM") - before)
