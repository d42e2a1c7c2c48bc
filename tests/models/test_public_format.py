"""The public on-disk format: read as it is, its code never run, its gaps never filled in silence (SPEC 5)."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from openrlhf.models.modeling_clara import CLaRa
from openrlhf.models.prompts import DEFAULT_PROMPTS
from openrlhf.models.public_format import read_prompts
from tests.tiny import DOCS, QUESTIONS, make_batch, new_model

LISTS = [DOCS[:2], DOCS[2:5], DOCS[4:]]

# A file of the public format's shape, with texts of our own. Running it would be noticed at its first line.
CODE = """
raise RuntimeError("this file must never be run")

import package_that_does_not_exist

PARAPHRASE_INSTRUCTIONS = [
    "First: {docs} Say it again:",
    'Second: {docs}'
    " and more",
]


class CLaRa:
    def _blend_prompt_and_selected_memory_tokens(self, query, count):
        docs = self.mem * count
        prompt_system = "Be brief." + " Be right."
        prompt_user = f"Background:\\n{docs}\\n\\nQuestion:{query}"
        return self.render(prompt_system, prompt_user)

    def _blend_standard_prompt(self, query, mem_tokens, answer=None):
        docs = mem_tokens
        prompt_system = "Be brief." + " Be right."
        prompt_user = f"Background:\\n{docs}\\n\\nQuestion:{query}"
        messages = [{"role": "system", "content": prompt_system}, {"role": "user", "content": prompt_user}]
        return messages

    def _blend_qa_prompt(self, docs, queries, answers):
        prompt_system = "Ask."
        prompt_user = f"Document: {docs} Ask about it."
        return prompt_system + prompt_user

    def _blend_paraphrase_prompt(self, docs):
        prompt_system = "Repeat."
        prompt_user = random.choice(PARAPHRASE_INSTRUCTIONS).format(docs=docs)
        return prompt_system + prompt_user
