"""The adapters' snippets of docs/RAG_GUIDE.md run as printed."""

import re
from pathlib import Path

from langchain_core.documents import Document
from langchain_core.language_models import FakeListChatModel
from llama_index.core.llms import MockLLM

from openrlhf.integrations.llamaindex import ClaraRetriever

GUIDE = Path(__file__).parents[2] / "docs" / "RAG_GUIDE.md"


def test_snippets_run_as_printed(checkpoint, store, tmp_path, monkeypatch, capsys):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "my_stage2").symlink_to(checkpoint)
    (tmp_path / "my_store").symlink_to(store.path)
    monkeypatch.chdir(tmp_path)
    section = GUIDE.read_text(encoding="utf-8").split("## LangChain and LlamaIndex")[1].split("\n## ")[0]
    langchain, llamaindex = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    given = {"llm": FakeListChatModel(responses=["An answer."]), "documents": [Document(page_content="A lighthouse.")]}
    exec(compile(langchain, "langchain", "exec"), given)
    assert capsys.readouterr().out == "An answer.\n"
    assert all("relevance_score" in one.metadata for one in given["best"])
    exec(
        compile(llamaindex, "llamaindex", "exec"),
        {"llm": MockLLM(), "other_retriever": ClaraRetriever(store, checkpoint)},
    )
    assert capsys.readouterr().out.strip()
