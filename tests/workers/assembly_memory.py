"""Assembles a set of 640 images of 256 px; prints by how many bytes memory grew.

Arguments: the folder, and the outputs.
"""

import os
import resource
import sys
from pathlib import Path

import torch

from srepa_ds.sampling.config import SamplerConfig
from srepa_ds.sampling.generate import ImageBatch, plan_chunks
from srepa_ds.sampling.provenance import Provenance
from srepa_ds.sampling.writer import ChunkWriter

SIZE = 256
CHUNKS = plan_chunks(SamplerConfig(num_samples=640, batch_size=32))


def resident() -> int:
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


writer = ChunkWriter(Path(sys.argv[1]), Provenance({"seed": 0}), sys.argv[2:])
for chunk in CHUNKS:
    ids = chunk.sample_ids()
    images = ids.to(torch.uint8)[:, None, None, None].expand(-1, SIZE, SIZE, 3).contiguous()
    writer.write(ImageBatch(images, ids % 10, ids, chunk))
before = resident()
writer.assemble(CHUNKS, num_classes=10)
peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(peak - before)
