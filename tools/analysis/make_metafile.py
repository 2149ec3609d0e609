"""Write the metafiles of configs/: every model, with its MACs and parameters.

Costs are those of the deployed graph for one image, as get_flops.py counts them, at the
size of the config's test images. No weights are published, so no entry names any.

Example:
    python tools/analysis/make_metafile.py                     # many minutes
    python tools/analysis/make_metafile.py configs/NEW.py      # the others as they are
"""

import argparse
from pathlib import Path
from typing import Any

import yaml
from get_flops import AS_BUILT, DEPLOYED, count_graphs
from mmengine.config import Config

from mmcastling.compat.model_index import models
from mmcastling.registry import type_name
from mmcastling.run import load_config, run_cli

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
PAPER = dict(
    Title="Castling-ViT: Compressing Self-Attention via Switching Towards "
    "Linear-Angular Attention at Vision Transformer Inference",
    URL="https://arxiv.org/abs/2211.10526",
)
COLLECTIONS = {
    "Castled": "Castled backbones",
    "CastlingViT": "Castling-ViT",
    "CastlingLeViT": "Castling-LeViT",
    "CastlingMViT": "Castling-MViTv2",
}
DATA = {
    "in1k": "ImageNet-1k",
    "coco": "COCO",
    "nuclei": "nuclei",
    "dsb2018": "Data Science Bowl 2018",
    "ade20k": "ADE20K",
    "camvid": "CamVid",
}
TASKS = {
    "mmpretrain": "classification",
    "mmdet": "detection",
    "mmseg": "segmentation",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("configs", nargs="*", help="count these alone (all)")
    chosen = {Path(path).stem for path in parser.parse_args().configs}
    known = models() if chosen else {}
    tasks: dict[str, list[dict[str, Any]]] = {task: [] for task in TASKS.values()}
    for path in sorted(CONFIGS.glob("*.py")):
        cfg = load_config(path)
        item = known.get(path.stem)
        if item is None or path.stem in chosen:
            item = entry(cfg)
            print(path.name, item["Metadata"], flush=True)
        tasks[TASKS[cfg.default_scope]].append(item)
    for task, entries in tasks.items():
        used = {item["In Collection"] for item in entries}
        collections = [
            dict(Name=name, Paper=PAPER, README="README.md") for name in sorted(used)
        ]
        text = "# Written by tools/analysis/make_metafile.py.\n" + yaml.safe_dump(
            dict(Collections=collections, Models=entries), sort_keys=False
        )
        (CONFIGS / f"metafile_{task}.yml").write_text(text)


def entry(cfg: Config) -> dict[str, Any]:
    """What the metafile says of one config."""
    name = Path(cfg.filename).stem
    shape = test_shape(cfg)
    if "pretrained" in (original := cfg.model.backbone.get("backbone", {})):
        original.pretrained = False  # its weights would be downloaded
    graphs = count_graphs(cfg.model, shape)
    report = graphs.get(DEPLOYED) or graphs[AS_BUILT]
    backbone = type_name(cfg.model.backbone.type)
    metadata = {
        "FLOPs": report.macs,  # as OpenMMLab means it: multiply-accumulates
        "Parameters": report.params,
        "Input Size": list(shape),
        "Training Data": DATA[name.rpartition("_")[2]],
    }
    return {
        "Name": name,
        "In Collection": COLLECTIONS.get(backbone, "Castling-ViT"),
        "Metadata": metadata,
        "Results": None,
        "Weights": None,
        "Config": f"configs/{name}.py",
    }


def test_shape(cfg: Config) -> tuple[int, int]:
    """``(H, W)`` of an image in testing, as the network sees it at its largest.

    For segmentation that of a crop.
    """
    if cfg.default_scope == "mmpretrain":
        return (224, 224)
    if cfg.default_scope == "mmseg":  # the size of crops, which is what papers count
        return tuple(cfg.model.data_preprocessor.size)
    sizes = [
        step["scale"]
        for step in cfg.test_dataloader.dataset.pipeline
        if step["type"] == "Resize"
    ]
    short, long = sorted(sizes[0])
    # mmdet resizes within (1333, 800) and pads to a multiple of 32.
    return (short, -(-long // 32) * 32)


if __name__ == "__main__":
    run_cli(main)
