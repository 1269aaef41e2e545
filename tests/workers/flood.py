"""Every rank prints 1 MB to each of its streams before it meets the others, in every round."""

import sys

from srepa_ds import distributed

ranks = distributed.initialize()
for number in range(2):
    for stream in (sys.stdout, sys.stderr):
        stream.write(f"round {number} of rank {ranks.rank}: " + "x" * (1 << 20) + "\n")
        stream.flush()
    distributed.barrier()
distributed.close()
