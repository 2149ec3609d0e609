"""Small models of timm's families, for the one table of models that castle() knows."""

import functools

import pytest
from torch import nn

SIZES = [(64, 64), (96, 48)]
FIXED = SIZES[:1]  # of those that take images of one size


def _timm():
    return pytest.importorskip(
        "timm", reason="timm is not installed: pip install -r requirements-dev.txt"
    )


def timm_vit(**options):
    return create(
        "vision_transformer.VisionTransformer",
        **dict(img_size=64, embed_dim=24, depth=2, num_heads=3, num_classes=1000),
        dynamic_img_size=True,
        **options,
    )


def create(name, **options):
    """A model of timm by name, or of a class by ``module.Class``.

    Its weights and scales are not so small that attention does not show.
    """
    timm, options = _timm(), {"num_classes": 5, **options}
    if "." in name:
        module, kind = name.split(".")
        model = getattr(getattr(timm.models, module), kind)(**options)
    else:
        model = timm.create_model(name, **options)
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):  # so that fusing shows
            nn.init.uniform_(layer.running_var, 0.5, 2.0)
            nn.init.normal_(layer.running_mean, std=0.1)
    for key, weight in model.named_parameters():
        if "gamma" in key or "layer_scale" in key:
            nn.init.constant_(weight, 0.5)
    return model


def _mvit(**options):
    small = dict(depths=(1, 2), embed_dim=12, num_heads=1, **options)
    config = _timm().models.mvitv2.MultiScaleVitCfg(**small)
    return create("mvitv2.MultiScaleVit", cfg=config, img_size=(64, 64))


def _caformer():
    former = _timm().models.metaformer
    mixers = [former.SepConv] * 2 + [former.Attention] * 2
    norms = [former.LayerNorm2dNoBias] * 2 + [former.LayerNormNoBias] * 2
    sizes = dict(depths=(1, 1, 1, 1), dims=(8, 8, 32, 32))
    return create(
        "metaformer.MetaFormer", token_mixers=mixers, norm_layers=norms, **sizes
    )


def timm_small(name, **options):
    small = dict(img_size=64, embed_dim=24, depth=2, num_heads=3)
    return create(name, **{**small, **options})


def _row(name, sizes, count, **options):
    return functools.partial(create, name, **options), sizes, count


def _small(name, sizes, count, **options):
    return functools.partial(timm_small, name, **options), sizes, count


_TWO = dict(depths=(2, 2), num_heads=(1, 2), embed_dim=12, img_size=64)
_SWIN = dict(_TWO, window_size=4, strict_img_size=False)
_SWIN_SIZES = [(64, 64), (72, 100)]
_ANY = dict(dynamic_img_size=True)

