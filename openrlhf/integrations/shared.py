"""What the adapters for other libraries have in common: a model and a store, given or named, become a RAGMaster and an
open store. Knows nothing about those libraries."""

from dataclasses import replace
from pathlib import Path

import torch

from openrlhf.models.modeling_clara import CLaRa
from openrlhf.rag.config import RAGConfig, Reranking
from openrlhf.rag.master import RAGMaster
from openrlhf.retrieval.store import Store

Model = CLaRa | str | Path
"""A loaded model, or the directory or Hub name of a checkpoint."""


def loaded(model: Model) -> CLaRa:
    """The model itself; loaded, on the GPU where there is one, when it is named."""
    if isinstance(model, CLaRa):
        return model
    return CLaRa.from_pretrained(model, device_map="cuda" if torch.cuda.is_available() else None)


def opened(store: Store | str | Path) -> Store:
    """The store itself; opened for reading when it is named."""
    return store if isinstance(store, Store) else Store.open(store)


def make_master(
    model: Model, top_k: int | None, min_score: float | None, settings: RAGConfig | str | Path | None
) -> RAGMaster:
    """A RAGMaster that retrieves and ranks.

    Args:
        settings: a RAGConfig or the path of a rag_config.yaml, by default the one in the checkpoint's directory;
            `top_k` and `min_score`, where given, win over it.

    Raises:
        ValueError: a value that cannot be used, or the model cannot select documents.
    """
    config = RAGConfig.chosen(settings, model)
    own = config.reranking
    reranking = Reranking(
        own.top_k if top_k is None else top_k, own.min_score if min_score is None else float(min_score)
    )
    config = replace(config, reranking=reranking)
    return RAGMaster(loaded(model), config=config)
