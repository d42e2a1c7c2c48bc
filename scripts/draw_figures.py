"""Draw the pictures of README.md: figs/architecture.png, figs/intro.png and the badges in figs/badges/.

    python scripts/draw_figures.py

Needs matplotlib only. The same version of matplotlib gives the same bytes. What the pictures state about stages is
written here once, in STAGES, after the table of losses in docs/TRAINING_GUIDE.md.
"""

from html import escape
from pathlib import Path

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Circle, FancyBboxPatch, Rectangle
from matplotlib.textpath import TextPath

FIGS = Path(__file__).resolve().parents[1] / "figs"
DPI = 150
INK, MUTED, LINE = "#1f2933", "#52606d", "#7b8794"
PAPER, BASE, FRAME = "#ffffff", "#e4e7eb", "#9aa5b1"
COMPRESSOR, REASONER, GENERATOR, MEMORY = "#2f6fb0", "#c46a1b", "#2e8b57", "#7d4fa8"
PARTS = {
    "compressor": COMPRESSOR,
    "memory\nembeddings": MEMORY,
    "query\nreasoner": REASONER,
    "generator": GENERATOR,
}
# stage, its loss, and for each of PARTS: True trains, False frozen, None not used.
STAGES = (
    ("stage1", "cross-entropy + λ · MSE", (True, True, None, True)),
    ("stage1_2", "cross-entropy + λ · MSE", (True, True, None, True)),
    ("stage2", "cross-entropy", (False, False, True, True)),
    ("stage2_pretrain_retrieval", "retrieval", (False, False, True, None)),
)
BADGES = {
    "licence": ("licence", "Apache-2.0", COMPRESSOR),
    "python": ("python", "3.10 – 3.12", COMPRESSOR),
    "paper": ("arXiv", "2511.18659", "#a33b3b"),
    "tests": ("tests", "bash scripts/test.sh", GENERATOR),
}


def canvas(width: float, height: float) -> tuple[plt.Figure, Axes]:
    """A white page measured in inches, without axes."""
    figure = plt.figure(figsize=(width, height), dpi=DPI, facecolor=PAPER)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, width)
    axes.set_ylim(0, height)
    axes.axis("off")
    return figure, axes


def save(figure: plt.Figure, name: str) -> None:
    """Writes a PNG without the date and the version of matplotlib."""
    FIGS.mkdir(exist_ok=True)
    figure.savefig(FIGS / name, dpi=DPI, metadata={"Software": None})
    plt.close(figure)


def say(axes: Axes, x: float, y: float, text: str, size: float = 13, **style) -> None:
    """Text around (x, y), centred unless told otherwise."""
    style = {"ha": "center", "va": "center", "color": INK, "linespacing": 1.25, **style}
    axes.text(x, y, text, fontsize=size, **style)


def box(axes: Axes, x: float, y: float, width: float, height: float, fill: str, edge: str, **style) -> None:
    """A rounded rectangle with its lower left corner at (x, y)."""
    shape = FancyBboxPatch(
        (x, y), width, height, boxstyle="round,pad=0,rounding_size=0.09", fc=fill, ec=edge, lw=1.4, **style
    )
    axes.add_patch(shape)


def arrow(axes: Axes, *points: tuple[float, float], color: str = LINE, dashed: bool = False) -> None:
    """A line through the points with a head at the last one."""
    style = {"color": color, "lw": 1.8, "linestyle": "--" if dashed else "-"}
    for (x0, y0), (x1, y1) in zip(points[:-2], points[1:-1], strict=True):
        axes.plot((x0, x1), (y0, y1), solid_capstyle="round", zorder=1, **style)
    head = {"arrowstyle": "-|>,head_width=0.28,head_length=0.5", "shrinkA": 0, "shrinkB": 0, "zorder": 2, **style}
    axes.annotate("", xy=points[-1], xytext=points[-2], arrowprops=head)


def role(axes: Axes, x: float, y: float, name: str, adapter: str, color: str) -> None:
    """One role of the decoder, 2.4 × 1.3 inches: the shared frozen weights above, the role's own adapter below."""
    box(axes, x, y, 2.4, 1.3, BASE, color)
    say(axes, x + 1.2, y + 1.02, name, 15.5, weight="bold", color=color)
    say(axes, x + 1.2, y + 0.7, "same frozen decoder", 12.5, color=MUTED)
    box(axes, x + 0.08, y + 0.08, 2.24, 0.42, color, color)
    say(axes, x + 1.2, y + 0.29, adapter, 11.5, color=PAPER, family="monospace")


