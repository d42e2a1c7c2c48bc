"""The export for vLLM: other programs' models made from it answer as ours, and nothing is lost or half written."""

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from openrlhf.cli.export_vllm import main
from openrlhf.models.adapters import DECODER
from openrlhf.models.modeling_clara import CLaRa
from openrlhf.serving import export_vllm
from openrlhf.serving.export_vllm import MANIFEST, plan, write
from tests.serving.conftest import NEW
from tests.tiny import BASES, DOCS, QUESTIONS, metaspace_tokenizer, new_model, text_rag_model

KINDS = ["mistral", "qwen2", "phi3", "smollm2"]  # untied; tied with spare rows; fused projections; tied


def plain(folder: Path, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def prompts_of(model: CLaRa) -> torch.Tensor:
    """Embeddings `[T, D]` of a prompt over two documents."""
    docs_KLD, _ = model.compress_documents(DOCS[:2])
    ids = torch.tensor([model.answer_prompt(QUESTIONS[0], 2).ids])
    with torch.no_grad():
        return model.place(ids, docs_KLD, torch.tensor([2]))[0]


def own_logits(model: CLaRa, embeds_TD: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.base_logits(model.hidden(DECODER, embeds_TD[None], torch.ones(1, len(embeds_TD))))[0]


def logits(model, embeds_TD: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(inputs_embeds=embeds_TD[None]).logits[0]


@pytest.mark.parametrize("name", KINDS)
def test_the_merged_model_loaded_by_plain_transformers_gives_our_logits(exported, name):
    model, folder = exported(name)
    embeds_TD = prompts_of(model)
    expected = own_logits(model, embeds_TD)
    torch.testing.assert_close(logits(plain(folder / "merged"), embeds_TD), expected, rtol=1e-4, atol=1e-5)
    untouched = logits(plain(folder / "base"), embeds_TD)
    assert (untouched - expected).abs().max() > 0.05  # the generator does something


@pytest.mark.parametrize("name", KINDS)
def test_the_adapter_over_the_base_loaded_by_plain_peft_gives_our_logits(exported, name):
    model, folder = exported(name)
    tuned = PeftModel.from_pretrained(plain(folder / "base"), folder / "decoder_adapter").eval()
    embeds_TD = prompts_of(model)
    torch.testing.assert_close(logits(tuned, embeds_TD), own_logits(model, embeds_TD), rtol=1e-4, atol=1e-5)


# Not qwen2: random weights write ids of its spare rows, which we read back as our added tokens.
@pytest.mark.parametrize("name", ["mistral", "llama_tied", "phi3", "smollm2"])
def test_the_merged_model_answers_as_ragmaster(exported, answers, name):
    model, folder = exported(name)
    prepared, own = answers(model)
    merged, tokenizer = plain(folder / "merged"), AutoTokenizer.from_pretrained(folder / "merged")
    for item, answer in zip(prepared, own, strict=True):
        ids = torch.tensor([item.prompt.ids])
        with torch.no_grad():
            embeds_1TD = model.place(ids, item.docs_KLD, torch.tensor([len(item.docs_KLD)]))
        stops = model.stop_ids()
        new = merged.generate(
            inputs_embeds=embeds_1TD,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=stops,
            pad_token_id=stops[0],
        )[0]
        assert tokenizer.decode(new, skip_special_tokens=True).strip() == answer
    assert any(own)


@pytest.mark.parametrize("name", KINDS)
def test_the_base_is_the_untouched_base_model(exported, base_dir, name):
    _, folder = exported(name)
    files = {path.name: path.read_bytes() for path in base_dir(name).iterdir()}
    assert {path.name: path.read_bytes() for path in (folder / "base").iterdir()} == files
    merged = load_file(folder / "merged" / "model.safetensors")
    base = load_file(folder / "base" / "model.safetensors")
    assert {key: value.shape for key, value in merged.items()} == {key: value.shape for key, value in base.items()}
    changed = {key for key in base if not torch.equal(merged[key], base[key])}
    assert changed == {key for key in base if key.endswith("_proj.weight")} and changed
    assert ("lm_head.weight" in merged) == (not BASES[name].options["tie_word_embeddings"])
    words = AutoTokenizer.from_pretrained(folder / "merged").get_vocab()
    assert not any("MEM" in word or word in ("<AE>", "<ENC>", "<SEP>") for word in words)


def test_the_adapter_is_one_that_vllm_loads(exported):
    _, folder = exported("mistral")
    config = json.loads((folder / "decoder_adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (4, 8, "LORA")
    assert set(config["target_modules"]) == {f"{n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down")}
    # What vLLM refuses, or would have to know.
    assert config["bias"] == "none" and not config["modules_to_save"]
    assert not any(config.get(key) for key in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "lora_bias"))
    weights = load_file(folder / "decoder_adapter" / "adapter_model.safetensors")
    assert all(key.startswith("base_model.model.model.layers.") for key in weights)
    assert all(4 in value.shape for value in weights.values())


@pytest.mark.parametrize("name", ["mistral", "smollm2"])
def test_bfloat16_is_the_float32_sum_rounded_once(exported, tmp_path, name):
    _, folder = exported(name)
    write(plan(str(folder.parent / "checkpoint"), tmp_path / "out"))
    fine = load_file(folder / "merged" / "model.safetensors")
    coarse = load_file(tmp_path / "out" / "merged" / "model.safetensors")
    assert all(torch.equal(coarse[key], value.bfloat16()) for key, value in fine.items())
    assert plain(tmp_path / "out" / "merged", dtype="auto").dtype == torch.bfloat16
    assert "--dtype bfloat16" in (tmp_path / "out" / "README.md").read_text()
    # The base stays in the dtype it came in.
    assert load_file(tmp_path / "out" / "base" / "model.safetensors")["model.norm.weight"].dtype == torch.float32


def test_large_models_are_written_in_shards(exported, tmp_path, monkeypatch):
    model, folder = exported("mistral")
    monkeypatch.setattr(export_vllm, "SHARD_BYTES", 60_000)
    write(plan(str(folder.parent / "checkpoint"), tmp_path / "out", dtype="float32"))
    shards = sorted((tmp_path / "out" / "merged").glob("model-*.safetensors"))
    assert len(shards) > 2 and shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    assert all(sum(t.numel() * 4 for t in load_file(path).values()) <= 60_000 for path in shards)
    embeds_TD = prompts_of(model)
    whole, sharded = plain(folder / "merged"), plain(tmp_path / "out" / "merged")
    assert torch.equal(logits(whole, embeds_TD), logits(sharded, embeds_TD))


def test_a_sharded_base_is_copied_and_its_second_copy_left_behind(tmp_path, base_dir):
    base = tmp_path / "base"
    plain(base_dir("mistral")).save_pretrained(base, max_shard_size="60KB")
    AutoTokenizer.from_pretrained(base_dir("mistral")).save_pretrained(base)
    save_file({"again": torch.zeros(4)}, base / "consolidated.safetensors")
    (base / "modeling_evil.py").write_text("raise SystemExit")
    model = new_model(base)
    model.save_pretrained(tmp_path / "checkpoint")
    write(plan(str(tmp_path / "checkpoint"), tmp_path / "out", dtype="float32"))
    copied = {path.name for path in (tmp_path / "out" / "base").iterdir()}
    assert copied == {path.name for path in base.iterdir()} - {"consolidated.safetensors", "modeling_evil.py"}
    embeds_TD = prompts_of(model)
    found = logits(plain(tmp_path / "out" / "merged"), embeds_TD)
    torch.testing.assert_close(found, own_logits(model, embeds_TD), rtol=1e-4, atol=1e-5)


def test_a_public_checkpoint_is_exported_too(tmp_path, vectors):
    source, base = vectors / "checkpoints" / "c8_stage2", vectors / "decoders" / "sys"
    write(plan(str(source), tmp_path / "out", str(base), "float32", with_base=False))
    model = CLaRa.from_pretrained(source, decoder_model_name=str(base))
    embeds_TD = torch.randn(9, model.decoder.config.hidden_size)
    found = logits(plain(tmp_path / "out" / "merged"), embeds_TD)
    torch.testing.assert_close(found, own_logits(model, embeds_TD), rtol=1e-4, atol=1e-4)


def test_a_text_rag_checkpoint_is_exported_too(tmp_path, mistral):
    model = text_rag_model(mistral)
    model.save_pretrained(tmp_path / "checkpoint")
    write(plan(str(tmp_path / "checkpoint"), tmp_path / "out", dtype="float32", with_base=False))
    embeds_TD = torch.randn(9, model.decoder.config.hidden_size)
    found = logits(plain(tmp_path / "out" / "merged"), embeds_TD)
    torch.testing.assert_close(found, own_logits(model, embeds_TD), rtol=1e-4, atol=1e-5)


def test_without_a_copy_of_the_base_the_commands_name_it(tmp_path, exported, base_dir):
    _, folder = exported("mistral")
    main(["--checkpoint", str(folder.parent / "checkpoint"), "--output", str(tmp_path / "out"), "--no_base"])
    assert not (tmp_path / "out" / "base").exists()
    assert f"vllm serve {base_dir('mistral')} --served-model-name" in (tmp_path / "out" / "README.md").read_text()
    assert "vllm serve base --served-model-name" in (folder / "README.md").read_text()


def test_the_commands_of_the_readme_have_the_rank(tmp_path, mistral):
    new_model(mistral, lora_r=12).save_pretrained(tmp_path / "checkpoint")
    export = plan(str(tmp_path / "checkpoint"), tmp_path / "out")
    assert export.max_lora_rank == 16 and "--max-lora-rank 16" in export_vllm.readme(export)


def test_an_earlier_export_is_replaced(tmp_path, exported):
    _, folder = exported("mistral")
    arguments = ["--checkpoint", str(folder.parent / "checkpoint"), "--output", str(tmp_path / "out")]
    main(arguments)
    main([*arguments, "--dtype", "float32", "--no_base"])
    assert json.loads((tmp_path / "out" / MANIFEST).read_text())["dtype"] == "float32"
    assert not (tmp_path / "out" / "base").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("what", ["a folder", "a file", "a checkpoint", "an export with a note in it"])
def test_what_it_did_not_make_is_not_replaced(tmp_path, exported, capsys, what):
    _, folder = exported("mistral")
    output = tmp_path / "out"
    if what == "a folder":
        output.mkdir()
        (output / "thesis.txt").write_text("dear")
    elif what == "a file":
        output.write_text("dear")
    else:
        shutil.copytree(folder.parent / "checkpoint" if what == "a checkpoint" else folder, output)
        (output / "note.txt").write_text("dear")
    before = sorted(path.name for path in output.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        main(["--checkpoint", str(folder.parent / "checkpoint"), "--output", str(output)])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "choose another --output" in said and said.count("\n") == 1
    assert sorted(path.name for path in output.rglob("*")) == before


Usage = namedtuple("Usage", "total used free")


def test_too_little_room_is_found_before_anything_is_written(tmp_path, exported, capsys, monkeypatch):
    _, folder = exported("mistral")
    arguments = ["--checkpoint", str(folder.parent / "checkpoint"), "--output", str(tmp_path / "deep" / "out")]
    sizes = {part: (folder / part / "model.safetensors").stat().st_size for part in ("base", "merged")}
    little = export_vllm._ROOM + sizes["merged"] // 2 + 30_000  # enough for merged/ in bfloat16, not for base/
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, little))
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2 and "--no_base" in capsys.readouterr().err and not (tmp_path / "deep").exists()
    main([*arguments, "--no_base"])
    assert (tmp_path / "deep" / "out" / "merged").is_dir()


def test_a_disk_that_fills_up_leaves_the_earlier_export(tmp_path, exported, capsys, monkeypatch):
    _, folder = exported("mistral")
    arguments = ["--checkpoint", str(folder.parent / "checkpoint"), "--output", str(tmp_path / "out")]
    main(arguments)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_vllm, "_write_merged", full)
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--dtype", "float32"])
    assert stop.value.code == 1 and "No space left" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_killed_export_leaves_nothing_that_looks_whole(tmp_path, exported):
    _, folder = exported("mistral")
    checkpoint, output = folder.parent / "checkpoint", tmp_path / "out"
    program = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from openrlhf.serving import export_vllm\n"
        "export_vllm._write_manifest = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "export_vllm.write(export_vllm.plan(sys.argv[1], Path(sys.argv[2])))\n"
    )
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", program, checkpoint, output],
        env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert run.returncode == -9 and not output.exists()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.draft-") and (left / "merged" / "model.safetensors").is_file()
    write(plan(str(checkpoint), output))
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (output / MANIFEST).is_file()


