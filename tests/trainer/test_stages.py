"""What each stage learns, what it leaves alone, where it starts, and that its flags do what they say."""

import json

import pytest
import torch
from safetensors.torch import load_file

from openrlhf.cli import compress_corpus
from openrlhf.retrieval.store import Store
from tests.trainer.facts import DOCS, candidates, paraphrase, qa, write_jsonl
from tests.trainer.launch import BASE_MODEL, Run, adapter, call, train

STAGES = ("stage1", "stage1_2", "stage2", "stage2_pretrain_retrieval")
STILL = 1e-30  # a learning rate that leaves every weight where it starts


def rows(run: Run) -> dict[str, torch.Tensor]:
    """Embeddings of the added tokens."""
    return load_file(run.folder / "special_embeddings.safetensors")


def same(one: dict, other: dict) -> bool:
    """Whether two sets of tensors are equal bit for bit."""
    assert set(one) == set(other)
    return all(torch.equal(one[key], other[key]) for key in one)


def is_fresh(weights: dict) -> bool:
    """Whether an adapter is a no-op, as it is before training."""
    return all(bool((value.abs() < 1e-20).all()) for key, value in weights.items() if "lora_B" in key)


def saved_config(run: Run) -> dict:
    """config.json of the checkpoint."""
    return json.loads((run.folder / "config.json").read_text())


@pytest.fixture
def small(tmp_path, chain):
    """A run of a few steps from the stage-1 checkpoint."""

    def run(stage: str, name: str = "run", source: str = "stage1", **options) -> Run:
        defaults = {"max_samples": 8, "train_batch_size": 4, "learning_rate": 1e-2}
        if source:
            defaults["pretrain_checkpoint"] = chain[source].folder
        return train(tmp_path / name, stage, **{**defaults, **options})

    return run


@pytest.mark.parametrize("stage", [*STAGES, "text_rag"])
def test_each_stage_lowers_its_training_loss(chain, stage):
    curve = chain[stage].curve()
    assert sum(curve[-2:]) < 0.7 * sum(curve[:2]), curve


def test_text_rag_trains_the_generator_alone_and_reports_no_mse(small, chain):
    run, still = chain["text_rag"], small("text_rag", "still", source="", learning_rate=STILL)
    assert [path.name for path in run.folder.glob("*_adapter")] == ["decoder_adapter"]
    assert is_fresh(adapter(still.folder, "decoder")) and not is_fresh(adapter(run.folder, "decoder"))
    trained, fresh = rows(run), rows(small("text_rag", "other", source="", max_samples=1))
    assert same(trained, fresh)  # the embeddings are those of the seed
    assert all("mse_loss" not in line and "recall_1" not in line for line in run.lines())
    assert "mse" not in run.errors and "loss" in run.errors
    card = (run.folder / "README.md").read_text()
    assert "# Text RAG baseline" in card and "no compressor" in card and "compress_rate" not in card


def test_text_rag_reads_instruction_and_end_to_end_records_together(small, tmp_path):
    """Of four documents a K of two keeps the positive, wherever it stands, and the first other."""
    one = write_jsonl(tmp_path / "instruction_data.jsonl", [{**candidates(i, 2), "pos_index": None} for i in range(3)])
    two = write_jsonl(tmp_path / "end_to_end_data.jsonl", [candidates(i) for i in range(3, 8)])
    run = small("text_rag", source="", data=f"{one},{two}", eval_dataset=two)
    assert run.curve("records", "eval")[0] == 5
    assert "10 documents beyond K, left out (counted once a sample and epoch)" in run.errors
    assert sum(run.curve("answer_tokens")) > 2 * 8


def test_stage_1_lowers_the_distance_of_memory_and_text(chain):
    curve = chain["stage1"].curve("mse_loss")
    assert curve[-1] < 0.8 * curve[0], curve


def test_retrieval_training_learns_to_find_the_positive(chain):
    recall = chain["stage2_pretrain_retrieval"].curve("recall_1")
    assert recall[-1] == 1.0 > min(recall), recall


