"""Builds every structural kernel for a Hopper GPU, without needing one.

Usage: gram_triton_build.py DTYPE FIGURES. FIGURES gets the assembler's figures of each kernel.
"""

import json
import re
import subprocess
import sys
import warnings
from pathlib import Path
from tempfile import NamedTemporaryFile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from srepa_ds.alignment.gram_algorithms import triton as gram_triton
from srepa_ds.alignment.gram_algorithms import triton_kernels as kernels

warnings.filterwarnings("error", module="srepa_ds")
dtype = {"float32": torch.float32, "float64": torch.float64}[sys.argv[1]]
element = {torch.float32: "fp32", torch.float64: "fp64"}[dtype]
SCALES = {"STUDENT_SCALE": 5.0, "TEACHER_SCALE": 10.0}
KERNELS = (
    (kernels.mse_kernel, {"WITH_GRADIENT": True}),
    (kernels.mse_kernel, {"WITH_GRADIENT": False}),
    (kernels.kl_rows_kernel, SCALES),
    (kernels.kl_gradient_kernel, SCALES),
)


def build(kernel, constants):
    """Compiles as for contiguous tensors whose widths are multiples of 16."""
    given = {**constants, **gram_triton.launch_options(gram_triton.TILINGS[dtype])}
    constants = {name: given.pop(name) for name in kernel.arg_names if name in given}
    signature = {name: f"*{element}" for name in kernel.arg_names}
    signature |= dict.fromkeys(("num_tokens", "d_student", "d_teacher"), "i32")
    signature |= dict.fromkeys(constants, "constexpr")
    if "row_values" in signature:
        signature["row_values"] = "*fp64"
    divisible = [("tt.divisibility", 16)]
    attributes = {
        (i,): divisible
        for i, name in enumerate(kernel.arg_names)
        if name not in (*constants, "num_tokens")
    }
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=given)


def figures(compiled):
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {
        "registers": int(re.search(r"REG:(\d+)", usage[usage.index(" Function") :]).group(1)),
        "stack_bytes": int(re.search(r"STACK:(\d+)", usage).group(1)),
        "shared_bytes": compiled.metadata.shared,
        "tensor_core_products": len(re.findall(r"wgmma\.mma_async|mma\.sync", compiled.asm["ptx"])),
    }


report = {"unavailable": {d: gram_triton.unavailable(torch.device(d)) for d in ("cpu", "cuda")}}
for kernel, constants in KERNELS:
    name = kernel.__name__ + ("_value" if constants.get("WITH_GRADIENT") is False else "")
    report[name] = figures(build(kernel, constants))
Path(sys.argv[2]).write_text(json.dumps(report))
