"""The estimate command: from a config.json alone, errors before anything is built, the same flags as train_sft."""

import json
import shlex

import pytest

from openrlhf.cli import estimate, train_sft
from openrlhf.trainer import estimate as logic


@pytest.fixture(scope="module")
def bare(tmp_path_factory, base_dir):
    """A directory that holds only a tiny model's config.json."""
    folder = tmp_path_factory.mktemp("bare")
    (folder / "config.json").write_text((base_dir("mistral") / "config.json").read_text())
    return folder


SHORT = ["--device", "cpu", "--doc_tokens", "9", "--prompt_tokens", "9", "--answer_tokens", "9"]


def run(*flags: object) -> None:
    estimate.main([str(flag) for flag in flags])


def test_a_config_is_enough(bare, tmp_path, capsys):
    target = tmp_path / "found.json"
    run("--pretrain", bare, "--compress_rate", 16, "--micro_train_batch_size", 2, "--json", target, *SHORT)
    out, found = capsys.readouterr().out, json.loads(target.read_text())
    assert "measured here" in out and "not measured" not in out
    assert found["seconds_per_step"] > 0 and found["documents_per_s"] > 0
    assert found["bytes_per_document"] == 16 * 32 * 4
    assert found["memory"]["sum"] == pytest.approx(sum(v for key, v in found["memory"].items() if key != "sum"))
    assert found["settings"]["compress_rate"] == 16
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]


def test_the_7b_shape_needs_no_file(tmp_path, capsys):
    target = tmp_path / "found.json"
    flags = "--pretrain mistral-7b --bf16 --device h100 --records 1000 --max_epochs 1"
    run(*flags.split(), "--json", target)
    out, found = capsys.readouterr().out, json.loads(target.read_text())
    assert "not measured" in out and " hours for 1,000 records" in out
    # 7,241,732,096 of the base, two adapters of 41,943,040, and the embeddings of 8 memory tokens
    assert found["parameters"] == 7_241_732_096 + 2 * 41_943_040 + 8 * 4096
    assert found["trained"] == 2 * 41_943_040 + 8 * 4096
    assert found["memory_there"] == 80e9 and found["largest_micro_train_batch_size"] > 8
    assert found["hours"] == pytest.approx(8 * found["seconds_per_step"] / 3600)


def test_text_rag_is_estimated_without_documents_to_compress(bare, tmp_path, capsys):
    target = tmp_path / "found.json"
    given = f"--pretrain {bare} --stage text_rag --generation_top_k 3 --micro_train_batch_size 1"
    run(*given.split(), "--json", target, *SHORT)
    out, found = capsys.readouterr().out, json.loads(target.read_text())
    assert "read as text, 45 tokens a question" in out and "compressed a second" not in out
    assert found["documents_per_s"] is None and found["seconds_per_step"] > 0
    words = shlex.split(out.split("next          ")[1])
    places = ["--save_path", str(tmp_path / "a"), "--ckpt_path", str(tmp_path / "b")]
    assert train_sft.parse([*words[words.index("openrlhf.cli.train_sft") + 1 :], *places]).stage == "text_rag"


def test_what_to_type_next_is_a_command_train_sft_takes(bare, tmp_path):
    given = f"--pretrain {bare} --stage stage2 --generation_top_k 3 --compress_rate 64 --bf16 --lora_r 8 --zero_stage 1"
    flags = estimate.parse([*given.split(), "--micro_train_batch_size", "1", "--train_batch_size", "4"])
    words = shlex.split(estimate.next_command(flags))
    places = ["--save_path", str(tmp_path / "a"), "--ckpt_path", str(tmp_path / "b")]
    config = train_sft.parse([*words[words.index("openrlhf.cli.train_sft") + 1 :], *places])
    assert (config.stage, config.lora_r, config.bf16, config.zero_stage) == ("stage2", 8, True, 1)


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--compress_rate 17", "must divide"),
        ("--device tpu", "--device tpu is not known: one of here, cpu, h200"),
        ("--pretrain /nowhere/at/all", "was not found"),
        ("--pretrain tests", "has no config.json"),
        ("--candidates 0 --processes 0", "--candidates must be at least 1; --processes must be at least 1"),
        ("--doc_tokens 999", "must not exceed --doc_max_length 256"),
        ("--answer_tokens -1", "--answer_tokens must not be negative"),
        ("--memory_gb 0", "--memory_gb must be positive"),
        ("--json /nowhere/at/all.json", "its directory does not exist"),
        ("--generation_top_k 5", "must be 1 in stage1"),
        ("--train_batch_size 4", "must not exceed --train_batch_size"),
        ("--stage stage3", "invalid choice"),
        ("--dataset x", "unrecognized arguments"),
    ],
)
def test_what_is_wrong_is_one_line_before_anything_is_built(flags, words, capsys, monkeypatch):
    monkeypatch.setattr(logic, "count", None)
    with pytest.raises(SystemExit) as left:
        run("--pretrain", "mistral-7b", *flags.split())
    said = capsys.readouterr()
    assert left.value.code == 2 and not said.out
    assert words in said.err.splitlines()[-1] and said.err.splitlines()[-1].startswith("estimate: ")
