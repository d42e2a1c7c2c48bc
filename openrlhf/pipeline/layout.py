"""The layout of a PDF page by rules: for machines that cannot have Docling's layout models.

Contract: takes the words of a page with their boxes, its ruling lines and its bitmaps; gives Docling's clusters
(headings, paragraphs, list items, captions, page numbers, pictures) with their text cells, and tables with their cells.
Every word of the page is in one cluster or table. Knows nothing about documents: order, captions' pictures and heading
levels are Docling's next stages.

The rules look at what typography does: a heading is larger than most of the page, or set in another font; lines of a
paragraph are evenly spaced; a table has ruling lines, or short entries that start under one another.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from docling.datamodel.base_models import Cluster, LayoutPrediction, Page, Table, TableStructurePrediction
from docling_core.types.doc import BoundingBox, CoordOrigin, DocItemLabel, TableCell
from docling_core.types.doc.page import BoundingRectangle, TextCell

from openrlhf.pipeline.convert import CAPTION

_BULLET = re.compile(r"^[•‣▪●○◦·]$")
_MARKER = re.compile(r"^([•‣▪●○◦·–—*-]|\d{1,2}[.)]|\(?(\d{1,2}|[a-zA-Z])\))$")
_RULES = 1500  # with more, a page is a drawing
_PAGE_NUMBER = re.compile(r"^(page\s*)?[-–—]?\s*\d{1,4}\s*[-–—]?(\s*(of|/)\s*\d{1,4})?$|^第\s*\d+\s*页", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?:;,。！？：；，]['\"”’)]*$")


@dataclass
class Line:
    """Words that stand beside one another without a gap."""

    words: list[TextCell]
    box: BoundingBox
    font: str = ""

    @property
    def text(self) -> str:
        return " ".join(word.text for word in self.words)

    @property
    def height(self) -> float:
        return self.box.b - self.box.t


@dataclass
class Block:
    """Lines that belong together, and what they are."""

    lines: list[Line]
    label: DocItemLabel = DocItemLabel.TEXT

    @property
    def box(self) -> BoundingBox:
        return enclosing([line.box for line in self.lines])

    @property
    def text(self) -> str:
        return " ".join(line.text for line in self.lines)


@dataclass
class Grid:
    """A table: rows from above, columns from the left; `cells[r][c]` is a box and its words, None where covered."""

    box: BoundingBox
    cells: list[TableCell] = field(default_factory=list)
    rows: int = 0
    columns: int = 0
    words: list[TextCell] = field(default_factory=list)


def enclosing(boxes: Sequence[BoundingBox]) -> BoundingBox:
    """The smallest box around all; origin at the top left, in points."""
    return BoundingBox(
        l=min(box.l for box in boxes),
        t=min(box.t for box in boxes),
        r=max(box.r for box in boxes),
        b=max(box.b for box in boxes),
        coord_origin=CoordOrigin.TOPLEFT,
    )


def box_of(cell: TextCell, height: float) -> BoundingBox:
    """A cell's box with its origin at the top left of a page `height` points high."""
    return cell.rect.to_bounding_box().to_top_left_origin(height)


def lines_of(words: list[TextCell], height: float) -> list[Line]:
    """Joins words to lines; a gap wider than a letter is high ends a line, as between columns."""
    rows: list[list[tuple[TextCell, BoundingBox]]] = []
    for word, box in sorted(((word, box_of(word, height)) for word in words), key=lambda pair: pair[1].t + pair[1].b):
        middle = (box.t + box.b) / 2
        row = next((row for row in reversed(rows[-8:]) if row[-1][1].t < middle < row[-1][1].b), None)
        if row is None:
            rows.append([(word, box)])
        else:
            row.append((word, box))
    lines = []
    for row in rows:
        row.sort(key=lambda pair: pair[1].l)
        run = [row[0]]
        for before, after in zip(row, row[1:], strict=False):
            tall = max(before[1].b - before[1].t, after[1].b - after[1].t)
            marker = len(run) == 1 and _MARKER.match(before[0].text)
            if after[1].l - before[1].r > tall * (3 if marker else 1):
                lines.append(_line(run))
                run = []
            run.append(after)
        lines.append(_line(run))
    return sorted(lines, key=lambda line: (line.box.t, line.box.l))


def _line(run: list[tuple[TextCell, BoundingBox]]) -> Line:
    fonts = Counter[str]()
    for word, _ in run:
        fonts[getattr(word, "font_name", "")] += len(word.text)
    return Line([word for word, _ in run], enclosing([box for _, box in run]), fonts.most_common(1)[0][0])