"""
PROMPTS = {
    "answer_system": "Be brief. Be right.",
    "answer_user": "Background:\n{docs}\n\nQuestion:{query}",
    "qa_system": "Ask.",
    "qa_user": "Document: {docs} Ask about it.",
    "paraphrase_system": "Repeat.",
    "paraphrase_instructions": ["First: {docs} Say it again:", "Second: {docs} and more"],
}


def write_public(model: CLaRa, target: Path, code: str | None = CODE) -> Path:
    """Writes `model` in the public format: adapters by name, first and last layer whole."""
    target.mkdir(parents=True)
    adapters = {}
    for name in model.decoder.peft_config:
        parts = {key: p for key, p in model.decoder.named_parameters() if f".{name}." in key}
        adapters[name] = {key.replace(f".{name}.", "."): p.detach().clone() for key, p in parts.items()}
    torch.save(adapters, target / "adapters.pth")
    inputs, heads = (rows.detach() for rows in model.special())
    first, layers = model.tokens.first_special_id, {}
    for key, module, rows in [
        ("model.embed_tokens.weight", model.decoder.get_input_embeddings(), inputs),
        ("lm_head.weight", model.decoder.get_output_embeddings(), heads),
    ]:
        layers[key] = torch.cat([module.weight.detach()[:first], rows, module.weight.detach()[first + len(rows) :]])
    torch.save(layers, target / "decoder_first_last_layers.pth")
    fields = {key: value for key, value in model.config.to_dict().items() if key != "prompts"}
    fields |= {"decoder_model_name": str(model.base_path), "kbtc_training": False}
    (target / "config.json").write_text(json.dumps(fields))
    if code is not None:
        (target / "modeling_clara.py").write_text(code)
    return target


@pytest.fixture(scope="module")
def model(mistral) -> CLaRa:
    return new_model(mistral)


@pytest.fixture
def public(model, tmp_path) -> Path:
    return write_public(model, tmp_path / "public")


@pytest.mark.parametrize("name", ["mistral", "llama_tied", "qwen2", "phi3"])
def test_a_public_checkpoint_computes_what_its_model_did(base_dir, name, tmp_path):
    model = new_model(base_dir(name), prompts=PROMPTS)
    loaded = CLaRa.from_pretrained(write_public(model, tmp_path / "public"))
    assert loaded.config.prompts == PROMPTS and not loaded.training
    assert torch.equal(loaded.compress_documents(DOCS)[0], model.compress_documents(DOCS)[0])
    assert torch.equal(loaded.encode_queries(QUESTIONS), model.encode_queries(QUESTIONS))
    answers, topk = model.generate_from_questions(QUESTIONS, LISTS)
    same, indices = loaded.generate_from_questions(QUESTIONS, LISTS)
    assert same == answers and torch.equal(indices, topk)
    assert loaded.generate_from_paraphrase(QUESTIONS, LISTS) == model.generate_from_paraphrase(QUESTIONS, LISTS)
    with torch.no_grad():
        batch = make_batch(model, "stage2", LISTS, QUESTIONS, ANSWERS_OF_TWO)
        assert torch.equal(loaded(batch=batch)[1]["logits"], model(batch=batch)[1]["logits"])


ANSWERS_OF_TWO = ["Warsaw", "The Danube", "No"]


@pytest.mark.parametrize("name", ["c8_stage1", "c8_stage1_2", "c8_stage2"])
def test_the_recorded_checkpoints_load_with_a_base_relative_to_the_working_directory(vectors, monkeypatch, name):
    monkeypatch.chdir(vectors)
    loaded = CLaRa.from_pretrained(f"checkpoints/{name}")
    assert loaded.has_query_reasoner == (name == "c8_stage2")
    assert loaded.config.kbtc_training is False and loaded.config.lora_r == 8


def test_copies_of_the_first_and_last_layers_inside_adapters_are_ignored(model, public):
    saved = torch.load(public / "adapters.pth", weights_only=True)
    layers = torch.load(public / "decoder_first_last_layers.pth", weights_only=True)
    for state in saved.values():
        state |= {key: torch.randn_like(value) for key, value in layers.items()}
    torch.save(saved, public / "adapters.pth")
    loaded = CLaRa.from_pretrained(public)
    assert torch.equal(loaded.compress_documents(DOCS)[0], model.compress_documents(DOCS)[0])


def test_prompts_are_read_from_a_file_that_could_not_be_run(public):
    with pytest.raises(RuntimeError, match="never be run"):
        exec(CODE, {})
    assert read_prompts([public]) == PROMPTS


def test_either_name_of_the_answering_function_is_read(public):
    path = public / "modeling_clara.py"
    path.write_text(CODE.replace("def _blend_standard_prompt", "def _other"))
    assert read_prompts([public]) == PROMPTS


@pytest.mark.parametrize(
    "gone", ["_blend_qa_prompt", "_blend_paraphrase_prompt", "PARAPHRASE_INSTRUCTIONS", "prompt_system"]
)
def test_a_file_without_prompts_where_they_belong_is_an_error_that_says_what_to_do(public, gone):
    (public / "modeling_clara.py").write_text(CODE.replace(gone, "something_else"))
    with pytest.raises(ValueError, match=r"modeling_clara\.py.*prompts="):
        CLaRa.from_pretrained(public)
    assert CLaRa.from_pretrained(public, prompts=PROMPTS).config.prompts == PROMPTS


def test_a_file_that_is_not_python_is_an_error_that_names_it(public):
    (public / "modeling_clara.py").write_text("def broken(:\n")
    with pytest.raises(ValueError, match=r"modeling_clara\.py.*prompts="):
        CLaRa.from_pretrained(public)


def test_prompts_given_win_over_those_in_the_file(public):
    loaded = CLaRa.from_pretrained(public, prompts=DEFAULT_PROMPTS)
    assert loaded.config.prompts == DEFAULT_PROMPTS


def test_without_prompts_compressing_and_training_work_and_writing_a_prompt_says_what_to_do(model, tmp_path):
    loaded = CLaRa.from_pretrained(write_public(model, tmp_path / "public", code=None))
    assert loaded.config.prompts is None
    assert torch.equal(loaded.compress_documents(DOCS)[0], model.compress_documents(DOCS)[0])
    assert torch.equal(loaded.encode_queries(QUESTIONS), model.encode_queries(QUESTIONS))
    batch = make_batch(model, "stage1_2", LISTS, QUESTIONS, ANSWERS_OF_TWO)
    with torch.no_grad():
        assert torch.equal(loaded(batch=batch)[0], model(batch=batch)[0])
    vectors, _ = loaded.compress_documents(DOCS[:3])
    for ask in (
        lambda: loaded.generate_from_text(QUESTIONS, LISTS),
        lambda: loaded.generate_from_questions(QUESTIONS, LISTS),
        lambda: loaded.generate_from_paraphrase(QUESTIONS, LISTS),
        lambda: loaded.generate_from_compressed_documents_and_questions(QUESTIONS, vectors),
        lambda: loaded.build_prompt("qa", 1),
    ):
        with pytest.raises(ValueError, match="pass prompts="):
            ask()


def test_in_a_subfolder_the_prompts_of_the_repositorys_root_are_used(model, tmp_path):
    """The code lies at the root of a repository (SPEC 4), and with it the prompts."""
    write_public(model, tmp_path / "repository" / "compression-4", code=None)
    (tmp_path / "repository" / "modeling_clara.py").write_text(CODE)
    loaded = CLaRa.from_pretrained(tmp_path / "repository", subfolder="compression-4")
    assert loaded.config.prompts == PROMPTS


@pytest.mark.parametrize("key", ["model.embed_tokens.weight", "lm_head.weight"])
def test_changed_old_rows_are_an_error(public, key):
    path = public / "decoder_first_last_layers.pth"
    layers = torch.load(path, weights_only=True)
    layers[key][17, 3] += 0.01
    torch.save(layers, path)
    with pytest.raises(ValueError, match=f"rows of {key} differ from the base model.*decoder_model_name="):
        CLaRa.from_pretrained(public)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loading_in_another_precision_is_not_taken_for_changed_rows(vectors, dtype):
    loaded = CLaRa.from_pretrained(
        vectors / "checkpoints" / "c8_stage2", decoder_model_name=str(vectors / "decoders" / "sys"), dtype=dtype
    )
    assert loaded.dtype == dtype


def test_rows_stored_in_half_precision_are_compared_at_that_precision(public):
    path = public / "decoder_first_last_layers.pth"
    layers = {key: value.bfloat16() for key, value in torch.load(path, weights_only=True).items()}
    torch.save(layers, path)
    CLaRa.from_pretrained(public)
    layers["lm_head.weight"][17, 3] += 0.5
    torch.save(layers, path)
    with pytest.raises(ValueError, match="differ from the base model"):
        CLaRa.from_pretrained(public)


def test_too_few_rows_are_an_error(public):
    path = public / "decoder_first_last_layers.pth"
    torch.save({key: value[:403].clone() for key, value in torch.load(path, weights_only=True).items()}, path)
    with pytest.raises(ValueError, match="403 rows, 407 are needed"):
        CLaRa.from_pretrained(public)


def test_missing_or_unknown_parts_are_errors(public):
    saved = torch.load(public / "adapters.pth", weights_only=True)
    torch.save({**saved, "reader": {}}, public / "adapters.pth")
    with pytest.raises(ValueError, match="reader"):
        CLaRa.from_pretrained(public)
    torch.save({"encoder_adapter": saved["encoder_adapter"]}, public / "adapters.pth")
    with pytest.raises(ValueError, match="decoder_adapter"):
        CLaRa.from_pretrained(public)
    saved["decoder_adapter"].popitem()
    torch.save(saved, public / "adapters.pth")
    with pytest.raises(ValueError, match="1 weights are missing"):
        CLaRa.from_pretrained(public)


def test_missing_layers_are_an_error_that_names_the_file(public):
    (public / "decoder_first_last_layers.pth").unlink()
    with pytest.raises(FileNotFoundError, match="decoder_first_last_layers"):
        CLaRa.from_pretrained(public)


@pytest.mark.parametrize("file", ["adapters.pth", "decoder_first_last_layers.pth"])
@pytest.mark.parametrize("keep", [0, 100, -1000])
def test_a_truncated_file_is_an_error_that_names_it(public, file, keep):
    (public / file).write_bytes((public / file).read_bytes()[:keep])
    with pytest.raises(ValueError, match=file):
        CLaRa.from_pretrained(public)


class Touch:
    """Pickles as a call that would leave a file behind."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("file", ["adapters.pth", "decoder_first_last_layers.pth"])
