"""The evaluation scripts: their variables reach the command."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(script: str, *arguments: str, **variables) -> subprocess.CompletedProcess:
    named = ("CHECKPOINT", "MODEL_PATH", "DATASETS", "EVAL_DATA", "SETTING", "MAX_QUESTIONS", "RESULTS_DIR")
    named += ("TEXT_RAG_CHECKPOINT",)
    environment = {key: value for key, value in os.environ.items() if key not in named}
    environment |= {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {key: str(value) for key, value in variables.items()}
    command = ["bash", str(ROOT / "scripts" / f"evaluation_{script}.sh"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("script", "settings"),
    [("end_to_end", ["oracle"]), ("instruction_tuning", ["normal"]), ("pretraining", ["paraphrase"])],
)
def test_variables_choose_what_is_measured(script, settings, stage2, mistral, eval_data, tmp_path):
    checkpoint = shutil.copytree(stage2, tmp_path / "elsewhere" / "checkpoint")
    fields = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**fields, "decoder_model_name": "./gone"}))
    dataset = "facts" if script == "pretraining" else "towns"
    output = tmp_path / "results"
    done = run(
        script,
        *("--max_new_tokens", "4"),
        CHECKPOINT=checkpoint,
        MODEL_PATH=mistral,
        DATASETS=dataset,
        EVAL_DATA=eval_data,
        SETTING=settings[0],
        MAX_QUESTIONS=2,
        RESULTS_DIR=output,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((output / "results.json").read_text())
    assert results["suite"] == script and results["config"]["datasets"] == [dataset]
    assert results["config"]["settings"] == settings and results["config"]["max_new_tokens"] == 4
    assert [each["questions"] for each in results["data"]] == [2]
    assert f"next: python -m evaluation.report {output}" in done.stdout
    assert "clara" in done.stdout


def test_a_base_model_that_has_moved_is_asked_for(stage2, eval_data, tmp_path):
    checkpoint = shutil.copytree(stage2, tmp_path / "checkpoint")
    fields = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**fields, "decoder_model_name": "./gone"}))
    done = run("end_to_end", CHECKPOINT=checkpoint, EVAL_DATA=eval_data, RESULTS_DIR=tmp_path / "results")
    assert done.returncode == 2 and "'./gone' was not found" in done.stderr and "Traceback" not in done.stderr
