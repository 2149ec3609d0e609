"""Where a token looks: rows of the attention matrices inside a castled model.

Linear attention never forms its matrix, so it is formed here for one query, from the q
and k that a forward pass has computed. The auxiliary branch has no parameters, so its
rows can be shown for a deployed model too.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmcastling.attention import LinearAngularMixer, MaskThreshold, l2_normalize
from mmcastling.attention.functional import linear_factor, normalized_keys
from mmcastling.attention.landmarks import landmark_attention
from mmcastling.errors import OptionError

Grid = tuple[int, int]
OFF = MaskThreshold(1.0)


@dataclass(frozen=True)
class MixerCall:
    """What one attention was given in a forward pass of one image.

    Attributes:
        name: The attention's path in the model.
        mixer: The attention itself.
        q: Queries ``(h, N, d)``.
        k: Keys ``(h, N, d)``.
        v: Values ``(h, N, e)``.
        grid: ``(H, W)``, which the last ``H * W`` of the ``N`` tokens fill row by row.
    """

    name: str
    mixer: LinearAngularMixer
    q: Tensor
    k: Tensor
    v: Tensor
    grid: Grid

    @property
    def extra_tokens(self) -> int:
        """Tokens before the grid, such as a class token."""
        return self.q.shape[1] - math.prod(self.grid)

    def token_at(self, x: float, y: float) -> int:
        """Index of the token at fractions in [0, 1) of the grid's width and height."""
        height, width = self.grid
        row = min(int(y * height), height - 1)
        return self.extra_tokens + row * width + min(int(x * width), width - 1)

    @torch.no_grad()
    def rows(
        self, query: int, threshold: MaskThreshold = OFF, weight: float = 1.0
    ) -> AttentionRows:
        """The attention of a token, with its branch in the state of ``set_mask``."""
        q, k = self.q.float()[:, query : query + 1], self.k.float()  # (h, 1, d), ...
        tokens = k.shape[1]
        softmax = torch.softmax(q @ k.transpose(1, 2) * k.shape[2] ** -0.5, dim=-1)
        softmax = softmax.squeeze(1)  # (h, N)
        angular = self._angular(q, k, query)
        survives = (softmax > threshold.resolve(tokens)) & (not threshold.rejects_all)
        masked = torch.where(survives, weight * softmax, 0.0)
        return AttentionRows(softmax, angular, masked, masked + angular)

    def _angular(self, q: Tensor, k: Tensor, query: int) -> Tensor:
        mixer, tokens = self.mixer, k.shape[1]
        if mixer.form == "landmarks":
            return self._by_landmarks(query)
        center = k.mean(1, keepdim=True) if mixer.center_keys else None
        cosine = l2_normalize(q) @ normalized_keys(k, center).transpose(1, 2)
        cosine = cosine.squeeze(1)
        if mixer.form == "released":
            angular, own = cosine * linear_factor(k, mixer.reference_tokens), 0.5
        else:
            own, even, gain = 0.0, 1.0, 1.0
            if mixer.form == "learned":
                own, even, gain = mixer.own, mixer.even[:, None], mixer.gain[:, None]
            angular = (even + 4 * gain * cosine) / tokens
        angular[:, query] += own
        return angular

    def _by_landmarks(self, query: int) -> Tensor:
        """The row as what the attention makes of values that tell tokens apart."""
        terms, rows = self.mixer.terms(self.grid), []
        values = torch.eye(self.q.shape[1])[None, None]
        for head, (q, k) in enumerate(zip(self.q.float(), self.k.float(), strict=True)):
            balance = tuple(factor[head : head + 1] for factor in terms["balance"])
            sharpness = terms["sharpness"][head : head + 1]
            own = dict(terms, balance=balance, sharpness=sharpness)
            y = landmark_attention(q[None, None], k[None, None], values, **own)
            rows.append(y[0, 0, query])
        return torch.stack(rows)


@dataclass(frozen=True)
class AttentionRows:
    """The weights of one query ``i`` on all ``N`` tokens ``j``, each ``(h, N)``.

    Attributes:
        softmax: ``P_ij``, the row of ``softmax(q k^T / sqrt(d))``. Sums to 1.
        angular: What the deployed model computes without ever forming it, such as
            ``1/2 [i = j] + (1/pi) <q^_i, k^_j>``, where ``q^`` and ``k^`` have length 1
            (:func:`mmcastling.attention.linear_angular_attention` and
            :func:`~mmcastling.attention.landmark_attention` have all forms). May be
            negative.
        masked: The auxiliary branch, ``weight * P_ij`` where ``P_ij > threshold`` and
            zero elsewhere, not renormalized.
        combined: ``masked + angular``: times the values it is what the attention
            yields before normalization and local convolution.
    """

    softmax: Tensor
    angular: Tensor
    masked: Tensor
    combined: Tensor

    def reduce_heads(self, head: int | None) -> AttentionRows:
        """One head's rows ``(N,)``, or with None the mean over heads."""
        heads = self.softmax.shape[0]
        if head is not None and not 0 <= head < heads:
            raise OptionError(
                f"head {head} does not exist: this attention has heads 0 to {heads - 1}"
            )
        return AttentionRows(
            *(x.mean(dim=0) if head is None else x[head] for x in vars(self).values())
        )


@torch.no_grad()
def record_attention(model: nn.Module, image: Tensor, layer: int = -1) -> MixerCall:
    """Run a model's feature extractor and keep what one attention was given.

    Args:
        model: A backbone, or any model with one, in evaluation mode.
        image: One preprocessed image ``(1, C, H, W)``.
        layer: Which of the backbone's linear-angular attentions, deployed or not, by
            depth, negative from the end. Defaults to -1.

    Raises:
        ValueError: If there is none, or its tokens cannot be laid out on the image
            (windows, or a grid that it was not told).
    """
    prefix = "backbone." if hasattr(model, "backbone") else ""
    layers = [
        (f"{prefix}{name}".removesuffix(".mixer"), module)
        for name, module in getattr(model, "backbone", model).named_modules()
        if isinstance(module, LinearAngularMixer)
    ]
    if not layers:
        raise OptionError(
            f"{type(model).__name__} has no castling attention in its backbone: use a "
            "config whose backbone has attention=dict(type='castling'), or castle the "
            "model first"
        )
    if not -len(layers) <= layer < len(layers):
        raise OptionError(
            f"layer {layer} does not exist: the backbone has {len(layers)} castling "
            f"attentions, 0 to {len(layers) - 1}, or -1 to {-len(layers)} from the end"
        )
    name, mixer = layers[layer]
    signature = inspect.signature(mixer.forward)
    calls: list[list[Any]] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = signature.bind(*args, **kwargs).arguments
        calls.append([call.get(name) for name in ("q", "k", "v", "grid")])

    handle = mixer.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        getattr(model, "extract_feat", model)(image)
    finally:
        handle.remove()
    if len(calls) != 1 or calls[0][0].shape[0] != 1:
        raise OptionError(
            f"{name} does not attend over the whole image at once but in "
            f"{sum(q.shape[0] for q, *_ in calls)} parts (windows): its maps cannot be "
            "laid over the image. Choose a backbone with global attention"
        )
    q, k, v, grid = calls[0]
    if grid is None:
        raise OptionError(
            f"{name} was not told the grid of its {q.shape[2]} tokens: castle the "
            "model with grid=(H, W)"
        )
    return MixerCall(name, mixer, q[0], k[0], v[0], tuple(map(int, grid)))
