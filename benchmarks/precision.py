"""Lower precision: the ViT-S backbone's speed, and a trained detector's accuracy.

make demo                             # trains the detector (6 minutes)
python benchmarks/precision.py        # measure (4 minutes), store the result
python benchmarks/report.py           # write docs/speed.md from the stored results

The backbone is measured at 800x1344; the detector is the demo's, evaluated on its
validation tiles in each precision that this machine computes in.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from backbones import SOFTMAX, TOKEN_CONV, vit
from common import ROOT, Benchmark, Contender, Size, Target, image, median, spread
from mmengine.config import Config
from torch import nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

from mmcastling.analysis import count_model_macs, paired_seconds
from mmcastling.deploy import PRECISIONS, check_precision, set_precision
from mmcastling.deploy.int8 import QuantizedLinear
from mmcastling.run import Evaluation, ExportedEvaluation, evaluate, load_config

SIZE: Size = (800, 1344)
ROUNDS = 9
DEMO = ROOT / "work_dirs" / "demo"
METRICS = {"bbox": "coco/bbox_mAP", "segm": "coco/segm_mAP"}
TOLERANCE = 0.005
REFERENCES = {
    "fp32": "float32's",
    "softmax fp32": "the float32 softmax twin's",
}


@functools.cache
def supported(device: str = "cpu") -> dict[str, str]:
    """The precisions, and why one is not computed in here (empty where it is)."""
    reasons = {}
    for precision in PRECISIONS:
        try:
            check_precision(precision, device)
        except RuntimeError as error:
            reasons[precision] = str(error)
        else:
            reasons[precision] = ""
    return reasons


def castled(precision: str) -> Callable[[], nn.Module]:
    """Builds the deployed ViT-S in a precision."""

    def build() -> nn.Module:
        model = vit(TOKEN_CONV)()
        model.eval().requires_grad_(False)
        set_precision(model, precision)
        return model

    return build


def int8_libraries(device: str) -> dict[str, Any]:
    """Milliseconds of one linear layer, 4,200 tokens from 384 to 1,536 channels."""
    linear = nn.Linear(384, 1536).eval().requires_grad_(False)
    torchao = nn.Sequential(copy.deepcopy(linear))
    quantize_(torchao, Int8DynamicActivationInt8WeightConfig())
    layers = {
        "fp32": linear,
        "int8, torch's oneDNN operators": QuantizedLinear(linear),
        "int8, torchao": torchao,
    }
    x = torch.randn(4200, 384)
    passes = {name: functools.partial(layer, x) for name, layer in layers.items()}
    with torch.inference_mode():
        seconds = paired_seconds(passes, ROUNDS)
    return dict(linear={name: spread(values) for name, values in seconds.items()})


def measure_more(device: str) -> dict[str, Any]:
    return {**int8_libraries(device), **accuracy(device)}


def demo_detector() -> tuple[Config, Path]:
    """Config and checkpoint of the demo's deployed detector.

    Raises:
        FileNotFoundError: If there is none.
    """
    checkpoint = DEMO / "deployed.pth"
    if not checkpoint.exists():
        raise FileNotFoundError(
            f"{checkpoint} does not exist: train the demo's detector with 'make demo'"
        )
    options = {"data_root": str(ROOT / "data" / "nuclei"), "work_dir": str(DEMO / "p")}
    return load_config(DEMO / "deployed.py", options), checkpoint


def scores(result: Evaluation | ExportedEvaluation) -> dict[str, float]:
    """Both APs of an evaluation, and seconds per image."""
    found = {name: result.metrics[key] for name, key in METRICS.items()}
    return dict(found, seconds=result.seconds_per_image)


def accuracy(device: str) -> dict[str, Any]:
    """The demo's detector in each precision, and what this machine lacks."""
    rows = {}
    for precision, reason in supported(device).items():
        if not reason:
            cfg, checkpoint = demo_detector()
            rows[precision] = scores(evaluate(cfg, checkpoint, precision=precision))
    lacking = {name: reason for name, reason in supported(device).items() if reason}
    return dict(detector=rows, lacking=lacking)


def targets(result: dict[str, Any]) -> list[Target]:
    """What was to be reached; int8 and fp16 where they were measured."""
    names = {cell["contender"] for cell in result["cells"]}
    speeds = {"bf16": (1.8, 4.5), "int8": (2.5, 6.5)}
    found = [
        Target(
            f"ViT-S at 800x1344 in {precision}: speed over {what}",
            median(result, other, SIZE) / median(result, precision, SIZE),
            limit,
            least=True,
        )
        for precision, limits in speeds.items()
        if precision in names
        for (other, what), limit in zip(REFERENCES.items(), limits, strict=True)
    ]
    full = result["detector"]["fp32"]
    for precision, row in result["detector"].items():
        if precision != "fp32":
            change = max(abs(row[name] - full[name]) for name in METRICS)
            claim = f"demo's detector in {precision}: change of AP"
            found.append(Target(claim, change, TOLERANCE))
    return found


def macs(_: nn.Module) -> int:
    """MACs of the deployed backbone, whatever computes them."""
    return count_model_macs(vit(TOKEN_CONV)(), SIZE).macs


BENCHMARK = Benchmark(
    name="precision",
    contenders={
        "softmax fp32": Contender(vit(SOFTMAX), image),
        **{
            precision: Contender(castled(precision), image, count=macs)
            for precision, reason in supported().items()
            if not reason
        },
    },
    repeats={SIZE: ROUNDS},
    extra=measure_more,
)

if __name__ == "__main__":
    BENCHMARK.main(__doc__)