def test_stage_1_trains_compressor_generator_and_memory_embeddings(small):
    trained, frozen = small("stage1", source=""), small("stage1", "frozen", source="", freeze_memory_embeddings=True)
    still = small("stage1", "still", source="", learning_rate=STILL)
    assert is_fresh(adapter(still.folder, "encoder")) and is_fresh(adapter(still.folder, "decoder"))
    for run in (trained, frozen):
        assert not is_fresh(adapter(run.folder, "encoder")) and not is_fresh(adapter(run.folder, "decoder"))
        assert not (run.folder / "query_reasoner_adapter").exists()
    assert same(rows(frozen), rows(still))
    memory, others = rows(trained)["embed_tokens"].split([4, 3])
    assert bool((memory != rows(still)["embed_tokens"][:4]).any(dim=1).all())
    assert torch.equal(others, rows(still)["embed_tokens"][4:])
    assert torch.equal(rows(trained)["lm_head"], rows(still)["lm_head"])


def test_memory_embeddings_go_on_training_in_stage1_2_unless_frozen(small, chain):
    before = rows(chain["stage1"])
    assert same(rows(small("stage1_2", "frozen", freeze_memory_embeddings=True)), before)
    after = rows(small("stage1_2"))
    assert bool((after["embed_tokens"][:4] != before["embed_tokens"][:4]).any(dim=1).all())
    assert torch.equal(after["embed_tokens"][4:], before["embed_tokens"][4:])


def test_a_checkpoint_made_with_frozen_embeddings_does_not_freeze_the_next_run(small, tmp_path):
    first = small("stage1", "first", source="", freeze_memory_embeddings=True)
    second = small("stage1_2", "second", pretrain_checkpoint=first.folder)
    assert not torch.equal(rows(second)["embed_tokens"][:4], rows(first)["embed_tokens"][:4])


def test_stage1_2_continues_both_adapters_of_the_checkpoint(small, chain):
    still = small("stage1_2", learning_rate=STILL)
    assert still.saved() == chain["stage1"].saved()


def test_reset_decoder_starts_a_fresh_generator_and_keeps_the_compressor(small, chain):
    still = small("stage1_2", reset_decoder=True, learning_rate=STILL)
    assert is_fresh(adapter(still.folder, "decoder"))
    assert same(adapter(still.folder, "encoder"), adapter(chain["stage1"].folder, "encoder"))
    assert same(rows(still), rows(chain["stage1"]))


@pytest.mark.parametrize("stage", STAGES[2:])
def test_stage_2_starts_its_query_reasoner_as_a_copy_of_the_compressor(small, chain, stage):
    still = small(stage, learning_rate=STILL)
    assert same(adapter(still.folder, "query_reasoner"), adapter(chain["stage1"].folder, "encoder"))
    assert same(adapter(still.folder, "decoder"), adapter(chain["stage1"].folder, "decoder"))


def test_fresh_query_reasoner_starts_from_nothing(small, chain):
    still = small("stage2", fresh_query_reasoner=True, learning_rate=STILL)
    assert is_fresh(adapter(still.folder, "query_reasoner"))
    assert same(adapter(still.folder, "encoder"), adapter(chain["stage1"].folder, "encoder"))


def test_a_trained_query_reasoner_is_kept_unless_a_fresh_one_is_asked_for(small, chain):
    source = "stage2_pretrain_retrieval"
    kept = small("stage2", "kept", source, learning_rate=STILL)
    assert same(adapter(kept.folder, "query_reasoner"), adapter(chain[source].folder, "query_reasoner"))
    assert not same(adapter(kept.folder, "query_reasoner"), adapter(kept.folder, "encoder"))
    fresh = small("stage2", "fresh", source, fresh_query_reasoner=True, learning_rate=STILL)
    assert is_fresh(adapter(fresh.folder, "query_reasoner"))


def test_stage_2_trains_query_reasoner_and_generator_and_nothing_else(chain):
    before, after = chain["stage1"], chain["stage2"]
    for file in ("encoder_adapter/adapter_model.safetensors", "special_embeddings.safetensors"):
        assert (after.folder / file).read_bytes() == (before.folder / file).read_bytes()
    assert not same(adapter(after.folder, "query_reasoner"), adapter(before.folder, "encoder"))
    assert not same(adapter(after.folder, "decoder"), adapter(before.folder, "decoder"))


def test_retrieval_training_trains_the_query_reasoner_and_nothing_else(chain):
    before, after = chain["stage1"], chain["stage2_pretrain_retrieval"]
    for name in before.saved():
        assert after.saved()[name] == before.saved()[name], name
    assert not same(adapter(after.folder, "query_reasoner"), adapter(before.folder, "encoder"))


