"""Whether all of it is right on a device, and how fast against fused softmax.

python benchmarks/device_check.py                    # the first GPU; eight minutes
python benchmarks/device_check.py --device cpu --quick
python benchmarks/device_check.py --parts correctness layers

Parts, in order: ``correctness`` of every form of attention, of the auxiliary branch, of
decay and deployment, of automatic mixed precision and of ``torch.compile``, against the
CPU in float64; ``layers`` at 196 to 16,384 tokens and ``models`` at 224 to 2,048 pixels
against softmax through torch's fused kernels in bfloat16, forward and training step,
with memory; a whole ``detector``, which alone needs OpenMMLab. Whatever is wrong is
listed in the end, and the exit status is then 1. The result is stored as
``benchmarks/results/device_check/DEVICE.json``.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mmcastling
from mmcastling.analysis import paired_medians
from mmcastling.analysis.machine import PeakMemory, environment, instruction_set
from mmcastling.attention import MIXERS, Attention, masked_softmax_attention
from mmcastling.checkpoint import write_json_atomically
from mmcastling.errors import OptionError, UnavailableError
from mmcastling.run import run_cli

STORED = Path(__file__).resolve().parent / "results" / "device_check"
PARTS = ("correctness", "layers", "models", "detector")
SECONDS = 480
"""For all of it: what is left then is named and left out."""

CHANNELS, HEADS, GRID = 48, 3, (6, 8)
FORMS: dict[str, dict[str, Any]] = {
    "castling": dict(type="castling"),
    "castling, average form": dict(type="castling", form="average", center_keys=True),
    "castling, learned form": dict(type="castling", form="learned", center_keys=True),
    "castling, by landmarks": dict(type="castling", form="landmarks", landmarks=4),
    "castling, on the grid": dict(type="castling", local_conv="grid"),
    **{name: dict(type=name) for name in sorted(MIXERS) if name != "castling"},
}
TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}
LAYER_TOKENS = (196, 1024, 4096, 8192, 16384)
LAYER_CHANNELS, LAYER_HEADS = 384, 6
SIDES = (224, 512, 1024, 2048)
REPEATS = 7


# -- correctness -----------------------------------------------------------------------


def gradients_and_outputs(
    run: Callable[..., Tensor], inputs: list[Tensor], module: nn.Module | None = None
) -> list[Tensor]:
    """What a function gives, and gradients of inputs and parameters, in float64."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    y = run(*inputs)
    noise = torch.Generator().manual_seed(1)
    weights = torch.randn(y.shape, generator=noise, dtype=torch.float64).to(y)
    wanted = (
        [*inputs, *(p for p in module.parameters() if p.requires_grad)]
        if (module is not None)
        else inputs
    )
    found = torch.autograd.grad((y * weights).sum(), wanted, allow_unused=True)
    return [x.detach().cpu().double() for x in (y, *found) if x is not None]


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest error of several tensors, in units of the largest value of each."""
    worst = 0.0
    for one, other in zip(found, expected, strict=True):
        error = (one - other).abs().max() / other.abs().max().clamp(min=1e-12)
        worst = max(worst, error.item() if torch.isfinite(error) else float("inf"))
    return worst


def attention_pair(
    options: dict[str, Any], device: torch.device
) -> tuple[nn.Module, nn.Module]:
    """An attention on the CPU in float64, and the same on a device in float32."""
    torch.manual_seed(0)
    layer = Attention(CHANNELS, HEADS, **options).eval()
    for name, parameter in layer.named_parameters():
        if "mixer" in name:
            nn.init.normal_(parameter, std=0.3)
    other = Attention(CHANNELS, HEADS, **options).eval()
    other.load_state_dict(layer.state_dict())
    return layer.double(), other.to(device)


def correctness(device: torch.device) -> Iterator[tuple[str, float, float]]:
    """Names, errors, and how large the errors may be."""
    tokens = torch.randn(2, GRID[0] * GRID[1], CHANNELS, dtype=torch.float64)
    on_device = tokens.to(device, torch.float32)
    limit = TOLERANCES[torch.float32]
    for name, options in FORMS.items():
        exact, ours = attention_pair(options, device)
        for threshold in (
            (0.0, "1/N", 1.0) if options["type"] == "castling" else (None,)
        ):
            if threshold is not None:
                mmcastling.set_mask(exact, threshold)
                mmcastling.set_mask(ours, threshold)
            passes = (functools.partial(m, grid=GRID) for m in (exact, ours))
            expected, found = (
                gradients_and_outputs(run, [x], m)
                for run, x, m in zip(
                    passes, (tokens, on_device), (exact, ours), strict=True
                )
            )
            where = "" if threshold is None else f", masks at {threshold}"
            yield f"{name}{where}", difference(found, expected), limit
        with torch.no_grad():
            expected = exact(tokens, grid=GRID)
            for dtype in (torch.float16, torch.bfloat16):
                with torch.autocast(device.type, dtype):
                    y = ours(on_device, grid=GRID)
                error = difference([y.cpu().double()], [expected])
                yield f"{name}, autocast {dtype}", error, TOLERANCES[dtype]
            deployed = mmcastling.switch_to_deploy(ours)
            y = deployed(on_device, grid=GRID)
            yield f"{name}, deployed", difference([y.cpu().double()], [expected]), limit
            torch.compiler.reset()  # or after some layers it compiles no more
            compiled = torch.compile(deployed, dynamic=False)
            y = compiled(on_device, grid=GRID)
            yield f"{name}, compiled", difference([y.cpu().double()], [expected]), limit
    yield from branch_correctness(device)


def branch_correctness(device: torch.device) -> Iterator[tuple[str, float, float]]:
    """The bounded auxiliary branch, with a bias, against its plain form."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, HEADS, 300, 16, dtype=torch.float64).unbind()
    bias = torch.randn(1, HEADS, 300, 300, dtype=torch.float64)
    inputs = [q, k, v, bias]
    for threshold in (0.002, "4/N"):
        run = functools.partial(masked_softmax_attention, threshold=threshold)
        expected = gradients_and_outputs(run, inputs)
        found = gradients_and_outputs(run, [x.to(device).float() for x in inputs])
        error = difference(found, expected)
        yield f"auxiliary branch at {threshold}", error, TOLERANCES[torch.float32]