def sheets(axes: Axes, x: float, y: float, title: str) -> None:
    """A small stack of documents."""
    for shift in (0.16, 0.08, 0.0):
        axes.add_patch(Rectangle((x + shift, y + shift), 0.72, 0.86, fc=PAPER, ec=FRAME, lw=1.3))
    for row in range(5):
        axes.plot((x + 0.1, x + 0.62 - 0.16 * (row == 4)), (y + 0.72 - 0.14 * row,) * 2, color=FRAME, lw=1.6)
    say(axes, x + 0.44, y - 0.22, title)


def vectors(axes: Axes, x: float, y: float, rows: int, color: str, side: float = 0.17) -> None:
    """Rows of L = 5 memory vectors, the first row on top; (x, y) is the lower left corner."""
    for row in range(rows):
        for column in range(5):
            corner = (x + column * side * 1.15, y + (rows - 1 - row) * side * 1.5)
            axes.add_patch(Rectangle(corner, side, side, fc=color, ec=PAPER, lw=0.6, alpha=0.55 + 0.09 * column))


def draw_flow(axes: Axes, bottom: float) -> None:
    """From documents and question to the answer; `bottom` is the lowest line used."""
    upper, lower, middle = bottom + 2.5, bottom + 0.45, bottom + 2.15
    sheets(axes, 0.3, upper + 0.24, "N documents")
    role(axes, 1.75, upper, "compressor", "encoder_adapter", COMPRESSOR)
    vectors(axes, 4.78, upper + 0.2, 4, COMPRESSOR)
    say(axes, 5.25, upper - 0.12, "L memory vectors\nfor each document")
    say(axes, 0.7, lower + 0.65, "question", 14.5)
    role(axes, 1.75, lower, "query reasoner", "query_reasoner_adapter", REASONER)
    vectors(axes, 4.78, lower + 0.57, 1, REASONER)
    say(axes, 5.25, lower + 0.22, "the question as\nL memory vectors")
    box(axes, 6.35, middle - 0.65, 2.2, 1.3, PAPER, LINE)
    say(axes, 7.45, middle + 0.38, "cosine scores", 15, weight="bold")
    say(axes, 7.45, middle - 0.18, "straight-through\ntop-k: K of the N", 13.5)
    vectors(axes, 9.09, middle + 0.0, 2, COMPRESSOR)
    say(axes, 9.57, middle + 0.8, "memory vectors\nof the K best")
    role(axes, 10.5, middle - 0.65, "generator", "decoder_adapter", GENERATOR)
    say(axes, 11.7, middle + 1.5, "answer", 15.5, weight="bold")

    arrow(axes, (1.28, upper + 0.65), (1.7, upper + 0.65))
    arrow(axes, (4.2, upper + 0.65), (4.7, upper + 0.65))
    arrow(axes, (5.85, upper + 0.65), (7.1, upper + 0.65), (7.1, middle + 0.68))
    arrow(axes, (1.2, lower + 0.65), (1.7, lower + 0.65))
    arrow(axes, (4.2, lower + 0.65), (4.7, lower + 0.65))
    arrow(axes, (5.85, lower + 0.65), (7.1, lower + 0.65), (7.1, middle - 0.68))
    arrow(axes, (8.58, middle + 0.2), (9.03, middle + 0.2))
    arrow(axes, (10.1, middle + 0.2), (10.47, middle + 0.2))
    arrow(axes, (11.7, middle + 0.68), (11.7, middle + 1.3))
    arrow(axes, (0.7, lower + 0.45), (0.7, bottom + 0.1), (12.1, bottom + 0.1), (12.1, middle - 0.68))
    say(axes, 9.25, bottom + 0.3, "the question as text", color=MUTED)
    arrow(axes, (11.2, middle - 0.68), (11.2, lower + 0.4), (7.75, lower + 0.4), (7.75, middle - 0.68),
          color=GENERATOR, dashed=True)  # fmt: skip
    say(axes, 9.5, lower + 0.76, "in training: the gradient\nof the answer's loss", color=GENERATOR)


def draw_stages(axes: Axes, top: float) -> None:
    """The matrix of what trains in which stage, its title at `top`."""
    columns = (6.65, 8.35, 10.05, 11.75)
    say(axes, 0.3, top, "What learns in each stage", 16, weight="bold", ha="left")
    for x, (part, color) in zip(columns, PARTS.items(), strict=True):
        say(axes, x, top, part, 13.5, color=color, weight="bold")
    for row, (stage, loss, learns) in enumerate(STAGES):
        y = top - 0.64 - 0.44 * row
        if row % 2 == 0:
            axes.add_patch(Rectangle((0.2, y - 0.22), 12.7, 0.44, fc="#f5f7fa", ec="none", zorder=0))
        say(axes, 0.3, y, stage, 13, ha="left", va="center_baseline", family="monospace")
        say(axes, 5.6, y, loss, 12.5, ha="right", va="center_baseline", color=MUTED)
        for x, state, color in zip(columns, learns, PARTS.values(), strict=True):
            if state is None:
                say(axes, x, y, "not used", 12, va="center_baseline", color=MUTED)
            else:
                axes.add_patch(Circle((x, y), 0.115, fc=color if state else PAPER, ec=color, lw=1.8))
    y = top - 0.64 - 0.44 * len(STAGES) - 0.1
    axes.add_patch(Circle((0.42, y), 0.1, fc=INK, ec=INK, lw=1.6))
    say(axes, 0.62, y, "learns", ha="left", va="center_baseline")
    axes.add_patch(Circle((1.72, y), 0.1, fc=PAPER, ec=INK, lw=1.6))
    say(axes, 1.92, y, "frozen", ha="left", va="center_baseline")
    note = "The decoder itself is frozen in every stage."
    say(axes, 12.8, y, note, ha="right", va="center_baseline", color=MUTED)


