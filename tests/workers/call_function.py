"""Calls a function of a test file on this rank: `ranks.start_function` starts it.

Usage: call_function.py FILE NAME ARGUMENTS RESULTS. ARGUMENTS is a JSON list, and what the function
returns is written to RESULTS/RANK.json.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path

from srepa_ds.distributed import ranks


def main(file: Path, name: str, arguments: str, results: Path) -> None:
    specification = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(specification)
    # Before it runs: dataclasses and pickle look their module up.
    sys.modules[file.stem] = module
    specification.loader.exec_module(module)
    returned = getattr(module, name)(*json.loads(arguments))
    (results / f"{os.environ['RANK']}.json").write_text(json.dumps(returned))
    ranks.leave(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], Path(sys.argv[4]))
