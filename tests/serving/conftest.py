"""A checkpoint, its export, and what RAGMaster answers with it, for each kind of base model that is asked for; and a
tiny checkpoint for the server, made once."""

from pathlib import Path

import pytest
import torch

from openrlhf.models.modeling_clara import CLaRa
from openrlhf.rag.config import RAGConfig
from openrlhf.rag.master import RAGMaster
from openrlhf.serving.export_vllm import plan, write
from tests.serving.served import save_checkpoint
from tests.tiny import DOCS, QUESTIONS, new_model

NEW = 12


@pytest.fixture(scope="session")
def exported(base_dir, tmp_path_factory):
    """(model, folder of its export) over a base model of `tiny.BASES`, in float32."""
    made = {}

    def make(name: str, **fields):
        key = (name, *fields.items())
        if key not in made:
            root = tmp_path_factory.mktemp("exported")
            model = new_model(base_dir(name), **fields)
            model.train_stage("stage2")
            model.save_pretrained(root / "checkpoint")
            write(plan(str(root / "checkpoint"), root / "export", dtype="float32"))
            made[key] = (model.eval(), root / "export")
        return made[key]

    return make


def rag_config(**more) -> RAGConfig:
    """Reads two documents whatever their scores, answers greedily."""
    given = {
        "reranking": {"min_score": -1.0, "top_k": 2},
        "generation": {"temperature": 0.0, "max_new_tokens": NEW},
    }
    return RAGConfig.from_dict({**given, **more})


@pytest.fixture(scope="session")
def answers():
    """(what was prepared, RAGMaster's own answers) of the questions, with a model."""
    made = {}

    def make(model):
        if id(model) not in made:
            with RAGMaster(model, config=rag_config()) as master, torch.no_grad():
                prepared = master.prepare(QUESTIONS, DOCS)
                own = [answer for answer, _ in master.query_batch(QUESTIONS, DOCS)]
            made[id(model)] = (prepared, own)
        return made[id(model)]

    return make


@pytest.fixture(scope="session")
def checkpoint(mistral, tmp_path_factory) -> Path:
    """A stage-2 checkpoint on disk."""
    return save_checkpoint(mistral, tmp_path_factory.mktemp("serving") / "checkpoint")


@pytest.fixture(scope="session")
def model(checkpoint) -> CLaRa:
    """The same, loaded in float32 on the CPU."""
    return CLaRa.from_pretrained(checkpoint, dtype="float32", device_map="cpu")
