"""Options of training that follow the hardware: precision, and the batch's size."""

from __future__ import annotations

from mmengine.config import Config

from mmcastling.errors import ConfigError
from mmcastling.run.distributed import is_sharded
from mmcastling.train.amp import DTYPES

_REPLACED = ("OptimWrapper", "AmpOptimWrapper", "DeviceAmpOptimWrapper")


def enable_amp(cfg: Config, dtype: str | None = None) -> None:
    """Switch the optimizer wrapper to automatic mixed precision.

    Args:
        cfg: The config; its optimizer wrapper is changed in place.
        dtype: ``'float16'``, ``'bfloat16'``, or None for the config's own or else the
            device's usual one. Defaults to None.

    Raises:
        ConfigError: If the config has no optimizer wrapper, one of another kind, or the
            dtype is not known.
    """
    wrapper = cfg.get("optim_wrapper")
    if wrapper is None:
        raise ConfigError(
            f"--amp: config {cfg.filename} lacks optim_wrapper, which it would change"
        )
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(
            f"--amp {dtype!r} is not a half precision: choose one of {list(DTYPES)}"
        )
    kind = wrapper.get("type", "OptimWrapper")
    name = kind if isinstance(kind, str) else kind.__name__
    if name.split(".")[-1] not in _REPLACED:
        raise ConfigError(
            f"--amp changes an optim_wrapper of type {_REPLACED}, the config has "
            f"{name!r}: set the precision there, or train without --amp"
        )
    wrapper.type = "mmcastling.DeviceAmpOptimWrapper"
    if dtype is not None:
        wrapper.dtype = dtype
    if is_sharded(cfg):
        wrapper.setdefault("use_fsdp", True)


def enable_auto_scale_lr(cfg: Config) -> None:
    """Let the learning rate follow the batch size by the linear rule.

    A batch is what one step of the optimizer sees: images per process, times processes,
    times ``accumulative_counts``. MMEngine counts the first two, so the reference is
    divided by the third.

    Args:
        cfg: The config; its ``auto_scale_lr`` is changed in place.

    Raises:
        ConfigError: If the config does not say for which batch size it was written, or
            how many images a process takes.
    """
    base = (cfg.get("auto_scale_lr") or {}).get("base_batch_size")
    if base is None:
        raise ConfigError(
            "--auto-scale-lr needs auto_scale_lr=dict(base_batch_size=...) in the "
            "config"
        )
    if not isinstance(base, (int, float)) or base <= 0:
        raise ConfigError(
            f"--auto-scale-lr: base_batch_size {base!r} must be a positive number of "
            "images"
        )
    if "batch_size" not in (cfg.get("train_dataloader") or {}):
        raise ConfigError(
            "--auto-scale-lr needs train_dataloader=dict(batch_size=...) in the config"
        )
    counts = (cfg.get("optim_wrapper") or {}).get("accumulative_counts", 1)
    if counts > 1:
        cfg.auto_scale_lr.base_batch_size = base / counts
    cfg.auto_scale_lr.enable = True
