"""CLaRa in LlamaIndex: a retriever over a store, and a postprocessor that ranks nodes which others found.

    engine = RetrieverQueryEngine.from_args(ClaraRetriever("my_store", "checkpoints/my_stage2"), llm=llm)

Contract: what is returned is what `RAGMaster` would answer from, with texts and scores; nothing is generated here.
Needs llama-index-core (`pip install 'clara-rag[llamaindex]'`). The asynchronous methods run these in a thread; threads
may share a model.
"""

import asyncio
from pathlib import Path
from typing import Any

try:
    from llama_index.core.bridge.pydantic import Field, PrivateAttr
    from llama_index.core.postprocessor.types import BaseNodePostprocessor
    from llama_index.core.retrievers import BaseRetriever
    from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle, TextNode
except ImportError as error:
    raise ImportError(
        f"the LlamaIndex adapters need llama-index-core ({error}): pip install llama-index-core"
    ) from error

from openrlhf.integrations.shared import Model, make_master, opened
from openrlhf.models.modeling_clara import CLaRa
from openrlhf.rag.config import RAGConfig
from openrlhf.rag.master import RAGMaster
from openrlhf.retrieval.store import Document, Store


class ClaraRetriever(BaseRetriever):
    """The documents of a store that a question is answered from, best first.

    Candidates by words and by vectors, ranked by the query reasoner. A node has the document's id and text; its
    metadata are `title`, `page` where there is one, and what else the store's document came with.

    Args:
        store: an open store, or its directory.
        model: a loaded CLaRa model with a query reasoner, or its checkpoint's directory or Hub name.
        top_k: nodes returned at most; default: that of `settings`.
        min_score: cosine below which a document is not returned; default: that of `settings`.
        settings: RAGConfig or path of a rag_config.yaml.
        options: of LlamaIndex's BaseRetriever, such as `callback_manager`.

    Raises:
        ValueError, OSError: the store or the model cannot be used.
    """

    def __init__(
        self,
        store: Store | str | Path,
        model: Model,
        top_k: int | None = None,
        min_score: float | None = None,
        settings: RAGConfig | str | Path | None = None,
        **options: Any,
    ):
        super().__init__(**options)
        self._store = opened(store)
        self._master = make_master(model, top_k, min_score, settings)

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        found = self._master.retrieve(query_bundle.query_str, self._store)
        return [
            NodeWithScore(
                node=TextNode(
                    id_=cited.id,
                    text=cited.passage,
                    metadata={
                        **cited.metadata,
                        **({"title": cited.title} if cited.title else {}),
                        **({"page": cited.page} if cited.page is not None else {}),
                    },
                ),
                score=cited.score,
            )
            for cited in found
        ]

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return await asyncio.to_thread(self._retrieve, query_bundle)


class ClaraPostprocessor(BaseNodePostprocessor):
    """Ranks nodes by the query reasoner and keeps the best; their scores become its cosines.

    A node's `title` in its metadata is read with its text, as in training. A text is compressed once while it is among
    the last thousand. `to_dict` and `from_dict` name the checkpoint; a model that was given loaded has none to name.

    Args:
        model, top_k, min_score, settings: as `ClaraRetriever`.
    """

    model: str = Field(default="", description="Checkpoint with a query reasoner: directory or Hub name.")
    top_k: int | None = Field(default=None, description="Nodes kept at most.")
    min_score: float | None = Field(default=None, description="Cosine below which a node is dropped.")
    settings: str | None = Field(default=None, description="Path of a rag_config.yaml.")
    _master: RAGMaster = PrivateAttr()

    def __init__(self, model: Model = "", settings: RAGConfig | str | Path | None = None, **fields: Any):
        if not isinstance(model, CLaRa) and not str(model):
            raise ValueError("no model: give a loaded CLaRa, or the directory or Hub name of a checkpoint")
        fields["model"] = "" if isinstance(model, CLaRa) else str(model)
        fields["settings"] = None if settings is None or isinstance(settings, RAGConfig) else str(settings)
        super().__init__(**fields)
        self._master = make_master(model, self.top_k, self.min_score, settings)

    @classmethod
    def class_name(cls) -> str:
        """LlamaIndex's name of this component."""
        return "ClaraPostprocessor"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        if query_bundle is None:
            raise ValueError("ClaraPostprocessor ranks nodes by a question: give query_bundle or query_str")
        texts = [
            Document("", one.node.get_content(metadata_mode=MetadataMode.NONE), one.node.metadata.get("title") or "")
            for one in nodes
        ]
        ranked = self._master.rerank(query_bundle.query_str, texts)
        return [NodeWithScore(node=nodes[i].node, score=score) for i, score in ranked]
