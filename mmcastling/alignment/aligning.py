"""The two stages of an alignment, resumable at every step."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmcastling.alignment.pairs import (
    AlignError,
    Features,
    Images,
    Pairs,
    attention_pairs,
    blocks_of,
    cosines,
    default_features,
    features_of,
    in_evaluation,
    on_each_attention,
    outputs_of,
    relative_error,
    widths_of,
)
from mmcastling.attention import TokenMixer, is_castled
from mmcastling.checkpoint import load_checkpoint, save_atomically
from mmcastling.decay import MaskDecay
from mmcastling.deploy import may_gain
from mmcastling.errors import OptionError
from mmcastling.verbs import castling_modules, set_mask

logger = logging.getLogger("mmcastling")
STATE_FILE = "align.pth"
_WARM_UP = 0.1  # of a stage's steps
_NEW = 30.0  # times the rate, of weights that the teacher has not got


def align(
    student: nn.Module,
    teacher: nn.Module,
    images: Images,
    *,
    steps: tuple[int, int] = (300, 0),
    learning_rates: tuple[float, float] = (3e-4, 4e-5),
    mask: MaskDecay | None = None,
    features: Features = default_features,
    folder: str | Path | None = None,
    save_every: int = 20,
    log_every: int = 20,
    amp: bool | None = None,
) -> nn.Module:
    """Train a castled network to compute what its softmax original computes.

    No labels are needed. In the first stage each castled attention, with all of its
    weights, learns to give what the teacher's gives on the teacher's own tokens; in the
    second, which has no steps by default, the whole student learns the features that
    the next part reads, and with them what each block gives, which tells the first
    blocks sooner what to mend. The masks are off in the end, so that the student can
    always be deployed.

    Args:
        student: A castled copy of the teacher, which is trained in place.
        teacher: The softmax network, which is left as it is.
        images: Gives the batch of a step, such as :class:`PictureBatches`.
        steps: Of the two stages; either may be 0. Defaults to (300, 0).
        learning_rates: Peaks of the two stages for the teacher's weights; what castling
            added learns thirty times as fast. Defaults to (3e-4, 4e-5).
        mask: How the masks decay over both stages, off before the end. Defaults to None
            (off from the start, see docs/align.md).
        features: Called as ``features(model, images)``; the features to match. Defaults
            to those of the backbone, or of timm's ``forward_features``.
        folder: Where the state is saved, and from where an alignment goes on that was
            interrupted. Defaults to None (nowhere).
        save_every: Steps between two savings. Defaults to 20.
        log_every: Steps between two lines of the logger ``mmcastling``. Defaults to 20.
        amp: Compute layers in bfloat16 (autocast). Defaults to None (where the device
            has instructions that multiply it faster).

    Returns:
        The student, in evaluation.

    Raises:
        AlignError: If the networks do not belong together, or an error is not finite.
        ValueError: If an option is out of range.
    """
    pairs = attention_pairs(student, teacher)
    _check_options(steps, learning_rates, save_every, log_every, images)
    mask = mask or MaskDecay(start=1.0)
    threshold, weight = mask.state_at(1.0)
    if not threshold.rejects_all and weight:
        raise OptionError(
            f"{mask}: the masks would still be on in the end; let mode 'threshold' end "
            "at 1, or take mode 'weight'"
        )
    for path, module in student.named_modules():
        if is_castled(module) and getattr(module, "deploy", False):
            raise AlignError(
                f"{path} of the student is deployed: give it as castle() made it"
            )
    has_branch = any(True for _ in castling_modules(student))
    student.train(False)
    device = next(teacher.parameters()).device
    if amp is None:
        amp = may_gain("bf16", device)
    settings = dict(steps=list(steps), learning_rates=list(learning_rates))
    settings.update(mask=str(mask), amp=amp, student=_described(student))
    settings.update(matched="features and blocks", new_weights=_NEW)
    settings["teacher"] = _fingerprint(teacher)
    settings["images"] = getattr(images, "described", "")
    state = _State(Path(folder) / STATE_FILE if folder else None, settings)
    wanted = [parameter.requires_grad for parameter in student.parameters()]
    try:
        with torch.enable_grad(), in_evaluation(teacher):
            for stage, count in enumerate(steps):
                if not count:
                    continue
                _select(student, pairs, wanted, stage)
                run = _Stage(stage, count, learning_rates[stage], student, teacher)
                first = state.resume(run, student)
                compute = _match_attentions if stage == 0 else _match_features
                for step in range(first, count):
                    done = step + (steps[0] if stage else 0)
                    if has_branch:
                        set_mask(student, *mask.state_at(done / max(1, sum(steps) - 1)))
                    x = images(done).to(device)
                    with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                        losses = compute(student, teacher, pairs, features, x)
                    run.update(losses, step)
                    if (step + 1) % log_every == 0 or step + 1 == count:
                        run.say(step, losses)
                    if (step + 1) % save_every == 0 or step + 1 == count:
                        state.save(run, student, step + 1)
    finally:
        for parameter, flag in zip(student.parameters(), wanted, strict=True):
            parameter.requires_grad_(flag)
    if has_branch:
        set_mask(student, *mask.state_at(1.0))
    return student


def _check_options(
    steps: tuple[int, int],
    rates: tuple[float, float],
    save_every: int,
    log_every: int,
    images: Images,
) -> None:
    whole = len(steps) == 2 and all(type(count) is int for count in steps)
    if (
        not (whole and min(steps) >= 0 and sum(steps))
        or len(rates) != 2
        or not all(0 < rate < math.inf for rate in rates)
    ):
        raise OptionError(
            f"steps {steps} and learning rates {rates}: give two numbers of steps that "
            "are not both 0, and two rates above 0"
        )
    if min(save_every, log_every) < 1:
        raise OptionError(
            f"save_every={save_every} and log_every={log_every} must be at least 1"
        )
    if not callable(images):
        raise OptionError(
            f"images is a {type(images).__name__}: give a function of the step that "
            "returns its batch, such as PictureBatches, or lambda step: batches[step]"
        )


def _fingerprint(teacher: nn.Module) -> str:
    """A short text that differs between networks of other weights."""
    sums = [f"{n}{v.double().sum().item()!r}" for n, v in teacher.named_parameters()]
    return hashlib.sha256("".join(sums).encode()).hexdigest()[:16]


def _described(student: nn.Module) -> list[str]:
    """The castled attentions of a student, so that another one is told from it."""
    return [
        f"{name} {type(mixer).__name__} {getattr(mixer, 'form', '')} centred="
        f"{getattr(mixer, 'center_keys', '')} landmarks="
        f"{getattr(mixer, 'landmarks', '')} normed={mixer.norm_output} "
        f"{mixer.local_conv}"
        for name, mixer in student.named_modules()
        if isinstance(mixer, TokenMixer)
    ]


def _new_parameters(student: nn.Module, teacher: nn.Module) -> set[str]:
    """Names of what castling added: of mixers, and not of the teacher."""
    names = {
        name
        for path, mixer in student.named_modules()
        if isinstance(mixer, TokenMixer)
        for name, _ in mixer.named_parameters(prefix=path)
    }
    return names - {name for name, _ in teacher.named_parameters()}


def _select(student: nn.Module, pairs: Pairs, wanted: list[bool], stage: int) -> None:
    """Let gradients reach the attentions, and in the second stage everything."""
    inside = {id(p) for attention, _ in pairs.values() for p in attention.parameters()}
    for parameter, flag in zip(student.parameters(), wanted, strict=True):
        parameter.requires_grad_(flag and (stage == 1 or id(parameter) in inside))
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise AlignError(
            "all weights of the student are frozen: nothing can be aligned"
        )
    within = [p for p in student.parameters() if stage or id(p) in inside]
    trained = sum(p.numel() for p in within if p.requires_grad)
    if trained < 0.5 * (whole := sum(p.numel() for p in within)):
        logger.warning(
            "most weights of the student are frozen: %d of %d learn in stage %d",
            *(trained, whole, stage + 1),
        )


def _match_attentions(
    student: nn.Module, teacher: nn.Module, pairs: Pairs, features: Features, x: Tensor
) -> dict[str, float]:
    """Add the gradients of each attention's error; the errors by name."""
    errors: dict[str, float] = {}

    def learn(name: str, found: Tensor, expected: Tensor) -> None:
        error = relative_error(found, expected)
        if error.requires_grad:  # not all of it is frozen
            error.backward()  # blocks are independent: no two graphs live at once
        errors[name] = error.item()

    run = on_each_attention(student, teacher, pairs, learn, gradients=True)
    with torch.no_grad(), run:
        features(teacher, x)
    return errors


