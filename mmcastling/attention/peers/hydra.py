"""Hydra attention (Bolya et al., 2022): as many heads as channels."""

from __future__ import annotations

from torch import Tensor

from mmcastling.attention.autocast import in_full_precision
from mmcastling.attention.functional import l2_normalize
from mmcastling.attention.local_conv import merge_heads, split_heads
from mmcastling.attention.mixer import TokenMixer
from mmcastling.errors import OptionError


@in_full_precision
def hydra_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``q^ * sum_j (k^_j * v_j)``, channel by channel, in O(N) and O(C).

    The cosine kernel normalises a token over all its channels, before they become
    heads of one channel each (over one channel it would only leave the sign). Queries
    ``(..., N, C)``, keys and values ``(..., M, C)`` give ``(..., N, C)``; float32 for
    half-precision inputs.
    """
    return l2_normalize(q) * (l2_normalize(k) * v).sum(dim=-2, keepdim=True)


class HydraMixer(TokenMixer):
    """Hydra attention as a mixer; ``num_heads`` only shapes its input and output.

    Arguments as in :class:`TokenMixer`.
    """

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.shape[-1] != v.shape[-1]:
            raise OptionError(
                f"hydra attention multiplies queries with values channel by channel: "
                f"they need as many channels per head, not {q.shape[-1]} and "
                f"{v.shape[-1]}"
            )
        y = hydra_attention(*map(merge_heads, (q, k, v)))
        return split_heads(y, v.shape[1])
