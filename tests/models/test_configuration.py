"""config.json: legal values, refused values, fields that are not ours (SPEC 1, 5)."""

import pytest

from openrlhf.models.configuration_clara import CLaRaConfig
from openrlhf.models.modeling_clara import CLaRa
from openrlhf.models.prompts import DEFAULT_PROMPTS, check_prompts, qa_answer
from tests.tiny import ANSWERS, DOCS, QUESTIONS, make_batch, new_model


@pytest.mark.parametrize("rate", [1, 2, 4, 8, 16, 32, 64, 128, 256])
def test_any_divisor_is_a_legal_rate(rate):
    config = CLaRaConfig(doc_max_length=256, compr_rate=rate)
    config.check()
    assert config.n_memory_tokens == 256 // rate == len(config.memory_tokens)
    assert config.special_tokens == [*(f"<MEM{i}>" for i in range(256 // rate)), "<AE>", "<ENC>", "<SEP>"]


@pytest.mark.parametrize(("length", "rate"), [(16, 1), (16, 16), (12, 3), (512, 32)])
def test_rates_from_none_to_one_vector_a_document_work_end_to_end(mistral, length, rate):
    model = new_model(mistral, doc_max_length=length, compr_rate=rate, generation_top_k=1)
    model.train_stage("stage1_2")
    loss, _ = model(batch=make_batch(model, "stage1_2", [[doc] for doc in DOCS[:3]], QUESTIONS, ANSWERS))
    loss.backward()
    assert model.special.memory.grad.shape[0] == length // rate
    vectors, _ = model.compress_documents(DOCS)
    assert vectors.shape == (len(DOCS), length // rate, 32)
    answers, topk = model.generate_from_questions(QUESTIONS, [DOCS] * 3)
    assert len(answers) == 3 and topk.shape == (3, 1)


@pytest.mark.parametrize("rate", [3, 5, 512, 200])
def test_a_rate_that_does_not_divide_is_refused_with_those_that_do(mistral, rate):
    with pytest.raises(ValueError, match=r"does not divide doc_max_length 256.*\[1, 2, 4, 8, 16, 32, 64, 128, 256\]"):
        CLaRa.from_base(CLaRaConfig(decoder_model_name=str(mistral), doc_max_length=256, compr_rate=rate))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("compr_rate", 0),
        ("compr_rate", -4),
        ("compr_rate", 4.0),
        ("doc_max_length", "256"),
        ("lora_r", 0),
        ("generation_top_k", 0),
        ("training_stage", "stage3"),
        ("training_stage", "stage2_reasoning"),
        ("quantization", "int2"),
        ("topk_temperature", 0.0),
        ("lora", False),
        ("compr_model_name", "bert-base-uncased"),
    ],
)
def test_impossible_values_are_refused_by_name_before_anything_loads(field, value):
    with pytest.raises(ValueError, match=field.split("_")[0]):
        CLaRa.from_base(CLaRaConfig(decoder_model_name="/nowhere", **{field: value}))


def test_spread_memory_does_not_go_with_flash_attention():
    for attention in ("flash_attention_2", "flash_attention_3"):
        config = CLaRaConfig(decoder_model_name="/nowhere", spread_memory=True, attn_implementation=attention)
        with pytest.raises(ValueError, match=f"spread_memory does not go with attn_implementation {attention}"):
            CLaRa.from_base(config)
    for attention in (None, "sdpa", "eager"):
        CLaRaConfig(spread_memory=True, attn_implementation=attention).check()


def test_defaults_are_those_of_the_contract():
    config = CLaRaConfig()
    assert (config.doc_max_length, config.compr_rate, config.lora_r, config.max_new_tokens) == (256, 32, 16, 128)
    assert (config.topk_temperature, config.sep, config.different_mem_tokens) == (0.02, True, True)
    assert config.model_type == "CLaRa" and config.decoder_model_name == "mistralai/Mistral-7B-Instruct-v0.2"


def test_fields_we_have_no_use_for_are_kept():
    config = CLaRaConfig(kbtc_training=False, compr_mlp_hidden_dim=8096, ae_mode="token")
    fields = config.to_dict()
    assert (fields["kbtc_training"], fields["compr_mlp_hidden_dim"], fields["ae_mode"]) == (False, 8096, "token")


def test_adapters_have_the_published_shape(mistral):
    config = new_model(mistral, lora_r=16).decoder.peft_config["encoder_adapter"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (16, 32, 0.1)


def test_our_prompts_are_complete_and_checked():
    check_prompts(DEFAULT_PROMPTS)
    assert len(DEFAULT_PROMPTS["paraphrase_instructions"]) > 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer_user": "Question:{query}"}, "must contain {docs} exactly once"),
        ({"answer_user": "{docs}"}, "must contain {query} exactly once"),
        ({"qa_user": "{docs} {docs}"}, "must contain {docs} exactly once"),
        ({"paraphrase_instructions": []}, "at least one text"),
        ({"paraphrase_instructions": "{docs}"}, "at least one text"),
        ({"paraphrase_instructions": ["{docs}", "no place"]}, "must contain {docs}"),
        ({"greeting": "hello"}, "exactly the keys"),
    ],
)
def test_prompts_that_could_not_work_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        CLaRaConfig(prompts={**DEFAULT_PROMPTS, **change}).check()


def test_question_and_answer_pairs_are_joined_as_the_contract_says():
    assert qa_answer(["a?", "b?"], ["x", "y"]) == "Question: a?\nAnswer: x\nQuestion: b?\nAnswer: y"
    with pytest.raises(ValueError):
        qa_answer(["a?"], ["x", "y"])
