"""Checkpoints of our format: what is in them, what is refused, where they may lie (SPEC 5)."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from openrlhf.models.checkpoint import trained_state
from openrlhf.models.modeling_clara import CLaRa, CLaRaConfig
from openrlhf.models.prompts import DEFAULT_PROMPTS
from tests.tiny import BASES, DOCS, QUESTIONS, byte_level_tokenizer, new_model


@pytest.fixture(scope="module")
def saved(mistral, tmp_path_factory) -> tuple[CLaRa, Path]:
    model = new_model(mistral, query=False)
    target = tmp_path_factory.mktemp("saved") / "checkpoint"
    model.save_pretrained(target)
    return model, target


@pytest.fixture
def tree(saved, mistral, tmp_path) -> Path:
    """A directory that holds a base model and a checkpoint that points to it by a relative path."""
    shutil.copytree(mistral, tmp_path / "tree" / "base")
    target = shutil.copytree(saved[1], tmp_path / "tree" / "checkpoint")
    edit_config(target, decoder_model_name="../base")
    return tmp_path / "tree"


def edit_config(checkpoint: Path, **fields) -> None:
    path = checkpoint / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def same(a: CLaRa, b: CLaRa) -> bool:
    return torch.equal(a.compress_documents(DOCS)[0], b.compress_documents(DOCS)[0])


def test_a_checkpoint_holds_the_files_of_the_contract(saved):
    found = {str(path.relative_to(saved[1])) for path in saved[1].rglob("*") if path.is_file()}
    adapters = {
        f"{a}/{f}"
        for a in ("encoder_adapter", "decoder_adapter")
        for f in ("adapter_config.json", "adapter_model.safetensors")
    }
    assert found >= adapters | {"config.json", "special_embeddings.safetensors", "modeling_clara.py", "README.md"}
    assert found >= {"tokenizer.json", "tokenizer_config.json"}
    assert not any(name.startswith((".", "query_reasoner")) or name.endswith((".pth", ".bin", ".pt")) for name in found)


def test_config_json_carries_prompts_code_and_type(saved):
    fields = json.loads((saved[1] / "config.json").read_text())
    assert fields["model_type"] == "CLaRa" and fields["prompts"] == DEFAULT_PROMPTS
    assert fields["auto_map"] == {"AutoConfig": "modeling_clara.CLaRaConfig", "AutoModel": "modeling_clara.CLaRa"}
    assert (fields["doc_max_length"], fields["compr_rate"], fields["lora_r"]) == (16, 4, 4)
    assert not Path(fields["decoder_model_name"]).is_absolute()


def test_only_the_small_trained_part_is_stored(saved):
    rows = load_file(saved[1] / "special_embeddings.safetensors")
    assert {key: tuple(value.shape) for key, value in rows.items()} == {"embed_tokens": (7, 32), "lm_head": (7, 32)}
    weights = load_file(saved[1] / "encoder_adapter" / "adapter_model.safetensors")
    assert all(key.startswith("base_model.model.model.layers.") and ".lora_" in key for key in weights)


def test_a_loaded_model_is_in_eval_mode_and_frozen(saved):
    model = CLaRa.from_pretrained(saved[1])
    assert not any(module.training for module in model.modules())
    assert not any(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_memory_embeddings_can_go_on_learning_after_a_load(saved):
    model = CLaRa.from_pretrained(saved[1])
    model.train_stage("stage1")
    assert model.special.memory.requires_grad


def test_the_saved_tokenizer_holds_the_memory_tokens(saved):
    tokenizer = AutoTokenizer.from_pretrained(saved[1])
    assert tokenizer.convert_tokens_to_ids(["<MEM0>", "<SEP>"]) == [400, 406] and len(tokenizer) == 407


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16"])
@pytest.mark.parametrize("keyword", ["dtype", "torch_dtype"])
def test_a_dtype_asked_for_is_honoured(saved, keyword, dtype):
    model = CLaRa.from_pretrained(saved[1], **{keyword: dtype})
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(("capability", "dtype", "warned"), [
    ("AVX2", torch.bfloat16, True), ("AVX512", torch.bfloat16, False), ("AVX2", torch.float32, False),
])  # fmt: skip
def test_bfloat16_on_a_processor_without_it_is_warned_of(saved, monkeypatch, caplog, capability, dtype, warned):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    CLaRa.from_pretrained(saved[1], dtype=dtype)
    assert ("has no bfloat16 arithmetic" in caplog.text) == warned


def test_the_default_dtype_on_cpu_is_float32_whatever_was_saved(saved, tmp_path):
    CLaRa.from_pretrained(saved[1], dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert load_file(tmp_path / "special_embeddings.safetensors")["embed_tokens"].dtype == torch.bfloat16
    assert {p.dtype for p in CLaRa.from_pretrained(tmp_path).parameters()} == {torch.float32}


def test_weights_gathered_elsewhere_are_written_in_place_of_the_models_own(saved, tmp_path):
    """Where parameters are partitioned over ranks, the trainer hands over what it gathered."""
    state = {name: tensor + 1 for name, tensor in trained_state(saved[0]).items()}
    saved[0].save_pretrained(tmp_path, state=state)
    again = trained_state(CLaRa.from_pretrained(tmp_path))
    assert again.keys() == state.keys() and all(torch.equal(again[name], state[name]) for name in state)


def test_a_model_can_be_made_from_its_config_alone(mistral):
    model = CLaRa(CLaRaConfig(decoder_model_name=str(mistral), doc_max_length=16, compr_rate=4, lora_r=4))
    assert model.compress_documents(DOCS)[0].shape == (len(DOCS), 4, 32) and model.config.prompts is None


def test_saving_what_was_loaded_changes_no_weight(saved, tmp_path):
    CLaRa.from_pretrained(saved[1]).save_pretrained(tmp_path / "again")
    for path in saved[1].rglob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(saved[1])).read_bytes(), path
    first, second = (json.loads((root / "config.json").read_text()) for root in (saved[1], tmp_path / "again"))
    assert first.pop("decoder_model_name") and second.pop("decoder_model_name")
    assert first == second


def test_prompts_of_the_checkpoint_win_over_ours(tree):
    prompts = {**DEFAULT_PROMPTS, "answer_user": "{docs} Q {query}", "answer_system": "Be odd."}
    edit_config(tree / "checkpoint", prompts=prompts)
    model = CLaRa.from_pretrained(tree / "checkpoint")
    text = model.tokens.tokenizer.decode(model.answer_prompt("Where?", 1).ids)
    assert "Be odd." in text and "<SEP> Q Where?" in text and "Background" not in text


def test_unknown_fields_survive_a_round_trip(tree):
    edit_config(tree / "checkpoint", kbtc_training=False, compr_mlp_hidden_dim=8096, future={"a": [1]})
    CLaRa.from_pretrained(tree / "checkpoint").save_pretrained(tree / "again")
    fields = json.loads((tree / "again" / "config.json").read_text())
    assert (fields["kbtc_training"], fields["compr_mlp_hidden_dim"], fields["future"]) == (False, 8096, {"a": [1]})


def test_overrides_of_config_fields_are_honoured(saved):
    model = CLaRa.from_pretrained(saved[1], generation_top_k=5, max_new_tokens=3, topk_temperature=0.5)
    assert (model.config.generation_top_k, model.config.max_new_tokens) == (5, 3)
    assert CLaRa.from_pretrained(saved[1]).config.generation_top_k == 2
    eager = CLaRa.from_pretrained(saved[1], attn_implementation="eager")
    assert eager.decoder.config._attn_implementation == "eager"


def test_an_unknown_keyword_is_a_type_error(saved):
    with pytest.raises(TypeError, match="unknown keyword 'compress_rate'"):
        CLaRa.from_pretrained(saved[1], compress_rate=8)


@pytest.mark.parametrize(
    "override", [{"compr_rate": 8}, {"doc_max_length": 32}, {"different_mem_tokens": False}, {"lora_r": 8}]
)
def test_overriding_what_the_weights_were_trained_with_is_refused(saved, override):
    with pytest.raises(ValueError, match="cannot be changed"):
        CLaRa.from_pretrained(saved[1], **override)
    other = CLaRa.from_pretrained(saved[1]).config
    setattr(other, *next(iter(override.items())))
    with pytest.raises(ValueError, match="cannot be changed"):
        CLaRa.from_pretrained(saved[1], config=other)


def test_the_same_rate_given_again_is_accepted(saved):
    assert CLaRa.from_pretrained(saved[1], compr_rate=4).config.n_memory_tokens == 4


def test_an_override_that_cannot_work_is_refused(saved):
    with pytest.raises(ValueError, match="generation_top_k"):
        CLaRa.from_pretrained(saved[1], generation_top_k=0)


@pytest.mark.parametrize(
    "file",
    [
        "config.json",
        "special_embeddings.safetensors",
        *(
            f"{a}_adapter/{f}"
            for a in ("encoder", "decoder")
            for f in ("adapter_config.json", "adapter_model.safetensors")
        ),
    ],
)
def test_a_missing_file_is_an_error_that_names_it(tree, file):
    (tree / "checkpoint" / file).unlink()
    with pytest.raises(FileNotFoundError, match=Path(file).name):
        CLaRa.from_pretrained(tree / "checkpoint")


@pytest.mark.parametrize("adapter", ["encoder_adapter", "decoder_adapter"])
def test_a_missing_adapter_directory_is_an_error_that_names_it(tree, adapter):
    shutil.rmtree(tree / "checkpoint" / adapter)
    with pytest.raises(FileNotFoundError, match=adapter):
        CLaRa.from_pretrained(tree / "checkpoint")


@pytest.mark.parametrize("stage", ["stage2", "stage2_pretrain_retrieval"])
def test_a_stage2_checkpoint_without_its_query_reasoner_is_an_error(tree, stage):
    edit_config(tree / "checkpoint", training_stage=stage)
    with pytest.raises(FileNotFoundError, match="query_reasoner_adapter"):
        CLaRa.from_pretrained(tree / "checkpoint")


@pytest.mark.parametrize("file", ["encoder_adapter/adapter_model.safetensors", "special_embeddings.safetensors"])
@pytest.mark.parametrize("keep", [0, 4, 200, -10])
def test_a_truncated_weight_file_is_an_error_that_names_it(tree, file, keep):
    path = tree / "checkpoint" / file
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=path.name):
        CLaRa.from_pretrained(tree / "checkpoint")


def test_a_partial_adapter_is_an_error_never_a_random_start(tree):
    path = tree / "checkpoint" / "decoder_adapter" / "adapter_model.safetensors"
    weights = load_file(path)
    gone = weights.pop(sorted(weights)[3])
    save_file(weights, path)
    with pytest.raises(ValueError, match="1 weights are missing"):
        CLaRa.from_pretrained(tree / "checkpoint")
    save_file({**weights, sorted(load_file(path))[0].replace("layers.0", "layers.9"): gone}, path)
    with pytest.raises(ValueError, match="1 are unknown"):
        CLaRa.from_pretrained(tree / "checkpoint")


def test_an_adapter_of_another_rank_is_an_error(tree, mistral):
    other = new_model(mistral, query=False, lora_r=2)
    other.save_pretrained(tree / "other")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copy(tree / "other" / "encoder_adapter" / file, tree / "checkpoint" / "encoder_adapter" / file)
        with pytest.raises(ValueError, match="shape|rank"):
            CLaRa.from_pretrained(tree / "checkpoint")


def test_special_embeddings_of_another_shape_are_an_error(tree):
    path = tree / "checkpoint" / "special_embeddings.safetensors"
    rows = load_file(path)
    save_file({"embed_tokens": rows["embed_tokens"][:5].clone(), "lm_head": rows["lm_head"]}, path)
    with pytest.raises(ValueError, match="shape"):
        CLaRa.from_pretrained(tree / "checkpoint")
    save_file({"embed_tokens": rows["embed_tokens"]}, path)
    with pytest.raises(ValueError, match="tied"):
        CLaRa.from_pretrained(tree / "checkpoint")
    save_file({"lm_head": rows["lm_head"]}, path)
    with pytest.raises(ValueError, match="embed_tokens"):
        CLaRa.from_pretrained(tree / "checkpoint")


def test_another_base_model_is_an_error(saved, base_dir):
    with pytest.raises(ValueError, match="decoder_model_name"):
        CLaRa.from_pretrained(saved[1], decoder_model_name=str(base_dir("phi3")))


def test_a_directory_of_another_model_is_refused_in_words(mistral):
    with pytest.raises(ValueError, match="model_type 'mistral', not a CLaRa checkpoint"):
        CLaRa.from_pretrained(mistral)


@pytest.mark.parametrize("name", ["/nowhere/at/all", "../gone", "./gone", "~/gone-from-here", "a/b/c", "org/absent"])
def test_a_missing_base_model_says_how_to_pass_another(tree, name):
    edit_config(tree / "checkpoint", decoder_model_name=name)
    with pytest.raises(FileNotFoundError, match="pass decoder_model_name="):
        CLaRa.from_pretrained(tree / "checkpoint")
    model = CLaRa.from_pretrained(tree / "checkpoint", decoder_model_name=str(tree / "base"))
    assert model.config.decoder_model_name == str(tree / "base")


@pytest.mark.parametrize("name", ["nowhere", "org/absent", "a/b/c"])
def test_a_missing_checkpoint_is_a_file_not_found(name):
    with pytest.raises(FileNotFoundError, match=name):
        CLaRa.from_pretrained(name)


def test_a_tree_of_base_and_checkpoint_may_be_moved(saved, mistral, tmp_path):
    shutil.copytree(mistral, tmp_path / "here" / "models" / "base")
    model = CLaRa.from_pretrained(saved[1], decoder_model_name=str(tmp_path / "here" / "models" / "base"))
    model.save_pretrained(tmp_path / "here" / "runs" / "one")
    (tmp_path / "here").rename(tmp_path / "there")
    moved = CLaRa.from_pretrained(tmp_path / "there" / "runs" / "one")
    assert same(moved, saved[0])
    assert moved.base_path == (tmp_path / "there" / "models" / "base").resolve()
    fields = json.loads((tmp_path / "there" / "runs" / "one" / "config.json").read_text())
    assert fields["decoder_model_name"] == "../../models/base"


def test_a_base_model_may_be_given_relative_to_the_working_directory_or_home(saved, mistral, tmp_path, monkeypatch):
    shutil.copytree(mistral, tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("org/name", "./org/name", "~/org/name"):
        assert same(CLaRa.from_pretrained(saved[1], decoder_model_name=name), saved[0])


def test_a_checkpoint_path_that_looks_like_a_hub_id_is_local_first(saved, tmp_path, monkeypatch):
    shutil.copytree(saved[1], tmp_path / "org" / "name")
    edit_config(tmp_path / "org" / "name", decoder_model_name=str(saved[0].base_path))
    monkeypatch.chdir(tmp_path)
    assert same(CLaRa.from_pretrained("org/name"), saved[0])


def test_a_checkpoint_in_a_subfolder(saved, tmp_path):
    shutil.copytree(saved[1], tmp_path / "repo" / "compression-16")
    edit_config(tmp_path / "repo" / "compression-16", decoder_model_name=str(saved[0].base_path))
    assert same(CLaRa.from_pretrained(tmp_path / "repo", subfolder="compression-16"), saved[0])
    with pytest.raises(FileNotFoundError, match="compression-4"):
        CLaRa.from_pretrained(tmp_path / "repo", subfolder="compression-4")


def test_stage2_asked_of_an_earlier_stage_starts_the_reasoner_as_the_compressor(saved):
    model = CLaRa.from_pretrained(saved[1], training_stage="stage2")
    assert torch.equal(model.encode_queries(DOCS), model.compress_documents(DOCS)[0].flatten(1))
    assert not any(p.requires_grad for p in model.parameters())
    model.train_stage("stage2")
    assert not saved[0].has_query_reasoner


def test_all_saved_adapters_are_loaded_whatever_the_stage_says(mistral, tmp_path):
    model = new_model(mistral)
    model.config.training_stage = "stage1"
    model.save_pretrained(tmp_path)
    again = CLaRa.from_pretrained(tmp_path)
    assert torch.equal(again.encode_queries(QUESTIONS), model.encode_queries(QUESTIONS))


def test_a_model_card_is_written_and_may_be_given(saved, tmp_path):
    assert "base" in (saved[1] / "README.md").read_text().lower()
    saved[0].save_pretrained(tmp_path, card="# ours\n")
    assert (tmp_path / "README.md").read_text() == "# ours\n"


def test_saving_over_a_checkpoint_leaves_no_adapter_of_the_former(mistral, tmp_path):
    new_model(mistral).save_pretrained(tmp_path)
    new_model(mistral, query=False).save_pretrained(tmp_path)
    assert not (tmp_path / "query_reasoner_adapter").exists()
    assert not CLaRa.from_pretrained(tmp_path).has_query_reasoner


def test_saving_into_the_base_models_directory_is_refused(saved, mistral):
    before = (mistral / "config.json").read_bytes()
    with pytest.raises(ValueError, match="base model"):
        saved[0].save_pretrained(mistral)
    assert (mistral / "config.json").read_bytes() == before


def test_a_base_whose_tokenizer_outgrew_its_embedding_is_refused_in_words(mistral, tmp_path):
    base = shutil.copytree(mistral, tmp_path / "base")
    tokenizer = byte_level_tokenizer(BASES["mistral"])
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(base)
    with pytest.raises(ValueError, match="401 tokens.*400 rows"):
        new_model(base)