def test_freeze_query_reasoner_trains_the_generator_only(small, chain):
    run = small("stage2", freeze_query_reasoner=True)
    assert same(adapter(run.folder, "query_reasoner"), adapter(chain["stage1"].folder, "encoder"))
    assert not same(adapter(run.folder, "decoder"), adapter(chain["stage1"].folder, "decoder"))


@pytest.mark.parametrize("stage", STAGES[:2])
def test_freeze_compressor_trains_the_generator_only_and_a_query_reasoner_stays_valid(small, chain, stage):
    source = chain["stage2_pretrain_retrieval"]
    run = small(stage, source="stage2_pretrain_retrieval", freeze_compressor=True)
    for name, content in source.saved().items():
        if "encoder_adapter" in name or "query_reasoner" in name or "special_embeddings" in name:
            assert run.saved()[name] == content, name
    assert not same(adapter(run.folder, "decoder"), adapter(source.folder, "decoder"))
    assert saved_config(run)["training_stage"] == stage and "outdates" not in run.errors


def vectors(folders: list) -> list[torch.Tensor]:
    """The same documents compressed by several checkpoints."""
    from openrlhf.models.modeling_clara import CLaRa

    models = [CLaRa.from_pretrained(folder, decoder_model_name=str(BASE_MODEL)) for folder in folders]
    return [model.compress_documents(DOCS)[0] for model in models]


def test_documents_compressed_before_stage_2_stay_valid_after_it(chain):
    before, *after = call(vectors, [chain[name].folder for name in ("stage1", *STAGES[2:], "stage1_2")])
    assert torch.equal(before, after[0]) and torch.equal(before, after[1])
    assert not torch.allclose(before, after[2])  # instruction tuning does change them


def test_training_the_compressor_of_a_stage_2_checkpoint_leaves_its_query_reasoner_out(small):
    run = small("stage1_2", source="stage2")
    said = " ".join(run.errors.split())
    assert "training its compressor again outdates its query reasoner, which is left out" in said
    assert not (run.folder / "query_reasoner_adapter").exists()
    still = small("stage2", "still", pretrain_checkpoint=run.folder, learning_rate=STILL)
    assert same(adapter(still.folder, "query_reasoner"), adapter(run.folder, "encoder"))


def test_lora_r_is_the_rank_and_alpha_is_twice_it(small):
    run = small("stage1", source="", lora_r=2)
    assert {min(value.shape) for value in adapter(run.folder, "encoder").values()} == {2}
    fields = json.loads((run.folder / "encoder_adapter" / "adapter_config.json").read_text())
    assert (fields["r"], fields["lora_alpha"], fields["lora_dropout"]) == (2, 4, 0.1)


def test_lora_dropout_is_chosen_for_each_run_and_kept_in_the_adapters_file(small):
    """Of the checkpoint that is continued nothing is left of it."""
    first = small("stage1", source="", lora_dropout=0.0)
    fields = json.loads((first.folder / "encoder_adapter" / "adapter_config.json").read_text())
    assert fields["lora_dropout"] == 0.0
    then = small("stage1_2", "then", source="", pretrain_checkpoint=first.folder)
    fields = json.loads((then.folder / "encoder_adapter" / "adapter_config.json").read_text())
    assert fields["lora_dropout"] == 0.1


def retrieval_loss(folder, data: list[dict], temperature: float) -> float:
    """−log Σ p of the positives, from vectors computed outside the training code."""
    from openrlhf.models.modeling_clara import CLaRa

    model = CLaRa.from_pretrained(folder, decoder_model_name=str(BASE_MODEL), training_stage="stage2")
    losses = []
    for record in data:
        docs = model.compress_documents(record["docs"])[0].flatten(1)
        scores = torch.nn.functional.cosine_similarity(model.encode_queries([record["question"]]), docs)
        losses.append(-torch.log(torch.softmax(scores / temperature, 0)[record["pos_index"]].sum()))
    return float(torch.stack(losses).mean())


def test_topk_temperature_is_used_and_saved(small, chain, tmp_path):
    lines = [candidates(i) for i in range(5)]
    data, stage = write_jsonl(tmp_path / "data.jsonl", lines), "stage2_pretrain_retrieval"
    run = small(stage, data=data, eval_dataset=data, topk_temperature=0.3)
    expected = call(retrieval_loss, chain["stage1"].folder, lines, 0.3)
    assert run.lines("eval")[0]["loss"] == pytest.approx(expected, rel=1e-4)
    assert saved_config(run)["topk_temperature"] == 0.3


