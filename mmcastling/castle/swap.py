"""``castle``: find the attentions that adapters know, swap them, report."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, TypeVar

from torch import Tensor, nn

from mmcastling.attention import TokenMixer, is_castled
from mmcastling.castle.adapter_registry import CannotCastle, find_adapter
from mmcastling.castle.castled_attention import MixerBuilder
from mmcastling.castle.grid import GridSource, layers_with_maps
from mmcastling.castle.hooks import (
    check_own_weights,
    drop_on_load,
    lost_hooks,
    take_hooks,
)
from mmcastling.castle.optimizers import optimizers_of
from mmcastling.castle.report import Castled, CastleReport
from mmcastling.errors import OptionError

Model = TypeVar("Model", bound=nn.Module)
Predicate = Callable[[str, nn.Module], bool]

logger = logging.getLogger("mmcastling")

AUTOMATIC_KEEP: list[Callable[..., list[str]]] = []
"""What chooses for ``keep='auto'``; it stands above, and puts itself here."""


class NothingToCastle(OptionError):
    """Raised where a model has no attention that castle can swap.

    Args:
        model: The model.
        left_alone: The reason for each attention that is known, by name.
    """

    def __init__(self, model: nn.Module, left_alone: dict[str, str]) -> None:
        unknown = _without_adapter(model, list(left_alone))
        self.left_alone = {**left_alone, **unknown}
        modules = dict(model.named_modules())
        kinds = {name: type(modules[name]).__name__ for name in unknown}
        said = ", ".join(f"{n} ({what})" for n, what in {**left_alone, **kinds}.items())
        advice = ". Make a class known with mmcastling.register_adapter"
        super().__init__(
            f"castle knows no attention in {type(model).__name__} that it can swap. "
            f"Modules that resemble one: {said or 'none'}"
            + (advice if kinds or not said else "")
        )


_LIKE_ATTENTION = re.compile(r"attention|attn|msa", re.IGNORECASE)


@dataclass
class _Found:
    """An attention of the model that has an adapter."""

    name: str
    module: nn.Module
    adapt: Callable[..., nn.Module]
    ancestors: list[nn.Module]  # the nearest first
    stage: int = 0


def castle(
    model: Model,
    stages: Iterable[int] | None = None,
    predicate: Predicate | None = None,
    *,
    keep: Iterable[int | str] | str = (),
    budget: int | float = 2,
    images: Iterable[Tensor] = (),
    grid: tuple[int, int] | None = None,
    return_report: bool = False,
    **attention: Any,
) -> Model | tuple[Model, CastleReport]:
    """Swap the softmax attentions of a model for castling ones, in place.

    Knows the attentions of mmpretrain's, mmdet's and mmseg's vision transformers (plain
    ones, BEiT, EVA-02, SAM, Swin, MViT, LeViT, T2T-ViT, TNT), of timm's families
    and of torchvision's ViT; others are made known by :func:`register_adapter`.
    All weights that keep a meaning are kept, as the same parameters. What was done is
    logged by the logger ``mmcastling``, as a warning where something of the original (a
    relative position bias, say) is lost. On an error the model is left as it was.

    Args:
        model: Any module that holds attentions: a backbone, classifier, detector.
        stages: Which stages to castle, by index, negative ones from the end. A stage is
            what the attentions' names first differ in (``layers.0``, ``layers.1``),
            counted in order. Defaults to None (all).
        predicate: Called as ``predicate(name, attention)``; says whether to castle it.
            Defaults to None (all).
        keep: Which attentions stay softmax: by index among all that castle knows in
            the model, in its order, negative ones from the end; or by name, or that of
            a block that holds them; or ``'auto'``, those whose castling changes the
            features most for what it saves, see :func:`mmcastling.scan`. Defaults to
            none.
        budget: With ``keep='auto'``, how many may stay, or the share of the saved time
            that must remain, as a float. Defaults to 2.
        images: With ``keep='auto'``, batches ``(B, 3, H, W)`` of the size of use, on
            which features are compared and attentions timed. Defaults to none.
        grid: ``(H, W)`` of the tokens, for a convolution on the grid. Defaults to None:
            that of the map which the tokens come from, at any size.
        return_report: Also return what was done. Defaults to False.
        **attention: Options of the attention: ``type`` (``'castling'`` unless given)
            and its arguments, such as ``local_conv`` and ``mask_threshold``, which
            default to :data:`RECOMMENDED`; with ``deploy=True`` in its deployed form,
            to load a deployed checkpoint.

    Returns:
        The model, or with ``return_report`` a pair of it and a :class:`CastleReport`.

    Raises:
        ValueError: If the model has been castled or deployed already, nothing in it is
            known or selected, or an option is not known or has a bad value.
    """
    if grid is not None and not _is_pair(grid):
        raise OptionError(f"grid={grid!r}: expected (H, W), two numbers above 0")
    if stages is not None and not isinstance(stages, Iterable):
        raise OptionError(f"stages={stages!r}: expected a list, such as [{stages!r}]")
    _check_not_castled(model)
    found, declined = _find(model)
    if not found:
        raise NothingToCastle(model, declined)
    if keep == "auto":
        images = list(images)
        if not images:
            raise OptionError("keep='auto' needs images, batches (B, 3, H, W) to scan")
        options = dict(attention, stages=stages, predicate=predicate, grid=grid)
        keep = AUTOMATIC_KEEP[0](model, images, budget, **options)
    unchosen = _unchosen(found, stages, predicate, keep)

    options = {"type": "castling", **attention}
    deploy = bool(options.pop("deploy", False))
    report = CastleReport(type=options["type"], left_alone=declined)
    swaps: dict[int, nn.Module] = {}
    sources: dict[int, GridSource] = {}
    listening: list[MixerBuilder] = []
    shared: list[tuple[type[nn.Module], nn.Module, str]] = []
    for item in found:
        if item.name in unchosen:
            report.left_alone[item.name] = unchosen[item.name]
            continue
        extra_tokens = _extra_tokens_of(item.ancestors)
        maps = layers_with_maps([item.module, *item.ancestors])
        source = sources.setdefault(id(maps[-1]), GridSource()) if maps else None
        build = MixerBuilder(
            *(item.module, options, deploy, grid, source, maps),
            extra_tokens=extra_tokens,
            holders=item.ancestors,
        )
        try:
            check_own_weights(item.module)
            new = item.adapt(item.module, build)
        except CannotCastle as reason:
            report.left_alone[item.name] = str(reason)
            continue
        new.training = item.module.training
        swaps[id(item.module)] = new
        if any(getattr(part, "grid_source", None) for part in new.modules()):
            listening.append(build)
        shared += [(type(item.module), *where) for where in build.shared]
        for name in lost_hooks(item.module, new):
            build.note(f"hooks on {name} are gone with it")
        report.castled.append(
            Castled(item.name, type(item.module).__name__, item.stage, (*build.notes,))
        )
    if not swaps:
        raise NothingToCastle(model, report.left_alone)

    optimizers = optimizers_of(model)
    before = model.state_dict(keep_vars=True)
    for item in found:
        if id(item.module) in swaps:
            take_hooks(item.module, swaps[id(item.module)])
    for holder in list(model.modules()):
        for name, child in holder._modules.items():
            if id(child) in swaps:
                setattr(holder, name, swaps[id(child)])
    for build in listening:
        build.grid_source.attach(build.maps)
    for kind, holder, name in shared:
        if not any(type(module) is kind for module in holder.modules()):
            setattr(holder, name, None)  # it would get no gradient
    after = model.state_dict(keep_vars=True)
    kept = {id(t) for t in before.values()} & {id(t) for t in after.values()}
    report.dropped = [name for name, t in before.items() if id(t) not in kept]
    drop_on_load(model, report.dropped)
    report.new = [name for name, t in after.items() if id(t) not in kept]
    report.num_kept = len(kept)
    gone = [item.name for item in report.castled]
    report.left_alone.update(_without_adapter(model, [*gone, *report.left_alone]))

    if optimizers and any(isinstance(after[name], nn.Parameter) for name in report.new):
        logger.warning(
            "castle has added parameters that an optimizer built before does not "
            "train (%s): build it after castling, or call its add_param_group",
            ", ".join(sorted({type(optimizer).__name__ for optimizer in optimizers})),
        )
    level = logging.WARNING if report.lossy else logging.INFO
    logger.log(level, "castled %s:\n%s", type(model).__name__, report)
    return (model, report) if return_report else model


def _is_pair(grid: Any) -> bool:
    return (
        isinstance(grid, (tuple, list))
        and len(grid) == 2
        and all(isinstance(side, int) and side > 0 for side in grid)
    )


def _check_not_castled(model: nn.Module) -> None:
    for name, module in model.named_modules():
        what = name or type(model).__name__
        if getattr(module, "deploy", False) is True:
            raise OptionError(
                f"{what} has been switched to its deployed form already: castle a "
                "model before, not after"
            )
        if is_castled(module):
            raise OptionError(
                f"{what} is castled already ({type(module).__name__}); castle the "
                "original model once, choosing its parts with stages or predicate"
            )


def _find(model: nn.Module) -> tuple[list[_Found], dict[str, str]]:
    """Attentions with an adapter, and reasons for those whose class resembles one."""
    found, declined = [], {}
    modules = dict(model.named_modules())
    for name, module in modules.items():
        parts = name.split(".") if name else []
        holders = [".".join(parts[:i]) for i in reversed(range(len(parts)))]
        ancestors = [modules[h] for h in holders if h in modules]
        try:
            adapt = find_adapter(module, ancestors[0] if ancestors else None)
        except CannotCastle as reason:
            declined[name] = str(reason)
            continue
        if adapt is not None:
            if not ancestors:
                raise OptionError(
                    f"castle changes a model in place, which a {type(model).__name__} "
                    "by itself does not allow: castle the module that holds it"
                )
            found.append(_Found(name, module, adapt, ancestors))
    # An adapter of the outer module speaks for what is inside.
    found = [
        item
        for item in found
        if not any(_holds(o.name, item.name) for o in found if o is not item)
    ]
    for item, stage in zip(found, _stages([i.name for i in found]), strict=True):
        item.stage = stage
    return found, declined


def _extra_tokens_of(ancestors: Sequence[nn.Module]) -> int:
    """How many tokens lead the grid, as the nearest module that knows says."""
    for module in ancestors:
        for name in ("num_extra_tokens", "num_prefix_tokens"):  # mmpretrain's, timm's
            count = getattr(module, name, None)
            if isinstance(count, int):
                return count
        for name in ("class_token", "cls_token"):  # torchvision's, mmseg's and TNT's
            token = getattr(module, name, None)  # (1, tokens, C)
            if isinstance(token, Tensor):
                return token.shape[1] * bool(getattr(module, "with_cls_token", True))
    return 0


def _stages(names: Sequence[str]) -> list[int]:
    """Number what the names first differ in, in order of appearance."""
    paths = [name.split(".") for name in names]
    shared = 0
    while len({path[shared] for path in paths}) == 1 and all(
        shared + 1 < len(path) for path in paths
    ):
        shared += 1
    order = list(dict.fromkeys(path[shared] for path in paths))
    return [order.index(path[shared]) for path in paths]


def _unchosen(
    found: Sequence[_Found],
    stages: Iterable[int] | None,
    predicate: Predicate | None,
    keep: Iterable[int | str],
) -> dict[str, str]:
    """The reason for each attention that stays as it is, by name."""
    count = 1 + max(item.stage for item in found)
    wanted = set(range(count))
    if stages is not None:
        stages = list(stages)
        for stage in stages:
            if not _is_index(stage, count):
                raise OptionError(
                    f"stages {stages!r}: {stage} is not a stage; there are {count} "
                    f"with attentions, numbered 0 to {count - 1} or -{count} to -1"
                )
        wanted = {stage % count for stage in stages}
    kept = _kept([item.name for item in found], keep)
    unchosen = {
        item.name: "kept" if item.name in kept else "not selected"
        for item in found
        if item.name in kept
        or item.stage not in wanted
        or (predicate is not None and not predicate(item.name, item.module))
    }
    if len(unchosen) == len(found):
        raise OptionError(
            "keep, stages and predicate select none of the attentions "
            + ", ".join(unchosen)
        )
    return unchosen


def _kept(names: Sequence[str], keep: Iterable[int | str]) -> set[str]:
    """Which of the attentions ``castle(keep=...)`` means."""
    if isinstance(keep, str) or not isinstance(keep, Iterable):
        raise OptionError(f"keep={keep!r}: expected a list, such as keep=[{keep!r}]")
    keep, kept = list(keep), set()
    for which in keep:
        if isinstance(which, str):
            meant = [name for name in names if _holds(which, name)]
        else:
            meant = [names[which]] if _is_index(which, len(names)) else []
        if not meant:
            raise OptionError(
                f"keep={keep!r}: {which!r} is none of the {len(names)} attentions, "
                f"numbered 0 to {len(names) - 1} or -{len(names)} to -1: "
                + ", ".join(names)
            )
        kept.update(meant)
    return kept


def _is_index(value: object, count: int) -> bool:
    """Whether a value numbers one of some things, from the start or the end."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    return whole and -count <= value < count


def _holds(outer: str, inner: str) -> bool:
    return inner == outer or inner.startswith(f"{outer}.")


def softmax_attentions(model: nn.Module) -> dict[str, nn.Module]:
    """Modules, by name, whose class resembles an attention and that hold no mixer."""
    return {
        name: module
        for name, module in model.named_modules()
        if _LIKE_ATTENTION.search(type(module).__name__)
        and not any(isinstance(part, TokenMixer) for part in module.modules())
    }


def _without_adapter(model: nn.Module, known: Sequence[str]) -> dict[str, str]:
    """What resembles an attention, and is not among the known ones."""
    return {
        name: "no adapter"
        for name in softmax_attentions(model)
        if not any(_holds(other, name) or _holds(name, other) for other in known)
    }
