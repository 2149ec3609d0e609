"""Multiply-accumulate operations (MACs) and parameters of a model.

Counted are matrix products (linear layers, einsum, batched products), convolutions and
attention, fused attention included; a product of ``(m, k)`` and ``(k, n)`` is
``m * n * k`` MACs. Not counted are additions, norms, activations, softmax, resizing,
RoIAlign and NMS, as is usual in the tables of this field, and mmcv's compiled ops,
which torch cannot see.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from mmcastling.analysis.data_sample import (
    Instances,
    check_size,
    input_channels,
    whole_pass,
)

SELF = "(self)"
"""Key in ``by_module`` for what the model computes outside its children."""


@dataclass(frozen=True)
class ComplexityReport:
    """Cost of one forward pass.

    Attributes:
        macs: Multiply-accumulate operations of the whole batch.
        params: Parameters, frozen ones too, shared ones once.
        input_shape: Shape of the (first) input tensor.
        by_module: MACs by top-level child, and by ``'(self)'`` what runs outside of
            them; children that cost nothing are left out. They add up to ``macs``.
    """

    macs: int
    params: int
    input_shape: tuple[int, ...]
    by_module: dict[str, int]


def count_macs(
    model: nn.Module,
    inputs: Tensor | tuple[Any, ...],
    parts: Mapping[str, nn.Module] | None = None,
) -> ComplexityReport:
    """Count the MACs of one forward pass in eval mode, without gradients.

    ``training`` and ``requires_grad`` are left as they were found, one by one. Inputs
    are one tensor, or a tuple of positional arguments. ``parts`` are the modules to
    report by name, instead of the top-level children.
    """
    args = (inputs,) if isinstance(inputs, Tensor) else inputs
    shapes = [tuple(arg.shape) for arg in args if isinstance(arg, Tensor)]
    with _eval_mode(model):
        macs = _count(model, lambda model: model(*args), parts)
        return _report(model, macs, shapes[0] if shapes else ())


def count_model_macs(model: nn.Module, shape: tuple[int, int]) -> ComplexityReport:
    """Count the MACs of any OpenMMLab model, or plain module, for one image.

    It runs on ``(1, C, H, W)``, in eval mode and without gradients. What counts is:

    - a plain module or backbone: its forward;
    - an mmpretrain classifier, an mmseg segmentor or a one-stage mmdet detector:
      backbone, neck and head (MMEngine's ``mode='tensor'``), without auxiliary
      heads, and without what only decoding computes (PointRend's refinement);
    - a two-stage mmdet detector: backbone, neck, RPN, the box heads on as many
      proposals as the test config lets through (``rpn.max_per_img``, usually
      1,000) and the mask heads on as many boxes as it lets out
      (``rcnn.max_per_img``, usually 100). The proposals are made up, since how many
      survive NMS depends on weights and image; the count depends on neither.

    The size is that of the image as the network sees it, padding included.
    """
    check_size(shape)
    while isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        model = model.module
    reference = next(model.parameters(), torch.empty(0))
    # Ones, since zeros meet normalizations at their singular point.
    image = reference.new_ones((1, input_channels(model), *shape))
    if not hasattr(model, "data_preprocessor"):  # which all models of MMEngine have
        return count_macs(model, image)
    run = whole_pass(image)
    with _eval_mode(model):
        if _max_proposals(model) is None:
            macs = _count(model, run)
        else:
            macs = _count_two_stage(model, run, image)
        return _report(model, macs, tuple(image.shape))


def _extra_formulas() -> dict[Any, Callable[..., int]]:
    """FLOPs of products that torch's counter takes for free, from the shapes."""
    aten = torch.ops.aten

    def attention(q, k, v, *_, **__) -> int:
        return sdpa_flop_count(q, k, v)

    def deform_conv2d(x, weight, *_, out_shape, **__) -> int:
        return 2 * prod(out_shape) * prod(weight[1:])

    formulas = {
        aten.mv: lambda matrix, *_, **__: 2 * prod(matrix),
        aten.addmv: lambda bias, matrix, *_, **__: 2 * prod(matrix),
        aten.dot: lambda vector, *_, **__: 2 * prod(vector),
        aten.vdot: lambda vector, *_, **__: 2 * prod(vector),
        # Unknown to the counter of torch 2.14.
        aten._scaled_dot_product_flash_attention_for_cpu: attention,
    }
    if hasattr(torch.ops.torchvision, "deform_conv2d"):  # where it is imported
        formulas[torch.ops.torchvision.deform_conv2d] = deform_conv2d
    return formulas


def _report(
    model: nn.Module, macs: Counter[str], input_shape: tuple[int, ...]
) -> ComplexityReport:
    return ComplexityReport(
        macs=sum(macs.values()),
        params=sum(p.numel() for p in model.parameters()),
        input_shape=input_shape,
        by_module={name: count for name, count in macs.items() if count},
    )


def _count(
    model: nn.Module,
    run: Callable[[nn.Module], Any],
    parts: Mapping[str, nn.Module] | None = None,
) -> Counter[str]:
    """MACs by part, or by top-level child, of one call of ``run(model)``."""
    flops: Counter[str] = Counter()
    counter = FlopCounterMode(display=False, custom_mapping=_extra_formulas())
    parts = dict(model.named_children()) if parts is None else parts
    children = _attribute_to_parts(parts, counter, flops)
    with ExitStack() as stack, torch.no_grad(), counter, children:
        # The fused path of nn.MultiheadAttention is a single op that counts as nothing.
        fused = torch.backends.mha.get_fastpath_enabled()
        stack.callback(torch.backends.mha.set_fastpath_enabled, fused)
        torch.backends.mha.set_fastpath_enabled(False)
        run(model)
    flops[SELF] = counter.get_total_flops() - sum(flops.values())
    # Every formula counts a multiplication and an addition per MAC.
    return Counter({name: count // 2 for name, count in flops.items()})


@contextmanager
def _attribute_to_parts(
    parts: Mapping[str, nn.Module], counter: FlopCounterMode, flops: Counter[str]
) -> Iterator[None]:
    """Book what each of some modules computes in ``flops``.

    Detectors and segmentors call ``head.forward(x)``, past all hooks.
    """
    running = False

    def wrap(name: str, forward: Callable) -> Callable:
        def wrapped(*args, **kwargs):
            nonlocal running
            if running:  # a child that is called by another one belongs to that one
                return forward(*args, **kwargs)
            running, before = True, counter.get_total_flops()
            try:
                return forward(*args, **kwargs)
            finally:
                running = False
                flops[name] += counter.get_total_flops() - before

        return wrapped

    with ExitStack() as stack:
        for name, child in parts.items():
            for module in _called_modules(child):
                wrapped = wrap(name, module.forward)
                stack.enter_context(patch.object(module, "forward", wrapped))
        yield


def _called_modules(module: nn.Module) -> Iterator[nn.Module]:
    """The module, or what a list of modules holds: the list itself is never called."""
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        for child in module.children():
            yield from _called_modules(child)
    else:
        yield module


def _max_proposals(model: nn.Module) -> int | None:
    """Proposals a two-stage detector passes on; None for any other model.

    Proposals that are parameters (Sparse R-CNN) are no setting, but a fixed number.
    """
    test_cfg = getattr(getattr(model, "rpn_head", None), "test_cfg", None)
    two_stage = test_cfg is not None and hasattr(model, "roi_head")
    return test_cfg.get("max_per_img") if two_stage else None


def _count_two_stage(
    model: nn.Module, run: Callable[[nn.Module], Any], image: Tensor
) -> Counter[str]:
    """MACs with a fixed number of proposals and of masks.

    In ``mode='tensor'`` a standard RoI head computes masks for the first 100 proposals
    and a cascade for all of them, neither of which is what happens at test time.
    So masks are counted apart, as what one of them adds, times their number.
    """
    roi_head = model.roi_head
    extract_feat, features = model.extract_feat, []

    def extract_once(*args, **kwargs):
        # The later passes are about the heads: no need to run the backbone again.
        if not features:
            features.append(extract_feat(*args, **kwargs))
        return features[0]

    box = image.new_tensor([[0, 0, image.shape[3], image.shape[2]]])

    def count(num_proposals: int, without: dict[str, None]) -> Counter[str]:
        proposals = Instances(bboxes=box.repeat(num_proposals, 1))
        with (
            patch.object(model, "extract_feat", extract_once),
            patch.object(
                model.rpn_head, "predict_by_feat", lambda *_, **__: [proposals]
            ),
            patch.dict(roi_head._modules, without),
        ):
            return _count(model, run)

    if not getattr(roi_head, "with_mask", False):
        return count(_max_proposals(model), {})
    no_masks = {"mask_head": None}
    macs = count(_max_proposals(model), no_masks)
    with_one, without = count(1, {}), count(1, no_masks)
    for name in with_one:
        one_mask = with_one[name] - without[name]
        macs[name] += one_mask * roi_head.test_cfg["max_per_img"]
    return macs


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients, and afterwards everybody's own flag again.

    ``no_grad`` alone is not enough: torch's module tracker hooks every argument that
    requires a gradient, and fails on query embeddings, which are split on their way.
    """
    training = [(module, module.training) for module in model.modules()]
    requires_grad = [(param, param.requires_grad) for param in model.parameters()]
    model.eval()
    model.requires_grad_(False)
    try:
        yield
    finally:
        for module, flag in training:
            module.training = flag
        for param, flag in requires_grad:
            param.requires_grad_(flag)
