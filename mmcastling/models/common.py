"""What our backbones share: checks of their options, modes, deployment."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from mmengine.model import initialize
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from mmcastling.attention.deploying import deploying
from mmcastling.attention.local_conv import Grid
from mmcastling.errors import OptionError
from mmcastling.models.folding import fold_for_inference
from mmcastling.models.pretrained import check_pretrained, pretrained_cfgs

logger = logging.getLogger("mmcastling")

TokensAt = dict[int, tuple[Tensor, Grid]]
"""Tokens ``(B, N, C)``, of which the last fill a grid, by the index of an output."""

Backbone = TypeVar("Backbone", bound="CastlingBackbone")


class CastlingBackbone:
    """Modes, weights and deployment, mixed into a backbone before mmpretrain's class.

    Expects the attributes below, and ``_freeze_stages()``, which puts what is frozen in
    evaluation and is called whenever training begins.
    """

    deploy: bool
    with_cp: bool
    num_layers: int

    def init_weights(self) -> None:
        """Initialise, and load what ``init_cfg`` names.

        Raises:
            CheckpointError: If ``init_cfg=dict(type='Pretrained', ...)`` names a file
                with less than half of the backbone's parameters, or of those of its
                attentions.
        """
        cfgs = [] if self.is_init else list(pretrained_cfgs(self.init_cfg))
        for cfg in cfgs:
            check_pretrained(self, cfg["checkpoint"], cfg.get("prefix"))
        super().init_weights()
        if cfgs and not isinstance(self.init_cfg, dict):
            # mmpretrain draws position embeddings anew after it has loaded a list's.
            initialize(self, cfgs)

    def _unused(self) -> list[nn.Module]:
        """What lies behind the last output, and is not run."""
        raise NotImplementedError

    def _freeze_unused(self) -> None:
        """Take it out of training: it has no gradient, which distributed training
        would wait for."""
        if unused := self._unused():
            freeze(unused)
            logger.info(
                "%s: out_indices %s need no layer behind them; %d modules are neither "
                "run nor trained",
                *(type(self).__name__, list(self.out_indices), len(unused)),
            )

    def switch_to_deploy(self) -> None:
        """Remove the auxiliary branch of every attention, and fold layers together.

        See :func:`~mmcastling.models.folding.fold_for_inference`. Idempotent.
        """
        with deploying(self):
            for module in list(self.modules()):
                switch = getattr(module, "switch_to_deploy", None)
                if module is not self and callable(switch):
                    switch()
            fold_for_inference(self)
        self.deploy = True

    def train(self: Backbone, mode: bool = True) -> Backbone:
        """Set the mode; frozen stages stay in evaluation. Returns the backbone."""
        super().train(mode)
        if mode:
            self._freeze_stages()
        return self

    def get_layer_depth(self, param_name: str, prefix: str = "") -> tuple[int, int]:
        """The layer of a parameter and the number of layers, for learning-rate decay.

        As mmpretrain's: 0 is what comes before the layers, the last are norms of the
        outputs and whatever ``prefix`` does not begin.
        """
        last = self.num_layers + 1
        if not param_name.startswith(prefix):
            return last, last + 1
        part, *place = param_name[len(prefix) :].split(".")
        if part in ("patch_embed", "pos_embed", "cls_token", "dist_token"):
            return 0, last + 1
        if part in ("layers", "blocks", "stages"):
            return 1 + self._layer_index(*place), last + 1
        return last, last + 1

    def _layer_index(self, index: str, *inside: str) -> int:
        """The layer that names of parameters number so."""
        return int(index)

    def _run(self, layer: nn.Module, x: Tensor, *args: Any) -> Any:
        """Call a layer; ``with_cp`` recomputes it in the backward pass."""
        if not (self.with_cp and x.requires_grad):
            return layer(x, *args)
        if any(isinstance(module, _BatchNorm) for module in layer.modules()):
            return _checkpoint_once_counted(layer, x, *args)
        return checkpoint(layer, x, *args, use_reentrant=False)


@torch.compiler.disable(recursive=False)  # it knows no context_fn
def _checkpoint_once_counted(layer: nn.Module, x: Tensor, *args: Any) -> Any:
    def contexts() -> tuple[Any, Any]:
        return contextlib.nullcontext(), _kept_statistics(layer)

    return checkpoint(layer, x, *args, use_reentrant=False, context_fn=contexts)


@contextlib.contextmanager
def _kept_statistics(layer: nn.Module) -> Iterator[None]:
    """Keep batch norms from counting a batch twice, which recomputing would."""
    buffers = [
        buffer
        for module in layer.modules()
        if isinstance(module, _BatchNorm) and module.training
        for buffer in module.buffers(recurse=False)
    ]
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)


def freeze(modules: Iterable[nn.Module]) -> None:
    """Put modules in evaluation and take their parameters out of training."""
    for module in modules:
        module.eval()
        for parameter in module.parameters():
            parameter.requires_grad = False


def check_arch(
    arch: str | Mapping[str, Any],
    zoo: Mapping[str, Mapping[str, Any]],
    needed: set[str],
) -> dict[str, Any]:
    """Look an architecture up in ``zoo``, or check the keys of one that is given."""
    if isinstance(arch, str):
        if arch.lower() not in zoo:
            raise OptionError(
                f"arch {arch!r} is not known: choose one of {list(zoo)}, or a dict "
                f"with {sorted(needed)}"
            )
        return dict(zoo[arch.lower()])
    if missing := needed - set(arch):
        raise OptionError(f"arch {arch!r} lacks {sorted(missing)}")
    return dict(arch)


def check_ffn_conv(ffn_conv: int) -> None:
    if ffn_conv not in (0, 3, 5, 7):
        raise OptionError(
            f"ffn_conv {ffn_conv!r} must be 0 (no convolution), 3, 5 or 7"
        )


def check_frozen_stages(frozen_stages: int, num_stages: int) -> None:
    if not -1 <= frozen_stages <= num_stages:
        raise OptionError(
            f"frozen_stages {frozen_stages!r} must be -1 (nothing frozen), 0 (the "
            f"stem) or up to {num_stages} (stem and stages)"
        )


def check_out_indices(
    out_indices: int | Sequence[int], count: int, what: str
) -> list[int]:
    """Resolve negative indices of ``count`` things; sort, drop what is named twice."""
    indices = [out_indices] if isinstance(out_indices, int) else list(out_indices)
    if not indices:
        raise OptionError(f"out_indices {out_indices!r} name no {what} to return")
    for index in indices:
        if not -count <= index < count:
            raise OptionError(
                f"out_indices {out_indices!r}: {index} is not a {what}; there are "
                f"{count}, numbered 0 to {count - 1} or -{count} to -1"
            )
    return sorted({index % count for index in indices})


def image_size(img_size: int | Sequence[int]) -> Grid:
    """``(H, W)`` of a size that is given as one number or two, or ValueError."""
    size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    if len(size) != 2 or any(not isinstance(n, int) or n < 1 for n in size):
        raise OptionError(f"img_size {img_size!r} must be a number of pixels or (H, W)")
    return size


def check_image(x: Tensor, smallest: int, what: str) -> None:
    """Raise ValueError if images ``(B, C, H, W)`` are smaller than ``what``."""
    height, width = x.shape[-2:]
    if min(height, width) < smallest:
        raise OptionError(
            f"image of {height}x{width} pixels is smaller than {what} of "
            f"{smallest}x{smallest}; enlarge it"
        )
