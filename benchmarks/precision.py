"""Lower precision: the ViT-S backbone's speed, and a trained detector's accuracy.

make demo                             # trains the detector (6 minutes)
python benchmarks/precision.py        # measure (5 minutes), store the result
python benchmarks/report.py           # write docs/speed.md from the stored results

The backbone is measured at 800x1344; the detector is the demo's, evaluated on its
validation tiles in each precision that this machine computes in. What --precision auto
says of the backbone is stored with them.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from backbones import SOFTMAX, TOKEN_CONV, vit
from common import (
    ROOT,
    Benchmark,
    Contender,
    Size,
    Target,
    image,
    kind_of,
    median,
    spread,
)
from mmengine.config import Config
from torch import nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

from mmcastling.analysis import count_model_macs, paired_seconds
from mmcastling.deploy import (
    PRECISIONS,
    best_precision,
    check_precision,
    fastest,
    set_precision,
)
from mmcastling.deploy.int8 import QuantizedLinear
from mmcastling.run import Evaluation, ExportedEvaluation, evaluate, load_config

SIZE: Size = (800, 1344)
ROUNDS = 9
DEMO = ROOT / "work_dirs" / "demo"
METRICS = {"bbox": "coco/bbox_mAP", "segm": "coco/segm_mAP"}
TOLERANCE = 0.005
AUTO_LIMITS = {"amx": 11.0, "avx512": 6.0}
"""How much faster than the float32 softmax twin the precision that auto chooses is."""
SOFTMAX_32, SOFTMAX_16 = "softmax fp32", "softmax bf16, by .to()"
PLAIN = "bf16, by .to()"
REFERENCES = {
    "fp32": "float32's",
    SOFTMAX_32: "the float32 softmax twin's",
}


@functools.cache
def supported(device: str = "cpu") -> dict[str, str]:
    """The precisions, and why one is not computed in here (empty where it is)."""
    reasons = {}
    for precision in PRECISIONS:
        try:
            check_precision(precision, device)
        except RuntimeError:
            reasons[precision] = "no instructions for it"
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


def plain_bf16(mixer: dict[str, Any]) -> Contender | None:
    """A deployed ViT-S all in bfloat16, by ``.to``; None where it is not computed."""
    if supported()["bf16"]:
        return None
    return Contender(
        lambda: vit(mixer)().to(torch.bfloat16),
        lambda size: tuple(x.to(torch.bfloat16) for x in image(size)),
        count=None if mixer is SOFTMAX else macs,
    )


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
    auto = best_precision(castled("fp32")().to(device), SIZE, remember=False)
    return dict(auto=str(auto), **int8_libraries(device), **accuracy(device))


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
    times = {name: median(result, name, SIZE) for name in PRECISIONS if name in names}
    chosen = times[fastest(times)]
    if limit := AUTO_LIMITS.get(kind_of(result)):
        claim = (
            f"ViT-S at 800x1344 in what auto takes: speed over {REFERENCES[SOFTMAX_32]}"
        )
        speed = median(result, SOFTMAX_32, SIZE) / chosen
        found.append(Target(claim, speed, limit, least=True))
    if SOFTMAX_16 in names:
        claim = (
            "ViT-S at 800x1344 in what auto takes: speed over the bf16 softmax twin's"
        )
        speed = median(result, SOFTMAX_16, SIZE) / chosen
        found.append(Target(claim, speed, 3.6, least=True))
    if PLAIN in names:
        claim = "ViT-S at 800x1344 in bf16: time over that of all in bfloat16"
        slower = times["bf16"] / median(result, PLAIN, SIZE)
        found.append(Target(claim, slower, 1.0))
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


CONTENDERS = {
    SOFTMAX_32: Contender(vit(SOFTMAX), image),
    SOFTMAX_16: plain_bf16(SOFTMAX),
    PLAIN: plain_bf16(TOKEN_CONV),
    **{
        precision: Contender(castled(precision), image, count=macs)
        for precision, reason in supported().items()
        if not reason
    },
}
BENCHMARK = Benchmark(
    name="precision",
    contenders={name: found for name, found in CONTENDERS.items() if found},
    repeats={SIZE: ROUNDS},
    extra=measure_more,
)

if __name__ == "__main__":
    BENCHMARK.main(__doc__)