# -- speed -----------------------------------------------------------------------------


def milliseconds_and_bytes(
    run: Callable[[], Any], device: torch.device, repeats: int
) -> tuple[float, int | None]:
    """The median of passes, and the most memory that the first one held."""
    run()
    try:
        with PeakMemory(device.type) as peak:
            run()
        most = peak.bytes
    except UnavailableError:
        most = None
    medians = paired_medians({"run": run}, repeats, warm=True)
    return 1e3 * medians["run"], most


def training_step(module: nn.Module, x: Tensor) -> Callable[[], None]:
    """A forward and backward pass of a module in training."""

    def run() -> None:
        for parameter in module.parameters():
            parameter.grad = None
        y = module(x)
        (y[-1] if isinstance(y, tuple) else y).float().mean().backward()

    return run


def compare(
    build: Callable[[dict[str, Any]], nn.Module],
    x: Tensor,
    device: torch.device,
    repeats: int,
) -> dict[str, Any]:
    """Softmax, castled with its branch on, and deployed: milliseconds and bytes."""
    kinds = {
        "softmax": dict(type="softmax"),
        "castled": dict(type="castling", local_conv=None, mask_threshold="4/N"),
        "linear": dict(type="castling", local_conv=None, mask_threshold=1.0),
    }
    found: dict[str, Any] = {}
    for name, attention in kinds.items():
        torch.manual_seed(0)
        module = build(attention).to(device, torch.bfloat16)
        module.train()
        cell = milliseconds_and_bytes(training_step(module, x), device, repeats)
        found[f"{name}, training step"] = cell
        if name == "castled":
            continue
        module.eval()
        module = mmcastling.switch_to_deploy(module)
        with torch.inference_mode():
            run = functools.partial(module, x)
            found[name] = milliseconds_and_bytes(run, device, repeats)
            if name == "linear":
                run = functools.partial(torch.compile(module, dynamic=False), x)
                cell = milliseconds_and_bytes(run, device, repeats)
                found["linear, compiled"] = cell
    return found


def layer_cells(device: torch.device, quick: bool) -> Iterator[tuple[str, Any]]:
    """Attention layers with their projections, batch 1."""
    for count in LAYER_TOKENS[: 2 if quick else None]:

        def build(attention: dict[str, Any]) -> nn.Module:
            return Attention(LAYER_CHANNELS, LAYER_HEADS, **attention)

        def run(count: int = count) -> dict[str, Any]:
            x = torch.randn(
                1, count, LAYER_CHANNELS, device=device, dtype=torch.bfloat16
            )
            return compare(build, x, device, 3 if quick else REPEATS)

        yield f"{count} tokens", run