def _match_features(
    student: nn.Module, teacher: nn.Module, pairs: Pairs, features: Features, x: Tensor
) -> dict[str, float]:
    """Add the gradients of the errors of features and blocks; the errors by level."""
    names = blocks_of(pairs)
    with torch.no_grad(), outputs_of(teacher, names) as wanted:
        expected = features_of(teacher, x, features)
    with outputs_of(student, names) as given:
        found = features_of(student, x, features)
    if [f.shape for f in found] != [e.shape for e in expected]:
        raise AlignError(
            f"features of the student have shapes {[tuple(f.shape) for f in found]}, "
            f"those of the teacher {[tuple(e.shape) for e in expected]}: give "
            "features=, a function of a model and its images"
        )
    widths = widths_of(student)
    errors = {
        f"features {level}": _error(*both, widths)
        for level, both in enumerate(zip(found, expected, strict=True))
    }
    if given:
        each = [_error(given[name], wanted[name], widths) for name in given]
        errors["blocks"] = sum(each) / len(each)
    sum(errors.values()).backward()
    return {name: error.item() for name, error in errors.items()}


def _error(found: Tensor, expected: Tensor, widths: set[int]) -> Tensor:
    kept = cosines(found, expected, widths).mean()
    return 1 - kept + 0.1 * relative_error(found, expected)


