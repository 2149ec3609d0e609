"""Import a checkpoint of another library into a backbone of ours."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmcastling.attention import build_mixer
from mmcastling.checkpoint import CheckpointError, save_atomically
from mmcastling.models.common import image_size
from mmcastling.models.pretrained import REQUIRED_SHARE
from mmcastling.version import __version__
from mmcastling.weights.dialect import Found, Translation, first_match, locate
from mmcastling.weights.family import Family, Target
from mmcastling.weights.import_report import ImportReport, collapse
from mmcastling.weights.levit_weights import LeViTFamily
from mmcastling.weights.mvit_weights import MViTFamily
from mmcastling.weights.source import Container, read_source
from mmcastling.weights.vit_weights import ViTFamily

FAMILIES: dict[str, Family] = {
    "vit": ViTFamily(),
    "levit": LeViTFamily(),
    "mvit": MViTFamily(),
}
PREFIX = "backbone."
"""In front of every name that is written, as in mmpretrain's checkpoints."""


def import_checkpoint(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    family: str,
    arch: str | dict[str, Any],
    *,
    img_size: int | Sequence[int] | None = None,
    in_channels: int = 3,
    attention: str = "castling",
    prefix: str | None = None,
    noise: float = 0.01,
    dist_token: bool = False,
    allow_partial: bool = False,
) -> ImportReport:
    """Import weights, and write them for ``init_cfg=dict(type='Pretrained', ...)``.

    Args:
        source: Checkpoint of timm, torchvision, mmpretrain, transformers or an original
            repository.
        destination: File to write, ``.pth``, in a folder that exists.
        family: A key of :data:`FAMILIES`.
        arch: Name or settings of the backbone's architecture.
        img_size: Image size for which tables of positions are resized, an int or
            ``(H, W)``. Defaults to None (the source's).
        in_channels: Channels of the image. Defaults to 3.
        attention: Type of the backbone's attention. For a plain vision transformer all
            give the same file; LeViT and MViTv2 have one structure for ``'softmax'``
            and another for the rest. Defaults to ``'castling'``.
        prefix: Path and prefix of the network inside the file, if it holds several.
            Defaults to None.
        noise: Relative noise on repeated keys, see
            :func:`mmcastling.weights.levit_heads.repeat_keys`. Defaults to 0.01.
        dist_token: Keep the distillation token of a plain vision transformer, for
            ``with_dist_token=True``; else it is dropped with its position. Defaults to
            False.
        allow_partial: Overlook names that are unknown or missing. Defaults to False.

    Raises:
        ValueError: If an option's value is not known.
        CheckpointError: If the source cannot be read, does not fit or holds something
            unexpected, or the destination cannot be written. Nothing is written then.
    """
    if family not in FAMILIES:
        raise ValueError(
            f"family {family!r} is not known: choose one of {list(FAMILIES)}"
        )
    if not 0 <= noise < float("inf"):
        raise ValueError(f"noise {noise!r} must be a number that is not negative")
    if dist_token and family != "vit":
        raise ValueError(
            f"dist_token: no {FAMILIES[family].name} has one, leave it out"
        )
    source, destination = Path(source).expanduser(), Path(destination).expanduser()
    _check_destination(source, destination)
    build_mixer(dict(type=attention), num_heads=1, head_dims=8)  # known?
    target = Target(
        arch,
        None if img_size is None else image_size(img_size),
        in_channels,
        {"type": attention},
        noise,
        dist_token,
    )
    state_dict, report = import_weights(
        read_source(source), FAMILIES[family], target, source.name, prefix
    )
    if report.unexpected and not allow_partial:
        shown = "; ".join(report.unexpected[:8])
        more = len(report.unexpected) - 8
        raise CheckpointError(
            f"{source} is not quite what was expected: {shown}"
            + (f"; and {more} more" if more > 0 else "")
            + ". Let it pass with --allow-partial if that is as you want it"
        )
    if report.loaded_share < REQUIRED_SHARE:
        raise CheckpointError(
            f"only {report.loaded_share:.1%} of the backbone's parameters are in "
            f"{source}, at least {REQUIRED_SHARE:.0%} are expected: it is of another "
            "architecture"
        )
    meta = dict(mmcastling_version=__version__, imported=report.as_dict())
    save_atomically(dict(meta=meta, state_dict=state_dict), destination)
    return report


