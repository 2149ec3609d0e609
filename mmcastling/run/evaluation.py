"""Evaluate a checkpoint, deployed by default: what ``tools/test.py`` does."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.device import get_device
from mmengine.dist import is_main_process
from mmengine.model import BaseTTAModel
from mmengine.runner import Runner
from torch import nn

from mmcastling.analysis import PartTimer
from mmcastling.checkpoint import load_checkpoint
from mmcastling.compat.atomic_checkpoint_hook import whole_local_files
from mmcastling.compat.coco_eval import fast_coco_eval
from mmcastling.deploy import check_precision, is_deployed, set_precision
from mmcastling.errors import ConfigError
from mmcastling.registry import model_spec, type_name
from mmcastling.run.config import check_data, check_work_dir, datasets_of, require
from mmcastling.run.deployed_config import drop_training_hooks
from mmcastling.run.pruning import Pruning, prune
from mmcastling.run.runner import build_runner, core_model, load_trained


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation.

    Attributes:
        metrics: What the config's evaluator returned.
        seconds_per_image: Median forward time over batches, divided by their size;
            of one view with test-time augmentation.
        pruning: What deploying removed, or None where nothing was.
        precision: What the layers computed in.
        parts: The same time, by the parts of :class:`mmcastling.analysis.PartTimer`;
            empty where a model cannot be split.
    """

    metrics: dict[str, float]
    seconds_per_image: float
    pruning: Pruning | None
    precision: str = "fp32"
    parts: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        text = (
            f"{self.seconds_per_image:.4f} s per image in {self.precision}, median "
            "forward pass"
        )
        if not self.parts:
            return text
        split = ", ".join(f"{part} {time:.4f}" for part, time in self.parts.items())
        return f"{text}: {split}"


def evaluate(
    cfg: Config,
    source: str | os.PathLike[str],
    *,
    deploy: bool = True,
    precision: str | None = None,
) -> Evaluation:
    """Evaluate a checkpoint on the config's test set.

    Args:
        cfg: A config from :func:`mmcastling.run.load_config`.
        source: A training or deployed checkpoint of that config.
        deploy: Prune before evaluating, and say what that saved. Defaults to True.
        precision: What layers compute in, see :func:`mmcastling.deploy.set_precision`.
            Defaults to None (the config's ``precision``, which the converter writes,
            or ``'fp32'``).

    Raises:
        CheckpointError: If the checkpoint cannot be read or does not fit.
        DatasetError, CocoFormatError: If the data is missing or malformed.
        ConfigError: If the work directory cannot be written.
        ValueError, RuntimeError: If the precision is not known or not supported, or the
            model has not been pruned for it.
    """
    require(cfg, "test_dataloader", "test_cfg", "test_evaluator")
    precision = precision or cfg.get("precision", "fp32")
    check_precision(precision, get_device())
    check_data(cfg, "test")
    checkpoint = load_checkpoint(source)
    check_work_dir(cfg.work_dir)
    cfg = testing_config(cfg)
    runner = build_runner(cfg)
    model = core_model(runner.model)
    load_trained(model, checkpoint, source)
    if isinstance(runner.model, BaseTTAModel):
        _leave_out_masks(model)

    pruning = None
    if deploy:
        pruning = prune(runner, model)
        _say(str(pruning or _nothing_pruned(checkpoint)))
    set_precision(model, precision)
    if precision != "fp32":
        _say(f"layers compute in {precision}")
    with PartTimer(model) as timer:  # wrappers pass their own forward by
        metrics = run_test(runner)
    size = cfg.test_dataloader.get("batch_size", 1)
    parts = {part: seconds / size for part, seconds in timer.parts.items()}
    return Evaluation(metrics, timer.median / size, pruning, precision, parts)


def run_test(runner: Runner) -> dict[str, float]:
    """Run the test loop of a runner, and say what counts where the metric is COCO's.

    Returns:
        What the evaluator returned.
    """
    with fast_coco_eval(runner.test_evaluator.metrics) as library:
        if library:
            _say(f"COCO evaluation by {library}")
        with whole_local_files():  # every process writes the metrics, to one file
            return runner.test()


def _say(text: str) -> None:
    if is_main_process():
        print(text, flush=True)


def testing_config(cfg: Config) -> Config:
    """A copy of a config that only tests: nothing of training is built."""
    cfg = copy.deepcopy(cfg)
    cfg.load_from, cfg.resume = None, False
    drop_training_hooks(cfg)  # the weights in state_dict are averaged already
    for key in ("train_dataloader", "train_cfg", "optim_wrapper", "param_scheduler"):
        cfg[key] = None
    for key in ("val_dataloader", "val_cfg", "val_evaluator"):
        cfg[key] = None
    cfg.auto_scale_lr = None
    for key in ("runner_type", "strategy"):  # of training; every rank holds all here
        cfg.pop(key, None)
    return cfg


