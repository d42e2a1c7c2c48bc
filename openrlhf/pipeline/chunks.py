"""Cuts a converted document into chunks that follow its structure and fit the model.

Contract: `chunks` gives text, headings, page and pictures; each text, its headings included, has at most `limit` tokens
of the model's tokenizer, and together they hold all text of the document. A picture stands in the text as one private
character until its place is known. Knows nothing about files.
"""

import re
from collections.abc import Callable
from typing import Any

from docling_core.transforms.chunker.hierarchical_chunker import ChunkingDocSerializer, ChunkingSerializerProvider
from docling_core.transforms.chunker.hybrid_chunker import HybridChunker
from docling_core.transforms.chunker.tokenizer.huggingface import HuggingFaceTokenizer
from docling_core.transforms.serializer.base import BasePictureSerializer, BaseTableSerializer
from docling_core.transforms.serializer.common import create_ser_result
from docling_core.transforms.serializer.markdown import MarkdownParams, MarkdownTableSerializer
from docling_core.types.doc import DoclingDocument, PictureItem
from docling_core.types.doc.base import ImageRefMode

from openrlhf.pipeline.marks import fitted, mark, prefix_of


class _Pictures(BasePictureSerializer):
    """A picture is its mark and its caption."""

    def serialize(self, *, item: PictureItem, doc_serializer: Any, doc: DoclingDocument, **kwargs: Any) -> Any:
        caption = doc_serializer.serialize_captions(item=item, **kwargs).text
        number = int(item.self_ref.rsplit("/", 1)[1])
        return create_ser_result(text=mark(number) + caption, span_source=item)


class _Serializer(ChunkingDocSerializer):
    picture_serializer: BasePictureSerializer = _Pictures()
    table_serializer: BaseTableSerializer = MarkdownTableSerializer()
    params: MarkdownParams = MarkdownParams(
        image_mode=ImageRefMode.PLACEHOLDER,
        image_placeholder="",
        escape_underscores=False,
        escape_html=False,
        compact_tables=True,
        include_formatting=False,
        include_hyperlinks=False,
    )


class _Provider(ChunkingSerializerProvider):
    def get_serializer(self, doc: DoclingDocument) -> _Serializer:
        return _Serializer(doc=doc)


class _Chunker(HybridChunker):
    """Counts a chunk with the headings that its text will have."""

    def contextualize(self, chunk: Any) -> str:
        return prefix_of(chunk.meta.headings or [], self.max_tokens, self.tokenizer.count_tokens) + chunk.text


def chunks(document: DoclingDocument, tokenizer: Any, limit: int, count: Callable[[str], int]) -> list[dict]:
    """[{"page", "headings", "text", "pictures": [{"number", "at"}]}] in reading order.

    Args:
        document: without private characters (see `marks`) in its texts.
        tokenizer: of transformers, the model's.
        limit: tokens a chunk may have.
        count: tokens of a text as the model counts them.
    """
    found: list[dict] = []
    for always in (False, True):  # a document of nothing but headings
        chunker = _Chunker(
            tokenizer=HuggingFaceTokenizer(tokenizer=tokenizer, max_tokens=limit),
            serializer_provider=_Provider(),
            always_emit_headings=always,
        )
        found = [chunk for piece in chunker.chunk(document) for chunk in _fitted(piece, limit, count)]
        if found:
            break
    return _with_text(found)


def _fitted(piece: Any, limit: int, count: Callable[[str], int]) -> list[dict]:
    """The chunk, in parts where it is longer than the limit after all."""
    pages = [place.page_no for item in piece.meta.doc_items for place in item.prov]
    headings = [re.sub(r"\s+", " ", heading).strip() for heading in piece.meta.headings or []]
    body = re.sub(r"[ \t]+\n", "\n", piece.text).strip()
    return [
        {"page": min(pages, default=None), "headings": headings, "text": text, "pictures": pictures}
        for text, pictures in fitted(headings, body, limit, count)
    ]


def _with_text(found: list[dict]) -> list[dict]:
    """Gives pictures that stand without any text to the chunk before them, or else to the one after; where there is no
    text at all one chunk without text holds them."""
    kept: list[dict] = []
    for chunk in found:
        before = kept[-1] if kept else None
        if before is None or (chunk["text"] and before["text"]):
            kept.append(chunk)
        elif chunk["text"]:
            before.update(chunk, pictures=before["pictures"] + chunk["pictures"])
        else:
            before["pictures"] += [{**picture, "at": len(before["text"])} for picture in chunk["pictures"]]
    return [chunk for chunk in kept if chunk["text"] or chunk["pictures"]]
