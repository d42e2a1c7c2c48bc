"""evaluation/llmlingua.py with the real package llmlingua over tiny random XLM-R and BERT token classifiers."""

import json
import re

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertConfig,
    BertForTokenClassification,
    BertTokenizer,
    PreTrainedTokenizerFast,
    XLMRobertaConfig,
    XLMRobertaForTokenClassification,
)

from evaluation.llmlingua import check_llmlingua, compress_texts
from tests.tiny import DOCS

LONG = " ".join(DOCS[i] for i in (0, 1, 2, 3, 5)) + " Who, in 1903 and 1911, won two Nobel prizes? Marie Curie did."
MEDIUM = DOCS[1]
SHORT = "A violin."
VERY_LONG = " ".join(f"{LONG} ({i})" for i in range(12))


def count(text: str) -> int:
    """Tokens of a reader that knows words and punctuation marks."""
    return len(re.findall(r"\w+|[^\w\s]", text))


def save(target, tokenizer, model_class, config_class, positions, labels=2):
    torch.manual_seed(0)
    config = config_class(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=positions,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.5,
        num_labels=labels,
    )
    model_class(config).save_pretrained(target)
    tokenizer.save_pretrained(target)
    return str(target)


def save_xlmr(target, labels=2):
    starts = sorted({"▁" + word[:3] for word in LONG.split()})
    pieces = [*((piece, 0.0) for piece in ("<s>", "<pad>", "</s>", "<unk>")), ("▁", -4.0)]
    pieces += [(start, -3.0) for start in starts] + [(letter, -5.0) for letter in sorted(set(LONG) - {" "})]
    inner = Tokenizer(models.Unigram(pieces, unk_id=3))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokens = {"bos": "<s>", "eos": "</s>", "cls": "<s>", "sep": "</s>", "unk": "<unk>", "pad": "<pad>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **{f"{k}_token": v for k, v in tokens.items()})
    return save(target, tokenizer, XLMRobertaForTokenClassification, XLMRobertaConfig, 514, labels)


def save_bert(target):
    pieces = sorted({piece.lower() for piece in re.findall(r"\w+|[^\w\s]", LONG)} - {"warsaw"})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "war", "##saw", *pieces]
    tokenizer = BertTokenizer(vocab={piece: i for i, piece in enumerate(vocabulary)})
    return save(target, tokenizer, BertForTokenClassification, BertConfig, 512)


@pytest.fixture(scope="module", params=["xlm-roberta-large", "bert-base-multilingual-cased"])
def model_name(request, tmp_path_factory):
    pytest.importorskip("llmlingua")
    target = tmp_path_factory.mktemp("models") / f"tiny-{request.param}"
    return save_xlmr(target) if "xlm" in request.param else save_bert(target)


@pytest.fixture(scope="module")
def xlmr(tmp_path_factory):
    return save_xlmr(tmp_path_factory.mktemp("models") / "tiny-xlm-roberta-large")


def compress(documents, target, model_name, count_tokens=count, batch_size=3):
    return compress_texts(documents, target, count_tokens, model_name, "cpu", batch_size)