def draw_architecture() -> None:
    """figs/architecture.png: one decoder in three roles, and what learns in which stage."""
    figure, axes = canvas(13.1, 7.95)
    say(axes, 0.3, 7.65, "One decoder, three adapters", 17, weight="bold", ha="left")
    draw_flow(axes, bottom=3.3)
    axes.plot((0.2, 12.9), (3.1, 3.1), color=BASE, lw=1.4)
    draw_stages(axes, top=2.72)
    save(figure, "architecture.png")


def draw_intro() -> None:
    """figs/intro.png: what goes in and comes out in each of the three stages, and what the next one continues."""
    figure, axes = canvas(13.1, 3.75)
    stages = (
        ("1  Compression pretraining", "stage1", COMPRESSOR, "one\ndocument",
         "questions and\nanswers, or a\nparaphrase", "The compressor learns to keep\nwhat a document says."),
        ("2  Instruction tuning", "stage1_2", MEMORY, "a question,\nK documents",
         "an answer", "Compressor and generator learn\nto answer from K documents."),
        ("3  End to end", "stage2", REASONER, "a question,\nN candidates",
         "an answer\nfrom the K\nit selects", "Query reasoner and generator\nlearn together, from answers."),
    )  # fmt: skip
    for number, (title, flag, color, given, wanted, lesson) in enumerate(stages):
        left = 0.15 + 4.4 * number
        box(axes, left, 0.15, 4.0, 3.45, PAPER, color)
        box(axes, left, 2.75, 4.0, 0.85, color, color)
        say(axes, left + 2.0, 3.33, title, 16, weight="bold", va="center_baseline", color=PAPER)
        say(axes, left + 2.0, 2.97, f"--stage {flag}", 13, va="center_baseline", color=PAPER, family="monospace")
        box(axes, left + 0.2, 1.3, 1.55, 1.15, BASE, FRAME)
        say(axes, left + 0.975, 1.875, given)
        arrow(axes, (left + 1.78, 1.875), (left + 2.16, 1.875))
        box(axes, left + 2.2, 1.3, 1.6, 1.15, BASE, FRAME)
        say(axes, left + 3.0, 1.875, wanted)
        say(axes, left + 2.0, 0.7, lesson, 13.5)
        if number:
            arrow(axes, (left - 0.38, 1.875), (left - 0.03, 1.875), color=INK)
    save(figure, "intro.png")


def text_width(text: str) -> float:
    """Pixels of a text at the badges' 11 pixels."""
    return TextPath((0, 0), text, size=11, prop=FontProperties(family="DejaVu Sans")).get_extents().width


def badge(label: str, value: str, color: str) -> str:
    """An SVG of 20 pixels' height: the label on grey, the value on `color`."""
    left, right = round(text_width(label)) + 14, round(text_width(value)) + 14
    width, (label, value) = left + right, (escape(label), escape(value))
    return f"""<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="20" role="img">
<title>{label}: {value}</title>
<clipPath id="round"><rect width="{width}" height="20" rx="3"/></clipPath>
<g clip-path="url(#round)"><rect width="{left}" height="20" fill="{MUTED}"/>
<rect x="{left}" width="{right}" height="20" fill="{color}"/></g>
<g fill="{PAPER}" font-family="DejaVu Sans,Verdana,Geneva,sans-serif" font-size="11">
<text x="7" y="14" textLength="{left - 14}">{label}</text>
<text x="{left + 7}" y="14" textLength="{right - 14}">{value}</text></g>
</svg>
"""


def draw_badges() -> None:
    """figs/badges/*.svg."""
    folder = FIGS / "badges"
    folder.mkdir(parents=True, exist_ok=True)
    for name, parts in BADGES.items():
        (folder / f"{name}.svg").write_text(badge(*parts), encoding="utf-8")


if __name__ == "__main__":
    draw_architecture()
    draw_intro()
    draw_badges()
    print(f"wrote architecture.png, intro.png and {len(BADGES)} badges under {FIGS.name}/")
