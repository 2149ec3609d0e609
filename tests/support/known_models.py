"""Small models of the libraries whose attentions castle() knows."""

import pytest
import torch
from known_timm import SIZES, TIMM_MODELS
from known_transformers import TRANSFORMERS
from torch import nn

PLAIN = dict(embed_dims=24, num_layers=2, num_heads=3, feedforward_channels=48)


def mmpretrain_vit(**options):
    from mmpretrain.models.backbones import VisionTransformer

    return VisionTransformer(PLAIN, img_size=64, **options)


def mmpretrain_deit():
    from mmpretrain.models.backbones import DistilledVisionTransformer

    return DistilledVisionTransformer(PLAIN, img_size=64)


def mmpretrain_mae():
    from mmpretrain.models.selfsup import MAEViT

    class UnmaskedMAE(MAEViT):
        def forward(self, x):
            return super().forward(x, None)

    return UnmaskedMAE(PLAIN, img_size=64)


def mmpretrain_beit(shared=False):
    from mmpretrain.models.backbones import BEiTViT

    return BEiTViT(
        PLAIN,
        img_size=64,
        layer_scale_init_value=0.5,
        use_rel_pos_bias=not shared,
        use_shared_rel_pos_bias=shared,
    )


def mmseg_mae():
    from mmseg.models.backbones import MAE

    return MAE(img_size=64, embed_dims=24, num_layers=2, num_heads=3, out_indices=[1])


def mmpretrain_mvit(**options):
    from mmpretrain.models.backbones import MViT

    arch = dict(embed_dims=8, num_layers=3, num_heads=1, downscale_indices=[1])
    return MViT(arch, img_size=64, **options)


def mmpretrain_levit():
    from mmpretrain.models.backbones import LeViT

    class SmallLeViT(LeViT):  # mmpretrain's takes no arch of one's own
        arch_zoo = {
            "small": dict(
                embed_dims=[16, 24, 32],
                num_heads=[2, 3, 4],
                depths=[1, 1, 1],
                key_dims=[8, 8, 8],
            )
        }

    model = SmallLeViT("small", img_size=64)
    for module in model.modules():  # so that fusing it in deployment shows
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.running_mean, std=0.1)
    return model


def mmpretrain_swin(**options):
    from mmpretrain.models.backbones import SwinTransformer

    arch = dict(embed_dims=12, depths=[2, 2], num_heads=[1, 2])
    return SwinTransformer(arch, 64, window_size=4, out_indices=(1,), **options)


def mmdet_swin(library="mmdet"):
    backbones = pytest.importorskip(f"{library}.models.backbones")
    return backbones.SwinTransformer(
        embed_dims=12,
        depths=[2, 2],
        num_heads=[1, 2],
        window_size=4,
        strides=(4, 2),
        out_indices=(1,),
    )


def torchvision_vit():
    from torchvision.models import VisionTransformer

    model = VisionTransformer(64, 16, 2, 3, 24, 48, num_classes=5)
    nn.init.normal_(model.heads.head.weight)  # zero as torchvision leaves it
    return model


def mmpretrain_eva02():
    from mmpretrain.models.backbones import ViTEVA02

    return ViTEVA02(PLAIN, img_size=64)


def mmpretrain_sam(**options):
    from mmpretrain.models.backbones import ViTSAM

    return ViTSAM(
        dict(PLAIN, global_attn_indexes=[1]),
        img_size=64,
        window_size=3,
        out_channels=0,
        **options,
    )


def mmpretrain_swin2():
    from mmpretrain.models.backbones import SwinTransformerV2

    arch = dict(
        embed_dims=12, depths=[2, 2], num_heads=[1, 2], extra_norm_every_n_blocks=0
    )
    return SwinTransformerV2(arch, 64, window_size=[4, 4], out_indices=(1,))


def mmpretrain_t2t():
    from mmpretrain.models.backbones import T2T_ViT

    layer = dict(num_heads=3, feedforward_channels=48)
    options = dict(t2t_cfg=dict(token_dims=8), layer_cfgs=layer)
    return T2T_ViT(img_size=64, embed_dims=24, num_layers=2, **options)


def mmpretrain_tnt():
    from mmpretrain.models.backbones import TNT

    arch = dict(
        embed_dims_outer=24,
        embed_dims_inner=8,
        num_layers=2,
        num_heads_outer=3,
        num_heads_inner=2,
    )
    return TNT(arch, img_size=64)


def mmseg_vit():
    from mmseg.models.backbones import VisionTransformer

    options = dict(embed_dims=24, num_layers=2, num_heads=3, final_norm=True)
    return VisionTransformer(img_size=64, out_indices=-1, **options)


# How to build each model, the image sizes it takes, and how many attentions it holds.
MODELS = {
    "vit": (mmpretrain_vit, SIZES, 2),
    "dinov2": (lambda: mmpretrain_vit(layer_scale_init_value=0.5), SIZES, 2),
    "deit": (mmpretrain_deit, SIZES, 2),
    "mae": (mmpretrain_mae, SIZES[:1], 2),
    "beit": (mmpretrain_beit, SIZES[:1], 2),
    "beit-shared": (lambda: mmpretrain_beit(shared=True), SIZES[:1], 2),
    "mmseg-mae": (mmseg_mae, SIZES[:1], 2),
    "mvit": (mmpretrain_mvit, SIZES, 3),
    "levit": (mmpretrain_levit, SIZES[:1], 5),
    "swin": (mmpretrain_swin, [(64, 64), (72, 100)], 4),
    "swin-padded": (lambda: mmpretrain_swin(pad_small_map=True), [(72, 100)], 4),
    "mmdet-swin": (mmdet_swin, [(64, 64), (72, 100)], 4),
    "mmseg-swin": (lambda: mmdet_swin("mmseg"), [(72, 100)], 4),
    "torchvision": (torchvision_vit, SIZES[:1], 2),
    "eva02": (mmpretrain_eva02, SIZES, 2),
    "sam": (mmpretrain_sam, SIZES, 2),
    "swin2": (mmpretrain_swin2, [(64, 64), (72, 100)], 4),
    "t2t": (mmpretrain_t2t, SIZES, 4),
    "tnt": (mmpretrain_tnt, SIZES[:1], 4),
    "mmseg-vit": (mmseg_vit, SIZES, 2),
    **TIMM_MODELS,
    **TRANSFORMERS,
}

# Names, where the model has them, of what linear attention has no place for.
BIASES = ("relative_position", "rel_pos", "attention_bias", "cpb_mlp")


def images(size, seed=0):
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(seed))


def build(name):
    """The model of that name, with biases and scales that are not zero and one."""
    torch.manual_seed(0)
    model = MODELS[name][0]()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight += 0.1 * torch.randn_like(weight)
    return model


def output(model, x):
    y = model(x)
    while not isinstance(y, torch.Tensor):
        y = y[-1]
    return y
