"""Our classifiers in timm's registry: ``timm.create_model('castling_vit_small')``.

:mod:`mmcastling.compat.registrations` names them there::

    import mmcastling, timm
    model = timm.create_model('castling_vit_small', num_classes=10)

They are mmpretrain's ``ImageClassifier`` with timm's interface: what the commands of
``tools/`` train and convert loads by ``checkpoint_path`` (``deploy=True`` for a
converted checkpoint), and ``timm.utils.reparameterize_model`` deploys them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from mmengine.registry import DefaultScope
from mmpretrain.models.classifiers import ImageClassifier
from timm.models._features import FeatureGetterNet, feature_take_indices
from torch import Tensor, nn

from mmcastling.errors import OptionError
from mmcastling.models import CastlingLeViT, CastlingViT
from mmcastling.models.common import image_size
from mmcastling.registry import MODELS

# The depthwise convolution in the MLPs with which costs meet the published ones.
FFN_CONV = 5
_GETTER_OPTIONS = ("out_indices", "output_fmt", "norm")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class CastlingClassifier(ImageClassifier):
    """A classifier with timm's interface around a castled backbone.

    Args:
        backbone, neck: As for ``ImageClassifier``.
        head: Config of mmpretrain's head, without its number of classes.
        num_classes: Number of classes, 0 for features.
        default_cfg: What timm's data pipelines ask for.
    """

    def __init__(
        self,
        backbone: dict[str, Any],
        head: dict[str, Any],
        neck: dict[str, Any] | None,
        num_classes: int,
        default_cfg: dict[str, Any],
    ) -> None:
        with DefaultScope.overwrite_default_scope("mmpretrain"):
            super().__init__(backbone, neck=neck)
        self._head_config = head
        self.num_features = self.head_hidden_size = head["in_channels"]
        self.reset_classifier(num_classes)
        linear = [n for n, m in self.named_modules() if isinstance(m, nn.Linear)]
        convs = (n for n, m in self.named_modules() if isinstance(m, nn.Conv2d))
        names = dict(
            classifier=linear[-1] if num_classes else None, first_conv=next(convs)
        )
        self.default_cfg = self.pretrained_cfg = dict(default_cfg, **names)
        self.feature_info = _feature_info(self.backbone)

    def forward_features(self, x: Tensor) -> Tensor:
        """Pooled features ``(B, C)`` of images ``(B, in_chans, H, W)``."""
        return self.extract_feat(x)[-1]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits ``(B, num_classes)`` of features, or the features themselves."""
        return x if pre_logits or self.head is None else self.head((x,))

    def forward(
        self, inputs: Tensor, data_samples: Any = None, mode: str = "tensor"
    ) -> Any:
        """Logits of images, or what ``ImageClassifier`` gives in its other modes."""
        if mode == "tensor":
            return self.forward_head(self.forward_features(inputs))
        return super().forward(inputs, data_samples, mode)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> Any:
        """Outputs of layers (ViT), stages (LeViT) or scales (MViT), as timm's models.

        Args:
            x: Images ``(B, in_chans, H, W)``.
            indices: The last so many, or which. Defaults to None (all).
            return_prefix_tokens: Return pairs with the class token. Defaults to False.
            norm: Apply the norm of the last layer, which ViT alone has for all.
                Defaults to False.
            stop_early: No effect: what is not needed is not run.
            output_fmt: ``'NCHW'`` or ``'NLC'``. Defaults to ``'NCHW'``.
            intermediates_only: Leave the features out. Defaults to False.
            output_dict: Return a dict with timm's keys. Defaults to False.

        Raises:
            OptionError: If the family does not offer what is asked for.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise OptionError(f"output_fmt {output_fmt!r}: choose 'NCHW' or 'NLC'")
        final_norm = getattr(self.backbone, "ln1", None)
        if norm and final_norm is None:
            raise OptionError("norm=True: this model has no norm for all its outputs")
        wanted, _ = feature_take_indices(len(self.feature_info), indices)
        final = [] if intermediates_only else self.backbone.out_indices
        taken = self.backbone.tokens_at(x, {*wanted, *final})
        prefixes, maps = [], []
        for i in wanted:
            tokens, grid = taken[i]
            tokens = final_norm(tokens) if norm else tokens
            extra = tokens.shape[1] - math.prod(grid)
            prefixes.append(tokens[:, :extra])
            tokens = tokens[:, extra:]
            if output_fmt == "NCHW":
                tokens = tokens.transpose(1, 2).unflatten(2, grid).contiguous()
            maps.append(tokens)
        result: dict[str, Any] = dict(image_intermediates=maps)
        if not intermediates_only:
            outs = self.backbone.outputs_of(taken)
            outs = self.neck(outs) if self.with_neck else outs
            result["image_features"] = outs[-1]
        if output_dict:
            if return_prefix_tokens:
                result["image_intermediates_prefix"] = prefixes
            return result
        if return_prefix_tokens:
            maps = list(zip(maps, prefixes, strict=True))
        return maps if intermediates_only else (result["image_features"], maps)

    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Drop what intermediates at ``indices`` do not need; returns these."""
        wanted, last = feature_take_indices(len(self.feature_info), indices)
        self.backbone.truncate(last)
        if prune_norm and hasattr(self.backbone, "ln1"):
            self.backbone.ln1 = nn.Identity()
        if prune_head:
            self.reset_classifier(0)
        return wanted

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """The layer of a parameter by its name, for timm's learning-rate decay.

        It is that of :class:`~mmcastling.train.LayerDecayOptimWrapperConstructor`; a
        coarser one there is not.
        """
        return lambda name: self.backbone.get_layer_depth(name, "backbone.")[0]

    def get_classifier(self) -> nn.Module | None:
        """The head, None without classes."""
        return self.head

    def reset_classifier(
        self, num_classes: int, global_pool: str | None = None
    ) -> None:
        """Put a new head on: for 0 classes none; ``global_pool`` must be None."""
        if global_pool:
            raise OptionError(
                f"global_pool={global_pool!r}: the pooling of castled models belongs "
                "to their family, leave it out"
            )
        self.num_classes = num_classes
        self.head = None
        if num_classes:
            with DefaultScope.overwrite_default_scope("mmpretrain"):
                head = MODELS.build(dict(self._head_config, num_classes=num_classes))
            self.head = head.to(next(self.backbone.parameters())).train(self.training)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute layers in the backward pass."""
        self.backbone.with_cp = enable

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that timm's optimizers leave without weight decay."""
        names = ("pos_embed", "cls_token")
        return {n for n, _ in self.named_parameters() if n.endswith(names)}


