"""Small models of Hugging Face transformers, and the backbones of two detectors.

Each entry of ``TRANSFORMERS`` is as those of ``known_models.MODELS``.
"""

import importlib
import inspect

import pytest
from torch import nn

SIZES = [(64, 64), (96, 48)]
SMALL = dict(
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=48,
    mlp_ratio=2,
    image_size=64,
    patch_size=16,
)
# What the last states do not depend on.
UNUSED = ("pooler", "mask_token", "post_layernorm", "head.")


class LastState(nn.Module):
    """A model of transformers that gives its last states, whatever the image's size."""

    def __init__(self, model):
        super().__init__()
        self.model, self.options = model, {}
        if "interpolate_pos_encoding" in inspect.signature(model.forward).parameters:
            self.options["interpolate_pos_encoding"] = True

    def forward(self, x):
        return self.model(x, **self.options)[0]


def with_effect(model):
    """The model with weights so large that attention matters, in evaluation."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.normal_(layer.weight, std=0.2)
    for name, weight in model.named_parameters():
        if name.startswith(UNUSED) or any(f".{part}" in name for part in UNUSED):
            weight.requires_grad_(False)
        elif any(part in name for part in ("rel_pos", "relative_position_bias")):
            nn.init.normal_(weight)
    return model.eval()


def transformers_model(kind, config, small=True, **options):
    """The model of that class, as transformers builds it."""
    transformers = pytest.importorskip(
        "transformers",
        minversion="5",
        reason="transformers is not installed: pip install -r requirements-dev.txt",
    )
    options = {**(SMALL if small else {}), **options}
    return with_effect(
        getattr(transformers, kind)(getattr(transformers, config)(**options))
    )


def segment_anything_encoder():
    encoder = pytest.importorskip("segment_anything.modeling.image_encoder")
    model = encoder.ImageEncoderViT(
        *(64, 16, 3, 24, 2, 3),
        out_chans=8,
        use_abs_pos=False,
        use_rel_pos=True,
        window_size=3,
        global_attn_indexes=(1,),
    )
    return with_effect(model)


def rfdetr_backbone():
    name = "rfdetr.models.backbone.dinov2_with_windowed_attn"
    pytest.importorskip("rfdetr", reason="rfdetr is not installed")
    library = importlib.import_module(name)
    config = library.WindowedDinov2WithRegistersConfig(
        **{name: value for name, value in SMALL.items() if name != "intermediate_size"},
        num_register_tokens=0,
        num_windows=2,
        window_block_indexes=[0],
    )
    return LastState(with_effect(library.WindowedDinov2WithRegistersModel(config)))


# Of each kind of adapter, those that every run of the tests tries.
LONG = ("deit", "dinov2", "dinov2-registers", "clip", "siglip", "dpt", "vitdet")
LONG = {f"hf-{name}" for name in LONG}


def row(name, sizes=SIZES, count=2, **options):
    def build():
        return LastState(transformers_model(f"{name}Model", f"{name}Config", **options))

    return build, list(sizes), count


TRANSFORMERS = {
    "hf-vit": row("ViT"),
    "hf-deit": row("DeiT"),
    "hf-dinov2": row("Dinov2"),
    "hf-dinov2-registers": row("Dinov2WithRegisters"),
    "hf-dinov3": row("DINOv3ViT", num_register_tokens=2),
    "hf-clip": row("CLIPVision"),
    "hf-siglip": row("SiglipVision"),
    "hf-yolos": row("Yolos", image_size=[64, 64], num_detection_tokens=5),
    "hf-beit": row("Beit", use_relative_position_bias=True, drop_path_rate=0.0),
    "hf-beit-shared": row("Beit", use_shared_relative_position_bias=True),
    "hf-dpt": row("DPT", is_hybrid=False),
    "hf-vitdet": row(
        "VitDet", pretrain_image_size=64, use_relative_position_embeddings=True
    ),
    "hf-sam": row(
        *("SamVision", SIZES[:1]),
        global_attn_indexes=[1],
        window_size=3,
        mlp_dim=48,
        mlp_ratio=2.0,
    ),
    "hf-swin": row(
        *("Swin", [(64, 64), (72, 100)], 4),
        small=False,
        image_size=64,
        embed_dim=12,
        depths=[2, 2],
        num_heads=[1, 2],
        window_size=4,
        drop_path_rate=0.0,
    ),
    "segment-anything": (segment_anything_encoder, SIZES, 2),
    "rfdetr": (rfdetr_backbone, [(64, 64), (96, 32)], 2),
}
