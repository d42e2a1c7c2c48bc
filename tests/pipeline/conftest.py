"""Documents, a tokenizer and one extraction for all tests of the pipeline."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.tiny import BASES, byte_level_tokenizer

LIMIT = 256


@dataclass
class Extracted:
    """What the extraction of the folder gave."""

    root: Path
    output: Path
    options: object
    report: dict

    @property
    def records(self) -> list[dict]:
        return [json.loads(line) for line in self.output.read_text(encoding="utf-8").splitlines()]

    def of(self, source: str) -> list[dict]:
        return [record for record in self.records if record["source"] == source]


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_level_tokenizer(BASES["smollm2"]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer_dir)


@pytest.fixture(scope="session")
def count(tokenizer) -> Callable[[str], int]:
    return lambda text: len(tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids)


@pytest.fixture(scope="session")
def documents(tmp_path_factory) -> Path:
    """A folder with a document of each kind, and broken ones."""
    for name in ("docling", "reportlab", "docx", "pptx", "openpyxl", "pypdf"):
        pytest.importorskip(name)
    from tests.pipeline.make_documents import make

    folder = tmp_path_factory.mktemp("documents")
    make(folder)
    return folder


@pytest.fixture(scope="session")
def options(tokenizer_dir, tokenizer):
    pytest.importorskip("docling")
    from openrlhf.pipeline.extract import Options, tokenizer_hash

    return Options(str(tokenizer_dir), tokenizer_hash(tokenizer), LIMIT)


@pytest.fixture(scope="session")
def extracted(documents, options, tmp_path_factory) -> Extracted:
    """The folder, extracted once, by the real workers."""
    from openrlhf.pipeline.extract import extract
    from openrlhf.pipeline.state import State

    output = tmp_path_factory.mktemp("extracted") / "raw_knowledge.jsonl"
    with State(output.parent / "state.sqlite") as state:
        report = extract(documents, output, options, state)
    return Extracted(documents, output, options, report)