def test_generation_top_k_gives_the_generator_that_many_documents(small):
    """Each document is four memory tokens and a separator in the generator's input."""
    two, three = (small("stage1_2", str(k), max_samples=4, generation_top_k=k) for k in (2, 3))
    assert saved_config(three)["generation_top_k"] == 3
    assert three.lines()[0]["tokens"] > two.lines()[0]["tokens"] + 4 * (4 + 1)


def test_no_qa_loss_trains_on_paraphrases_only(small, tmp_path):
    data = write_jsonl(tmp_path / "data.jsonl", [qa(0), paraphrase(1), qa(2), paraphrase(3)])
    one = small("stage1", "one", source="", data=data, no_qa_loss=True)
    other_data = write_jsonl(tmp_path / "other.jsonl", [paraphrase(1), paraphrase(3)])
    other = small("stage1", "other", source="", data=other_data)
    assert one.figures() == other.figures()


def test_the_mse_loss_trains_only_when_asked_for_and_with_its_weight(small):
    runs = [
        small("stage1", "off", source=""),
        small("stage1", "zero", source="", mse_loss=True, mse_loss_weight=0.0),
        small("stage1", "some", source="", mse_loss=True),
        small("stage1", "much", source="", mse_loss=True, mse_loss_weight=30.0),
    ]
    off, zero, some, much = runs
    assert off.saved() == zero.saved() and off.figures() == zero.figures()
    assert off.saved() != some.saved() != much.saved()
    assert off.curve()[0] == some.curve()[0]  # the reported loss is CE alone
    assert much.curve("grad_norm")[0] > off.curve("grad_norm")[0]


def test_the_span_loss_trains_only_when_asked_for_and_with_its_weight(small):
    runs = [
        small("stage1", "without", source=""),
        small("stage1", "little", source="", span_loss_weight=0.5),
        small("stage1", "more", source="", span_loss_weight=30.0),
    ]
    without, little, more = runs
    assert "span_loss" not in without.lines()[0] and little.curve("span_loss")[0] > 0
    assert without.curve()[0] == little.curve()[0]  # the reported loss is CE alone
    assert without.saved() != little.saved() != more.saved()
    assert more.curve("grad_norm")[0] > without.curve("grad_norm")[0]


def test_the_saved_config_says_how_the_checkpoint_was_made(chain):
    for stage, run in chain.items():
        fields = saved_config(run)
        assert fields["training_stage"] == stage
        assert (fields["doc_max_length"], fields["compr_rate"], fields["lora_r"]) == (32, 8, 4)
        assert fields["attn_implementation"] is None
        card = (run.folder / "README.md").read_text()
        assert stage in card and "learning_rate" in card and f"{run.lines()[-1]['loss']}" in card


def test_the_checkpoint_finds_its_base_model_by_a_relative_path(chain):
    name = saved_config(chain["stage2"])["decoder_model_name"]
    assert not name.startswith("/")
    assert (chain["stage2"].folder / name).resolve() == BASE_MODEL.resolve()


def test_stage2_reads_its_documents_from_a_store(small, chain, tmp_path):
    """A store made before the stage gives the curve of compressing, up to bfloat16, and is what is read."""
    corpus = write_jsonl(tmp_path / "corpus.jsonl", [{"text": text} for text in DOCS])
    command = ["--model", str(chain["stage1"].folder), "--input", str(corpus), "--output", str(tmp_path / "store")]
    compress_corpus.main(command)
    plain, stored = small("stage2", "plain"), small("stage2", "stored", document_store=tmp_path / "store")
    assert stored.curve() == pytest.approx(plain.curve(), rel=2e-2) and stored.curve() != plain.curve()
    assert "documents are read from" in stored.output + stored.errors
    with Store.open(tmp_path / "store", write=True) as store:
        keys = [key for (key,) in store._sql.execute("SELECT key FROM vectors")]
        store.rewrite({key: doc_LD.flip(-1) for key, doc_LD in zip(keys, store.by_key(keys), strict=True)})
    other = small("stage2", "other", document_store=tmp_path / "store")
    assert abs(other.curve()[0] - plain.curve()[0]) > 10 * abs(stored.curve()[0] - plain.curve()[0])