def _leave_out_masks(model: nn.Module) -> None:
    # mmdet's test-time augmentation merges boxes and refuses predictions with masks.
    roi_head = getattr(model, "roi_head", None)
    if getattr(roi_head, "with_mask", False):
        roi_head.mask_head = None


def _nothing_pruned(checkpoint: dict[str, Any]) -> str:
    why = "it was deployed before" if is_deployed(checkpoint) else "nothing is castled"
    return f"pruned nothing: {why}"


# -- options of the command line -------------------------------------------------------

_FLIP = [dict(type="RandomFlip", prob=1.0), dict(type="RandomFlip", prob=0.0)]
_TTA_MODELS = {
    "mmdet": dict(
        type="DetTTAModel",
        tta_cfg=dict(nms=dict(type="nms", iou_threshold=0.5), max_per_img=100),
    ),
    "mmpretrain": dict(type="mmpretrain.AverageClsScoreTTA"),
    "mmseg": dict(type="SegTTAModel"),
}


def enable_tta(cfg: Config) -> None:
    """Evaluate with test-time augmentation: the config's, or horizontal flips.

    mmdet merges boxes only, so masks are left out of its metric.

    Raises:
        ConfigError: If the toolbox has no default and the config none of its own, or
            cannot draw augmented images.
    """
    scope = cfg.get("default_scope")
    hook = cfg.get("default_hooks", {}).get("visualization") or {}
    if scope == "mmpretrain" and hook.get("enable"):
        raise ConfigError(
            "--tta: mmpretrain cannot draw augmented images; leave --show and "
            "--show-dir out, or evaluate without --tta"
        )
    if "tta_model" not in cfg:
        if scope not in _TTA_MODELS:
            raise ConfigError(
                f"--tta: no default for scope {scope!r}; put tta_model and "
                "tta_pipeline into the config"
            )
        cfg.tta_model = _TTA_MODELS[scope]
    dataset = next(datasets_of(cfg, "test"))
    if "tta_pipeline" not in cfg:
        pack = copy.deepcopy(dataset.pipeline[-1])
        keys = pack.get("meta_keys")
        if keys is not None:
            pack.meta_keys = (*keys, "flip", "flip_direction")
        steps = copy.deepcopy(dataset.pipeline[:-1])
        # mmseg flips predictions back, not the truth, which must not be flipped.
        late = [step for step in steps if scope == "mmseg" and _loads_truth(step)]
        transforms = [_FLIP, *([step] for step in late), [pack]]
        cfg.tta_pipeline = [
            *(step for step in steps if step not in late),
            dict(type="TestTimeAug", transforms=transforms),
        ]
    dataset.pipeline = cfg.tta_pipeline
    module = model_spec(cfg)
    # The runner gives the config's own to the wrapper, which puts it into the model.
    cfg.data_preprocessor = module.get("data_preprocessor")
    cfg.model = ConfigDict(**cfg.tta_model, module=module)
    evaluators = cfg.test_evaluator
    for evaluator in evaluators if isinstance(evaluators, list) else [evaluators]:
        if scope == "mmdet" and "segm" in (evaluator.get("metric") or []):
            print("--tta: mmdet merges boxes only; evaluating bbox without segm")
            evaluator.metric = ["bbox"]


def _loads_truth(step: dict[str, Any]) -> bool:
    return type_name(step["type"]) == "LoadAnnotations"


def enable_drawing(
    cfg: Config, show: bool, show_dir: str | None, wait_time: float
) -> None:
    """Show each prediction in a window, or write it to a folder.

    Raises:
        ConfigError: If the config has no visualization hook.
    """
    hook = cfg.get("default_hooks", {}).get("visualization")
    if hook is None:
        raise ConfigError(
            "--show and --show-dir need a hook under default_hooks.visualization"
        )
    hook.update(show=show, wait_time=wait_time)
    if cfg.get("default_scope") == "mmpretrain":
        hook.update(enable=True, out_dir=show_dir, interval=1)
    else:
        hook.draw = True
    if show_dir is not None:
        if cfg.get("default_scope") == "mmdet":
            hook.test_out_dir = str(Path(show_dir).resolve())
        elif cfg.get("default_scope") == "mmseg":
            cfg.visualizer.save_dir = show_dir


def enable_output(cfg: Config, out: str) -> None:
    """Write all predictions to a pickle file, as the toolboxes do.

    Raises:
        ConfigError: If the name does not end in ``.pkl`` or the folder is missing.
    """
    if Path(out).suffix not in (".pkl", ".pickle"):
        raise ConfigError(f"--out {out}: predictions are pickled, end it in .pkl")
    if not Path(out).absolute().parent.is_dir():
        raise ConfigError(f"--out {out}: its folder does not exist, create it first")
    kind = "DumpDetResults" if cfg.get("default_scope") == "mmdet" else "DumpResults"
    evaluators = cfg.test_evaluator
    evaluators = evaluators if isinstance(evaluators, list) else [evaluators]
    cfg.test_evaluator = [*evaluators, dict(type=kind, out_file_path=out)]