def import_weights(
    containers: dict[str, Container],
    family: Family,
    target: Target,
    source: str,
    prefix: str | None = None,
) -> tuple[Container, ImportReport]:
    """Import weights that are in memory.

    Args:
        containers: What :func:`mmcastling.weights.source.read_source` returned.
        family: The family that they should be of.
        target: What they are for.
        source: Their file's name, for messages.
        prefix: As in :func:`import_checkpoint`.

    Returns:
        The backbone's weights, their names after :data:`PREFIX`, and the report.

    Raises:
        CheckpointError: If they are of another family or architecture.
    """
    found = locate(containers, family.dialects, prefix)
    if found is None:
        raise CheckpointError(_foreign(containers, family, source))
    translation = found.dialect.translate(found.weights)
    family.check(translation.weights, target)
    options = family.options(translation.weights, target)
    backbone = family.build(options, target)
    weights, changed = family.adapt(translation.weights, target, backbone)
    missing = family.fit(weights, backbone)
    fitted = backbone.state_dict()
    if target.attention != {"type": "castling"}:
        options["attention"] = target.attention
    report = ImportReport(
        source=source,
        names=found.dialect.name,
        where=found.where,
        backbone={"type": f"mmcastling.{family.backbone.__name__}", **options},
        changed=changed,
        dropped=dict(translation.dropped),
    )
    _account_for_ours(report, fitted, weights, set(translation.weights), family)
    unknown = _account_for_theirs(report, fitted, weights, translation, found, family)
    report.unexpected = [f"unknown {text}" for text in collapse(unknown)]
    report.unexpected += [f"missing {text}" for text in collapse(missing)]
    state_dict = {
        PREFIX + name: _own_storage(value)
        for name, value in fitted.items()
        if not value.is_meta
    }
    return state_dict, report


def _account_for_ours(
    report: ImportReport,
    fitted: Container,
    weights: Container,
    given: set[str],
    family: Family,
) -> None:
    """Report what became of each parameter of the backbone."""
    ours_alone = dict.fromkeys(family.new, "")
    for name, value in fitted.items():
        if name.endswith("num_batches_tracked"):
            continue
        derived = name not in given and first_match(ours_alone, name) is not None
        kind = report.new if value.is_meta or derived else report.loaded
        kind[name] = value.numel()
        if name in weights and weights[name].shape != value.shape:
            before = tuple(weights[name].shape)
            report.changed[name] = f"resized from {before} to {tuple(value.shape)}"


def _account_for_theirs(
    report: ImportReport,
    fitted: Container,
    weights: Container,
    translation: Translation,
    found: Found,
    family: Family,
) -> list[str]:
    """Report what of the file has no place; gives the names that are not understood."""
    unknown = list(translation.unknown)
    for name in weights:
        if name in fitted:
            continue
        original = translation.sources[name]
        if (reason := first_match(family.no_place, name)) is not None:
            report.dropped[original] = reason
        else:
            unknown.append(original)
    report.dropped |= dict.fromkeys(found.outside, "outside the backbone")
    sizes = {n: v.numel() for n, v in {**found.outside, **found.weights}.items()}
    lost = {*report.dropped, *unknown}
    dropped = sum(size for name, size in sizes.items() if name in lost)
    report.dropped_share = dropped / max(1, sum(sizes.values()))
    return unknown


def _own_storage(value: Tensor) -> Tensor:
    """A tensor that is all of its storage: else the rest would be saved as well."""
    if value.untyped_storage().nbytes() == value.numel() * value.element_size():
        return value.contiguous()
    return value.clone(memory_format=torch.contiguous_format)


def _foreign(containers: dict[str, Container], family: Family, source: str) -> str:
    names = [name for weights in containers.values() for name in weights]
    for other in FAMILIES.values():
        if other is not family and _is_in(containers, other):
            return (
                f"{source} holds a {other.name}, not a {family.name}: use "
                f"{other.command}"
            )
    known = ", ".join(dialect.name for dialect in family.dialects)
    return (
        f"{source} holds no {family.name} with the names of {known}: its names begin "
        f"with {names[:4]}"
    )


def _is_in(containers: dict[str, Container], family: Family) -> bool:
    """Whether a network of a family is in a file."""
    return any(
        dialect.prefixes(weights)
        for weights in containers.values()
        for dialect in family.dialects
    )


def _check_destination(source: Path, destination: Path) -> None:
    if destination.suffix != ".pth":
        raise CheckpointError(f"destination {destination} must end in .pth")
    if destination.is_dir():
        raise CheckpointError(f"destination {destination} is a folder: name a file")
    if not destination.parent.is_dir():
        raise CheckpointError(
            f"cannot write {destination}: the folder {destination.parent} does not "
            "exist: create it"
        )
    if destination.resolve() == source.resolve():
        raise CheckpointError(
            f"destination {destination} is the source: choose another name"
        )
