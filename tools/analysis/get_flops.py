"""Count parameters and MACs of a config's model, in training and deployed.

Three graphs are counted at the given shape, one forward pass of one image each: the
training graph with its softmax branch on, the deployed graph without it, and the
softmax twin, which is the same config with attention=dict(type='softmax'). MACs are
multiply-accumulates of matrix products, convolutions and attention; norms, activations
and softmax are not counted.

Example:
    python tools/analysis/get_flops.py configs/castling_tiny_in1k.py --shape 224 224
"""

import argparse
import contextlib
import copy
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from rich.console import Console
from rich.table import Table
from torch import nn
from torch._subclasses import fake_tensor

from mmcastling.analysis import ComplexityReport, count_model_macs, input_channels
from mmcastling.checkpoint import write_json_atomically
from mmcastling.models import Castled
from mmcastling.models.common import CastlingBackbone
from mmcastling.run import run_cli
from mmcastling.run.arguments import add_config_arguments, config_from_arguments
from mmcastling.verbs import castling_modules, switch_to_deploy

TRAINING, DEPLOYED, TWIN = "training graph", "deployed graph", "softmax twin"
AS_BUILT = "as built"

NEEDS_CONTENTS = (
    fake_tensor.DataDependentOutputException,
    fake_tensor.DynamicOutputShapeException,
    fake_tensor.UnsupportedOperatorException,
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_config_arguments(parser)
    parser.add_argument(
        "--shape",
        nargs=2,
        type=int,
        required=True,
        metavar=("H", "W"),
        help="size of the image as the network sees it, padding included",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts")
    args = parser.parse_args()
    if min(args.shape) < 1:
        parser.error(f"--shape {args.shape[0]} {args.shape[1]}: give positive sizes")
    if args.json is not None and not os.access(args.json.absolute().parent, os.W_OK):
        parser.error(f"--json {args.json}: its folder does not exist or is read-only")
    return args


def main() -> None:
    args = parse_args()
    cfg = config_from_arguments(args)
    shape = tuple(args.shape)
    graphs = count_graphs(cfg.model, shape)
    print_table(cfg, shape, graphs)
    if args.json is not None:
        write_json_atomically(args.json, as_json(cfg, shape, graphs))


def count_graphs(
    model: dict[str, Any], shape: tuple[int, int]
) -> dict[str, ComplexityReport]:
    """Count the graphs that a model has.

    Args:
        model: Config of a backbone, classifier, detector or segmentor.
        shape: ``(H, W)`` of the image.

    Returns:
        Reports by graph: training and deployed for a model with auxiliary branches,
        ``'as built'`` for any other; and the softmax twin where attentions of the
        castled backbones can be exchanged.
    """
    try:
        return _count_graphs(model, shape, count_shapes)
    except NEEDS_CONTENTS:
        pass
    if "backbone" in model:
        # Often only what follows the backbone does, such as the levels of proposals.
        with contextlib.suppress(*NEEDS_CONTENTS):
            return _count_around_backbone(model, shape)
    return _count_graphs(model, shape, count_model_macs)


def count_shapes(network: nn.Module, shape: tuple[int, int]) -> ComplexityReport:
    """Count with tensors that have no contents: large images cost neither memory nor
    time. (The meta device would do too, but autocast does not know it.)

    Raises:
        Exception: One of ``NEEDS_CONTENTS``, if what the model does depends on them.
    """
    try:
        with fake_tensor.FakeTensorMode(allow_non_fake_inputs=True):
            return count_model_macs(network, shape)
    except RuntimeError as error:
        if "not allocated" in str(error):  # handed to numpy, as Mask2Former does
            raise fake_tensor.DataDependentOutputException(error) from error
        raise


def _count_graphs(
    model: dict[str, Any],
    shape: tuple[int, int],
    count: Callable[[nn.Module, tuple[int, int]], ComplexityReport],
) -> dict[str, ComplexityReport]:
    network = MODELS.build(copy.deepcopy(model))
    if any(True for _ in castling_modules(network)):
        # Counted in evaluation, where the branch still computes: its mask is on.
        graphs = {TRAINING: count(network, shape)}
        graphs[DEPLOYED] = count(switch_to_deploy(network, inplace=True), shape)
    else:
        graphs = {AS_BUILT: count(network, shape)}
    twin = softmax_twin(model)
    if twin != model:
        graphs[TWIN] = count(MODELS.build(twin), shape)
    return graphs


def _count_around_backbone(
    model: dict[str, Any], shape: tuple[int, int]
) -> dict[str, ComplexityReport]:
    """The backbone by shapes, once per graph; the rest with real tensors, once."""
    graphs = _count_graphs(model["backbone"], shape, count_shapes)
    network = MODELS.build(copy.deepcopy(model))
    network.eval()
    with fake_tensor.FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        images = torch.empty(1, input_channels(network), *shape)
        outs = network.backbone(images)
    network.backbone = MadeUpFeatures([tuple(out.shape) for out in outs])
    rest = count_model_macs(network, shape)
    return {
        name: ComplexityReport(
            macs=report.macs + rest.macs,
            params=report.params + rest.params,
            input_shape=rest.input_shape,
            by_module={"backbone": report.macs, **rest.by_module},
        )
        for name, report in graphs.items()
    }


class MadeUpFeatures(nn.Module):
    """Stands in for a backbone whose cost is known.

    Args:
        sizes: Shapes of its outputs for one image.
    """

    def __init__(self, sizes: list[tuple[int, ...]]) -> None:
        super().__init__()
        self.sizes = sizes

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(x.new_ones(size) for size in self.sizes)


def softmax_twin(model: dict[str, Any]) -> dict[str, Any]:
    """The same config with plain softmax in every castled backbone.

    Of an attention's options none is kept: those of the mixers belong to castling, the
    local convolution that it has by default among them. A backbone of others is what it
    was before it was castled.
    """
    twin = copy.deepcopy(model)
    stack: list[Any] = [twin]
    while stack:
        node = stack.pop()
        if isinstance(node, dict):
            kind = _class_of(node)
            if kind is Castled:
                original = node["backbone"]
                node.clear()
                node.update(original)
            elif isinstance(kind, type) and issubclass(kind, CastlingBackbone):
                node["attention"] = dict(type="softmax")
            stack.extend(node.values())
        elif isinstance(node, (list, tuple)):
            stack.extend(node)
    return twin


def _class_of(node: dict[str, Any]) -> Any:
    kind = node.get("type")
    return MODELS.get(kind) if isinstance(kind, str) else kind


def print_table(
    cfg: Config, shape: tuple[int, int], graphs: dict[str, ComplexityReport]
) -> None:
    table = Table()
    table.add_column("GMACs")
    for name in graphs:
        table.add_column(name, justify="right")
    parts = dict.fromkeys(part for r in graphs.values() for part in r.by_module)
    for part in parts:
        cells = [f"{r.by_module.get(part, 0) / 1e9:.3f}" for r in graphs.values()]
        table.add_row(part, *cells)
    table.add_section()
    totals = [f"{r.macs / 1e9:.3f}" for r in graphs.values()]
    table.add_row("total", *totals, style="bold")
    table.add_row("parameters", *(f"{r.params / 1e6:.3f} M" for r in graphs.values()))
    console = Console(width=None if os.isatty(1) else 100)
    console.print(f"{Path(cfg.filename).name} at {shape[0]}x{shape[1]}")
    console.print(table)
    if DEPLOYED in graphs:
        saved = 1 - graphs[DEPLOYED].macs / graphs[TRAINING].macs
        console.print(f"pruning the softmax branch saves {saved:.1%} of the MACs")


def as_json(
    cfg: Config, shape: tuple[int, int], graphs: dict[str, ComplexityReport]
) -> dict[str, Any]:
    return {
        "config": Path(cfg.filename).name,
        "shape": list(shape),
        "torch": torch.__version__,
        "graphs": {name: dataclasses.asdict(report) for name, report in graphs.items()},
    }


if __name__ == "__main__":
    run_cli(main)
