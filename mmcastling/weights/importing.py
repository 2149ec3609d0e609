"""Import a checkpoint of another library into a backbone of ours."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mmcastling.attention import build_mixer
from mmcastling.attention.old_names import with_current_names
from mmcastling.checkpoint import save_atomically
from mmcastling.errors import CheckpointError, OptionError
from mmcastling.files import check_writable
from mmcastling.models.common import image_size
from mmcastling.models.pretrained import REQUIRED_SHARE, prepared_weights
from mmcastling.version import __version__
from mmcastling.weights.family import Family, Library, Target
from mmcastling.weights.import_report import ImportReport, collapse
from mmcastling.weights.levit_weights import LEVIT
from mmcastling.weights.mvit_weights import MVIT
from mmcastling.weights.source import Weights, read_source
from mmcastling.weights.vit_weights import VIT

# The original MViTv2 also has the names by which timm's ViT is known: it comes first.
FAMILIES: dict[str, Family] = {"mvit": MVIT, "levit": LEVIT, "vit": VIT}
PREFIX = "backbone."
"""In front of every name that is written, as in mmpretrain's checkpoints."""
PREFERRED = ("state_dict", "model", "model_state", "", "teacher")
"""Which dictionary of a file is meant where several hold the same network."""


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
        img_size: Image size, an int or ``(H, W)``, for which tables of positions are
            resized. Defaults to None (the source's).
        in_channels: Channels of the image. Defaults to 3.
        attention: Type of the backbone's attention. For a plain vision transformer all
            give the same file; LeViT and MViTv2 have one structure for ``'softmax'``
            and another for the rest. Defaults to ``'castling'``.
        prefix: Path and prefix of the network inside a file that holds several.
        noise: Relative noise on repeated keys, see
            :func:`mmcastling.weights.levit_heads.repeat_keys`. Defaults to 0.01.
        dist_token: Keep the distillation token of a plain vision transformer, for
            ``with_dist_token=True``. Defaults to False.
        allow_partial: Overlook names that are unknown or missing. Defaults to False.

    Raises:
        OptionError: If an option's value is not known, or the destination cannot be
            written.
        CheckpointError: If the source cannot be read, does not fit or holds something
            unexpected. Nothing is written then.
    """
    if family not in FAMILIES:
        raise OptionError(
            f"family {family!r} is not known: choose one of {list(FAMILIES)}"
        )
    if not 0 <= noise < float("inf"):
        raise OptionError(f"noise {noise!r} must be a number that is not negative")
    if dist_token and family != "vit":
        raise OptionError(
            f"dist_token: no {FAMILIES[family].name} has one, leave it out"
        )
    source, destination = Path(source).expanduser(), Path(destination).expanduser()
    check_writable(destination, ".pth", option="the imported weights")
    if destination.resolve() == source.resolve():
        raise CheckpointError(f"{destination} is the source: choose another name")
    build_mixer(dict(type=attention), num_heads=1, head_dims=8)  # known?
    size = None if img_size is None else image_size(img_size)
    target = Target(arch, size, in_channels, {"type": attention}, noise, dist_token)
    weights, report = _import(source, FAMILIES[family], target, prefix)
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
    imported = {**asdict(report), "loaded_share": report.loaded_share}
    meta = dict(mmcastling_version=__version__, imported=imported)
    # Cloned, as a view would be saved with all that it is a view of.
    state_dict = {PREFIX + name: value.clone() for name, value in weights.items()}
    save_atomically(dict(meta=meta, state_dict=state_dict), destination)
    return report


def _import(
    source: Path, family: Family, target: Target, prefix: str | None
) -> tuple[Weights, ImportReport]:
    """The weights of a backbone that fit into it, and what was done to get them."""
    containers = read_source(source)
    library, path, inner = _find_network(containers, family, source.name, prefix)
    inside = {
        n.removeprefix(inner): v
        for n, v in containers[path].items()
        if n.startswith(inner)
    }
    ours = library.rename(inside)
    weights = {
        ours[name]: value.float() if value.is_floating_point() else value
        for name, value in inside.items()
    }
    family.check(weights, target)
    options = {"arch": target.arch}
    if target.img_size is not None:
        options["img_size"] = target.img_size
    options |= family.options(weights, target)
    if len(set(size := options.get("img_size", ()))) == 1:
        options["img_size"] = size[0]
    with torch.device("meta"):  # no memory, no initialisation
        backbone = family.backbone(**options, attention=target.attention)
    if target.attention != {"type": "castling"}:
        options["attention"] = target.attention
    own = backbone.state_dict()

    theirs = with_current_names({new: name for name, new in ours.items()}, own)
    weights = with_current_names(weights, own)
    changed = family.reshape(weights, target, backbone)
    outside = [name for name in containers[path] if not name.startswith(inner)]
    dropped = dict.fromkeys(outside, "outside the backbone")
    unknown = list(inside.keys() - set(theirs.values()))  # what is there twice
    for name in [name for name in weights if name not in own]:
        reasons = (r for p, r in family.dropped.items() if re.fullmatch(p, name))
        if reason := next(reasons, None):
            dropped[theirs.get(name, name)] = reason
        else:
            unknown.append(theirs.get(name, name))
    weights = {name: weights[name] for name in own if name in weights}
    fitted = prepared_weights(backbone, weights)
    _check_fit(fitted, own)
    for name, value in fitted.items():
        if (before := weights[name].shape) != value.shape:
            changed[name] = f"resized from {tuple(before)} to {tuple(value.shape)}"

    report = ImportReport(
        source=source.name,
        names=library.name,
        where=f"{path}.{inner}" if path else inner,
        backbone={"type": f"mmcastling.{family.backbone.__name__}", **options},
        changed=changed,
        dropped=dropped,
    )
    missing = []
    for name, value in own.items():
        is_new = re.fullmatch(family.new, name)
        held = theirs if is_new else fitted
        if not name.endswith("num_batches_tracked"):
            (report.loaded if name in held else report.new)[name] = value.numel()
            missing += [name] if name not in held and not is_new else []
    report.unexpected = [f"unknown {text}" for text in collapse(unknown)]
    report.unexpected += [f"missing {text}" for text in collapse(missing)]
    sizes = {n: v.numel() for n, v in containers[path].items()}
    lost = [*outside, *(inner + n for n in {*dropped, *unknown} if n in inside)]
    report.dropped_share = sum(map(sizes.get, lost)) / max(1, sum(sizes.values()))
    return fitted, report


def _find_network(
    containers: dict[str, Weights], family: Family, source: str, prefix: str | None
) -> tuple[Library, str, str]:
    """A family's network in a file: whose names it has, its path and prefix."""
    found: dict[str, tuple[Family, Library, str, str]] = {}
    for other in FAMILIES.values():
        for library in other.libraries:
            for path, held in containers.items():
                for inner in library.prefixes(held):
                    where = f"{path}.{inner}" if path else inner
                    found.setdefault(where, (other, library, path, inner))
    options = {w: place[1:] for w, place in found.items() if place[0] is family}
    if not options:
        names = [name for weights in containers.values() for name in weights]
        known = ", ".join(library.name for library in family.libraries)
        problem = f"no {family.name} with the names of {known}: its names begin with "
        problem += str(names[:4])
        for tool, other in FAMILIES.items():
            if any(place[0] is other for place in found.values()):
                problem = f"a {other.name}, not a {family.name}: use import_{tool}.py"
        raise CheckpointError(f"{source} holds {problem}")
    problem = "the file holds several networks"
    if prefix is not None:
        problem = f"no network has the prefix {prefix!r}"
        chosen = [w for w in options if w.rstrip(".") == prefix.rstrip(".")]
    else:
        paths = [path for _, path, _ in options.values()]
        best = next((path for path in PREFERRED if path in paths), None)
        chosen = [w for w, (_, path, _) in options.items() if best in (path, None)]
    if len(chosen) != 1:
        raise CheckpointError(
            f"{problem}: choose one of {sorted(options)} with --prefix"
        )
    return options[chosen[0]]


def _check_fit(weights: Weights, own: Weights) -> None:
    misfits = []
    for name, value in weights.items():
        if value.shape != own[name].shape:
            expected = tuple(own[name].shape)
            misfits.append(f"{name} is {tuple(value.shape)}, expected {expected}")
        elif own[name].is_floating_point() and not value.is_floating_point():
            misfits.append(f"{name} is of {value.dtype}, expected floating point")
    if misfits:
        advice = ""
        if any("attention_biases" in text for text in misfits):
            advice = (
                ". Only tables of square images can be resized: for others give the "
                "source's own --img-size H W"
            )
        raise CheckpointError(
            f"{len(misfits)} of the weights have another shape or type: "
            f"{'; '.join(misfits[:3])}{advice}"
        )
