"""Docling's standard PDF pipeline: OCR of scanned pages only and, where its models are not to be had, layout by rules.

Contract: `format_option` is what a converter of PDF files takes. Knows nothing about what is done with a document.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from docling.datamodel.accelerator_options import AcceleratorDevice, AcceleratorOptions
from docling.datamodel.base_models import LayoutPrediction, Page, TableStructurePrediction
from docling.datamodel.document import ConversionResult
from docling.datamodel.pipeline_options import (
    BaseLayoutOptions,
    BaseTableStructureOptions,
    HeadingHierarchyOptions,
    PdfPipelineOptions,
    RapidOcrOptions,
)
from docling.document_converter import PdfFormatOption
from docling.models.base_layout_model import BaseLayoutModel
from docling.models.base_table_model import BaseTableStructureModel
from docling.models.factories import get_layout_factory, get_ocr_factory
from docling.models.factories.table_factory import TableStructureFactory
from docling.models.stages.ocr.rapid_ocr_model import RapidOcrModel
from docling.pipeline import standard_pdf_pipeline
from docling_core.types.doc import BoundingBox, CoordOrigin

from openrlhf.pipeline.layout import as_it_comes, lay_out

MIN_LETTERS = 32  # a page with fewer, and a large image, is a scanned one


class ScannedPagesOptions(RapidOcrOptions):
    """OCR by RapidOCR of pages without a text layer."""

    kind: ClassVar[str] = "rapidocr-scanned-pages"  # type: ignore[misc,assignment]


class ScannedPages(RapidOcrModel):
    """Reads whole pages that have no text layer, and no others."""

    @classmethod
    def get_options_type(cls) -> type[ScannedPagesOptions]:
        return ScannedPagesOptions

    def get_ocr_rects(self, page: Page) -> list[BoundingBox]:
        """The page, or nothing."""
        assert page.size is not None and page._backend is not None
        letters = sum(len(cell.text.replace(" ", "")) for cell in page.cells)
        whole = page.size.width * page.size.height
        large = any(box.area() > 0.5 * whole for box in page._backend.get_bitmap_rects())
        if letters and not (letters < MIN_LETTERS and large):
            return []
        return [BoundingBox(l=0, t=0, r=page.size.width, b=page.size.height, coord_origin=CoordOrigin.TOPLEFT)]


class LaterOptions(BaseLayoutOptions):
    """No layout at this stage."""

    kind: ClassVar[str] = "by-rules-later"


class Later(BaseLayoutModel):
    """Docling's layout stage comes before OCR, where a scanned page has no text to go by: `Rules` does its work."""

    requires_layout_postprocessing = False

    def __init__(self, options: LaterOptions, artifacts_path: Path | None, **_: object):
        self.options = options

    @classmethod
    def get_options_type(cls) -> type[LaterOptions]:
        return LaterOptions

    def predict_layout(self, conv_res: ConversionResult, pages: Sequence[Page]) -> Sequence[LayoutPrediction]:
        """Empty pages."""
        return [LayoutPrediction() for _ in pages]


class RulesOptions(BaseTableStructureOptions):
    """Layout and tables by rules."""

    kind: ClassVar[str] = "by-rules"


class Rules(BaseTableStructureModel):
    """Layout and tables of a page, with the text that OCR found."""

    def __init__(self, options: RulesOptions, enabled: bool, **_: object):
        self.options, self.enabled = options, True

    @classmethod
    def get_options_type(cls) -> type[RulesOptions]:
        return RulesOptions

    def predict_tables(self, conv_res: ConversionResult, pages: Sequence[Page]) -> Sequence[TableStructurePrediction]:
        """Tables; sets the pages' layout as well."""
        tables = []
        for page in pages:
            try:
                page.predictions.layout, found = lay_out(page)
            except (ArithmeticError, LookupError, ValueError):  # a page that no rule thought of
                page.predictions.layout, found = as_it_comes(page), TableStructurePrediction()
            tables.append(found)
        return tables


def _register(rules: bool) -> None:
    """Makes the stages above known to Docling, once a process."""
    stages: list[tuple[Any, Any]] = [(get_ocr_factory(allow_external_plugins=False), ScannedPages)]
    if rules:
        stages.append((get_layout_factory(allow_external_plugins=False), Later))
        # Docling's own list of table models imports torchvision, which must not stand beside the training code.
        tables = TableStructureFactory()
        standard_pdf_pipeline.get_table_structure_factory = lambda allow_external_plugins=False: tables
        stages.append((tables, Rules))
    for factory, stage in stages:
        if stage.get_options_type() not in factory.classes:
            factory.register(stage, "clara", __name__)


def format_option(layout: str, ocr: bool) -> PdfFormatOption:
    """How PDF files are converted.

    Args:
        layout: "docling" for its models, "rules" for ours.
        ocr: some page is a scanned one.
    """
    _register(layout == "rules")
    options = PdfPipelineOptions(
        do_ocr=ocr,
        ocr_options=ScannedPagesOptions(),
        generate_picture_images=True,
        images_scale=2.0,
        generate_parsed_pages=True,
        heading_hierarchy_options=HeadingHierarchyOptions(enabled=True),
        accelerator_options=AcceleratorOptions(num_threads=1, device=AcceleratorDevice.AUTO),
    )
    if layout == "rules":
        options.layout_options = LaterOptions()
        options.table_structure_options = RulesOptions()
    return PdfFormatOption(pipeline_options=options)
