"""example/checkpoint: whole, small, without traces of the machine it was made on, and loaded by AutoModel."""

import filecmp
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from openrlhf.cli import rag

ROOT = Path(__file__).parents[1]
CHECKPOINT = ROOT / "example" / "checkpoint"
BASE = ROOT / ".models" / "SmolLM2-135M-Instruct"
LARGEST = 32 * 2**20


def tensors() -> dict[str, torch.Tensor]:
    """All tensors that are shipped."""
    found = {}
    for path in sorted(CHECKPOINT.rglob("*.safetensors")):
        with safe_open(path, "pt") as file:
            names = file.keys()
            found |= {f"{path.relative_to(CHECKPOINT)}/{name}": file.get_tensor(name) for name in names}
    return found


def test_its_tensors_are_those_of_its_config_in_bfloat16_and_at_most_32_mb():
    config, shipped = json.loads((CHECKPOINT / "config.json").read_text(encoding="utf-8")), tensors()
    assert sum(path.stat().st_size for path in CHECKPOINT.rglob("*.safetensors")) <= LARGEST
    assert {tensor.dtype for tensor in shipped.values()} == {torch.bfloat16}
    assert all(bool(tensor.isfinite().all()) for tensor in shipped.values())
    rows = next(tensor for name, tensor in shipped.items() if name.endswith("embed_tokens"))
    assert len(rows) == config["doc_max_length"] // config["compr_rate"] + 3
    for adapter in ("encoder_adapter", "query_reasoner_adapter", "decoder_adapter"):
        ranks = {min(t.shape) for name, t in shipped.items() if name.startswith(adapter)}
        assert ranks == {config["lora_r"]} and config["lora_r"] <= 16
        assert any(bool(t.any()) for name, t in shipped.items() if name.startswith(adapter) and "lora_B" in name)


def test_its_code_is_this_code():
    copies = sorted(path.name for path in CHECKPOINT.glob("*.py"))
    ours = sorted(path.name for path in (ROOT / "openrlhf" / "models").glob("*.py") if path.name != "__init__.py")
    assert copies == ours
    _, other, missing = filecmp.cmpfiles(CHECKPOINT, ROOT / "openrlhf" / "models", copies, shallow=False)
    assert not other and not missing, "cp openrlhf/models/[a-z]*.py example/checkpoint/"


def test_it_names_the_base_model_relative_to_itself_and_no_other_place():
    config = json.loads((CHECKPOINT / "config.json").read_text(encoding="utf-8"))
    assert (CHECKPOINT / config["decoder_model_name"]).resolve() == BASE
    for path in CHECKPOINT.rglob("*"):
        if path.suffix in (".json", ".md"):
            assert str(Path.home()) not in path.read_text(encoding="utf-8")


def test_its_card_has_data_licences_figures_and_limits_and_says_where_it_is_not_good():
    text = (CHECKPOINT / "README.md").read_text(encoding="utf-8")
    for heading in ("## Training", "## Figures", "## Limits", "license:", "| data | what of it | licence |"):
        assert heading in text
    assert text.count("| right |") + text.count("| wrong |") == 10
    assert ("not a model that works" in text) == (text.count("| right |") < 7)


@pytest.mark.skipif(not BASE.is_dir(), reason="python scripts/get_base_model.py makes the base model")
def test_automodel_loads_it_and_its_vectors_say_what_was_in_the_document():
    code = (
        "from transformers import AutoModel\n"
        f"model = AutoModel.from_pretrained({str(CHECKPOINT)!r}, trust_remote_code=True)\n"
        "text = 'The lighthouse was built in the year 1874 by an engineer.'\n"
        "vectors = model.compress_documents([text])[0][0]\n"
        "ids = model.tokens.tokenizer(text, add_special_tokens=False).input_ids\n"
        "best = model.head(vectors, added=False).topk(8).indices\n"
        "print(sum(token in best for token in ids), len(ids))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    named, all_tokens = map(int, run.stdout.split()[-2:])
    assert named >= 0.8 * all_tokens


@pytest.mark.skipif(not BASE.is_dir(), reason="python scripts/get_base_model.py makes the base model")
def test_it_answers_at_least_seven_of_ten_fresh_questions_unless_its_card_says_that_it_is_unfinished():
    ask = [sys.executable, "scripts/ask_fresh.py", "--checkpoint", str(CHECKPOINT)]
    for more in ([], ["--select", "1"]):
        run = subprocess.run([*ask, *more], cwd=ROOT, capture_output=True, text=True, check=True)
        right = int(run.stdout.splitlines()[-1].split(" of 10 right")[0])
        assert right >= 7 or "not a model that works" in (CHECKPOINT / "README.md").read_text(encoding="utf-8")
        found = [line for line in run.stdout.splitlines() if "documents found" in line]
        assert len(found) == bool(more) and all(int(line.split(" of 10")[0]) >= 9 for line in found)


@pytest.mark.skipif(not BASE.is_dir(), reason="python scripts/get_base_model.py makes the base model")
def test_a_folder_is_asked_with_it_as_the_readme_says(tmp_path, capsys):
    library = tmp_path / "library"
    library.mkdir()
    rows = (ROOT / "scripts" / "fresh_questions.jsonl").read_text(encoding="utf-8").splitlines()
    for number, row in enumerate(map(json.loads, rows)):
        (library / f"{number}.txt").write_text("\n\n".join(row["docs"]), encoding="utf-8")
    asked = json.loads(rows[0])
    rag.main([asked["question"], "--documents", str(library), "--store", str(tmp_path / "store")])
    answer, *sources = capsys.readouterr().out.strip().splitlines()
    assert asked["golden_answers"][0] in answer and "[1] 0.txt" in "\n".join(sources) and "[2]" not in "".join(sources)
