"""Plots of results against the compression rate, a panel for each data set, beside the paper's curves.

    python -m evaluation.plot_results DIR [DIR…] [--output_dir plots] [--metric f1] [--setting oracle]
    python -m evaluation.plot_results [DIR…] --figure main_recall --output_dir figs

A DIR is one that evaluation.evaluate wrote, or holds such directories; DIR=LABEL names its curve, which is needed
where two checkpoints have the same base model and rate. Without a DIR only the paper's curves are drawn. The pictures
are PNG files named after metric and setting.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evaluation.paper import PAPER_DATASETS, PAPER_LABEL, paper_figures
from evaluation.report_data import DATASET_LABELS, SYSTEM_LABELS, find_results, own_name, read_results
from evaluation.scoring import AVERAGE, METRICS, SYSTEM

DEFAULT_METRICS = ("recall_1", "recall_3", "recall_5", "f1", "cover_em")
# Okabe and Ito's colours, told apart with any colour vision; the first is for CLaRa's curves.
CLARA_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
BASELINE_COLORS = {
    "closed_book": "#56B4E9",
    "text_rag": "#882255",
    "oracle_text": "#332288",
    "text_rag_tuned": "#CC6677",
    "oracle_text_tuned": "#6699CC",
    "llmlingua2": "#AA4499",
    "random": "#999933",
    "bm25": "#E69F00",
    "dense": "#117733",
    "cross_encoder": "#661100",
}
OTHER_COLOR = "#000000"
# By label: a second checkpoint has other markers, and its baselines, where they differ, other lines.
MARKERS, DASHES = ("o", "s", "^", "D"), ("-", "--", "-.", ":")
PAPER_PREFIX = f"{PAPER_LABEL}: "
PAPER_GREY, PAPER_DASHES = "#7a7a7a", {"instruct": (0, (5, 2)), "pretrain": (0, (1.2, 1.8))}
PAPER_STARTS = {"instruct": "instruct", "pretrain": "pretrained"}
RATES = (4, 16, 32, 64, 128, 256)
DPI, COLUMNS = 150, 3


@dataclass(frozen=True)
class Run:
    """One results.json and the name of the curve that it is a point of."""

    label: str
    rate: int
    results: dict

    def figure(self, system: str, dataset: str, setting: str, metric: str) -> dict | None:
        """The figure, None where there is none or it could not be computed."""
        wanted = {"system": system, "dataset": dataset, "setting": setting, "metric": metric}
        for figure in self.results["figures"]:
            if figure["value"] is not None and all(figure[key] == value for key, value in wanted.items()):
                return figure
        return None


@dataclass(frozen=True)
class Curve:
    """A system's points by rate, each (value, low, high), as printed (shares × 100); `number` counts the labels."""

    name: str
    system: str
    number: int
    points: dict[int, tuple[float, float, float]]

    @property
    def color(self) -> str:
        """CLaRa's by the number of the label, a baseline's its own."""
        if self.system == SYSTEM:
            return CLARA_COLORS[self.number % len(CLARA_COLORS)]
        return BASELINE_COLORS.get(self.system, OTHER_COLOR)

    @property
    def level(self) -> bool:
        """Whether every rate has the same value: a system that does not depend on the rate."""
        return len(set(self.points.values())) == 1


def read_runs(arguments: Sequence[str]) -> list[Run]:
    """The runs of DIR and DIR=LABEL arguments. Raises ValueError where two of them would be the same point."""
    runs: dict[tuple[str, int], Path] = {}
    found = []
    for argument in arguments:
        path, _, label = (argument, "", "") if Path(argument).exists() else argument.rpartition("=")
        if not path:
            raise ValueError(f"{argument} is no directory; give DIR or DIR=LABEL.")
        for folder in find_results([Path(path)]):
            results = read_results(folder)
            rate = results["config"].get("compr_rate")
            if not isinstance(rate, int) or rate < 1:
                raise ValueError(f"{folder} has no compression rate in its config ({rate!r}); it cannot be plotted.")
            run = Run(label or f"CLaRa, {own_name(results['config'].get('base_model'))}", rate, results)
            other = runs.setdefault((run.label, rate), folder)
            if other != folder:
                raise ValueError(
                    f"{other} and {folder} are both rate {rate} of {run.label!r}; tell them apart with DIR=LABEL."
                )
            found.append(run)
    return found


