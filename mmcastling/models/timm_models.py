"""Our classifiers in timm's registry: ``timm.create_model('castling_vit_small')``.

:mod:`mmcastling.compat.registrations` names them there::

    import mmcastling, timm
    model = timm.create_model('castling_vit_small', num_classes=10)

They are mmpretrain's ``ImageClassifier`` with timm's interface: what the commands of
``tools/`` train and convert loads by ``checkpoint_path`` (``deploy=True`` for a
converted checkpoint), and ``timm.utils.reparameterize_model`` deploys them.
"""

from __future__ import annotations

from typing import Any

from mmengine.registry import DefaultScope
from mmpretrain.models.classifiers import ImageClassifier
from torch import Tensor, nn

from mmcastling.errors import OptionError
from mmcastling.models import CastlingLeViT, CastlingViT
from mmcastling.models.common import image_size
from mmcastling.registry import MODELS

# The depthwise convolution in the MLPs with which costs meet the published ones.
FFN_CONV = 5
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
        self.default_cfg = self.pretrained_cfg = default_cfg

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
                self.head = MODELS.build(
                    dict(self._head_config, num_classes=num_classes)
                )

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
) -> CastlingClassifier:
    """Build a classifier by its name in timm, as ``timm.create_model`` asks for it.

    Takes the usual arguments of timm's models, of which those about pretrained weights
    have no effect, and as ``options`` those of the backbone.

    Raises:
        OptionError: If the family does not offer what is asked for.
    """
    backbone, head, neck = _parts(name)
    if pretrained:
        raise OptionError(
            f"{name} has no pretrained weights: give checkpoint_path=FILE, or castle "
            "one of timm's models with mmcastling.castle"
        )
    if options.pop("features_only", False):
        raise OptionError(
            f"{name} offers no features_only: build the backbone with out_indices, "
            f"mmcastling.models.{backbone['type'].split('.')[1]}"
        )
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
    return CastlingClassifier(backbone, head, neck, num_classes, default_cfg)


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
