"""Warns as other packages do: in every step, on one rank or all, and in data workers."""

import warnings

from torch.utils.data import DataLoader

from srepa_ds.console import show_warnings_once
from srepa_ds.distributed import ranks


class Complaining(list):
    """A data set whose items warn."""

    def __getitem__(self, index):
        warnings.warn("data worker", UserWarning, stacklevel=1)
        return super().__getitem__(index)


show_warnings_once()
warnings.warn("before joining", UserWarning, stacklevel=1)
rank = ranks.initialize()
for _step in range(5):
    warnings.warn("every rank, every step", FutureWarning, stacklevel=1)
    warnings.warn(f"only rank {rank.number}", UserWarning, stacklevel=1)
    # Makes Python forget which lines have warned.
    with warnings.catch_warnings():
        warnings.simplefilter("default")
    ranks.barrier()
loader = DataLoader(Complaining(range(4)), num_workers=2, multiprocessing_context="fork")
assert len(list(loader)) == 4
ranks.close()
