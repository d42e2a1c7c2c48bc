"""`AutoModel.from_pretrained(…, trust_remote_code=True)` where this project is not installed (SPEC 4)."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from openrlhf.models.modeling_clara import CLaRa
from tests.tiny import DOCS, QUESTIONS, new_model, text_rag_model

LISTS = [DOCS[:3], DOCS[2:], DOCS[5:]]


@pytest.fixture(scope="module")
def model(mistral) -> CLaRa:
    return new_model(mistral)


@pytest.fixture(scope="module")
def text_reader(mistral) -> CLaRa:
    return text_rag_model(mistral)


@pytest.fixture(scope="module")
def found(model, text_reader, mistral, tmp_path_factory) -> dict:
    """What the probe saw: a published repository (code at the root, weights there and in a subfolder)."""
    root = tmp_path_factory.mktemp("remote")
    shutil.copytree(mistral, root / "repository" / "base")
    inside = CLaRa.from_pretrained(_saved(model, root / "first"), decoder_model_name=str(root / "repository" / "base"))
    inside.save_pretrained(root / "repository")
    inside.save_pretrained(root / "repository" / "compression-4")
    base = str(root / "repository" / "base")
    text = CLaRa.from_pretrained(_saved(text_reader, root / "text"), decoder_model_name=base)
    text.save_pretrained(root / "repository" / "text-rag")
    for code in (root / "repository").glob("*/*.py"):
        code.unlink()
    elsewhere = root / "elsewhere"
    elsewhere.mkdir()
    (root / "given.json").write_text(json.dumps({"questions": QUESTIONS, "documents": LISTS}))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HOME": str(root / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    probe = Path(__file__).parent / "remote_probe.py"
    run = subprocess.run(
        [sys.executable, str(probe), str(root / "repository"), str(root / "given.json"), str(elsewhere)],
        cwd=elsewhere,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return torch.load(elsewhere / "found.pt", weights_only=True) | {"resaved_path": elsewhere / "resaved"}


def _saved(model: CLaRa, target: Path) -> Path:
    model.save_pretrained(target)
    return target


@pytest.mark.parametrize("place", ["root", "subfolder", "resaved"])
def test_answers_and_vectors_are_bit_identical_without_the_project(model, found, place):
    """From the root, from a subfolder with its code at the root, and saved again by a user without the project."""
    seen = found[place]
    answers, topk = model.generate_from_questions(QUESTIONS, LISTS)
    assert seen["module"].startswith("transformers_modules.")
    assert torch.equal(seen["vectors"], model.compress_documents(LISTS[0])[0])
    assert torch.equal(seen["queries"], model.encode_queries(QUESTIONS))
    assert seen["answers"] == answers and torch.equal(seen["topk"], topk)
    assert seen["paraphrases"] == model.generate_from_paraphrase(QUESTIONS, LISTS)
    assert seen["dtype"] == torch.float32 and not seen["training"]


def test_a_text_rag_checkpoint_answers_without_the_project_and_says_what_it_is(text_reader, found):
    assert found["text"]["answers"] == text_reader.generate_from_text(QUESTIONS, LISTS)
    assert found["text"]["adapters"] == ["decoder_adapter"]
    assert found["text"]["error"].startswith("this is a text_rag checkpoint")


def test_what_a_user_without_the_project_saves_loads_here(model, found):
    again = CLaRa.from_pretrained(found["resaved_path"])
    assert torch.equal(again.compress_documents(DOCS)[0], model.compress_documents(DOCS)[0])


def test_overrides_and_errors_are_the_same_through_the_auto_classes(found):
    assert found["bfloat16"] == "torch.bfloat16"
    assert found["top_k"].shape == (3, 1)
    assert found["errors"]["unknown"].startswith("TypeError") and "compress_rate" in found["errors"]["unknown"]
    assert found["errors"]["rate"].startswith("ValueError") and "cannot be changed" in found["errors"]["rate"]
    assert found["errors"]["value"].startswith("ValueError") and "generation_top_k" in found["errors"]["value"]
    assert found["config"] == 4 and found["memory_id"] == 400