def test_a_pickle_with_code_in_it_is_refused_and_not_run(public, tmp_path, file):
    torch.save({"encoder_adapter": Touch(tmp_path / "run")}, public / file)
    with pytest.raises(ValueError, match=file):
        CLaRa.from_pretrained(public)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("how", ["override", "field"])
def test_asked_for_stage2_without_a_query_reasoner_it_starts_as_the_encoder(mistral, tmp_path, how):
    model = new_model(mistral, query=False)
    public = write_public(model, tmp_path / "public")
    options = {"training_stage": "stage2"}
    if how == "field":
        fields = json.loads((public / "config.json").read_text())
        (public / "config.json").write_text(json.dumps(fields | options))
        options = {}
    loaded = CLaRa.from_pretrained(public, **options)
    assert torch.equal(loaded.encode_queries(DOCS), model.compress_documents(DOCS)[0].flatten(1))


def test_every_saved_adapter_is_loaded_whatever_the_stage_says(model, public):
    fields = json.loads((public / "config.json").read_text())
    (public / "config.json").write_text(json.dumps({**fields, "training_stage": "stage1"}))
    assert torch.equal(CLaRa.from_pretrained(public).encode_queries(QUESTIONS), model.encode_queries(QUESTIONS))


def test_an_import_saved_in_our_format_is_the_same_and_loads_in_peft(model, public, mistral, tmp_path):
    loaded = CLaRa.from_pretrained(public)
    loaded.save_pretrained(tmp_path / "ours")
    again = CLaRa.from_pretrained(tmp_path / "ours")
    assert again.config.prompts == PROMPTS and again.config.kbtc_training is False
    assert torch.equal(again.compress_documents(DOCS)[0], model.compress_documents(DOCS)[0])
    assert again.generate_from_text(QUESTIONS, LISTS) == loaded.generate_from_text(QUESTIONS, LISTS)
    ids, mask = model.tokens.encoder_batch(model.tokens.encoder_rows(DOCS))
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for name in model.decoder.peft_config:
        decoder = AutoModelForCausalLM.from_pretrained(mistral, dtype=torch.float32)
        peft = PeftModel.from_pretrained(decoder, tmp_path / "ours" / name).eval()
        with torch.no_grad():
            embeds = model.embed(ids)
            theirs = peft.base_model.model.model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions)
            assert torch.equal(theirs.last_hidden_state, model.hidden(name, embeds, mask))


def test_an_import_without_prompts_stays_without_them(model, tmp_path):
    loaded = CLaRa.from_pretrained(write_public(model, tmp_path / "public", code=None))
    loaded.save_pretrained(tmp_path / "ours")
    again = CLaRa.from_pretrained(tmp_path / "ours")
    assert again.config.prompts is None
    with pytest.raises(ValueError, match="pass prompts="):
        again.generate_from_text(QUESTIONS, LISTS)
    assert CLaRa.from_pretrained(tmp_path / "ours", prompts=PROMPTS).generate_from_text(QUESTIONS, LISTS)


def test_saving_over_a_public_checkpoint_is_refused(model, public):
    """Its adapters.pth would go on being read in place of what was saved."""
    before = shutil.copytree(public, public.parent / "copy")
    with pytest.raises(ValueError, match="public format"):
        model.save_pretrained(public)
    assert all((before / path.name).read_bytes() == path.read_bytes() for path in public.iterdir())


def test_overriding_the_rate_of_public_weights_is_refused(public):
    with pytest.raises(ValueError, match="cannot be changed"):
        CLaRa.from_pretrained(public, compr_rate=8)
