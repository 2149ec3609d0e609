"""Post-training quantisation by NNCF in a process of its own.

NNCF wraps functions of torch when it is imported, and a process that traces a model
afterwards can crash. Run as ``python -m mmcastling.export.nncf_process SOURCE
OUT FEEDS``: two OpenVINO files, and examples of inputs as a NumPy archive.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

# What NNCF would quantise besides products.
_NOT_INT8 = ["Convolution", "GroupConvolution", "ConvolutionBackpropData"]
_NOT_INT8 += ["GroupConvolutionBackpropData", "Interpolate"]


def quantise_apart(
    source: Path, out: Path, feeds: Sequence[dict[str, np.ndarray]]
) -> None:
    """Quantise the products with constant weights of an OpenVINO file.

    Args:
        source: The file in float32.
        out: The file to write.
        feeds: Examples of inputs by name.

    Raises:
        RuntimeError: If the process fails; with the last of what it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "feeds.npz"
        arrays = {
            f"{index} {name}": array
            for index, feed in enumerate(feeds)
            for name, array in feed.items()
        }
        np.savez(archive, **arrays)
        command = [sys.executable, "-m", __name__, str(source), str(out), str(archive)]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or not out.exists():
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = lines[-1] if lines else f"it ended with status {done.returncode}"
        raise RuntimeError(f"NNCF failed: {reason}")


def _quantise(source: str, out: str, archive: str) -> None:
    import nncf
    import openvino

    feeds: dict[str, dict[str, np.ndarray]] = {}
    with np.load(archive) as arrays:
        for key in arrays.files:
            index, _, name = key.partition(" ")
            feeds.setdefault(index, {})[name] = arrays[key]
    model = openvino.Core().read_model(source)
    among_tokens = [
        op.get_friendly_name()
        for op in model.get_ops()
        if op.get_type_name() == "MatMul"
        and not _is_weight(op.input_value(1).get_node())
    ]
    nncf.set_log_level(logging.ERROR)
    quantised = nncf.quantize(
        model,
        nncf.Dataset(list(feeds.values())),
        subset_size=len(feeds),
        model_type=nncf.ModelType.TRANSFORMER,
        ignored_scope=nncf.IgnoredScope(
            names=among_tokens, types=_NOT_INT8, validate=False
        ),
    )
    openvino.save_model(quantised, out, compress_to_fp16=False)


def _is_weight(node: Any, depth: int = 3) -> bool:
    """Whether an OpenVINO node is a constant, up to conversions and transposition."""
    if node.get_type_name() == "Constant":
        return True
    parents = [node.input_value(i).get_node() for i in range(node.get_input_size())]
    return bool(parents and depth) and all(_is_weight(p, depth - 1) for p in parents)


if __name__ == "__main__":
    _quantise(*sys.argv[1:])
