"""Training and testing small detectors on the embedded nuclei, at 1,024 tokens."""

from __future__ import annotations

import copy
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS, MODELS
from mmengine.runner import Runner

from benchmarks.study.store import Run, Store
from mmcastling.analysis import count_model_macs
from mmcastling.run import evaluate, load_config, train
from mmcastling.verbs import switch_to_deploy

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "configs/mask_rcnn_castling_nano_nuclei.py"
DATA_ROOT = "data/nuclei/"
ITERATIONS = 150  # of the demo's 700
WARM_UP = 20
TRAIN_SIZE = (256, 256)

# The config's own attention is that of the full method.
ATTENTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "softmax": ("softmax", dict(type="softmax")),
    "performer": ("Performer", dict(type="performer")),
    "angular": ("linear-angular", dict(type="linear_angular", local_conv=None)),
    "angular-conv": (
        "linear-angular + convolution",
        dict(type="linear_angular", local_conv="grid"),
    ),
    "decay": (
        "full method",
        dict(type="castling", local_conv="grid", mask_threshold="1/N"),
    ),
}
SEEDS = range(3)


@HOOKS.register_module()
class SharedStartHook(Hook):
    """Start from the weights of the softmax detector wherever it has them.

    Args:
        seed: Of those weights, and of what training draws from then on.
        model: The softmax detector's config.
    """

    def __init__(self, seed: int, model: dict[str, Any]) -> None:
        self.seed = seed
        self.model = model

    def before_train(self, runner: Runner) -> None:
        torch.manual_seed(self.seed)
        softmax = MODELS.build(copy.deepcopy(self.model))
        softmax.init_weights()
        model = runner.model
        model = model.module if is_model_wrapper(model) else model
        own = model.state_dict(keep_vars=True)
        with torch.no_grad():
            for name, value in softmax.state_dict().items():
                own[name].copy_(value)
        torch.manual_seed(self.seed)


def config(
    name: str, seed: int, iterations: int, data_root: str, work_dir: str
) -> Config:
    """The whole config of a run."""
    options = {
        "data_root": data_root,
        "train_cfg.max_iters": iterations,
        "train_cfg.val_begin": iterations + 1,  # never: it is tested at the end
        "default_hooks.checkpoint.interval": iterations,
        "default_hooks.logger.interval": min(10, iterations),
        "randomness.seed": seed,
    }
    cfg = load_config(ROOT / CONFIG, options, work_dir)
    cfg.max_iters = iterations
    warm_up, cosine = cfg.param_scheduler
    warm_up.end = cosine.begin = min(WARM_UP, iterations // 4)
    cosine.end, cosine.T_max = iterations, iterations - cosine.begin
    softmax = copy.deepcopy(cfg.model.to_dict())
    softmax["backbone"]["attention"] = dict(ATTENTIONS["softmax"][1])
    cfg.model.backbone.attention = dict(ATTENTIONS[name][1])
    hooks = list(cfg.custom_hooks) if name == "decay" else []
    cfg.custom_hooks = [
        dict(type="SharedStartHook", seed=seed, model=softmax),
        *hooks,
    ]
    return cfg


def run_of(name: str, seed: int, iterations: int) -> Run:
    """A detector's run, its settings free of places on this machine."""
    cfg = config(name, seed, iterations, DATA_ROOT, "work_dir").to_dict()
    settings = {key: value for key, value in cfg.items() if not key.startswith("_")}
    for hook in settings["custom_hooks"]:
        hook.pop("model", None)  # the config's own, with softmax
    settings = dict(kind="detect", seed=seed, config=settings)
    return Run("nuclei", name, seed, json.loads(json.dumps(settings, default=str)))


def table_runs(iterations: int) -> list[Run]:
    """All detectors' runs, seed by seed."""
    return [run_of(name, seed, iterations) for seed in SEEDS for name in ATTENTIONS]


class Trainer:
    """Carries out runs.

    Args:
        data_root: Folder of the nuclei set.
        store: Where results go.
    """

    def __init__(self, data_root: str, store: Store) -> None:
        self.data_root = data_root
        self.store = store

    @staticmethod
    def headline(result: dict[str, Any]) -> str:
        """A result in a few words."""
        after = result["after"]
        return f"AP50 {after['bbox_mAP_50']:.3f} box, {after['segm_mAP_50']:.3f} mask"

    def carry_out(self, run: Run) -> dict[str, Any]:
        """Train, test before and after pruning, and store."""
        iterations = run.settings["config"]["train_cfg"]["max_iters"]
        with tempfile.TemporaryDirectory() as folder:
            cfg = config(run.name, run.seed, iterations, self.data_root, folder)
            test_cfg = copy.deepcopy(cfg)
            cfg.work_dir = f"{folder}/train"
            started = time.process_time()
            model = train(cfg)
            seconds = time.process_time() - started
            curve = _curve(Path(folder, "train"))
            (weights,) = Path(folder, "train").glob("iter_*.pth")
            result: dict[str, Any] = {}
            for key, deploy in (("before", False), ("after", True)):
                if deploy and run.name != "decay":  # there is nothing to prune
                    result["after"] = result["before"]
                    continue
                test_cfg.work_dir = f"{folder}/{key}"
                found = evaluate(test_cfg, weights, deploy=deploy).metrics
                result[key] = {k.removeprefix("coco/"): v for k, v in found.items()}
        cost = count_model_macs(switch_to_deploy(model).backbone, TRAIN_SIZE)
        result.update(
            train_cpu_seconds=round(seconds, 1),
            backbone_params=cost.params,
            backbone_macs=cost.macs,
            curve=curve,
        )
        self.store.save(run, result)
        return result


def _curve(work_dir: Path) -> dict[str, list[float]]:
    """Loss, and where there is one the density of the masks, over training."""
    (log,) = work_dir.glob("*/vis_data/scalars.json")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    lines = [line for line in lines if "loss" in line]
    curve = dict(step=[line["step"] for line in lines])
    for name in ("loss", "mask_density", "mask_threshold"):
        if lines and name in lines[0]:
            curve[name] = [line[name] for line in lines]
    return curve
