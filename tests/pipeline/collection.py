"""Inputs of the assembly in the formats of the earlier steps, from the passages of the example data."""

import hashlib
import json
from pathlib import Path

ROOT = Path(__file__).parents[2]


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def passages() -> list[dict]:
    """The example's passages, English and Chinese, with questions, answers and paraphrases."""
    lines = (ROOT / "example" / "source" / "passages.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def chunk(source: str, number: int, text: str, **fields) -> dict:
    """A line of raw_knowledge.jsonl."""
    return {
        "id": f"{source}#{number}",
        "source": source,
        "document_sha256": sha256(source),
        "number": number,
        "page": number + 1,
        "title": text.split("\n")[0],
        "headings": [text.split("\n")[0]],
        "text": text,
        "sha256": sha256(text),
        "layout": "plain",
        "language": "en",
        "pictures": [],
        **fields,
    }


def synthesized(of: dict, simple: list[tuple[str, str]] = (), **fields) -> dict:
    """A line of synthesized.jsonl; `simple` holds (question, answer)."""
    language = of["language"]
    return {
        **{name: of[name] for name in ("id", "sha256", "source", "document_sha256")},
        "accepted": True,
        "rounds": 2,
        "model": "tiny-writer",
        "simple_qa": [{"question": q, "answer": a, "language": language} for q, a in simple],
        "complex_qa": [],
        "multi_hop": [],
        "paraphrase": None,
        "summary": None,
        "rejected": [],
        "round_counts": [{"asked": 4, "accepted": 3, "rejected": 1}, {"asked": 1, "accepted": 1, "rejected": 0}],
        "tokens": {"prompt": 100, "completion": 20},
        **fields,
    }


def write(folder: Path, chunks: list[dict], samples: list[dict]) -> Path:
    """Writes both files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, records in (("raw_knowledge.jsonl", chunks), ("synthesized.jsonl", samples)):
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (folder / name).write_text("".join(lines), encoding="utf-8")
    return folder


def library(documents: int = 20, chunks_each: int = 4) -> tuple[list[dict], list[dict]]:
    """Chunks and accepted samples of several documents, with a question over two chunks in each."""
    texts = passages()[: documents * chunks_each]
    chunks, samples = [], []
    for i, passage in enumerate(texts):
        source, number = f"shelf/document_{i // chunks_each:02d}.pdf", i % chunks_each
        chunks.append(chunk(source, number, f"{passage['title']}\n{passage['text']}", language=passage["lang"]))
        pairs = [(pair["q"], pair["a"]) for pair in passage["qa"]]
        samples.append(synthesized(chunks[-1], pairs[:-1], paraphrase=passage["paraphrase"]))
        samples[-1]["complex_qa"] = [{"question": pairs[-1][0], "answer": pairs[-1][1], "language": passage["lang"]}]
        samples[-1]["summary"] = passage["text"].split(". ")[0]
        if number == 1:
            both = [chunks[-2]["id"], chunks[-1]["id"]]
            question = f"What do {texts[i - 1]['title']} and {passage['title']} have in common?"
            samples[-1]["multi_hop"] = [
                {"question": question, "answer": "Both are told of here.", "language": "en", "chunks": both}
            ]
    return chunks, samples