def model_cells(device: torch.device, quick: bool) -> Iterator[tuple[str, Any]]:
    """Plain vision transformers with patches of 16 pixels, batch 1."""
    import timm

    names = {"ViT-S": "vit_small_patch16_224", "ViT-B": "vit_base_patch16_224"}
    for side in SIDES[: 1 if quick else None]:
        for title, name in list(names.items())[: 1 if quick else None]:

            def build(
                attention: dict[str, Any], name: str = name, side: int = side
            ) -> nn.Module:
                model = timm.create_model(name, img_size=side, num_classes=10)
                if attention["type"] == "softmax":
                    return model
                return mmcastling.castle(model, **attention)

            def run(build: Any = build, side: int = side) -> dict[str, Any]:
                x = torch.randn(1, 3, side, side, device=device, dtype=torch.bfloat16)
                return compare(build, x, device, 3 if quick else REPEATS)

            yield f"{title} at {side}x{side}", run


def detector_cells(device: torch.device, quick: bool) -> Iterator[tuple[str, Any]]:
    """Mask R-CNN with Castling-S and with its softmax twin, from tensor to result."""
    height, width = (256, 256) if quick else (800, 1344)

    def run() -> dict[str, Any]:
        from mmdet.structures import DetDataSample

        from mmcastling.run import load_config
        from mmcastling.run.load import build_model

        found = {}
        for kind in ("softmax", "castling"):
            config = Path("configs") / f"mask_rcnn_{kind}_s_coco.py"
            model = build_model(load_config(STORED.parents[2] / config))
            model.eval()
            if kind == "castling":
                mmcastling.set_mask(model, 1.0)
            model = mmcastling.switch_to_deploy(model).to(device)
            sample = DetDataSample(
                metainfo=dict(
                    img_shape=(height, width),
                    ori_shape=(height, width),
                    pad_shape=(height, width),
                    batch_input_shape=(height, width),
                    scale_factor=(1.0, 1.0),
                )
            )
            x = torch.randn(1, 3, height, width, device=device)
            one_pass = functools.partial(model, x, [sample], mode="predict")
            with torch.inference_mode():
                for precision in (None, torch.bfloat16):
                    with torch.autocast(
                        device.type, precision, enabled=bool(precision)
                    ):
                        cell = milliseconds_and_bytes(one_pass, device, 3)
                    found[f"{kind}{', bf16' if precision else ''}"] = cell
        return found

    yield f"Mask R-CNN at {height}x{width}", run


# -- the command -----------------------------------------------------------------------


def chosen_device(name: str | None) -> torch.device:
    """The device of that name, or the first GPU."""
    if name is None:
        if not torch.cuda.is_available():
            raise UnavailableError(
                f"torch {torch.__version__} finds no GPU: run it where there is one, "
                "or try the command with --device cpu --quick"
            )
        name = "cuda"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise OptionError(f"--device {name!r} is not there: {reason}") from error
    return device


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", help="such as cuda:1 or cpu (the first GPU)")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    add("--quick", action="store_true", help="the smallest sizes alone; not stored")
    add("--seconds", type=float, default=SECONDS, help=f"({SECONDS})")
    add("--json", type=Path, help="file to write (results/device_check/DEVICE.json)")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    device = chosen_device(args.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    began, wrong = time.monotonic(), []
    result: dict[str, Any] = dict(environment=environment(device.type))
    print(result["environment"], flush=True)
    if "correctness" in args.parts:
        result["correctness"] = {}
        for name, error, limit in correctness(device):
            result["correctness"][name] = dict(error=error, limit=limit)
            state = "right" if error <= limit else "WRONG"
            print(f"{state}  {error:9.2e} of {limit:.0e}  {name}", flush=True)
            if error > limit:
                wrong.append(f"{name}: {error:.2e}, expected at most {limit:.0e}")
    for part, cells in (
        ("layers", layer_cells),
        ("models", model_cells),
        ("detector", detector_cells),
    ):
        if part not in args.parts:
            continue
        result[part] = {}
        for name, run in cells(device, args.quick):
            if time.monotonic() - began > args.seconds:
                result[part][name] = "left out: no time"
                print(f"{name}: left out, as {args.seconds:.0f} s have passed")
                continue
            try:
                result[part][name] = found = run()
            except torch.OutOfMemoryError as error:
                result[part][name] = f"out of memory: {error}"
                print(f"{name}: out of memory")
                continue
            print(name, flush=True)
            for kind, (milliseconds, most) in found.items():
                memory = "" if most is None else f"{most / 1e6:9,.0f} MB"
                print(f"  {kind:<24}{milliseconds:10,.2f} ms{memory}", flush=True)
    path = args.json
    if path is None and not args.quick and device.type != "cpu":
        path = STORED / f"{instruction_set(device)}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
    if path is not None:
        write_json_atomically(path, result)
        print(f"wrote {path}")
    if wrong:
        print("\n".join(["", "wrong on this device:", *wrong]))
        sys.exit(1)


if __name__ == "__main__":
    run_cli(main)