def ruled_grids(rules: list[BoundingBox], words: list[TextCell], height: float) -> list[Grid]:
    """Tables that are drawn: ruling lines that touch and make at least two rows and two columns with words."""
    groups: list[list[BoundingBox]] = []
    for rule in rules:
        touching = [group for group in groups if any(_near(rule, other, 3) for other in group)]
        groups = [group for group in groups if all(group is not other for other in touching)]
        groups.append([rule, *(other for group in touching for other in group)])
    grids = []
    for group in groups:
        across = _positions([(rule.t + rule.b) / 2 for rule in group if rule.r - rule.l > rule.b - rule.t])
        down = _positions([(rule.l + rule.r) / 2 for rule in group if rule.r - rule.l <= rule.b - rule.t])
        if len(across) < 3 or len(down) < 3:
            continue
        box = enclosing(group)
        inside = [word for word in words if _holds(box, box_of(word, height))]
        grid = _grid(box, across, down, group, inside, height)
        if len({cell.start_col_offset_idx for cell in grid.cells if cell.text}) >= 2 and 2 * sum(
            bool(cell.text) for cell in grid.cells
        ) >= len(grid.cells):
            grids.append(grid)
    return grids


def _near(a: BoundingBox, b: BoundingBox, distance: float) -> bool:
    return (
        a.l <= b.r + distance and b.l <= a.r + distance and a.t <= b.b + distance and b.t <= a.b + distance
    )  # fmt: skip


def _holds(box: BoundingBox, other: BoundingBox) -> bool:
    x, y = (other.l + other.r) / 2, (other.t + other.b) / 2
    return box.l - 1 <= x <= box.r + 1 and box.t - 1 <= y <= box.b + 1


def _positions(values: list[float], distance: float = 3) -> list[float]:
    """Values without those that are all but equal to the one before."""
    kept: list[float] = []
    for value in sorted(values):
        if not kept or value - kept[-1] > distance:
            kept.append(value)
    return kept


def _grid(
    box: BoundingBox,
    across: list[float],
    down: list[float],
    rules: list[BoundingBox],
    words: list[TextCell],
    height: float,
) -> Grid:
    """Cells between the rules; where a rule is missing between two cells they are one."""
    rows, columns = len(across) - 1, len(down) - 1
    taken: set[tuple[int, int]] = set()
    grid = Grid(box, rows=rows, columns=columns, words=words)
    for r in range(rows):
        for c in range(columns):
            if (r, c) in taken:
                continue
            right, below = c + 1, r + 1
            while right < columns and not _drawn(rules, down[right], (across[r], across[r + 1]), vertical=True):
                right += 1
            while below < rows and not _drawn(rules, across[below], (down[c], down[right]), vertical=False):
                below += 1
            taken |= {(y, x) for y in range(r, below) for x in range(c, right)}
            area = BoundingBox(l=down[c], t=across[r], r=down[right], b=across[below], coord_origin=CoordOrigin.TOPLEFT)
            inside = [word for word in words if _holds(area, box_of(word, height))]
            grid.cells.append(_cell(area, inside, (r, below), (c, right), height))
    return grid


def _drawn(rules: list[BoundingBox], place: float, span: tuple[float, float], vertical: bool) -> bool:
    """Whether a rule runs at `place` through the middle of `span`."""
    middle = (span[0] + span[1]) / 2
    for rule in rules:
        along, start, end = (rule.l + rule.r, rule.t, rule.b) if vertical else (rule.t + rule.b, rule.l, rule.r)
        if abs(along / 2 - place) <= 3 and start - 1 <= middle <= end + 1:
            return True
    return False


def _cell(
    area: BoundingBox, words: list[TextCell], rows: tuple[int, int], columns: tuple[int, int], height: float
) -> TableCell:
    return TableCell(
        bbox=area,
        text=" ".join(line.text for line in lines_of(words, height)) if words else "",
        start_row_offset_idx=rows[0],
        end_row_offset_idx=rows[1],
        start_col_offset_idx=columns[0],
        end_col_offset_idx=columns[1],
        row_span=rows[1] - rows[0],
        col_span=columns[1] - columns[0],
        column_header=rows[0] == 0,
    )


def open_grids(lines: list[Line], height: float) -> list[Grid]:
    """Tables without vertical rules: three rows or more of short entries that start or end under one another."""
    rows: list[list[Line]] = []
    for line in lines:
        middle = (line.box.t + line.box.b) / 2
        if rows and rows[-1][0].box.t < middle < rows[-1][0].box.b:
            rows[-1].append(line)
        else:
            rows.append([line])
    for row in rows:
        row.sort(key=lambda line: line.box.l)
    grids: list[Grid] = []
    run: list[list[Line]] = []
    for row in [*rows, []]:
        if run and (len(row) != len(run[0]) or not _aligned(run[-1], row) or _apart(run[-1], row)):
            if len(run) >= 3 and _short(run):
                grids.append(_open_grid(run, height))
            run = []
        if len(row) >= 2:
            run.append(row)
    return grids


