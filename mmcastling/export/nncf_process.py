"""Post-training quantization by NNCF in a process of its own.

NNCF wraps functions of torch when it is imported, and a process that traces a model
afterwards can crash. Run as ``python -m mmcastling.export.nncf_process SOURCE OUT``,
two OpenVINO files, with examples of inputs pickled into its standard input.
"""

from __future__ import annotations

import logging
import pickle
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmcastling.errors import UnavailableError

# What NNCF would quantize besides products.
_NOT_INT8 = ["Convolution", "GroupConvolution", "ConvolutionBackpropData"]
_NOT_INT8 += ["GroupConvolutionBackpropData", "Interpolate"]


def quantize_in_subprocess(
    source: Path, out: Path, feeds: Sequence[dict[str, np.ndarray]]
) -> None:
    """Quantize the products with constant weights of an OpenVINO file.

    Args:
        source: The file in float32.
        out: The file to write.
        feeds: Examples of inputs by name.

    Raises:
        RuntimeError: If the process fails; with the last line that it printed.
    """
    command = [sys.executable, "-m", __name__, str(source), str(out)]
    done = subprocess.run(command, input=pickle.dumps(list(feeds)), capture_output=True)
    if done.returncode or not out.exists():
        printed = done.stderr.decode(errors="replace").strip().splitlines()
        reason = printed[-1] if printed else f"it ended with status {done.returncode}"
        raise UnavailableError(f"NNCF failed: {reason}")


def _quantize(source: str, out: str, feeds: list[dict[str, np.ndarray]]) -> None:
    import nncf
    import openvino

    model = openvino.Core().read_model(source)
    among_tokens = [
        op.get_friendly_name()
        for op in model.get_ops()
        if op.get_type_name() == "MatMul"
        and not _is_weight(op.input_value(1).get_node())
    ]
    nncf.set_log_level(logging.ERROR)
    quantized = nncf.quantize(
        model,
        nncf.Dataset(feeds),
        subset_size=len(feeds),
        model_type=nncf.ModelType.TRANSFORMER,
        ignored_scope=nncf.IgnoredScope(
            names=among_tokens, types=_NOT_INT8, validate=False
        ),
    )
    openvino.save_model(quantized, out, compress_to_fp16=False)


def _is_weight(node: Any, depth: int = 3) -> bool:
    """Whether an OpenVINO node is a constant, up to conversions and transposition."""
    if node.get_type_name() == "Constant":
        return True
    parents = [node.input_value(i).get_node() for i in range(node.get_input_size())]
    return bool(parents and depth) and all(_is_weight(p, depth - 1) for p in parents)


if __name__ == "__main__":
    _quantize(*sys.argv[1:], pickle.load(sys.stdin.buffer))
