"""Write the README's demo table and pictures from a run of ``make demo``.

python benchmarks/demo_table.py --from work_dirs/demo   # store a run, then write
python benchmarks/demo_table.py                         # write from the stored run
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from marked import replace_between

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
ASSETS = ROOT / "docs" / "assets"
STORED = ASSETS / "demo.json"
BEGIN, END = "<!-- demo-table -->\n", "<!-- /demo-table -->"
ROWS = {"train_graph": "training graph", "deploy": "deployed graph"}


def table(summary: dict[str, Any]) -> str:
    """The table and its caption, in Markdown."""
    height, width = summary["image_size"]
    lines = [
        "| | bbox AP | bbox AP50 | segm AP | segm AP50 | GMACs | s / image |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for key, label in ROWS.items():
        row = summary[key]
        metrics = ("bbox_mAP", "bbox_mAP_50", "segm_mAP", "segm_mAP_50")
        cells = [f"{row[name]:.3f}" for name in metrics]
        cells += [f"{row['macs'] / 1e9:.2f}", f"{row['seconds_per_image']:.3f}"]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    caption = (
        f"\nOne run, one seed, {summary['seconds'] / 60:.1f} minutes in all on "
        f"{summary['threads']} CPU threads, torch {summary['torch']}, "
        f"{summary['params'] / 1e6:.2f} M parameters, {height}x{width} pixels. AP of "
        "the training graph is that of its last state, masks at zero; its MACs and "
        "time are those with the softmax branch on. Largest difference of features "
        f"between the last state and the deployed graph: {summary['max_abs_diff']:.2g}."
        "\n"
    )
    return "\n".join(lines) + "\n" + caption


def readme_with(summary: dict[str, Any], text: str) -> str:
    """The README's text with the table between its two marks."""
    return replace_between(text, BEGIN, END, table(summary))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--from", dest="run", type=Path, help="work directory of a run")
    args = parser.parse_args()
    if args.run is not None:
        summary = json.loads((args.run / "summary.json").read_text())
        del summary["data_root"]
        ASSETS.mkdir(parents=True, exist_ok=True)
        STORED.write_text(json.dumps(summary, indent=2) + "\n")
        for name in ("mask_density.png", "predictions.png"):
            shutil.copy(args.run / name, ASSETS / name)
    summary = json.loads(STORED.read_text())
    README.write_text(readme_with(summary, README.read_text()))


if __name__ == "__main__":
    main()
