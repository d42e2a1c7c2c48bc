"""evaluation/paraphrase.py: entities over a rule-based spaCy pipeline, BERTScore against a slow float64 loop."""

import builtins

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModel, BertConfig, BertModel, PreTrainedTokenizerFast

from evaluation.paraphrase import bert_scores, check_bert_model, check_entity_model, entity_preservation
from tests.tiny import DOCS, save_base

WORDS = sorted({word for text in DOCS for word in text.lower().split()} | {"was", "."})
PREDICTIONS = ["Marie Curie was born in Warsaw", "the Danube flows", "violin", "they swim very well", "", "Sydney"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A random BERT over whole words, with [CLS] and [SEP] around a text, for at most 18 tokens."""
    folder = tmp_path_factory.mktemp("bert")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*special, *WORDS])}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=18, initializer_range=0.3, **sizes)
    BertModel(config).save_pretrained(folder)
    return folder


def slow_bert_score(prediction: str, reference: str, folder, ids_of) -> float:
    """Equation 1 of the paper, one token after another, in float64 and without padding."""
    model = AutoModel.from_pretrained(folder).double().eval()
    sides = []
    for text in (prediction, reference):
        ids, inner = ids_of(text)
        with torch.no_grad():
            states = model(torch.tensor([ids])).last_hidden_state[0]
        sides.append([states[i] for i in inner])
    if not all(sides):
        return 0.0

    def mean_of_best(from_states, to_states):
        best = [max(float(a @ b / (a.norm() * b.norm())) for b in to_states) for a in from_states]
        return sum(best) / len(best)

    precision, recall = mean_of_best(*sides), mean_of_best(*reversed(sides))
    return 2 * precision * recall / (precision + recall)


def word_ids(text: str) -> tuple[list[int], range]:
    ids = [4 + WORDS.index(word) if word in WORDS else 1 for word in text.split()][:14]
    return [2, *ids, 3], range(1, len(ids) + 1)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_bert_score_equals_a_slow_loop_whatever_the_batch(bert, batch_size):
    scores = bert_scores(PREDICTIONS, DOCS, bert, batch_size)
    slow = [slow_bert_score(p, d, bert, word_ids) for p, d in zip(PREDICTIONS, DOCS, strict=True)]
    assert scores == pytest.approx(slow, abs=1e-5)
    assert scores[4] == 0.0 and len(set(scores)) == len(scores)


def test_bert_score_of_a_text_with_itself_is_one(bert):
    assert bert_scores(["violin has four"], ["violin has four"], bert) == pytest.approx([1.0], abs=1e-6)


def test_a_text_longer_than_the_model_takes_is_cut(bert):
    text = " ".join(["violin has four"] * 50)
    assert bert_scores([text], [text[: len("violin has four") * 8]], bert) == pytest.approx([1.0], abs=1e-6)


def test_bert_score_runs_on_a_decoder_without_a_padding_token(tmp_path):
    base = save_base("mistral", tmp_path / "base")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    assert tokenizer.pad_token is None

    def ids_of(text):
        ids = tokenizer(text)["input_ids"]
        return ids, range(len(ids))

    scores = bert_scores(PREDICTIONS, DOCS, base)
    slow = [slow_bert_score(p, d, base, ids_of) if p else 0.0 for p, d in zip(PREDICTIONS, DOCS, strict=True)]
    assert scores == pytest.approx(slow, abs=1e-5)
    assert bert_scores([""], [""], base) == [0.0]


def test_a_directory_that_cannot_score_is_found_before_anything_loads(bert, tmp_path):
    with pytest.raises(ValueError, match="no directory"):
        check_bert_model(tmp_path / "absent")
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match="safetensors"):
        check_bert_model(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match="config and tokenizer"):
        check_bert_model(tmp_path)
    for file in bert.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    check_bert_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "t5", "is_encoder_decoder": true}')
    with pytest.raises(ValueError, match="encoder-decoder"):
        check_bert_model(tmp_path)


def test_predictions_and_references_come_in_pairs(bert):
    with pytest.raises(ValueError, match="shorter|longer"):
        bert_scores(["a", "b"], ["a"], bert)


@pytest.fixture(scope="module")
def rules(tmp_path_factory):
    """A spaCy pipeline on disk that finds a few names by rule."""
    spacy = pytest.importorskip("spacy")
    pipeline = spacy.blank("en")
    names = ["Marie Curie", "Warsaw", "1867", "AI", "$5", "Köln", "marie   curie", "MARIE CURIE"]
    pipeline.add_pipe("entity_ruler").add_patterns([{"label": "NAME", "pattern": name} for name in names])
    folder = tmp_path_factory.mktemp("spacy") / "rules"
    pipeline.to_disk(folder)
    return str(folder)


def test_entity_preservation_is_the_share_of_names_that_the_prediction_has(rules):
    documents = [DOCS[0]] * 3 + ["A violin has four strings.", DOCS[4]]
    predictions = ["marie\n curie, of WARSAW", "Someone, born in 1867.", "nobody", "anything", "In KÖLN!"]
    shares = entity_preservation(predictions, documents, rules)
    assert shares == [pytest.approx(2 / 3), pytest.approx(1 / 3), 0.0, None, 1.0]


def test_an_entity_counts_once_and_as_a_whole_word(rules):
    document = "Marie Curie is MARIE CURIE . AI costs $5 ."
    assert entity_preservation(["a Thai aide paid $5 now"], [document], rules) == [pytest.approx(1 / 3)]
    assert entity_preservation(["Marie Curie"], [document], rules) == [pytest.approx(1 / 3)]
    assert entity_preservation(["Marie Curie-Skłodowska likes AI. It is $5."], [document], rules) == [1.0]


def test_a_missing_entity_model_is_found_in_words(rules, tmp_path):
    spacy = pytest.importorskip("spacy")
    with pytest.raises(ValueError, match="spacy download"):
        check_entity_model("no_such_model")
    spacy.blank("en").to_disk(tmp_path / "blank")
    with pytest.raises(ValueError, match="no part that finds named entities"):
        check_entity_model(str(tmp_path / "blank"))
    check_entity_model(rules)


def test_without_spacy_the_message_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without_spacy(name, *rest, **options):
        if name == "spacy":
            raise ImportError("No module named 'spacy'")
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without_spacy)
    with pytest.raises(ValueError, match="pip install spacy"):
        check_entity_model("en_core_web_sm")