def create(
    name: str,
    pretrained: bool = False,
    *,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: Any = None,
    cache_dir: Any = None,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
    **options: Any,
) -> nn.Module:
    """Build a classifier by its name in timm, as ``timm.create_model`` asks for it.

    Takes the usual arguments of timm's models, of which those about pretrained weights
    have no effect, and as ``options`` those of the backbone. With ``features_only``
    the model returns maps, by default the last three, or those at ``out_indices``.

    Raises:
        OptionError: If the family does not offer what is asked for.
    """
    backbone, head, neck = _parts(name)
    if pretrained:
        raise OptionError(
            f"{name} has no pretrained weights: give checkpoint_path=FILE, or castle "
            "one of timm's models with mmcastling.castle"
        )
    getter: dict[str, Any] | None = None
    if options.pop("features_only", False):
        getter = {k: options.pop(k) for k in _GETTER_OPTIONS if k in options}
    if options.get("with_dist_token"):
        raise OptionError(
            f"{name} has one classifier: for with_dist_token give mmpretrain's "
            "ImageClassifier a DeiTClsHead"
        )
    if backbone["type"] != "mmcastling.CastlingLeViT":
        backbone = dict(backbone, in_channels=in_chans)
    elif in_chans != 3:
        raise OptionError(f"in_chans={in_chans}: {name} takes images of 3 channels")
    if "deploy" in options and "LeViT" in head["type"]:
        head = dict(head, deploy=options["deploy"])
    backbone = dict(dict(backbone, ffn_conv=FFN_CONV, img_size=img_size), **options)
    default_cfg = dict(
        architecture=name,
        num_classes=num_classes,
        input_size=(in_chans, *image_size(img_size)),
        interpolation="bicubic",
        crop_pct=0.875,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    )
    model = CastlingClassifier(backbone, head, neck, num_classes, default_cfg)
    if getter is None:
        return model
    return FeatureGetterNet(model, **{"out_indices": 3, **getter})


def _feature_info(backbone: nn.Module) -> list[dict[str, Any]]:
    """Name, channels and stride of what :meth:`forward_intermediates` can return."""
    if isinstance(backbone, CastlingViT):
        width, stride = backbone.embed_dims, backbone.patch_size
        where = {f"layers.{i}": (width, stride) for i in range(backbone.num_layers)}
    elif isinstance(backbone, CastlingLeViT):
        widths = enumerate(backbone.embed_dims)
        where = {f"stages.{i}": (width, 16 * 2**i) for i, width in widths}
    else:
        stride = backbone.patch_embed.projection.stride[0]
        where = {
            f"blocks.{i}": (backbone.blocks[i].out_dims, stride * 2**scale)
            for i, scale in sorted(backbone.stage_indices.items())
        }
    return [
        dict(module=f"backbone.{name}", num_chs=width, reduction=reduction)
        for name, (width, reduction) in where.items()
    ]


def _parts(name: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any] | None]:
    """Configs of a model's backbone, head and neck."""
    _, family, arch = name.split("_")
    pooling = dict(type="GlobalAveragePooling")
    if family == "vit":
        width = CastlingViT.arch_zoo[arch]["embed_dims"]
        backbone, neck = "CastlingViT", None
        head = dict(type="VisionTransformerClsHead", in_channels=width)
    elif family == "levit":
        width = CastlingLeViT.arch_zoo[arch]["embed_dims"][-1]
        backbone, neck = "CastlingLeViT", pooling
        head = dict(type="mmcastling.LeViTHead", distillation=False, in_channels=width)
    else:
        backbone, neck = "CastlingMViT", pooling
        head = dict(type="LinearClsHead", in_channels=768)
    return dict(type=f"mmcastling.{backbone}", arch=arch), head, neck
