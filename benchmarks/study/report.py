"""The study's page and plots, from what is stored."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.castle_and_distil import STORED as DISTILLATION
from benchmarks.castle_and_distil import command as distillation_command
from benchmarks.study import nuclei
from benchmarks.study.plots import Curve, plot_curves, plot_means
from benchmarks.study.results import (
    Comparison,
    Results,
    Values,
    cell,
    comparison_table,
    listed,
    mean,
    sentence,
)
from benchmarks.study.statistics import paired
from benchmarks.study.store import Store
from benchmarks.study.text import (
    DECISIONS,
    DEFAULTS,
    DETECTORS,
    PREAMBLE,
    RESOLUTIONS,
    SCHEDULES,
    TIMED,
    UNKNOWN,
)
from benchmarks.study.variants import (
    PENALTY,
    RESIZED,
    SCALES,
    START,
    TABLE_A,
    TABLE_B,
    VARIANTS,
    Recipe,
    table_runs,
)
from mmcastling.checkpoint import write_text_atomically

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "study.md"
ASSETS = ROOT / "docs" / "assets"
COMMAND = "python -m benchmarks.study"

FULL = "decay"
# Names that read well inside a sentence.
SHORT = {
    "softmax": "softmax",
    "softmax-conv": "the softmax control",
    "swin": "Swin windows",
    "performer": "Performer",
    "efficient": "efficient attention",
    "relu": "ReLU-linear",
    "focused": "focused linear",
    "angular": "linear-angular",
    "angular-conv": "linear-angular + convolution",
    "fixed": "the fixed threshold",
    "decay": "the full method",
    "ffn-conv": "the full method + MLP convolution",
}
CONTRASTS = (
    ("softmax-conv", "softmax"),
    ("angular", "softmax"),
    ("angular-conv", "angular"),
    ("fixed", "angular-conv"),
    (FULL, "angular-conv"),
    (FULL, "fixed"),
    ("ffn-conv", FULL),
)
NUCLEI_SHORT = {
    "softmax": "softmax",
    "performer": "Performer",
    "angular": "linear-angular",
    "angular-conv": "linear-angular + convolution",
}


def write(store: Store, recipe: Recipe, iterations: int) -> None:
    """Write page and plots."""
    study = Study(store, recipe, iterations)
    study.plot(ASSETS)
    write_text_atomically(PAGE, study.page())


class Study:
    """Everything that is stored, and the page about it.

    Args:
        store: Where results are.
        recipe: How classifiers were trained.
        iterations: How long detectors were trained.
    """

    def __init__(self, store: Store, recipe: Recipe, iterations: int) -> None:
        self.recipe = recipe
        self.iterations = iterations
        self.a, self.b, self.c, self.d = (
            Results(store, table_runs(table, recipe)) for table in "abcd"
        )
        self.nuclei = Results(store, nuclei.table_runs(iterations))
        timing = store.folder / "timing.json"
        self.timing = json.loads(timing.read_text()) if timing.is_file() else None
        self.distillation = json.loads(DISTILLATION.read_text())

    def page(self) -> str:
        """The page in Markdown."""
        parts = [
            self._preamble(),
            self._attentions(),
            self._detectors(),
            self._schedules(),
            self._resolutions(),
            self._castling(),
            self._defaults(),
            UNKNOWN,
        ]
        return "\n".join(parts)

    # -- comparisons -------------------------------------------------------------------

    def contrast(self, one: str, other: str) -> Comparison:
        """Two attentions of table (a), deployed."""
        return Comparison.of(
            SHORT[one],
            SHORT[other],
            self.a.of(one, "accuracy"),
            self.a.of(other, "accuracy"),
        )

    def against_all(self) -> list[Comparison]:
        """The full method against every other attention."""
        others = [n for n in TABLE_A if n not in (FULL, "ffn-conv")]
        return [self.contrast(FULL, other) for other in others]

    def detectors(self, task: str) -> list[Comparison]:
        """The full method against the other detectors, deployed."""

        def values(name: str) -> Values:
            return self.nuclei.of(
                name, lambda result: 100 * result["after"][f"{task}_mAP_50"]
            )

        return [
            Comparison.of("the full method", title, values(FULL), values(name))
            for name, title in NUCLEI_SHORT.items()
        ]

    def schedules(self) -> list[Comparison]:
        """Other schedules against the default one, pruned."""
        default = self.b.of(FULL, "accuracy")
        return [
            Comparison.of(
                VARIANTS[name].title.removeprefix("+ "),
                "threshold decay, to 0.7",
                self.b.of(name, "accuracy"),
                default,
            )
            for name in TABLE_B
            if name not in (FULL, "angular-conv")
        ]

    def resized(self, name: str, scale: int, reference: bool) -> Values:
        """Accuracies at a resolution."""
        if scale == 1:
            return self.c.of(name, "accuracy")
        word = "reference" if reference else "plain"
        return self.c.of(f"{name}-x{scale}-{word}", "accuracy")

    def convolutions(self) -> list[Comparison]:
        """Convolution on the grid against that on the line, by resolution."""
        return [
            Comparison.of(
                f"grid at {scale}x",
                "line",
                self.resized("decay-grid", scale, False),
                self.resized("decay", scale, False),
            )
            for scale in SCALES
        ]

    def references(self) -> list[Comparison]:
        """``reference_tokens`` on against off, by convolution and resolution."""
        return [
            Comparison.of(
                f"{word}, {scale}x: on",
                "off",
                self.resized(name, scale, True),
                self.resized(name, scale, False),
            )
            for name, word in (("decay", "line"), ("decay-grid", "grid"))
            for scale in SCALES[1:]
        ]

    def castling(self) -> list[Comparison]:
        """Ways to a castled network against each other, deployed."""
        labels, taught, softmax, scratch = (
            self.d.of(name, "accuracy")
            for name in ("labels", "taught", "softmax", "decay-long")
        )
        return [
            Comparison.of("castled, taught", "castled, labels", taught, labels),
            Comparison.of("castled, labels", "from scratch", labels, scratch),
            Comparison.of("castled, taught", "from scratch", taught, scratch),
            Comparison.of("castled, labels", "softmax", labels, softmax),
        ]

    # -- sections ----------------------------------------------------------------------

    def _preamble(self) -> str:
        tables = (self.a, self.b, self.c, self.d, self.nuclei)
        missing = sorted({str(run) for table in tables for run in table.missing})
        text = PREAMBLE.format(
            command=COMMAND,
            train=self.recipe.train_images,
            test=self.recipe.test_images,
            epochs=self.recipe.epochs,
            seen=self.recipe.train_images * self.recipe.epochs,
        )
        if missing:
            text += (
                f"\n**{len(missing)} runs are not stored yet**; their rows say so, and "
                "comparisons use the seeds that both sides have, three at least. "
                f"`{COMMAND} TABLE` goes on where it stopped.\n"
            )
        full = sentence("On Fashion-MNIST the full method", self.against_all())
        found = [full]
        if self.nuclei.found:
            for task, word in (("bbox", "box"), ("segm", "mask")):
                subject = f"On the nuclei ({word} AP50) the full method"
                found.append(sentence(subject, self.detectors(task)))
        kernel = self.contrast(FULL, "softmax-conv")
        convolution = self.contrast("softmax-conv", "softmax")
        branch = self.contrast(FULL, "angular-conv")
        found.append(
            "What the convolution and the output norm do to softmax alone: "
            f"{cell(convolution.difference, 1, True)} points ({convolution.verdict}). "
            "What is left to kernel and branch, the full method against that control: "
            f"{cell(kernel.difference, 1, True)} ({kernel.verdict}). What the branch "
            "and its decay add to linear-angular attention with the convolution: "
            f"{cell(branch.difference, 1, True)} ({branch.verdict})."
        )
        found.append(
            "Pruning a branch that is off changed the prediction of "
            f"{self._changed()} test images; see (b) for branches that were not off."
        )
        return text + "\n## What was found\n\n" + _bullets(found)

    def _changed(self) -> str:
        names = [n for n in TABLE_B if n.startswith(("decay", "fade"))]
        changed = [
            value
            for name in names
            for value in self.b.of(name, "changed_by_pruning").values()
        ]
        return "no" if not any(changed) else f"up to {max(changed):.2f}% of the"

    def _attentions(self) -> str:
        seconds = self._step_seconds()
        lines = [
            "| attention | seeds | before pruning | accuracy | parameters "
            "| MMACs, branch on | MMACs | training step, ms |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for name in TABLE_A:
            accuracy = self.a.of(name, "accuracy")
            before = self.a.of(name, "accuracy_before")
            if not accuracy:
                lines.append(f"| {VARIANTS[name].title} | 0 | not run | | | | | |")
                continue
            branch = VARIANTS[name].hook is not None
            on = f"{self._macs_with_branch():.2f}" if name in ("fixed", FULL) else ""
            lines.append(
                f"| {VARIANTS[name].title} | {len(accuracy)} "
                f"| {cell(mean(before)) if branch else ''} | {cell(mean(accuracy))} "
                f"| {self.a.any(name, 'params'):,} | {on} "
                f"| {self.a.any(name, 'macs') / 1e6:.2f} | {seconds.get(name, '')} |"
            )
        comparisons = [self.contrast(*pair) for pair in CONTRASTS]
        timed = ""
        if self.timing is not None:
            timed = TIMED.format(
                rounds=len(next(iter(self.timing["seconds"].values()))),
                batch=self.timing["batch_size"],
                threads=self.timing["environment"]["threads"],
                decayed=seconds["decayed"],
            )
        return (
            f"\n## (a) Attentions on Fashion-MNIST\n\n`{COMMAND} a`: percent of "
            f"{self.recipe.test_images:,} test images.\n\n"
            + "\n".join(lines)
            + f"\n\n{timed}\n![Accuracy and AP50 with intervals]"
            "(assets/study_accuracy.png)\n\nThe steps between the rows, paired by "
            "seed:\n\n"
            + comparison_table(comparisons, "points", 1)
            + "\nThe full method against every other attention:\n\n"
            + comparison_table(self.against_all(), "points", 1)
        )

    def _macs_with_branch(self) -> float:
        return self.a.any("fixed", "macs_before") / 1e6

    def _step_seconds(self) -> dict[str, str]:
        if self.timing is None:
            return {}
        medians = {
            name: f"{1e3 * statistics.median(values):.0f}"
            for name, values in self.timing["seconds"].items()
        }
        if "fixed" in medians:
            medians[FULL] = f"{medians['fixed']}, then {medians['decayed']}"
        return medians

    def _detectors(self) -> str:
        head = DETECTORS.format(command=COMMAND, iterations=self.iterations)
        if not self.nuclei.found:
            return head + "\nNot run yet.\n"
        lines = [
            "| attention | seeds | box AP50 before | box AP50 | mask AP50 before "
            "| mask AP50 | backbone parameters | backbone GMACs | training, CPU s |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for name, (title, _) in nuclei.ATTENTIONS.items():
            figures = self.nuclei.of(name, "train_cpu_seconds")
            if not figures:
                lines.append(f"| {title} | 0 | not run | | | | | | |")
                continue
            scores = [
                cell(mean(self._ap(name, task, when)))
                if when == "after" or name == FULL
                else ""
                for task in ("bbox", "segm")
                for when in ("before", "after")
            ]
            lines.append(
                f"| {title} | {len(figures)} | {' | '.join(scores)} "
                f"| {self.nuclei.any(name, 'backbone_params'):,} "
                f"| {self.nuclei.any(name, 'backbone_macs') / 1e9:.3f} "
                f"| {statistics.median(figures.values()):.0f} |"
            )
        return (
            head
            + "\n"
            + "\n".join(lines)
            + "\n\nBox AP50:\n\n"
            + comparison_table(self.detectors("bbox"), "points of AP50", 1)
            + "\nMask AP50:\n\n"
            + comparison_table(self.detectors("segm"), "points of AP50", 1)
        )

    def _ap(self, name: str, task: str, when: str) -> Values:
        return self.nuclei.of(name, lambda r: 100 * r[when][f"{task}_mAP_50"])

    def _schedules(self) -> str:
        lines = [
            "| schedule | seeds | before pruning | pruned | pruning costs "
            "| predictions it changes | density at 0, 1/4, 1/2, 1 |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        for name in TABLE_B:
            title = VARIANTS[name].title.removeprefix("+ ")
            if name == FULL:
                title = "threshold decay, to 0.7 (default)"
            if name == "angular-conv":
                title = "no branch at all"
            before, after = (
                self.b.of(name, key) for key in ("accuracy_before", "accuracy")
            )
            if not after:
                lines.append(f"| {title} | 0 | not run | | | | |")
                continue
            changed = statistics.fmean(self.b.of(name, "changed_by_pruning").values())
            lines.append(
                f"| {title} | {len(after)} | {cell(mean(before))} "
                f"| {cell(mean(after))} | {cell(paired(before, after), 2)} "
                f"| {changed:.2f}% | {self._densities(name)} |"
            )
        return (
            SCHEDULES.format(command=COMMAND, start=START, penalty=PENALTY)
            + "\n".join(lines)
            + "\n\n![Density of the masks over training]"
            "(assets/study_density.png)\n\nAgainst the default schedule, pruned:\n\n"
            + comparison_table(self.schedules(), "points", 1)
        )

    def _density_curve(self, name: str) -> Curve | None:
        curves = [result["curve"] for result in self.b.found.get(name, {}).values()]
        curves = [curve for curve in curves if "density" in curve]
        if not curves:
            return None
        steps = curves[0]["step"]
        values = zip(*(curve["density"] for curve in curves), strict=True)
        return [s / steps[-1] for s in steps], [statistics.fmean(v) for v in values]

    def _densities(self, name: str) -> str:
        curve = self._density_curve(name)
        if curve is None:
            return ""
        progress, values = curve
        shown = []
        for point in (0.0, 0.25, 0.5, 1.0):
            nearest = min(range(len(progress)), key=lambda i: abs(progress[i] - point))
            shown.append(f"{values[nearest]:.2g}")
        return ", ".join(shown)

    def _resolutions(self) -> str:
        lines = [
            "| deployed network | `reference_tokens` | 1x | 2x | 4x |",
            "| --- | --- | --- | --- | --- |",
        ]
        titles = {"softmax": "softmax", "decay": "line (1-D)", "decay-grid": "grid"}
        for name in RESIZED:
            for reference in (False, True) if name != "softmax" else (False,):
                cells = [
                    cell(mean(self.resized(name, scale, reference))) for scale in SCALES
                ]
                word = "" if name == "softmax" else ("on" if reference else "off")
                lines.append(f"| {titles[name]} | {word} | {' | '.join(cells)} |")
        return (
            RESOLUTIONS.format(command=COMMAND, few=self.recipe.test_images_x4)
            + "\n".join(lines)
            + "\n\nThe convolution, with `reference_tokens` off:\n\n"
            + comparison_table(self.convolutions(), "points", 1)
            + "\n`reference_tokens`:\n\n"
            + comparison_table(self.references(), "points", 1)
        )

    def _castling(self) -> str:
        recipe = self.recipe
        epochs, more = recipe.epochs, recipe.finetune_epochs
        teacher = {
            seed: value
            for seed, value in self.a.of("softmax", "accuracy").items()
            if seed < 3
        }
        rows: dict[str, Values] = {
            f"softmax, {epochs} epochs (the start and the teacher)": teacher,
            f"softmax, {more} epochs more": self.d.of("softmax", "accuracy"),
            "castled, pruned, not finetuned": self.d.of("labels", "accuracy_castled"),
            f"castled, {more} epochs on labels, before pruning": self.d.of(
                "labels", "accuracy_before"
            ),
            f"castled, {more} epochs on labels": self.d.of("labels", "accuracy"),
            f"castled, {more} epochs with the teacher": self.d.of("taught", "accuracy"),
            f"full method from scratch, {epochs + more} epochs": self.d.of(
                "decay-long", "accuracy"
            ),
        }
        lines = ["| network | seeds | accuracy |", "| --- | --- | --- |"]
        lines += [
            f"| {title} | {len(values)} | {cell(mean(values))} |"
            for title, values in rows.items()
        ]
        return (
            f"\n## (d) Castling a trained network\n\n`{COMMAND} d`: the softmax "
            "networks of (a) are castled and finetuned while the masks decay, with "
            "labels alone or half of the loss from the softmax network itself (soft, "
            "T 2); the softmax network is finetuned alike. From scratch the full "
            "method gets the epochs of both stages together.\n\n"
            + "\n".join(lines)
            + "\n\n"
            + comparison_table(self.castling(), "points", 1)
            + self._other_castling()
        )

    def _other_castling(self) -> str:
        runs, settings = self.distillation["runs"], self.distillation["settings"]

        def values(name: str) -> Values:
            return {int(seed): run[name] for seed, run in runs.items()}

        taught = paired(values("taught_pruned"), values("labels_pruned"))
        softmax = paired(values("labels_pruned"), values("softmax_finetuned"))
        return (
            f"\nAn independent run, `{distillation_command([])}` "
            f"([distillation](distillation.md): {settings['train_images']:,} images "
            "with flips and shifts, 4 layers of 64 channels, a class token), found "
            f"{cell(taught, 1, True)} points for the teacher and "
            f"{cell(softmax, 1, True)} for castled on labels against softmax "
            f"finetuned alike, over {len(runs)} seeds.\n"
        )

    def _defaults(self) -> str:
        return DEFAULTS + _bullets(
            [
                self._decision("hook", self.schedules()),
                self._decision("convolution", self.convolutions()),
                self._decision("reference", self.references()),
            ]
        )

    def _decision(self, what: str, comparisons: list[Comparison]) -> str:
        better, worse, same, unknown = (
            [c.one for c in comparisons if c.verdict == verdict]
            for verdict in ("higher", "lower", "not told apart", "not measured")
        )
        parts = [
            f"{words} {listed([name.removesuffix(': on') for name in names])}"
            for words, names in (
                ("better in", better),
                ("worse in", worse),
                ("not told apart in", same),
                ("not measured in", unknown),
            )
            if names
        ]
        return DECISIONS[what] + "; ".join(parts) + "."

    # -- plots -------------------------------------------------------------------------

    def plot(self, folder: Path) -> None:
        """Write the plots."""
        series: dict[str, Any] = {
            VARIANTS[name].title: mean(self.a.of(name, "accuracy")) for name in TABLE_A
        }
        panels = {"test accuracy, percent": {"deployed": _present(series)}}
        detectors = {
            when: _present(
                {
                    title: mean(self._ap(name, "bbox", "after"))
                    if when == "box"
                    else mean(self._ap(name, "segm", "after"))
                    for name, (title, _) in nuclei.ATTENTIONS.items()
                }
            )
            for when in ("box", "mask")
        }
        if detectors["box"]:
            panels["AP50 on nuclei, percent"] = detectors
        plot_means(panels, folder / "study_accuracy.png")
        curves = {
            VARIANTS[name].title.removeprefix("+ "): curve
            for name in TABLE_B
            if (curve := self._density_curve(name)) is not None
        }
        label = "pairs that survive the mask"
        plot_curves(curves, label, folder / "study_density.png")


def _present(series: dict[str, Any]) -> dict[str, Any]:
    return {title: value for title, value in series.items() if value is not None}


def _bullets(sentences: list[str]) -> str:
    return "".join(f"- {text}\n" for text in sentences)