def curves(runs: Sequence[Run], dataset: str, setting: str, metric: str) -> list[Curve]:
    """CLaRa's curve of each label, then the baselines; equal baselines of several labels are one curve."""
    scale = 100 if METRICS[metric].share else 1
    systems: set[str] = {figure["system"] for run in runs for figure in run.results["figures"]}
    baselines = sorted(systems - {SYSTEM}, key=lambda system: (_order(system), system))
    labels = list(dict.fromkeys(run.label for run in runs))
    drawn: list[Curve] = []
    for system in ([SYSTEM] if SYSTEM in systems else []) + baselines:
        for number, label in enumerate(labels):
            points: dict[int, tuple[float, float, float]] = {}
            for run in sorted((run for run in runs if run.label == label), key=lambda run: run.rate):
                if figure := run.figure(system, dataset, setting, metric):
                    low, high = (figure["value"] if figure[k] is None else figure[k] for k in ("low", "high"))
                    points[run.rate] = (scale * figure["value"], scale * low, scale * high)
            name = label if system == SYSTEM else SYSTEM_LABELS.get(system, system)
            curve = Curve(name, system, number, points)
            same_name = [other for other in drawn if other.name == name]
            if not points or (curve.level and any(set(c.points.values()) == set(points.values()) for c in same_name)):
                continue
            if same_name:
                curve = replace(curve, name=f"{name} ({label})")
            drawn.append(curve)
    return drawn


def _order(system: str) -> int:
    known = list(SYSTEM_LABELS)
    return known.index(system) if system in known else len(known)


def paper_curves(dataset: str, setting: str, metric: str) -> dict[tuple[str, str], dict[int, float]]:
    """(system, init) → rate → percent. Where the paper prints no average, the mean of its four data sets."""
    found: dict[tuple[str, str], dict[int, list[float]]] = {}
    rows = [row for row in paper_figures(metric, setting) if row["system"] != "clara_ablation"]
    printed = any(row["dataset"] == AVERAGE for row in rows)
    for row in rows:
        if row["dataset"] == dataset or (dataset == AVERAGE and not printed):
            found.setdefault((row["system"], row["init"]), {}).setdefault(row["rate"], []).append(row["value"])
    return {key: {rate: sum(v) / len(v) for rate, v in points.items()} for key, points in found.items()}


def draw_paper(axes: Any, dataset: str, setting: str, metric: str) -> None:
    """The paper's curves, thin, grey and dashed; what reads full text as level lines."""
    full_text_styles = iter(((0, (8, 2, 1, 2)), (0, (3, 4)), (0, (1, 4))))
    for (system, init), points in paper_curves(dataset, setting, metric).items():
        name = f"{PAPER_PREFIX}{SYSTEM_LABELS.get(system, system)}"
        if set(points) == {1}:
            axes.axhline(points[1], color=PAPER_GREY, lw=1, ls=next(full_text_styles), label=name, zorder=1)
        elif len(points) == 1:
            axes.plot(list(points), list(points.values()), "x", color=PAPER_GREY, ms=7, label=name, zorder=1)
        else:
            name = f"{name}, {PAPER_STARTS[init]}"
            style = {"color": PAPER_GREY, "lw": 1.2, "ls": PAPER_DASHES[init], "marker": ".", "ms": 5}
            axes.plot(sorted(points), [points[rate] for rate in sorted(points)], label=name, zorder=1, **style)