def _aligned(above: list[Line], below: list[Line]) -> bool:
    def close(a: Line, b: Line) -> bool:
        middles = abs((a.box.l + a.box.r) - (b.box.l + b.box.r)) / 2
        return min(abs(a.box.l - b.box.l), abs(a.box.r - b.box.r), middles) <= max(a.height, b.height) / 2

    return all(close(a, b) for a, b in zip(above, below, strict=True))


def _apart(above: list[Line], below: list[Line]) -> bool:
    return below[0].box.t - above[0].box.b > 2 * above[0].height


def _short(rows: list[list[Line]]) -> bool:
    """Entries of a table, not lines of columns of text."""
    count = sum(len(line.words) for row in rows for line in row)
    return count / sum(len(row) for row in rows) <= (3 if len(rows[0]) == 2 else 4)


def _open_grid(rows: list[list[Line]], height: float) -> Grid:
    box = enclosing([line.box for row in rows for line in row])
    words = [word for row in rows for line in row for word in line.words]
    grid = Grid(box, rows=len(rows), columns=len(rows[0]), words=words)
    for r, row in enumerate(rows):
        for c, line in enumerate(row):
            grid.cells.append(_cell(line.box, line.words, (r, r + 1), (c, c + 1), height))
    return grid


def blocks_of(lines: list[Line], tolerance: float) -> list[Block]:
    """Joins lines to paragraphs: a line goes on from the one above it where both are alike, near and not a beginning.

    Args:
        tolerance: share by which the heights of alike lines may differ.
    """
    leading = _leading(lines)
    blocks: list[Block] = []
    for line in lines:
        above = [
            block
            for block in blocks
            if block.lines[-1].box.b <= line.box.t + line.height / 2
            and _overlap(block.box, line.box) > 0.5 * min(block.box.r - block.box.l, line.box.r - line.box.l)
        ]
        nearest = max(above, key=lambda block: block.lines[-1].box.b, default=None)
        if nearest is not None and _goes_on(nearest, line, leading, tolerance):
            nearest.lines.append(line)
        else:
            blocks.append(Block([line]))
    return blocks


def _leading(lines: list[Line]) -> float:
    """The usual gap between lines of a paragraph, as a share of their height: that of the nearest line below."""
    gaps = []
    for number, line in enumerate(lines):
        below = [
            (other.box.t - line.box.b) / line.height
            for other in lines[number + 1 : number + 12]
            if other.box.t > line.box.t + line.height / 2 and _overlap(line.box, other.box) > 0
        ]
        if below and min(below) < 1.2:
            gaps.append(min(below))
    return max(median(gaps), 0.1) if gaps else 0.4


def _overlap(a: BoundingBox, b: BoundingBox) -> float:
    return min(a.r, b.r) - max(a.l, b.l)


def _goes_on(block: Block, line: Line, leading: float, tolerance: float) -> bool:
    last, first = block.lines[-1], block.lines[0]
    tall = max(last.height, line.height)
    if tall > (1 + tolerance) * min(last.height, line.height) or last.font != line.font:
        return False
    if (line.box.t - last.box.b) / tall > leading + 0.35:
        return False
    listed = _MARKER.match(first.words[0].text)
    marked = len(line.words) > 1 and _MARKER.match(line.words[0].text)
    # A number or a dash may begin a line by chance.
    if marked and (_BULLET.match(line.words[0].text) or listed or _SENTENCE_END.search(last.text)):
        return False
    indent = line.box.l - min(other.box.l for other in block.lines[-3:])
    if not listed and len(block.lines) > 1 and indent > tall and _SENTENCE_END.search(last.text):
        return False
    ended = last.box.r < block.box.r - 0.25 * (block.box.r - block.box.l)
    return not (ended and len(block.lines) > 1 and re.search(r"[.!?。！？]['\"”’)]*$", last.text))


