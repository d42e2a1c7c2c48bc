"""scripts/ship_small.py: a small checkpoint of a run in bfloat16, and the card that says what it is worth."""

import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from openrlhf.models.configuration_clara import CLaRaConfig
from openrlhf.models.modeling_clara import CLaRa
from openrlhf.rag.config import RAGConfig

ROOT = Path(__file__).parents[1]


def ship(work: Path, record: Path, out: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "scripts/ship_small.py", "--work", str(work), "--record", str(record)]
    return subprocess.run([*command, "--name", "second", "--out", str(out)], cwd=ROOT, capture_output=True, text=True)


def test_a_model_is_shipped_with_its_runs_and_its_answers(vectors, tmp_path):
    work, record, out = tmp_path / "work", tmp_path / "record", tmp_path / "out"
    config = CLaRaConfig(
        decoder_model_name=str(vectors / "decoders" / "sys"), lora_r=4, doc_max_length=64, compr_rate=4
    )
    model = CLaRa.from_base(config)
    model.train_stage("stage1")
    model.add_query_reasoner()
    model.config.training_stage = "stage2_pretrain_retrieval"
    refused = ship(work, record, out)
    assert refused.returncode == 2 and "holds no checkpoint" in refused.stderr
    model.save_pretrained(work / "checkpoints" / "second")
    refused = ship(work, record, out)
    assert refused.returncode == 2 and "has no figures of second" in refused.stderr and not out.exists()
    runs = (("first", "stage1_2", None), ("second", "stage2_pretrain_retrieval", "elsewhere/checkpoints/first"))
    for name, stage, start in runs:
        run = record / "checkpoints" / name
        run.mkdir(parents=True)
        settings = {"stage": stage, "max_samples": 40, "train_batch_size": 4, "learning_rate": 1e-3}
        settings |= {"dataset": "data/stage1.jsonl,data/words.jsonl", "dataset_probs": "0.7,0.3"}
        settings["lora_dropout"] = 0.0 if start else 0.1
        (run / "training_config.json").write_text(json.dumps({**settings, "pretrain_checkpoint": start}))
    shipped = ship(work, record, out)
    assert shipped.returncode == 0, shipped.stderr[-2000:]
    tensors = [tensor for path in out.rglob("*.safetensors") for tensor in load_file(path).values()]
    assert tensors and {tensor.dtype for tensor in tensors} == {torch.bfloat16}
    answers = json.loads((record / "fresh" / "shipped.json").read_text(encoding="utf-8"))["answers"]
    right = sum(line["right"] for line in answers)
    card = (out / "README.md").read_text(encoding="utf-8")
    assert f"{right} of 10 fresh questions" in card and ("not a model that works" in card) == (right < 7)
    unseen = json.loads((record / "fresh" / "shipped_unseen.json").read_text(encoding="utf-8"))["answers"]
    assert len(unseen) == 10 and not {line["question"] for line in unseen} & {line["question"] for line in answers}
    assert f"{sum(line['right'] for line in unseen)} were right" in card and "says the passage again" not in card
    assert card.index("| `first` | stage1_2 | stage1 0.7, words 0.3 | 40 | 4 | 0.001 |") < card.index(
        "| `second` | stage2_pretrain_retrieval |"
    )
    assert "Three LoRA adapters" in card and "learned from labels" in card and "no query reasoner" not in card
    found = json.loads((record / "fresh" / "shipped_selecting.json").read_text(encoding="utf-8"))["answers"]
    assert f"{sum(line['right'] for line in found)} of the ten and " in card
    assert RAGConfig.chosen(None, out).reranking.top_k == 1
    assert "leave the published method:\n`--lora_dropout`.\n" in card
    assert "HotpotQA, 2WikiMultiHopQA, MuSiQue |" in card and "64 tokens into 16 vectors" in card.replace("\n", " ")
