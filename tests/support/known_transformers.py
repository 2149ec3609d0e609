"""Small models of Hugging Face transformers, and of what is built on it."""

import functools
import inspect

import pytest
from torch import nn

SMALL = dict(
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=48,
    image_size=64,
    patch_size=16,
)


class LastState(nn.Module):
    """A model of transformers that gives its last states, whatever the image's size."""

    def __init__(self, model, **options):
        super().__init__()
        self.model, self.options = model, options
        if "interpolate_pos_encoding" in inspect.signature(model.forward).parameters:
            self.options["interpolate_pos_encoding"] = True

    def forward(self, x):
        return self.model(x, **self.options)[0]


def transformers_model(kind, config, wrapped=True, **options):
    """The model of that class, or with ``wrapped`` what its last states come from."""
    transformers = pytest.importorskip(
        "transformers",
        minversion="5",
        reason="transformers is not installed: pip install -r requirements-dev.txt",
    )
    config = getattr(transformers, config)(**{**SMALL, **options})
    model = getattr(transformers, kind)(config).eval()
    for layer in model.modules():
        if isinstance(layer, nn.(nn.Linear, nn.Conv2d)):  # so small that attention hardly matters
            nn.init.normal_(layer.weight, std=0.2)
    return LastState(model) if wrapped else model


def row(name, model=None, config=None, sizes=((64, 64), (96, 48)), count=2, **options):
    build = functools.partial(
        transformers_model,
        model or f"{name}Model",
        config or f"{name}Config",
        **options,
    )
    return build, list(sizes), count


SIGLIP = dict(model="SiglipVisionModel", config="SiglipVisionConfig")
TRANSFORMERS = {
    "hf-vit": row("ViT"),
    "hf-deit": row("DeiT"),
    "hf-dinov2": row("Dinov2", mlp_ratio=2),
    "hf-dinov2-registers": row("Dinov2WithRegisters", mlp_ratio=2),
    "hf-dinov3": row("DINOv3ViT", num_register_tokens=2),
    "hf-clip": row("CLIPVision"),
    "hf-siglip": row("SiglipVision", vision_use_head=False),
    "hf-yolos": row("Yolos", image_size=[64, 64], num_detection_tokens=5),
    "hf-beit": row("Beit"),
    "hf-dpt": row("DPT", is_hybrid=False),
    "hf-vitdet": row("VitDet", pretrain_image_size=64, use_relative_position_embeddings=True),
    "hf-sam": row("SamVision", sizes=[(64, 64)], global_attn_indexes=[1], window_size=3, mlp_dim=48),
}