def label(block: Block, height: float, body: tuple[float, str], tolerance: float) -> DocItemLabel:
    """What a block of text is.

    Args:
        height: of the page, points.
        body: height of its usual line, and the usual font.
    """
    text, lines = block.text, block.lines
    edge = block.box.b < 0.08 * height or block.box.t > 0.92 * height
    if edge and _PAGE_NUMBER.match(text):
        return DocItemLabel.PAGE_FOOTER if block.box.t > height / 2 else DocItemLabel.PAGE_HEADER
    if CAPTION.match(text) and len(lines) <= 4:
        return DocItemLabel.CAPTION
    size = median(line.height for line in lines)
    larger = size > body[0] * (1 + max(tolerance, 0.12))
    other = bool(body[1]) and lines[0].font != body[1] and size >= body[0] * 0.98
    words = sum(len(line.words) for line in lines)
    brief = len(lines) <= 3 and words <= 25 and len(text) <= 200 and not _SENTENCE_END.search(text)
    if brief and (larger or (other and len(lines) == 1 and words <= 12)) and any(letter.isalpha() for letter in text):
        return DocItemLabel.SECTION_HEADER
    if _MARKER.match(lines[0].words[0].text) and words > 1:
        return DocItemLabel.LIST_ITEM
    return DocItemLabel.TEXT


def joined(boxes: list[BoundingBox]) -> list[BoundingBox]:
    """Boxes that touch, made one: an image may be stored as tiles."""
    rest, done = list(boxes), []
    while rest:
        box = rest.pop()
        touching = [other for other in rest if _near(box, other, 1)]
        if touching:
            rest = [other for other in rest if not _near(box, other, 1)]
            rest.append(enclosing([box, *touching]))
        else:
            done.append(box)
    return sorted(done, key=lambda box: (box.t, box.l))


def lay_out(page: Page) -> tuple[LayoutPrediction, TableStructurePrediction]:
    """Clusters and tables of a parsed page, after OCR where it has had any."""
    assert page.size is not None and page.parsed_page is not None and page._backend is not None
    height, area = page.size.height, page.size.width * page.size.height
    read = any(cell.from_ocr for cell in page.parsed_page.textline_cells)
    words = [
        cell for cell in (page.parsed_page.textline_cells if read else page.parsed_page.word_cells) if cell.text.strip()
    ]
    tolerance = 0.3 if read else 0.08  # the boxes of OCR are as tall as the letters in them
    rules = [] if read else page._backend.get_shape_lines() or []
    rules = [rule for rule in rules if min(rule.r - rule.l, rule.b - rule.t) <= 3]
    rules = rules if len(rules) <= _RULES else []
    grids = ruled_grids(rules, words, height)
    gone = {id(word) for grid in grids for word in grid.words}
    lines = lines_of([word for word in words if id(word) not in gone], height)
    found = open_grids(lines, height)
    gone = {id(word) for grid in found for word in grid.words}
    lines = [line for line in lines if id(line.words[0]) not in gone]
    sizes: dict[tuple[float, str], int] = defaultdict(int)
    for line in lines:
        sizes[round(line.height, 1), line.font] += len(line.text)
    body = max(sizes, key=lambda size: sizes[size], default=(10.0, ""))
    if read:
        body = (median([line.height for line in lines] or [10.0]), "")
    clusters: list[Cluster] = []
    for block in blocks_of(lines, tolerance):
        cells = [_joined_cell(line, number, height) for number, line in enumerate(block.lines)]
        kind = label(block, height, body, tolerance)
        clusters.append(Cluster(id=len(clusters), label=kind, bbox=block.box, cells=cells))
    for box in joined(list(page._backend.get_bitmap_rects())):
        if min(box.r - box.l, box.b - box.t) >= 24 and box.area() < 0.85 * area:
            clusters.append(Cluster(id=len(clusters), label=DocItemLabel.PICTURE, bbox=box))
    tables = TableStructurePrediction()
    for grid in [*grids, *found]:
        cluster = Cluster(id=len(clusters), label=DocItemLabel.TABLE, bbox=grid.box, cells=grid.words)
        clusters.append(cluster)
        tables.table_map[cluster.id] = Table(
            otsl_seq=[],
            num_rows=grid.rows,
            num_cols=grid.columns,
            table_cells=grid.cells,
            id=cluster.id,
            page_no=page.page_no,
            cluster=cluster,
            label=DocItemLabel.TABLE,
        )
    return LayoutPrediction(clusters=clusters), tables


def as_it_comes(page: Page) -> LayoutPrediction:
    """All lines as one paragraph, in the order of the file."""
    cells = list(page.cells)
    if not cells or page.size is None:
        return LayoutPrediction()
    box = enclosing([box_of(cell, page.size.height) for cell in cells])
    return LayoutPrediction(clusters=[Cluster(id=0, label=DocItemLabel.TEXT, bbox=box, cells=cells)])


def _joined_cell(line: Line, number: int, height: float) -> TextCell:
    """A line as one cell; the text of a cluster is that of its cells."""
    rect = BoundingRectangle.from_bounding_box(line.box.to_bottom_left_origin(height))
    return TextCell(
        index=number, rect=rect, text=line.text, orig=line.text, from_ocr=any(word.from_ocr for word in line.words)
    )
