"""Focal loss: the ops behind ``mmcv.ops.sigmoid_focal_loss``.

``input`` is ``(N, C)``, ``target`` the class of each of N samples, ``weight`` a factor
per class, ``(C,)``, or an empty tensor; ``output`` and ``grad_input``, shaped as what
they are of, are overwritten.

It is written with log-sigmoid. The compiled op takes the logarithm of
``1 - sigmoid(x)``, which float32 rounds to zero from logits of about 17 on, and clamps
it; up to there both agree, beyond it only this one is right.
"""

from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn import functional as F

from mmcastling.compat.mmcv_ops.calling import register_op, widen


@register_op("input target weight output gamma alpha")
def sigmoid_focal_loss_forward(op: SimpleNamespace) -> None:
    """Loss of each class, ``(N, C)``, of logits.

    With ``p = sigmoid(input)`` the loss of a sample's own class is
    ``-alpha (1 - p)^gamma log(p)``, that of every other class
    ``-(1 - alpha) p^gamma log(1 - p)``. A target outside ``0..C-1`` means background
    and weighs 1, where the compiled op reads past the end of ``weight``.
    """
    logits = widen(op.input)
    log_p, log_q = F.logsigmoid(logits), F.logsigmoid(-logits)
    positive = -op.alpha * torch.exp(op.gamma * log_q) * log_p
    negative = -(1 - op.alpha) * torch.exp(op.gamma * log_p) * log_q
    loss = torch.where(_own_class(op.target, logits), positive, negative)
    op.output.copy_(loss * _sample_weight(op.weight, op.target, logits))


@register_op("input target weight grad_input gamma alpha")
def sigmoid_focal_loss_backward(op: SimpleNamespace) -> None:
    """Derivative of each loss by its logit, ``(N, C)``."""
    alpha, gamma, logits = op.alpha, op.gamma, widen(op.input)
    log_p, log_q = F.logsigmoid(logits), F.logsigmoid(-logits)
    p, q = log_p.exp(), log_q.exp()
    positive = alpha * torch.exp(gamma * log_q) * (gamma * p * log_p - q)
    negative = (1 - alpha) * torch.exp(gamma * log_p) * (p - gamma * q * log_q)
    grad = torch.where(_own_class(op.target, logits), positive, negative)
    op.grad_input.copy_(grad * _sample_weight(op.weight, op.target, logits))


def _own_class(target: Tensor, like: Tensor) -> Tensor:
    """Where the class is the sample's target, bool ``(N, C)``."""
    return target[:, None] == torch.arange(like.shape[1], device=like.device)


def _sample_weight(weight: Tensor, target: Tensor, like: Tensor) -> Tensor:
    """The factor of each sample, ``(N, 1)``."""
    if weight.numel() == 0:
        return like.new_ones(len(like), 1)
    inside = (target >= 0) & (target < len(weight))
    picked = weight.to(like)[target.where(inside, 0)]
    return picked.where(inside, 1)[:, None]
