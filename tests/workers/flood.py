"""Every rank prints 1 MB to each of its streams before it meets the others, in every round."""

import sys

from srepa_ds.distributed import ranks

rank = ranks.initialize()
for number in range(2):
    for stream in (sys.stdout, sys.stderr):
        stream.write(f"round {number} of rank {rank.number}: " + "x" * (1 << 20) + "\n")
        stream.flush()
    ranks.barrier()
ranks.close()
