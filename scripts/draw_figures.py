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
    """One role of the decoder, 2.1 × 1.3 inches: the shared frozen weights above, the role's own adapter below."""
    box(axes, x, y, 2.1, 1.3, BASE, color)
    say(axes, x + 1.05, y + 1.0, name, 15, weight="bold", color=color)
    say(axes, x + 1.05, y + 0.69, "same frozen decoder", 11.5, color=MUTED)
    box(axes, x + 0.08, y + 0.08, 1.94, 0.4, color, color)
    say(axes, x + 1.05, y + 0.28, adapter, 11, color=PAPER, family="monospace")


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
    upper, lower = bottom + 2.35, bottom + 0.35
    sheets(axes, 0.25, upper + 0.24, "N documents")
    role(axes, 1.75, upper, "compressor", "encoder_adapter", COMPRESSOR)
    vectors(axes, 4.45, upper + 0.24, 4, COMPRESSOR)
    say(axes, 4.92, upper + 1.55, "L memory vectors\nfor each document", 12)
    say(axes, 0.69, lower + 0.65, "question", 14)
    role(axes, 1.75, lower, "query reasoner", "query_reasoner_adapter", REASONER)
    vectors(axes, 4.45, lower + 0.56, 1, REASONER)
    say(axes, 4.92, lower + 0.3, "the question as\nL memory vectors", 12)

    middle = bottom + 2.0
    box(axes, 6.1, middle - 0.72, 2.25, 1.44, PAPER, LINE)
    say(axes, 7.225, middle + 0.4, "cosine scores", 14, weight="bold")
    say(axes, 7.225, middle - 0.16, "straight-through\ntop-k: the K best", 13)
    say(axes, 7.225, middle - 0.52, "K of N", 11.5, color=MUTED)
    vectors(axes, 9.02, middle + 0.02, 2, COMPRESSOR)
    say(axes, 9.5, middle + 0.74, "K documents'\nmemory vectors", 12)
    role(axes, 10.45, middle - 0.65, "generator", "decoder_adapter", GENERATOR)
    say(axes, 11.5, middle + 1.55, "answer", 15, weight="bold")

    arrow(axes, (1.24, upper + 0.65), (1.7, upper + 0.65))
    arrow(axes, (3.88, upper + 0.65), (4.38, upper + 0.65))
    arrow(axes, (5.52, upper + 0.65), (6.9, upper + 0.65), (6.9, middle + 0.75))
    arrow(axes, (1.18, lower + 0.65), (1.7, lower + 0.65))
    arrow(axes, (3.88, lower + 0.65), (4.38, lower + 0.65))
    arrow(axes, (5.52, lower + 0.65), (6.9, lower + 0.65), (6.9, middle - 0.75))
    arrow(axes, (8.38, middle + 0.14), (8.95, middle + 0.14))
    arrow(axes, (10.05, middle + 0.14), (10.42, middle + 0.14))
    arrow(axes, (11.5, middle + 0.68), (11.5, middle + 1.34))
    arrow(axes, (0.69, lower + 0.45), (0.69, bottom), (11.2, bottom), (11.2, middle - 0.68))
    say(axes, 9.0, bottom + 0.17, "the question as text", 12, color=MUTED)
    arrow(axes, (11.75, middle - 0.68), (11.75, lower + 0.1), (7.6, lower + 0.1), (7.6, middle - 0.75),
          color=GENERATOR, dashed=True)  # fmt: skip
    say(axes, 9.66, lower + 0.36, "gradient of the answer's loss, in training", 12, color=GENERATOR)


def draw_stages(axes: Axes, top: float) -> None:
    """The matrix of what trains in which stage, its title at `top`."""
    columns = (5.75, 7.3, 8.85, 10.4)
    say(axes, 0.3, top, "What learns in each stage", 15, weight="bold", ha="left")
    for x, (part, color) in zip(columns, PARTS.items(), strict=True):
        say(axes, x, top - 0.02, part, 12.5, color=color, weight="bold")
    for row, (stage, loss, learns) in enumerate(STAGES):
        y = top - 0.62 - 0.44 * row
        if row % 2 == 0:
            axes.add_patch(Rectangle((0.2, y - 0.22), 12.35, 0.44, fc="#f5f7fa", ec="none", zorder=0))
        say(axes, 0.3, y, stage, 12, ha="left", family="monospace")
        say(axes, 4.95, y, loss, 11.5, ha="right", color=MUTED)
        for x, state, color in zip(columns, learns, PARTS.values(), strict=True):
            if state is None:
                say(axes, x, y, "not used", 11, color=MUTED)
            else:
                axes.add_patch(Circle((x, y), 0.115, fc=color if state else PAPER, ec=color, lw=1.8))
    y = top - 0.62 - 0.44 * len(STAGES) - 0.1
    axes.add_patch(Circle((0.42, y), 0.1, fc=INK, ec=INK, lw=1.6))
    say(axes, 0.62, y, "learns", 12, ha="left")
    axes.add_patch(Circle((1.72, y), 0.1, fc=PAPER, ec=INK, lw=1.6))
    say(axes, 1.92, y, "frozen", 12, ha="left")
    say(axes, 12.45, y, "The decoder itself is frozen in every stage.", 12, ha="right", color=MUTED)


def draw_architecture() -> None:
    """figs/architecture.png: one decoder in three roles, and what learns in which stage."""
    figure, axes = canvas(12.75, 7.75)
    say(axes, 0.3, 7.48, "One decoder, three adapters", 17, weight="bold", ha="left")
    draw_flow(axes, bottom=3.15)
    axes.plot((0.2, 12.55), (2.83, 2.83), color=BASE, lw=1.4)
    draw_stages(axes, top=2.5)
    save(figure, "architecture.png")


def draw_intro() -> None:
    """figs/intro.png: what goes in and comes out in each of the three stages, and what the next one continues."""
    figure, axes = canvas(12.75, 4.3)
    stages = (
        ("1  Compression pretraining", "stage1", COMPRESSOR, "one document",
         "question-answer pairs,\nor a paraphrase", "The compressor learns to keep\nwhat a document says."),
        ("2  Instruction tuning", "stage1_2", MEMORY, "a question and\nK documents",
         "an answer", "The generator learns to answer\nfrom several documents."),
        ("3  End to end", "stage2", REASONER, "a question and\nN candidates",
         "an answer from the\nK it selects", "The query reasoner learns what\nhelps to answer."),
    )  # fmt: skip
    for number, (title, flag, color, given, wanted, lesson) in enumerate(stages):
        left = 0.2 + 4.25 * number
        box(axes, left, 0.2, 3.85, 3.9, PAPER, color)
        box(axes, left, 3.3, 3.85, 0.8, color, color)
        say(axes, left + 1.925, 3.83, title, 15, weight="bold", color=PAPER)
        say(axes, left + 1.925, 3.51, f"--stage {flag}", 12, color=PAPER, family="monospace")
        box(axes, left + 0.2, 1.75, 1.45, 1.2, BASE, FRAME)
        say(axes, left + 0.925, 2.35, given, 12)
        arrow(axes, (left + 1.68, 2.35), (left + 2.08, 2.35))
        box(axes, left + 2.12, 1.75, 1.55, 1.2, BASE, FRAME)
        say(axes, left + 2.895, 2.35, wanted, 11 if number == 0 else 12)
        say(axes, left + 1.925, 1.0, lesson, 13)
        if number:
            arrow(axes, (left - 0.37, 2.35), (left - 0.03, 2.35), color=INK)
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