def draw_curve(axes: Any, curve: Curve) -> None:
    """One of our systems: points with interval bars, or for a baseline that keeps its value a line with a band."""
    rates, is_clara = list(curve.points), curve.system == SYSTEM
    if curve.level and not is_clara:
        value, low, high = curve.points[rates[0]]
        axes.axhspan(low, high, color=curve.color, alpha=0.13, lw=0, zorder=0)
        axes.axhline(value, color=curve.color, lw=1.8, ls=DASHES[curve.number % 4], label=curve.name, zorder=2)
        return
    values = [curve.points[rate][0] for rate in rates]
    below = [max(0.0, v - curve.points[r][1]) for r, v in zip(rates, values, strict=True)]
    above = [max(0.0, curve.points[r][2] - v) for r, v in zip(rates, values, strict=True)]
    style = {
        "lw": 2.2 if is_clara else 1.5,
        "ms": 7 if is_clara else 4.5,
        "marker": MARKERS[curve.number % 4],
        "capsize": 3,
    }
    axes.errorbar(rates, values, [below, above], color=curve.color, label=curve.name, zorder=3 + is_clara, **style)


def panels(runs: Sequence[Run], setting: str, metric: str) -> list[str]:
    """Data sets to draw, the average last; the paper's where there are no results."""
    wanted = ({"setting": setting, "metric": metric}).items()
    found = dict.fromkeys(
        figure["dataset"] for run in runs for figure in run.results["figures"] if wanted <= figure.items()
    )
    if not runs:
        found = {d: None for d in (*PAPER_DATASETS, AVERAGE) if paper_curves(d, setting, metric)}
    return sorted(found, key=lambda dataset: dataset == AVERAGE)


def draw_legend(axes: Any, entries: dict[str, Any], first: set[str], note: str) -> None:
    """Our curves, those named in `first` above the others; below a heading the paper's, with a note on them."""
    from matplotlib.lines import Line2D

    ours = [name for name in entries if not name.startswith(PAPER_PREFIX)]
    ours.sort(key=lambda name: name not in first)
    paper = [name for name in entries if name.startswith(PAPER_PREFIX)]
    empty = Line2D([], [], ls="none")
    rows = [(entries[name], name) for name in ours]
    if paper:
        rows.append((empty, f"{PAPER_LABEL}:"))
        rows += [(entries[name], name.removeprefix(PAPER_PREFIX)) for name in paper]
    if note:
        rows.append((empty, note))
    handles, names = zip(*rows, strict=True)
    size = 9.5 if len(rows) < 12 else 8
    legend = axes.legend(handles, names, loc="upper left", frameon=False, fontsize=size, handlelength=3, borderpad=0)
    # The panels keep their size however many entries there are.
    legend.set_in_layout(False)


def draw_panel(axes: Any, dataset: str, metric: str, rates: Sequence[int]) -> None:
    """Axes, ticks and titles of one data set, after its curves."""
    from matplotlib.ticker import FixedLocator, NullLocator

    axes.set_xscale("log", base=2)
    axes.set_xlim(rates[0] / 1.35, rates[-1] * 1.35)
    axes.xaxis.set_major_locator(FixedLocator(rates))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([str(rate) for rate in rates])
    axes.set_title(DATASET_LABELS.get(dataset, dataset), fontsize=12, weight="bold")
    axes.set_xlabel("compression rate", fontsize=10)
    axes.set_ylabel(METRICS[metric].label + (" (%)" if METRICS[metric].share else ""), fontsize=10)
    axes.grid(color="#e4e7eb", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.12)


