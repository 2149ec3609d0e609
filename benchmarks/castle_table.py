"""Castle every model of timm, without weights, and write the table of docs/castle.md.

python benchmarks/castle_table.py          # try models, store the result
python benchmarks/castle_table.py --docs   # write the page from the stored result

Models are built on the meta device. Of each family (a module of ``timm.models``) the
first two, a middle one and the last by name are tried, which takes minutes, and the
architectures that people run; with ``--all``, every model, which takes an hour.
"""

import argparse
import json
import logging
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import timm
import torch
from marked import replace_between

from mmcastling.castle import castle
from mmcastling.castle.swap import NothingToCastle
from mmcastling.checkpoint import write_json_atomically, write_text_atomically

ROOT = Path(__file__).resolve().parents[1]
STORED = ROOT / "benchmarks" / "results" / "castle_table.json"
PAGE = ROOT / "docs" / "castle.md"
BEGIN, END = "<!-- castle-table -->\n", "<!-- /castle-table -->"

# The architectures that stand for what people run.
_NAMES = """
vit_tiny_patch16_224 deit3_small_patch16_224 vit_small_patch14_dinov2
vit_small_patch14_reg4_dinov2 vit_small_patch16_dinov3 vit_tiny_r_s16_p8_224
vit_small_patch16_rope_224 samvit_base_patch16_224 beit_base_patch16_224
beitv2_base_patch16_224 eva02_tiny_patch14_224 swin_tiny_patch4_window7_224
swinv2_tiny_window8_256 swinv2_cr_tiny_224 mvitv2_tiny levit_128 cait_xxs24_224
xcit_nano_12_p16_224 pit_ti_224 tnt_s_patch16_224 twins_pcpvt_small twins_svt_small
pvt_v2_b0 crossvit_tiny_240 convit_tiny volo_d1_224 coat_tiny maxvit_nano_rw_256
maxvit_tiny_tf_224 coatnet_0_rw_224 mobilevit_s mobilevitv2_050 efficientvit_b0
efficientformer_l1 efficientformerv2_s0 davit_tiny hiera_tiny_224 tiny_vit_5m_224
fastvit_sa12 nextvit_small gcvit_xxtiny edgenext_xx_small botnet26t_256 halonet26t
lambda_resnet26t nest_tiny visformer_tiny vit_base_patch16_clip_224
naflexvit_base_patch16_gap vit_pe_core_tiny_patch16_384 vit_wee_patch16_reg1_gap_256
vit_little_patch16_reg4_gap_256 vit_so150m_patch16_reg4_gap_256 test_vit test_vit2
vit_relpos_small_patch16_224 caformer_s18 deepseek_vit_412m
"""
NAMES = _NAMES.split()


def trial(name: str) -> dict[str, Any]:
    """What castling does to a model: castled attentions, reasons of the others."""
    with torch.device("meta"):
        model = timm.create_model(name)
    family = type(model).__module__.rpartition(".")[2]
    try:
        _, report = castle(model, return_report=True)
        count, left = len(report.castled), report.left_alone
    except NothingToCastle as error:
        count, left = 0, error.left_alone
    return dict(family=family, castled=count, left_alone=dict(Counter(left.values())))


def chosen(every: bool) -> list[str]:
    """Names of the models to try."""
    families: dict[str, list[str]] = {}
    for name in timm.list_models():
        module = timm.models.model_entrypoint(name).__module__
        if module.startswith("timm."):  # and not ours, which are registered there
            families.setdefault(module, []).append(name)
    names = set(NAMES)
    for members in families.values():
        few = [*members[:2], members[len(members) // 2], members[-1]]
        names.update(members if every else few)
    return sorted(names)


def run(every: bool = False) -> dict[str, Any]:
    """Try models of timm."""
    results = {}
    for name in chosen(every):
        try:
            results[name] = trial(name)
        except Exception as error:  # of timm's: some need an argument or a package
            results[name] = dict(error=f"{type(error).__name__}: {error}"[:200])
        print(name, results[name], flush=True)
    versions = dict(timm=timm.__version__, torch=torch.__version__)
    return dict(versions, every=every, models=results)


def table(stored: dict[str, Any]) -> str:
    """The page's part that is generated, in Markdown."""
    built = {n: r for n, r in stored["models"].items() if "error" not in r}
    castled = [n for n, r in built.items() if r["castled"]]
    plain = [n for n, r in built.items() if not r["castled"] and not r["left_alone"]]
    refused = len(built) - len(castled) - len(plain)
    unknown = [n for n, r in built.items() if "no adapter" in r["left_alone"]]
    named = [n for n in NAMES if built.get(n, {}).get("castled")]
    which = "all" if stored["every"] else "a few of each family,"
    lines = [
        f"Of {which} {len(built)} models of timm {stored['timm']}, "
        f"{len(castled)} are castled, {refused} are refused with the reason, and "
        f"{len(plain)} hold no attention. "
        f"In {len(unknown)} an attention is left alone for want of an adapter. "
        f"Of {len(NAMES)} architectures that people run, {len(named)} are castled.",
        "",
        "| family | models | castled | left alone, and why |",
        "| --- | --- | --- | --- |",
    ]
    families: dict[str, list[dict[str, Any]]] = {}
    for row in built.values():
        if row["castled"] or row["left_alone"]:
            families.setdefault(row["family"], []).append(row)
    for family, rows in sorted(families.items()):
        reasons = sorted({reason for row in rows for reason in row["left_alone"]})
        count = sum(bool(row["castled"]) for row in rows)
        said = "; ".join(reasons)
        lines.append(f"| `{family}` | {len(rows)} | {count} | {said} |")
    if left := [n for n in NAMES if n not in named]:
        lines += ["", "Of those that people run, not castled: " + ", ".join(left) + "."]
    option = " --all" if stored["every"] else ""
    lines += ["", f"`python benchmarks/castle_table.py{option}`", ""]
    return "\n".join(lines)


def page_with(stored: dict[str, Any], text: str) -> str:
    """The page's text with the table between its two marks."""
    return replace_between(text, BEGIN, END, table(stored))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--docs", action="store_true", help="write the page only")
    parser.add_argument("--all", action="store_true", help="try every model")
    args = parser.parse_args()
    if not args.docs:
        warnings.simplefilter("ignore")
        logging.getLogger("mmcastling").setLevel(logging.ERROR)
        write_json_atomically(STORED, run(args.all))
    stored = json.loads(STORED.read_text())
    write_text_atomically(PAGE, page_with(stored, PAGE.read_text()))


if __name__ == "__main__":
    main()
