"""Record small networks of transformers and their features, for ``test_vit.py``.

Releases of transformers differ in their features, so the suite reads what this script
has written where that is installed, such as a folder of its own::

    pip install --target FOLDER transformers
    PYTHONPATH=FOLDER python tests/weights/record_transformers.py
"""

from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

FOLDER = Path(__file__).resolve().parent / "transformers"
SIZES = ((224, 224), (192, 256))
ARCH = dict(
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=16,
    layer_norm_eps=1e-6,
)


def picture(height: int, width: int) -> torch.Tensor:
    """An image ``(1, 3, H, W)`` that every release of torch makes alike."""
    count = torch.arange(3 * height * width, dtype=torch.float64)
    return (
        (torch.sin(count * 0.37) + torch.sin(count.sqrt()))
        .float()
        .view(1, 3, height, width)
    )


def main() -> None:
    for kind in ("ViT", "DeiT"):
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(**ARCH)
        model = getattr(transformers, f"{kind}Model")(config).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        folder = FOLDER / kind.lower()
        model.save_pretrained(folder)
        (folder / "config.json").unlink()
        memory = {n: v.contiguous() for n, v in model.state_dict().items()}
        save_file(memory, folder / "memory.safetensors")
        with torch.no_grad():
            features = {
                f"{height}x{width}": model(
                    picture(height, width), interpolate_pos_encoding=True
                ).last_hidden_state.contiguous()
                for height, width in SIZES
            }
        versions = dict(transformers=transformers.__version__, torch=torch.__version__)
        save_file(features, folder / "features.safetensors", metadata=versions)


if __name__ == "__main__":
    main()