def draw(runs: Sequence[Run], setting: str, metric: str, path: Path) -> None:
    """Saves one picture. Raises ValueError when neither the runs nor the paper have the metric in this setting."""
    from matplotlib.figure import Figure

    datasets = panels(runs, setting, metric)
    label = METRICS[metric].label
    if not datasets:
        raise ValueError(f"no {label} in the setting {setting!r}; see which there are in table.md.")
    lines, columns = -(-(len(datasets) + 1) // COLUMNS), min(COLUMNS, len(datasets) + 1)
    figure = Figure(figsize=(3.3 * columns + 0.2, 2.75 * lines + 0.55), dpi=DPI, layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False).flatten()
    # The paper's average is over its own four data sets; beside another average it would mislead.
    comparable = not runs or {d for d in datasets if d != AVERAGE} == set(PAPER_DATASETS)
    legend: dict[str, Any] = {}
    for axes, dataset in zip(grid, datasets, strict=False):
        if dataset != AVERAGE or comparable:
            draw_paper(axes, dataset, setting, metric)
        for curve in curves(runs, dataset, setting, metric):
            draw_curve(axes, curve)
        draw_panel(axes, dataset, metric, sorted({*RATES, *(run.rate for run in runs)}))
        handles, names = axes.get_legend_handles_labels()
        legend |= dict(zip(names, handles, strict=True))
    for axes in grid[len(datasets) :]:
        axes.axis("off")
    averaged = AVERAGE in datasets and comparable and paper_curves(AVERAGE, setting, metric)
    computed = averaged and not any(row["dataset"] == AVERAGE for row in paper_figures(metric, setting))
    note = "its average: mean of the four" if computed else ""
    draw_legend(grid[len(datasets)], legend, {run.label for run in runs}, note)
    what = "95 % intervals over questions" if runs else "the paper's curves only (Mistral-7B), nothing measured here"
    figure.suptitle(f"{label}, {setting} setting: {what}", fontsize=12.5)
    figure.savefig(path, metadata={"Software": None})


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="evaluation.plot_results", description=__doc__.split("\n")[0], allow_abbrev=False
    )
    parser.add_argument("results", nargs="*", metavar="DIR[=LABEL]", help="results; none: the paper's curves only")
    parser.add_argument(
        "--output_dir", type=Path, default=Path("plots"), help="directory of the pictures (%(default)s)"
    )
    parser.add_argument("--metric", action="append", choices=list(METRICS), help=f"again for more; {DEFAULT_METRICS}")
    parser.add_argument("--setting", action="append", help="again for more; default: all that the results have")
    parser.add_argument("--figure", choices=["main_recall"], help="only the README's picture: Recall@5, oracle")
    args = parser.parse_args(argv)
    try:
        if args.figure and (args.metric or args.setting):
            raise ValueError("--figure has its own metric and setting; leave out --metric and --setting.")
        runs = read_runs(args.results)
        pictures = wanted_pictures(args, runs)
        args.output_dir.mkdir(parents=True, exist_ok=True)
        written = []
        for name, metric, setting in pictures:
            draw(runs, setting, metric, args.output_dir / name)
            written.append(name)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except ImportError:
        print(f"{parser.prog}: matplotlib is missing; pip install matplotlib", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"wrote {', '.join(written)} in {args.output_dir}")


def wanted_pictures(args: argparse.Namespace, runs: Sequence[Run]) -> list[tuple[str, str, str]]:
    """(file name, metric, setting) of each picture. Raises ValueError when there is nothing to draw."""
    if args.figure:
        return [("main_recall.png", "recall_5", "oracle")]
    own = list(dict.fromkeys(figure["setting"] for run in runs for figure in run.results["figures"]))
    settings = args.setting or own or ["normal", "oracle"]
    wanted = [(metric, setting) for metric in args.metric or DEFAULT_METRICS for setting in settings]
    # What was asked for by name is drawn or refused in words; of the defaults, what there is.
    if not (args.metric and args.setting):
        wanted = [(metric, setting) for metric, setting in wanted if panels(runs, setting, metric)]
    if not wanted:
        raise ValueError("the results have none of these metrics in these settings; see their table.md.")
    return [(f"{metric}_{setting}.png", metric, setting) for metric, setting in wanted]


if __name__ == "__main__":
    main()