def test_the_draft_of_an_export_that_still_runs_is_left_alone(tmp_path, exported):
    _, folder = exported("mistral")
    other = tmp_path / f".out.draft-{os.getppid()}"
    other.mkdir()
    write(plan(str(folder.parent / "checkpoint"), tmp_path / "out"))
    assert other.is_dir()


def test_another_base_model_is_refused(tmp_path, exported, base_dir, capsys):
    checkpoint = exported("mistral")[1].parent / "checkpoint"
    arguments = ["--checkpoint", str(checkpoint), "--output", str(tmp_path / "out"), "--decoder_model_name"]
    for base in ("phi3", "nowhere"):
        with pytest.raises(SystemExit) as stop:
            main([*arguments, str(base_dir(base)) if base == "phi3" else "./nowhere"])
        assert stop.value.code == 2
    said = capsys.readouterr().err.splitlines()
    assert "does not belong to the base model" in said[0] and "does not exist there" in said[0]
    assert "was not found" in said[1] and not (tmp_path / "out").exists()


def test_a_base_with_another_tokenizer_is_refused(tmp_path, exported, base_dir):
    checkpoint = exported("mistral")[1].parent / "checkpoint"
    shutil.copytree(base_dir("mistral"), tmp_path / "base")
    metaspace_tokenizer("first").save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="another tokenizer than the one the checkpoint was trained with"):
        plan(str(checkpoint), tmp_path / "out", str(tmp_path / "base"))


@pytest.mark.parametrize("what", ["no safetensors", "cut short", "quantised", "adapter missing"])
def test_what_cannot_be_exported_is_said_in_words(tmp_path, exported, base_dir, what):
    shutil.copytree(exported("mistral")[1].parent / "checkpoint", tmp_path / "checkpoint")
    shutil.copytree(base_dir("mistral"), tmp_path / "base")
    weights = tmp_path / "base" / "model.safetensors"
    if what == "no safetensors":
        weights.rename(weights.with_name("pytorch_model.bin"))
        message = "needs the base model's weights as safetensors"
    elif what == "cut short":
        weights.write_bytes(weights.read_bytes()[:-100])
        message = "cut short or damaged"
    elif what == "adapter missing":
        (tmp_path / "checkpoint" / "decoder_adapter" / "adapter_model.safetensors").unlink()
        message = "is missing: the checkpoint is not complete"
    else:
        path = tmp_path / "checkpoint" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "quantization": "int4"}))
        message = "quantised to int4"
    with pytest.raises((ValueError, OSError), match=message):
        plan(str(tmp_path / "checkpoint"), tmp_path / "out", str(tmp_path / "base"))
    assert not (tmp_path / "out").exists()
