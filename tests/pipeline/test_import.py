"""What importing costs, and what it says where diffusers is missing."""

import subprocess
import sys


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_without_diffusers_the_extra_is_named():
    code = "import sys; sys.modules['diffusers'] = None; import srepa_ds.pipeline"
    last = python(code).stderr.strip().splitlines()[-1]
    assert last == (
        "ImportError: srepa_ds.pipeline needs diffusers; install the extra: "
        "pip install 'srepa_ds[vae]'"
    )


def test_exporting_needs_no_diffusers():
    code = (
        "import sys; sys.modules['diffusers'] = None; import srepa_ds; "
        "assert 'torch' not in sys.modules; import srepa_ds.commands.export"
    )
    result = python(code)
    assert result.returncode == 0, result.stderr
