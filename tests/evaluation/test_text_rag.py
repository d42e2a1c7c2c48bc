"""Evaluation with --text_rag_checkpoint: the fine-tuned text reader beside CLaRa, and what is refused (SPEC 8)."""

import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from evaluation import cli, evaluate, report
from evaluation.checks import check_text_rag
from evaluation.config import EvaluationConfig
from evaluation.report_data import SYSTEM_LABELS
from openrlhf.models.modeling_clara import CLaRa
from openrlhf.models.prompts import DEFAULT_PROMPTS
from tests.evaluation.test_evaluate import figure, flags, no_model, read, refused, without_times  # noqa: F401
from tests.evaluation.test_scripts import run
from tests.tiny import text_rag_model

TUNED = ("text_rag_tuned", "oracle_text_tuned")


def save(base: Path, target: Path, **fields) -> Path:
    """A text_rag checkpoint with a random adapter."""
    text_rag_model(base, **fields).save_pretrained(target)
    return target


@pytest.fixture(scope="module")
def text_rag(mistral, tmp_path_factory) -> Path:
    return save(mistral, tmp_path_factory.mktemp("text") / "text_rag")


@pytest.fixture(scope="module")
def finished(stage2, text_rag, eval_data, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("finished") / "run"
    evaluate.main(flags(stage2, eval_data, output, "--text_rag_checkpoint", str(text_rag)))
    return output


def test_the_tuned_systems_answer_the_same_prompts_as_the_base_with_the_adapter_does(
    finished, mistral, stage2, text_rag
):
    _, lines = read(finished)
    base = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(mistral), text_rag / "decoder_adapter")
    tokenizer, clara = AutoTokenizer.from_pretrained(mistral), CLaRa.from_pretrained(stage2)
    differ = 0
    for line in lines:
        systems_of = line["baselines"]
        assert systems_of["text_rag_tuned"]["selected"] == systems_of["text_rag"]["selected"]
        golds = [line["documents"][str(i)] for i in line["pos_index"]]
        for name in TUNED:
            plain = systems_of[name.removesuffix("_tuned")]
            assert systems_of[name]["prompt_tokens"] == plain["prompt_tokens"]
            differ += systems_of[name]["prediction"] != plain["prediction"]
        read_by = {"text_rag_tuned": [line["documents"][str(s["index"])] for s in systems_of["text_rag"]["selected"]]}
        if line["setting"] == "oracle":
            read_by["oracle_text_tuned"] = golds
        for name, documents in read_by.items():
            ids = clara.text_prompt(line["question"], documents).ids
            output = base.generate(input_ids=torch.tensor([ids]), max_new_tokens=6, do_sample=False)
            expected = tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True).strip()
            assert systems_of[name]["prediction"] == expected
    assert differ > len(lines)


def test_everything_else_is_as_without_it(finished, stage2, eval_data, tmp_path):
    evaluate.main(flags(stage2, eval_data, tmp_path / "without"))
    lines = read(finished)[1]
    for line in lines:
        assert set(TUNED) <= set(line["baselines"])
        for name in TUNED:
            del line["baselines"][name]
    assert without_times(lines) == without_times(read(tmp_path / "without")[1])


def test_they_are_in_the_figures_the_table_and_on_the_page(finished, text_rag, tmp_path):
    results, _ = read(finished)
    for name in TUNED:
        assert "rank 4" in results["systems"][name] and "text_rag" in results["systems"][name]
        assert figure(results, dataset="average", setting="oracle", system=name, metric="cover_em")["n"] == 8
        assert f"| Cover-EM | {name} |" in (finished / "table.md").read_text(encoding="utf-8")
    assert results["config"]["text_rag_checkpoint"] == str(text_rag)
    report.main([str(finished), "--output", str(tmp_path / "page.html")])
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert all(SYSTEM_LABELS[name] in page for name in TUNED) and str(text_rag) in page


def test_another_text_rag_checkpoint_is_another_run(finished, stage2, text_rag, eval_data, mistral, tmp_path, capsys):
    before = (finished / "results.json").read_bytes()
    with pytest.raises(SystemExit):
        evaluate.main(flags(stage2, eval_data, finished))
    assert "other settings (text_rag_weights)" in capsys.readouterr().err
    other = text_rag_model(mistral)
    with torch.no_grad():
        next(p for name, p in other.named_parameters() if "lora_B" in name).add_(1e-3)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(flags(stage2, eval_data, finished, "--text_rag_checkpoint", str(tmp_path / "other")))
    assert stopped.value.code == 2 and "other settings (text_rag_weights)" in capsys.readouterr().err
    evaluate.main(flags(stage2, eval_data, finished, "--text_rag_checkpoint", str(text_rag)))  # the same: shown again
    assert (finished / "results.json").read_bytes() == before


