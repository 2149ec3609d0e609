"""The grid of tokens, as the layer that made the tokens saw it.

A third-party attention is given tokens alone, and 8 x 32 of them look like 16 x 16. So
a hook on the patch embedding notes the size of every map that passes, and the castled
attentions behind it read the note.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from mmcastling.attention.local_conv import Grid
from mmcastling.errors import OptionError

# The layers that put out the maps of tokens.
_MAKE_MAPS = (nn.Conv2d, nn.Unfold)
# Grids by number of tokens are forgotten beyond so many.
_REMEMBERED = 4096


class GridSource:
    """Notes the grid of the tokens that pass now; a forward hook, and no module.

    The hook and the attentions that read hold the same object, and go on to after
    ``copy.deepcopy`` and pickling, without what has been noted. Threads do not meet
    each other's grids. A block that checkpointing runs again in the backward pass finds
    the grid of as many tokens, and refuses to choose where there were two since the
    last backward pass.
    """

    def __init__(self) -> None:
        self._last: Grid | None = None
        self._of_thread: dict[int, Grid] = {}
        self._of_count: dict[int, Grid] = {}
        self._recorded: dict[int, set[Grid]] = {}  # since the last backward pass
        self._was_replayed = False

    def __call__(
        self, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor | None = None
    ) -> None:
        """Note the grid of a layer's output ``(B, C, H, W)``, or input without one.

        That is ``(B, H, W, C)``.
        """
        if output is None and isinstance(args[0], Tensor):
            self.note((args[0].shape[1], args[0].shape[2]))
        elif output is None:  # recorded by torch.fx, it has no sizes
            return
        elif isinstance(layer, nn.Unfold):
            self.note(_unfolded(layer, args[0]))
        else:
            self.note((output.shape[-2], output.shape[-1]))

    def note(self, grid: Grid) -> None:
        """Note the grid ``(H, W)`` of the tokens that follow."""
        self._last = grid
        if torch.compiler.is_compiling():  # which threads are none of
            self._of_thread = {}
            return
        self._of_thread[threading.get_ident()] = grid
        if not torch.jit.is_tracing():
            count = grid[0] * grid[1]
            if len(self._of_count) >= _REMEMBERED:
                self._of_count = {}
            self._of_count[count] = grid
            if torch.is_grad_enabled() and not _in_backward():
                if self._was_replayed or len(self._recorded) >= _REMEMBERED:
                    self._recorded, self._was_replayed = {}, False
                self._recorded.setdefault(count, set()).add(grid)

    def find(self, num_tokens: int) -> Grid | None:
        """The grid noted last, or None; whether it fits is the caller's to check.

        Raises:
            ValueError: If a block that runs again may have had either of two.
        """
        if torch.compiler.is_compiling():
            return self._last
        if _in_backward():
            self._was_replayed = True
            grids = sorted(self._recorded.get(num_tokens, ()))
            if len(grids) > 1:
                raise OptionError(
                    f"a block that is checkpointed runs again on {num_tokens} tokens, "
                    f"which were on grids of {grids} since the last backward pass: "
                    "call backward() after each image, or give images one size"
                )
            return self._of_count.get(num_tokens, self._last)
        return self._of_thread.get(threading.get_ident(), self._last)

    def attach(self, layers: Sequence[nn.Module]) -> None:
        """Listen to layers: to the input of those that put out no maps."""
        for layer in layers:
            if not isinstance(layer, _MAKE_MAPS):
                layer.register_forward_pre_hook(self)
            elif self not in layer._forward_hooks.values():
                layer.register_forward_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        return vars(GridSource())


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


@contextmanager
def noted_by(castled: nn.Module, passing: nn.Module) -> Iterator[None]:
    """Let attentions of one model know the grids of images that pass through another.

    Both have the same names: attentions of the one are run with tokens of the other.
    """
    others, handles = dict(passing.named_modules()), []
    for name, layer in castled.named_modules():
        for hook in layer._forward_hooks.values():
            if isinstance(hook, GridSource):
                handles.append(others[name].register_forward_hook(hook))
        for hook in layer._forward_pre_hooks.values():
            if isinstance(hook, GridSource):
                handles.append(others[name].register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def layers_with_maps(path: Sequence[nn.Module]) -> list[nn.Module]:
    """The layers whose output is the map of an attention's tokens.

    The last convolution before the attention, in the nearest of its holders that has
    one, and all of ``nn.Unfold`` there.

    Args:
        path: The attention and the modules that hold it, the nearest first.
    """
    for inner, outer in pairwise(path):
        found: list[nn.Module] = []
        for child in outer.children():
            if child is inner:
                break
            found += [m for m in child.modules() if isinstance(m, _MAKE_MAPS)]
        if found:
            return [m for m in found if isinstance(m, nn.Unfold) or m is found[-1]]
    return []


def _unfolded(layer: nn.Unfold, x: Tensor) -> Grid:
    """The grid of what ``nn.Unfold`` makes of ``(B, C, H, W)``."""
    sizes = []
    for axis in (0, 1):
        kernel, dilation, padding, stride = (
            option if isinstance(option, int) else option[axis]
            for option in (
                *(layer.kernel_size, layer.dilation, layer.padding, layer.stride),
            )
        )
        reach = dilation * (kernel - 1) + 1
        sizes.append((x.shape[2 + axis] + 2 * padding - reach) // stride + 1)
    return sizes[0], sizes[1]
