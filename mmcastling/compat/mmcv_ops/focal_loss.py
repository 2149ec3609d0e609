"""Focal losses: the ops behind ``mmcv.ops.sigmoid_focal_loss`` and ``softmax_...``.

The sigmoid loss is written with log-sigmoid. The compiled op takes the logarithm of
``1 - sigmoid(x)``, which float32 rounds to zero from logits of about 17 on, and clamps
it; up to there both agree, beyond it only this one is right.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from mmcastling.compat.mmcv_ops.widen import widen


def sigmoid_focal_loss_forward(
    input: Tensor,
    target: Tensor,
    weight: Tensor,
    output: Tensor,
    gamma: float,
    alpha: float,
) -> None:
    """Stands in for ``mmcv._ext.sigmoid_focal_loss_forward``.

    With ``p = sigmoid(input)`` the loss of a sample's own class is
    ``-alpha (1 - p)^gamma log(p)``, that of every other class
    ``-(1 - alpha) p^gamma log(1 - p)``.

    Args:
        input: Logits, ``(N, C)``.
        target: Classes, ``(N,)``; one outside ``0..C-1`` means background.
        weight: Factor per target class, ``(C,)``, or an empty tensor. Background, for
            which the compiled op reads past the end of ``weight``, weighs 1.
        output: Overwritten by the losses, ``(N, C)``.
        gamma: Exponent.
        alpha: Weight of the positive term.
    """
    logits = widen(input)
    log_p, log_q = F.logsigmoid(logits), F.logsigmoid(-logits)
    positive = -alpha * torch.exp(gamma * log_q) * log_p
    negative = -(1 - alpha) * torch.exp(gamma * log_p) * log_q
    loss = torch.where(_own_class(target, logits), positive, negative)
    output.copy_(loss * _sample_weight(weight, target, logits))


def sigmoid_focal_loss_backward(
    input: Tensor,
    target: Tensor,
    weight: Tensor,
    grad_input: Tensor,
    gamma: float,
    alpha: float,
) -> None:
    """Stands in for ``mmcv._ext.sigmoid_focal_loss_backward``.

    Args:
        input: Logits, ``(N, C)``.
        target: Classes, ``(N,)``.
        weight: Factor per target class, ``(C,)``, or an empty tensor.
        grad_input: Overwritten by the derivative of each loss by its logit, ``(N, C)``.
        gamma: Exponent.
        alpha: Weight of the positive term.
    """
    logits = widen(input)
    log_p, log_q = F.logsigmoid(logits), F.logsigmoid(-logits)
    p, q = log_p.exp(), log_q.exp()
    positive = alpha * torch.exp(gamma * log_q) * (gamma * p * log_p - q)
    negative = (1 - alpha) * torch.exp(gamma * log_p) * (p - gamma * q * log_q)
    grad = torch.where(_own_class(target, logits), positive, negative)
    grad_input.copy_(grad * _sample_weight(weight, target, logits))


def softmax_focal_loss_forward(
    input: Tensor,
    target: Tensor,
    weight: Tensor,
    output: Tensor,
    gamma: float,
    alpha: float,
) -> None:
    """Stands in for ``mmcv._ext.softmax_focal_loss_forward``.

    With ``p`` the probability of the target class, ``-alpha (1 - p)^gamma log(p)``.

    Args:
        input: Probabilities, that is after the softmax, ``(N, C)``.
        target: Classes, ``(N,)``; a negative one is ignored.
        weight: Factor per target class, ``(C,)``, or an empty tensor.
        output: Overwritten by the losses, ``(N,)``.
        gamma: Exponent.
        alpha: Factor on everything.
    """
    p = _target_probability(input, target)
    loss = -alpha * (1 - p) ** gamma * _safe_log(p)
    loss = loss * _sample_weight(weight, target, p[:, None])[:, 0]
    output.copy_(loss * (target >= 0))


def softmax_focal_loss_backward(
    input: Tensor,
    target: Tensor,
    weight: Tensor,
    buff: Tensor,
    grad_input: Tensor,
    gamma: float,
    alpha: float,
) -> None:
    """Stands in for ``mmcv._ext.softmax_focal_loss_backward``.

    Args:
        input: Probabilities, that is after the softmax, ``(N, C)``.
        target: Classes, ``(N,)``; a negative one is ignored.
        weight: Factor per target class, ``(C,)``, or an empty tensor.
        buff: Overwritten by ``p dL/dp`` of the target class, ``(N,)``.
        grad_input: Overwritten by the derivative of each sample's loss by its logits
            (not its probabilities), ``(N, C)``.
        gamma: Exponent.
        alpha: Factor on everything.
    """
    p = _target_probability(input, target)
    q = (1 - p).clamp(min=torch.finfo(p.dtype).tiny)  # q^(gamma - 1) stays finite
    slope = alpha * (gamma * q ** (gamma - 1) * p * _safe_log(p) - q**gamma)
    slope = slope * _sample_weight(weight, target, p[:, None])[:, 0] * (target >= 0)
    buff.copy_(slope)
    grad_input.copy_(slope[:, None] * (_own_class(target, input).to(p) - widen(input)))


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


def _target_probability(probabilities: Tensor, target: Tensor) -> Tensor:
    """The probability of each sample's target class, ``(N,)``."""
    return widen(probabilities).gather(1, target.clamp(min=0)[:, None])[:, 0]


def _safe_log(p: Tensor) -> Tensor:
    return p.clamp(min=torch.finfo(p.dtype).tiny).log()
