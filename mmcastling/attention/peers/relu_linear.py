"""ReLU linear attention, as EfficientViT has it (Cai et al., ICCV 2023)."""

from __future__ import annotations

from torch import Tensor

from mmcastling.attention.functional import kernel_attention
from mmcastling.attention.mixer import TokenMixer


class ReLULinearMixer(TokenMixer):
    """Normalised attention with the kernel ``ReLU(q) ReLU(k)^T``.

    The multi-scale aggregation of EfficientViT is no part of it; ``local_conv`` can
    stand in. Arguments as in :class:`TokenMixer`.
    """

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return kernel_attention(q.relu(), k.relu(), v)
