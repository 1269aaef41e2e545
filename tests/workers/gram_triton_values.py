"""Runs the structural kernels on stored tokens.

Usage: gram_triton_values.py DEVICE TOKENS RESULTS. TOKENS holds NAME.student and NAME.teacher.
RESULTS gets NAME.LOSS.{value,gradient}, and below 64 tokens also NAME.LOSS.value_alone, computed
without the gradient. On a CPU the kernels run under Triton's interpreter.
"""

import os
import sys
import warnings

import jaxtyping
import torch
from safetensors.torch import load_file, save_file


def measure(gram_triton, temperatures, name, student, teacher):
    """Yields the named results of every loss."""
    for loss, algorithm, options in (
        ("mse", gram_triton.mse_triton, {}),
        ("kl", gram_triton.kl_triton, {"temperatures": temperatures(0.2, 0.2)}),
        ("kl_sharp", gram_triton.kl_triton, {"temperatures": temperatures(0.4, 0.1)}),
    ):
        value, gradient = algorithm(student, teacher, with_gradient=True, **options)
        yield f"{name}.{loss}.value", value.cpu()
        yield f"{name}.{loss}.gradient", gradient.contiguous().cpu()
        # The interpreter is slow: large cases do without.
        if student.shape[1] < 64:
            alone, nothing = algorithm(student, teacher, with_gradient=False, **options)
            assert nothing is None
            yield f"{name}.{loss}.value_alone", alone.cpu()


def main(device, source, target):
    # Not the kernels' own module: before 0.3.11 the hook decorates even what says @no_type_check.
    checked = [f"srepa_ds.alignment.gram_algorithms.{name}" for name in ("triton", "parts")]
    jaxtyping.install_import_hook(checked, "beartype.beartype")
    from srepa_ds.alignment.gram_algorithms import triton as gram_triton
    from srepa_ds.alignment.gram_algorithms.parts import Temperatures

    # Triton reads it at the first call.
    os.environ["TRITON_INTERPRET"] = "1" if device == "cpu" else "0"
    warnings.filterwarnings("error", module="srepa_ds")
    assert gram_triton.unavailable(torch.device(device)) is None
    tokens = load_file(source, device=device)
    results = {}
    for name in sorted({key.split(".")[0] for key in tokens}):
        student, teacher = tokens[f"{name}.student"], tokens[f"{name}.teacher"]
        if name.startswith("strided"):
            student, teacher = student.mT.contiguous().mT, teacher.mT.contiguous().mT
            assert not student.is_contiguous()
        results.update(measure(gram_triton, Temperatures, name, student, teacher))
    save_file(results, target)


main(*sys.argv[1:])
