"""Warns as other packages do: in every step, on one rank or all, though each is shown once."""

import warnings

from srepa_ds import distributed
from srepa_ds.console import show_warnings_once

show_warnings_once()
ranks = distributed.initialize()
for _step in range(5):
    warnings.warn("every rank, every step", FutureWarning, stacklevel=1)
    warnings.warn(f"only rank {ranks.rank}", UserWarning, stacklevel=1)
    # Makes Python forget which lines have warned.
    with warnings.catch_warnings():
        warnings.simplefilter("default")
    distributed.barrier()
distributed.close()