def plain_compression(text, target, model_name, count=count):
    """The same by one forward pass in float64 and a plain loop over percentiles: at most `target` tokens of words.

    The package frames every text with BERT's [CLS] and [SEP], which XLM-R reads as unknown tokens.
    """
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    model = AutoModelForTokenClassification.from_pretrained(model_name).double().eval()
    ids = tokenizer.convert_tokens_to_ids(["[CLS]", *tokenizer.tokenize(text), "[SEP]"])
    with torch.no_grad():
        keep = model(input_ids=torch.tensor([ids])).logits[0].softmax(-1)[:, 1].tolist()
    words: list[tuple[str, list[float]]] = []
    for piece, probability in zip(tokenizer.convert_ids_to_tokens(ids), keep, strict=True):
        if piece in tokenizer.all_special_tokens:
            continue
        joined = not piece.startswith("▁") and piece not in "!\"#$%&'()*+,-./:;<=>?@[]^_`{|}~"
        if piece.startswith("##") if "bert-base" in model_name else joined:
            words[-1] = (words[-1][0] + piece.removeprefix("##"), [*words[-1][1], probability])
        else:
            words.append((piece, [probability]))
    means = [sum(p) / len(p) for _, p in words]
    weighted = [mean for (word, _), mean in zip(words, means, strict=True) for _ in range(count(word))]
    for percentile in range(max(1, 100 - 100 * target // count(text) - 3), 101):
        threshold = np.percentile(weighted, percentile)
        kept = [word for (word, _), mean in zip(words, means, strict=True) if mean > threshold]
        shorter = tokenizer.convert_tokens_to_string(kept)
        if count(shorter) <= target:
            break
    return shorter


@pytest.mark.parametrize("target", [3, 8, 14])
def test_the_most_probable_words_that_fit_the_budget_are_kept_in_order(model_name, target):
    ((long, medium),) = compress([[LONG, MEDIUM]], target, model_name)
    assert long == plain_compression(LONG, target, model_name)
    assert medium == plain_compression(MEDIUM, target, model_name)
    assert 0 < count(long) <= target


def test_a_passage_within_the_budget_stays_as_it_is(model_name):
    assert compress([[SHORT, MEDIUM], []], count(MEDIUM), model_name) == [[SHORT, MEDIUM], []]
    assert compress([[MEDIUM]], count(MEDIUM) - 1, model_name) != [[MEDIUM]]


def test_the_result_of_a_passage_does_not_depend_on_its_company(model_name):
    together = compress([[LONG, SHORT], [MEDIUM, DOCS[3], LONG]], 6, model_name)
    assert together[0][0] == together[1][2]
    alone = [compress([[text]], 6, model_name, batch_size=1)[0][0] for text in (MEDIUM, DOCS[3], LONG)]
    assert together[1] == alone


def test_passages_cut_at_the_same_percentile_share_a_batch_and_change_nothing(model_name):
    texts = [" ".join(LONG.split()[:-dropped]) for dropped in (3, 2, 1)]
    assert {100 * 6 // count(text) for text in texts} == {100 * 6 // count(texts[0])}
    assert compress([texts], 6, model_name) == [[plain_compression(text, 6, model_name) for text in texts]]


def test_each_distinct_passage_goes_through_the_model_once(model_name, monkeypatch):
    rows = []
    for kind in (XLMRobertaForTokenClassification, BertForTokenClassification):

        def forward(self, input_ids, attention_mask, plain=kind.forward, **rest):
            rows.extend([tuple(ids[mask.bool()].tolist()) for ids, mask in zip(input_ids, attention_mask, strict=True)])
            return plain(self, input_ids=input_ids, attention_mask=attention_mask, **rest)

        monkeypatch.setattr(kind, "forward", forward)
    compress([[LONG, MEDIUM, SHORT], [MEDIUM, LONG]], 10, model_name)
    assert len(rows) == len(set(rows)) == 2


def test_passages_longer_than_the_classifier_reads_are_compressed_in_pieces(model_name):
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    assert len(tokenizer.tokenize(VERY_LONG)) > 512
    ((text,),) = compress([[VERY_LONG]], count(VERY_LONG) - 20, model_name)
    assert count(text) <= count(VERY_LONG) - 20
    assert text.lower().count("danube") == 12


def test_the_budget_is_counted_in_the_readers_own_tokens(model_name):
    for target in range(40, 200, 20):
        ((shorter,),) = compress([[LONG]], target, model_name, count_tokens=len)
        assert shorter == plain_compression(LONG, target, model_name, count=len)
        assert 20 < len(shorter) <= target


def test_a_text_of_unknown_signs_only_becomes_empty(tmp_path):
    pytest.importorskip("llmlingua")
    bert = save_bert(tmp_path / "tiny-bert-base-multilingual-cased")
    unknown, known = compress([["東 京 東 京", LONG]], 2, bert)[0]
    assert unknown == ""
    assert known != ""


def test_a_budget_below_one_percent_of_the_passage_leaves_nothing(model_name):
    assert compress([[VERY_LONG]], 1, model_name) == [[""]]


def test_neither_network_nor_remote_code_is_asked_for(xlmr, monkeypatch):
    pytest.importorskip("llmlingua")
    asked = []
    monkeypatch.setattr("tiktoken.encoding_for_model", lambda name: asked.append(name))
    plain = AutoTokenizer.from_pretrained
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *a, **k: asked.append(k) or plain(*a, **k))
    compress([[LONG]], 8, xlmr)
    assert asked == [{"trust_remote_code": False}]


def test_a_budget_without_a_token_is_refused():
    with pytest.raises(ValueError, match="at least 1 token"):
        compress([[LONG]], 0, "unused")


def test_check_accepts_a_token_classifier_and_a_hub_id(xlmr, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert check_llmlingua(xlmr) == xlmr
    hub_id = "microsoft/llmlingua-2-xlm-roberta-large-meetingbank"
    assert check_llmlingua(hub_id) == hub_id


def test_check_refuses_what_the_package_would_misread(xlmr, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(ValueError, match="pip install llmlingua"):
            check_llmlingua(xlmr)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    with pytest.raises(ValueError, match="must contain xlm-roberta-large or bert-base-multilingual-cased"):
        check_llmlingua("organisation/roberta-base")
    with pytest.raises(ValueError, match="neither"):
        check_llmlingua("xlm-roberta-large")
    with pytest.raises(ValueError, match="two labels"):
        check_llmlingua(save_xlmr(tmp_path / "three-xlm-roberta-large", labels=3))
    config = tmp_path / "three-xlm-roberta-large" / "config.json"
    fields = json.loads(config.read_text()) | {"architectures": ["XLMRobertaModel"]}
    config.write_text(json.dumps({k: v for k, v in fields.items() if k != "id2label"}))
    with pytest.raises(ValueError, match="two labels"):
        check_llmlingua(str(config.parent))