class _Stage:
    """The optimizer of a stage; its learning rates are functions of the step."""

    def __init__(
        self,
        index: int,
        steps: int,
        rate: float,
        student: nn.Module,
        teacher: nn.Module,
    ) -> None:
        self.index, self.steps, self.rate = index, steps, rate
        learns = {n: p for n, p in student.named_parameters() if p.requires_grad}
        new = _new_parameters(student, teacher)
        groups = [
            dict(params=[learns[n] for n in learns if n not in new], factor=1.0),
            dict(params=[learns[n] for n in learns if n in new], factor=_NEW),
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=0.0)
        self.optimizer.zero_grad()  # of earlier backward passes
        self.started = time.monotonic()
        self.first = 0

    def update(self, losses: dict[str, float], step: int) -> None:
        """Take a step, unless a loss or a gradient is not finite."""
        for name, loss in losses.items():
            if not math.isfinite(loss):
                self._stop(step, f"the error of {name} is {loss}")
        warm = max(1, round(_WARM_UP * self.steps))
        if step < warm:
            factor = (step + 1) / warm
        else:
            rest = (step - warm) / max(1, self.steps - warm)
            factor = (1 + math.cos(math.pi * rest)) / 2
        groups = self.optimizer.param_groups
        for group in groups:
            group["lr"] = self.rate * factor * group["factor"]
        norm = nn.utils.clip_grad_norm_([p for g in groups for p in g["params"]], 1.0)
        if not torch.isfinite(norm):
            self._stop(step, "a gradient is not finite")
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _stop(self, step: int, what: str) -> None:
        hint = f"the state saved last is good; try a rate below {self.rate:g}"
        if step == self.index == 0:  # nothing was learned yet
            hint = "check the pictures, and the weights of both networks"
        raise AlignError(f"stage {self.index + 1}, step {step + 1}: {what}: {hint}")

    def say(self, step: int, losses: dict[str, float]) -> None:
        """Log the errors, and how long the rest of the stage will take."""
        spent = time.monotonic() - self.started
        left = spent / (step + 1 - self.first) * (self.steps - step - 1)
        values = " ".join(f"{value:.3f}" for value in losses.values())
        logger.info(
            "stage %d, step %d of %d: mean error %.4f (%s), %.0f s left",
            *(self.index + 1, step + 1, self.steps),
            *(sum(losses.values()) / len(losses), values, left),
        )


class _State:
    """What is saved, so that an alignment goes on as if it had never stopped."""

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        self.path, self.settings = path, settings
        self.saved = load_checkpoint(path) if path and path.is_file() else None
        if self.saved is not None and self.saved["settings"] != settings:
            raise AlignError(
                f"{path} is of an alignment with {self.saved['settings']}, not with "
                f"{settings}: give the same to go on, or take another folder"
            )
        if self.saved is not None:
            logger.info(
                "going on from stage %d, step %d, in %s",
                *(self.saved["stage"] + 1, self.saved["step"], path),
            )

    def resume(self, stage: _Stage, student: nn.Module) -> int:
        """Load a stage's state, if there is one; the step to go on with."""
        if self.saved is None or self.saved["stage"] < stage.index:
            return 0
        if self.saved["stage"] > stage.index:
            return stage.steps
        student.load_state_dict(self.saved["state_dict"])
        stage.optimizer.load_state_dict(self.saved["optimizer"])
        stage.first = self.saved["step"]
        return stage.first

    def save(self, stage: _Stage, student: nn.Module, step: int) -> None:
        if self.path is None:
            return
        state = dict(settings=self.settings, stage=stage.index, step=step)
        state["state_dict"] = student.state_dict()
        state["optimizer"] = stage.optimizer.state_dict()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        save_atomically(state, self.path)