TIMM_MODELS = {
    "timm": (timm_vit, SIZES, 2),
    "timm-deit3": (
        lambda: timm_vit(qk_norm=True, init_values=0.5, reg_tokens=2, qkv_bias=False),
        SIZES,
        2,
    ),
    "timm-relpos": _small("vit_relpos_small_patch16_224", FIXED, 2),
    "timm-relpos-shared": _small("vit_srelpos_small_patch16_224", FIXED, 2),
    "timm-beit": _small("beit_base_patch16_224", FIXED, 2),
    "timm-beit-shared": _small(
        *("beit_base_patch16_224", FIXED, 2),
        use_rel_pos_bias=False,
        use_shared_rel_pos_bias=True,
    ),
    "timm-sam": _small("samvit_base_patch16_224", FIXED, 2, window_size=3),
    "timm-dinov3": _small("vit_small_patch16_dinov3", SIZES, 2, **_ANY),
    "timm-eva02": _small("eva02_tiny_patch14_224", SIZES, 2, patch_size=16, **_ANY),
    "timm-rope": _small("vit_small_patch16_rope_224", SIZES, 2, **_ANY),
    "timm-rope-mixed": _small("vit_small_patch16_rope_mixed_224", SIZES, 2, **_ANY),
    "timm-pe": _small("vit_pe_core_tiny_patch16_384", SIZES, 2, **_ANY),
    "timm-naflex": _row(
        *("naflexvit_base_patch16_gap", SIZES, 2),
        cfg=None,
        **dict(embed_dim=24, depth=2, num_heads=3),
    ),
    "timm-swin": _row("swin_tiny_patch4_window7_224", _SWIN_SIZES, 4, **_SWIN),
    "timm-swin2": _row("swinv2_tiny_window8_256", _SWIN_SIZES, 4, **_SWIN),
    "timm-swin2-cr": _row("swinv2_cr_tiny_224", _SWIN_SIZES, 4, **_SWIN),
    "timm-twins": _row(
        *("twins_svt_small", SIZES, 2),
        **dict(img_size=64, embed_dims=(12, 24), depths=(2, 1), num_heads=(1, 2)),
        **dict(mlp_ratios=(2, 2), sr_ratios=(2, 1), wss=(3, 3)),
    ),
    "timm-levit": _row(
        *("levit_128", FIXED, 4),
        **dict(img_size=64, embed_dim=(16, 24), key_dim=8, num_heads=(2, 3)),
        depth=(2, 1),
    ),
    "timm-levit-conv": _row(
        *("levit_conv_128", FIXED, 4),
        **dict(img_size=64, embed_dim=(16, 24), key_dim=8, num_heads=(2, 3)),
        depth=(2, 1),
    ),
    "timm-mvit": (_mvit, FIXED, 3),
    "timm-mvit-whole": (lambda: _mvit(stride_kv_adaptive=(1, 1)), FIXED, 3),
    "timm-hiera": _row(
        *("hiera_tiny_224", FIXED, 2),
        **dict(img_size=64, embed_dim=12, stages=(1, 2, 1, 1)),
    ),
    "timm-tiny-vit": _row(
        *("tiny_vit_5m_224", SIZES, 3),
        **dict(embed_dims=(8, 12, 24), depths=(1, 2, 1), num_heads=(1, 1, 2)),
        window_sizes=(3, 3, 3),
    ),
    "timm-pit": _row(
        *("pit_ti_224", FIXED, 2),
        **dict(img_size=64, base_dims=(8, 8), depth=(1, 1), heads=(2, 4)),
    ),
    "timm-tnt": _row(
        *("tnt_s_patch16_224", FIXED, 4),
        **dict(img_size=64, embed_dim=24, inner_dim=8, depth=2, num_heads_outer=3),
        num_heads_inner=2,
    ),
    "timm-pvt": _row(
        *("pvt_v2_b0", SIZES, 2),
        **dict(embed_dims=(8, 8, 16, 24), depths=(1, 1, 1, 2)),
        **dict(num_heads=(1, 1, 2, 3), mlp_ratios=(2, 2, 2, 2)),
    ),
    "timm-crossvit": _row(
        *("crossvit_tiny_240", FIXED, 3),
        **dict(img_size=64, embed_dim=(12, 24), num_heads=(2, 2), img_scale=(1.0, 1.0)),
        **dict(patch_size=(8, 16), depth=((1, 2, 0),)),
    ),
    "timm-volo": _row(
        *("volo.VOLO", FIXED, 2),
        **dict(img_size=64, layers=(1, 1, 1, 0), embed_dims=(12, 24, 24, 24)),
        num_heads=(1, 2, 2, 2),
    ),
    "timm-maxvit": _row(
        *("maxvit_rmlp_nano_rw_256", FIXED, 4),
        **dict(img_size=64, embed_dim=(32, 32), depths=(1, 1), stem_width=8),
    ),
    "timm-maxvit-tf": _row(
        *("maxvit_tiny_tf_224", FIXED, 4),
        **dict(img_size=64, embed_dim=(32, 32), depths=(1, 1), stem_width=8),
    ),
    "timm-coatnet": _row(
        *("coatnet_0_rw_224", FIXED, 2),
        **dict(img_size=64, embed_dim=(8, 32, 32, 32), depths=(1, 1, 1, 1)),
        stem_width=8,
    ),
    "timm-davit": _row(
        *("davit_tiny", SIZES, 2),
        **dict(depths=(1, 1), embed_dims=(8, 16), num_heads=(1, 2), window_size=3),
    ),
    "timm-gcvit": _row(
        *("gcvit.GlobalContextVit", FIXED, 4),
        **dict(img_size=64, embed_dim=8, depths=(2, 2), num_heads=(1, 2)),
        window_ratio=(16, 16),
    ),
    "timm-nest": _row(
        *("nest.Nest", FIXED, 3),
        **dict(img_size=64, embed_dims=(8, 8, 16), depths=(1, 1, 1)),
        num_heads=(1, 1, 2),
    ),
    "timm-visformer": _row(
        *("visformer_tiny", FIXED, 2),
        **dict(
            img_size=64, embed_dim=24, depth=(1, 1, 1), num_heads=3, init_channels=8
        ),
    ),
    "timm-fastvit": _row(
        *("fastvit_sa12", SIZES, 2),
        **dict(layers=(1, 1, 1, 2), embed_dims=(8, 8, 16, 32)),
    ),
    "timm-efficientformer": _row(
        *("efficientformer_l1", [(224, 224)], 1),
        **dict(depths=(1, 1, 1, 2), embed_dims=(8, 8, 16, 24)),
    ),
    "timm-nextvit": _row(
        *("nextvit.NextViT", SIZES, 1),
        **dict(depths=(1, 1, 5, 1), stem_chs=(8, 8, 8), in_chans=3),
    ),
    "timm-mobilevit": _row("mobilevit_xxs", SIZES, 9),
    "timm-convit": _row(
        *("convit_tiny", FIXED, 1),
        **dict(img_size=64, embed_dim=24, depth=2, num_heads=3, local_up_to_layer=1),
    ),
    "timm-botnet": _row("botnet26t_256", FIXED, 3, img_size=64),
    "timm-caformer": (_caformer, SIZES, 2),
}

# Those that take one size, built for another.
for _name in ("relpos", "beit", "sam", "levit", "tnt", "maxvit-tf", "visformer"):
    _build, _, _count = TIMM_MODELS[f"timm-{_name}"]
    TIMM_MODELS[f"timm-{_name}-wide"] = (
        functools.partial(_build, img_size=(64, 128)),
        [(64, 128)],
        _count,
    )

# Of each kind of adapter, those that every run of the tests tries.
QUICK = ("", "-beit", "-sam", "-dinov3", "-swin", "-levit", "-maxvit-tf", "-hiera")
LONG = TIMM_MODELS.keys() - {f"timm{name}" for name in QUICK}
