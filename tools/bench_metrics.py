"""Measures time and memory of every score on made-up features, beside scipy's matrix root.

    python tools/bench_metrics.py --images 50000 --reference 10000 --width 2048

Each row runs in a process of its own, so that its peak memory is its own.
"""

import argparse
import json
import resource
import subprocess
import sys
import time

import numpy as np
import torch
from scipy.linalg import sqrtm

from srepa_ds.metrics.scores import METRICS, Conventions, FeatureSet, measure

WIDTHS = {"pooled": 2048, "spatial": 2023, "logits": 1008}
EVERYTHING, BY_SCIPY = "all scores", " by scipy"
ROWS = (*METRICS, EVERYTHING, "frechet" + BY_SCIPY, "spatial_frechet" + BY_SCIPY)


def features(kind: str, count: int, width: int, *, seed: int) -> torch.Tensor:
    """Returns rows that are not negative, as Inception's are."""
    width = min(width, WIDTHS[kind])
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator).mul_(0.4).add_(0.3).clamp_(min=0)


def by_scipy(samples: torch.Tensor, reference: torch.Tensor) -> float:
    """Returns the Frechet distance as ADM's evaluator computes it."""
    means = [x.numpy().mean(axis=0, dtype=np.float64) for x in (samples, reference)]
    a, b = (np.cov(x.numpy(), rowvar=False) for x in (samples, reference))
    cross = np.trace(sqrtm(a @ b).real)
    return float(((means[0] - means[1]) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * cross)


def one_row(name: str, options: argparse.Namespace) -> dict[str, object]:
    """Returns seconds, peak memory in GB beside the features' own, and the values."""
    metrics = list(METRICS) if name == EVERYTHING else [name.removesuffix(BY_SCIPY)]
    kinds = {METRICS[metric].features for metric in metrics}
    counts = options.images, options.reference
    sets = [{k: features(k, n, options.width, seed=n) for k in kinds} for n in counts]
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    if name.endswith(BY_SCIPY):
        (field,) = METRICS[metrics[0]].fields
        values = {field: by_scipy(*(s.popitem()[1] for s in sets))}
    else:
        ours = [{kind: FeatureSet(rows=rows) for kind, rows in one.items()} for one in sets]
        conventions = Conventions(arithmetic="fp16", subset_size=min(1000, *counts))
        found = measure(*ours, metrics=metrics, conventions=conventions)
        values = json.loads(found.scores.to_json())
    seconds, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sizes = {"peak": peak / 1e6, "beside": (peak - before) / 1e6}
    return {"seconds": seconds, **sizes, "values": values}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for option, default in (("images", 2000), ("reference", 1500), ("width", 256)):
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--row", choices=ROWS, help="this row alone, as JSON")
    given = parser.parse_args()
    if given.row:
        print(json.dumps(one_row(given.row, given)))
        sys.exit()
    print(f"{torch.get_num_threads()} threads, {given.images} images, {given.reference} real ones")
    for row in ROWS:
        command = [sys.executable, *sys.argv, "--row", row]
        result = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        shown = ", ".join(f"{key} {value:.5f}" for key, value in result["values"].items())
        memory = f"{result['peak']:5.2f} GB in all, {result['beside']:5.2f} beside the features"
        print(f"{row:26} {result['seconds']:7.1f} s  {memory}: {shown}", flush=True)