def test_the_instruction_suite_and_its_script_take_it(stage1, text_rag, mistral, eval_data, tmp_path):
    variables = {"CHECKPOINT": stage1, "TEXT_RAG_CHECKPOINT": text_rag, "EVAL_DATA": eval_data, "MAX_QUESTIONS": 2}
    output = tmp_path / "answers"
    done = run("instruction_tuning", "--max_new_tokens", "4", **variables, RESULTS_DIR=output, MODEL_PATH=mistral)
    assert done.returncode == 0, done.stderr
    results, lines = read(output)
    assert set(TUNED) <= set(results["systems"])
    assert [s["index"] for s in lines[0]["baselines"]["text_rag_tuned"]["selected"]] == [0, 1, 2]
    done = run("pretraining", "--max_new_tokens", "4", **variables, RESULTS_DIR=tmp_path / "said")
    assert done.returncode == 0, done.stderr  # which has no questions: the variable means nothing there


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"lora_r": 2}, "lora_r 2 and not 4"),
        ({"doc_max_length": 32}, "doc_max_length 32 and not 16"),
        ({"prompts": {**DEFAULT_PROMPTS, "answer_system": "Say it."}}, "prompt answer_system 'Say it.' and not"),
        ({"prompts": {**DEFAULT_PROMPTS, "answer_user": "{docs} {query}"}}, "prompt answer_user '{docs} {query}' and"),
    ],
)
def test_one_that_cannot_be_compared_is_refused(
    no_model,  # noqa: F811
    stage2, mistral, eval_data, tmp_path, capsys, fields, said,
):  # fmt: skip
    other = save(mistral, tmp_path / "other", **fields)
    message = refused(flags(stage2, eval_data, tmp_path / "out", "--text_rag_checkpoint", str(other)), capsys)
    assert "cannot be compared with --checkpoint" in message and said in message
    assert not (tmp_path / "out").exists()


def test_one_of_another_base_model_is_refused(
    no_model,  # noqa: F811
    stage2, base_dir, mistral, text_rag, eval_data, tmp_path, capsys,
):  # fmt: skip
    other = save(base_dir("phi3"), tmp_path / "other")
    message = refused(flags(stage2, eval_data, tmp_path / "out", "--text_rag_checkpoint", str(other)), capsys)
    assert f"base model '{base_dir('phi3')}' and not '{mistral}'" in message
    given = ("--text_rag_checkpoint", str(other), "--model_path", str(mistral))
    assert "base model '" in refused(flags(stage2, eval_data, tmp_path / "out", *given), capsys)


def test_copies_of_one_base_model_are_one(stage2, mistral, tmp_path):
    copy = shutil.copytree(mistral, tmp_path / "elsewhere" / "base")
    config = EvaluationConfig(str(stage2), text_rag_checkpoint=str(save(copy, tmp_path / "other")))
    assert check_text_rag(config, stage2, str(mistral)) == tmp_path / "other"
    weights = next(copy.glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ValueError, match="cannot be compared"):
        check_text_rag(config, stage2, str(mistral))
    weights.unlink()
    with pytest.raises(ValueError, match="cannot be compared"):
        check_text_rag(config, stage2, str(mistral))


def test_a_base_model_that_has_moved_is_given_for_both(stage2, mistral, tmp_path):
    other = save(shutil.copytree(mistral, tmp_path / "elsewhere" / "mistral"), tmp_path / "other")
    shutil.rmtree(tmp_path / "elsewhere")
    given = {"checkpoint": str(stage2), "text_rag_checkpoint": str(other)}
    with pytest.raises(FileNotFoundError, match="was not found"):
        check_text_rag(EvaluationConfig(**given), stage2, str(mistral))
    assert check_text_rag(EvaluationConfig(**given, model_path=str(mistral)), stage2, str(mistral)) == other


def test_the_tools_that_look_at_vectors_refuse_it(text_rag):
    with pytest.raises(ValueError, match="is a text_rag checkpoint, which has no vectors"):
        cli.check_checkpoint(str(text_rag), None)


def test_what_is_no_text_rag_checkpoint_is_refused(
    no_model,  # noqa: F811
    stage2, stage1, text_rag, eval_data, tmp_path, capsys,
):  # fmt: skip
    def said(checkpoint: Path, *more: str) -> str:
        return refused(flags(checkpoint, eval_data, tmp_path / "out", *more), capsys)

    assert "is a stage1 checkpoint: give one that" in said(stage2, "--text_rag_checkpoint", str(stage1))
    assert "nowhere" in said(stage2, "--text_rag_checkpoint", str(tmp_path / "nowhere"))
    assert "has no compressor: give it as --text_rag_checkpoint" in said(text_rag, "--suite", "instruction_tuning")
    given = ("--text_rag_checkpoint", str(text_rag))
    assert "--text_rag_checkpoint is a baseline: it needs --baselines" in said(stage2, *given, "--baselines", "no")
    assert "--text_rag_checkpoint is a baseline" in said(stage2, *given, "--suite", "pretraining")
    half = shutil.copytree(text_rag, tmp_path / "half")
    (half / "decoder_adapter" / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors is missing" in said(stage2, "--text_rag_checkpoint", str(half))
