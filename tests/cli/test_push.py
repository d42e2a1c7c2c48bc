"""Publishing through the real huggingface_hub client to a Hub on loopback, and loading from what was uploaded."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from openrlhf.cli import push
from openrlhf.models.adapters import ADAPTERS
from openrlhf.models.modeling_clara import CLaRa
from openrlhf.models.publish import SETTINGS_FILE
from tests import fake_hub
from tests.tiny import DOCS, QUESTIONS, new_model

ROOT = Path(__file__).parents[2]
LISTS = [DOCS[:3], DOCS[2:], DOCS[5:]]
BASE = "team/base"
GIVEN = ["--base_model", BASE, "--license", "apache-2.0"]
SECRET = "hf_" + "Zz9Yy8Xx7W" * 3


@pytest.fixture(scope="module")
def model(mistral) -> CLaRa:
    return new_model(mistral, training_stage="stage2")


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory) -> Path:
    """A checkpoint with what a run and its user leave beside it."""
    folder = tmp_path_factory.mktemp("push") / "checkpoint"
    model.save_pretrained(folder)
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    (folder / "optimizer.pt").write_bytes(b"state")
    (folder / ".env").write_text(f"HF_TOKEN={SECRET}\n")
    (folder / "helper.py").write_text(f"KEY = '{SECRET}'\n")
    (folder / "global_step3").mkdir()
    (folder / "global_step3" / "mp_rank_00_model_states.pt").write_bytes(b"state")
    return folder


@pytest.fixture
def copy(checkpoint, tmp_path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


@pytest.fixture
def hub(mistral) -> Iterator[fake_hub.Hub]:
    """A Hub that has the base model."""
    with fake_hub.running() as made:
        base = fake_hub.Repository(private=False)
        base.files |= {str(path.relative_to(mistral)): path.read_bytes() for path in mistral.rglob("*.*")}
        made.repositories[BASE] = base
        yield made


def run(hub: fake_hub.Hub, tmp_path: Path, *words, token: str = fake_hub.TOKEN, cwd: Path = ROOT):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **fake_hub.environment(hub, str(tmp_path / "hf"), token)}
    if cwd == ROOT:
        environment["PYTHONPATH"] = str(ROOT)
    else:
        environment.pop("PYTHONPATH", None)
    return subprocess.run(
        [sys.executable, *map(str, words)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )


def pushed(hub, tmp_path, checkpoint, repo_id, *more) -> str:
    done = run(hub, tmp_path, "-m", "openrlhf.cli.push", "--checkpoint", checkpoint, "--repo_id", repo_id, *more)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


def loaded(hub, tmp_path, repo_id: str, subfolder: str = "") -> dict:
    """What a process without this project gets from the Hub."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    (tmp_path / "given.json").write_text(json.dumps({"questions": QUESTIONS, "documents": LISTS}))
    probe = Path(__file__).parent / "hub_probe.py"
    words = (probe, repo_id, subfolder, tmp_path / "given.json", elsewhere / "found.pt")
    done = run(hub, tmp_path, *words, cwd=elsewhere)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(elsewhere / "found.pt", weights_only=True)


def same(model: CLaRa, found: dict) -> bool:
    answers, topk = model.generate_from_questions(QUESTIONS, LISTS)
    assert found["module"].startswith("transformers_modules.")
    return (
        found["answers"] == answers
        and torch.equal(found["topk"], topk)
        and torch.equal(found["vectors"], model.compress_documents(LISTS[0])[0])
    )


def metadata(card: bytes) -> dict:
    return yaml.safe_load(card.decode().split("---")[1])


def test_what_was_pushed_to_the_root_loads_where_this_project_is_not_installed(model, checkpoint, hub, tmp_path):
    where = pushed(hub, tmp_path, checkpoint, "team/clara", *GIVEN, "--private", "--commit_message", "First try")
    assert where == f"{hub.url}/team/clara"
    repository = hub.repositories["team/clara"]
    assert repository.private and repository.messages == ["First try"] and repository.commits == 1
    files = repository.files
    there = {path.split("/")[0] for path in files} - {".gitattributes"}
    assert {"config.json", "README.md", "modeling_clara.py", "tokenizer.json", *ADAPTERS} <= there
    assert not there & {"optimizer.pt", "metrics.jsonl", ".env", "helper.py", "global_step3"}
    everything = b"".join(files.values())
    for private in (SECRET, fake_hub.TOKEN, str(checkpoint.parent), os.path.dirname(model.base_path)):
        assert private.encode() not in everything
    assert json.loads(files["config.json"])["decoder_model_name"] == BASE
    for name in ADAPTERS:
        assert json.loads(files[f"{name}/adapter_config.json"])["base_model_name_or_path"] == BASE
    card = metadata(files["README.md"])
    assert (card["base_model"], card["license"], card["library_name"]) == (BASE, "apache-2.0", "transformers")
    assert "clara" in card["tags"] and 'from_pretrained("team/clara", ' in files["README.md"].decode()
    assert any(request.startswith("PUT /lfs/") for request in hub.requests)
    assert same(model, loaded(hub, tmp_path, "team/clara"))


SETTINGS = """
import sys
from openrlhf.rag.config import RAGConfig
print(RAGConfig.chosen(None, sys.argv[1]).reranking.min_score)
"""


def test_settings_for_rag_go_with_a_checkpoint_and_are_found_on_the_hub(copy, hub, tmp_path):
    pushed(hub, tmp_path, copy, "team/plain", *GIVEN)
    (copy / SETTINGS_FILE).write_text("rag_master:\n  reranking: {min_score: 0.125}\n")
    pushed(hub, tmp_path, copy, "team/clara", *GIVEN)
    for name, score in (("team/clara", "0.125"), ("team/plain", "0.55"), ("team/nothing", "0.55")):
        done = run(hub, tmp_path, "-c", SETTINGS, name)
        assert done.returncode == 0 and done.stdout.strip() == score, done.stderr[-3000:]
    (copy / SETTINGS_FILE).unlink()
    pushed(hub, tmp_path, copy, "team/clara", *GIVEN)
    assert SETTINGS_FILE not in hub.repositories["team/clara"].files


def test_what_was_pushed_to_a_subfolder_loads_and_others_beside_it_stay(model, mistral, checkpoint, hub, tmp_path):
    other = new_model(mistral, compr_rate=8, training_stage="stage2")
    other.save_pretrained(tmp_path / "other")
    for folder, name in ((checkpoint, "compression-4"), (tmp_path / "other", "compression-8")):
        where = pushed(hub, tmp_path, folder, "team/many", "--subfolder", name, *GIVEN)
        assert where == f"{hub.url}/team/many/tree/main/{name}"
        if name == "compression-4":
            card = hub.repositories["team/many"].files["README.md"]
            hub.repositories["team/many"].files["README.md"] = card + b"\nWritten by hand.\n"
    files = hub.repositories["team/many"].files
    assert metadata(files["README.md"])["license"] == "apache-2.0"
    assert files["README.md"].endswith(b"Written by hand.\n"), "a card that is there stays"
    assert b'"team/many", subfolder="compression-8"' in files["compression-8/README.md"]
    assert {"modeling_clara.py", "compression-4/modeling_clara.py", "compression-8/config.json"} <= set(files)
    assert "config.json" not in files
    assert same(model, loaded(hub, tmp_path, "team/many", "compression-4"))
    assert same(other, loaded(hub, tmp_path, "team/many", "compression-8"))


PYTHON = """
import sys
from openrlhf.models.modeling_clara import CLaRa
model = CLaRa.from_pretrained(sys.argv[1])
print(model.push_to_hub("team/python", base_model="team/base", license="mit", commit_message="From Python"))
"""


def test_a_model_in_memory_is_pushed_and_takes_the_place_of_another_stages(mistral, copy, hub, tmp_path):
    pushed(hub, tmp_path, copy, "team/python", *GIVEN)
    assert "query_reasoner_adapter/adapter_model.safetensors" in hub.repositories["team/python"].files
    earlier = new_model(mistral, query=False)
    earlier.save_pretrained(tmp_path / "stage1")
    done = run(hub, tmp_path, "-c", PYTHON, tmp_path / "stage1")
    assert done.returncode == 0 and done.stdout.strip() == f"{hub.url}/team/python", done.stderr[-3000:]
    files = hub.repositories["team/python"].files
    assert not [name for name in files if name.startswith("query_reasoner_adapter")], "of the checkpoint before"
    assert json.loads(files["config.json"])["training_stage"] == "stage1"
    assert metadata(files["README.md"])["license"] == "mit"
    assert hub.repositories["team/python"].messages[-1] == "From Python"


def test_a_dry_run_lists_files_and_sizes_and_sends_nothing(checkpoint, hub, tmp_path):
    said = pushed(hub, tmp_path, checkpoint, "team/clara", *GIVEN, "--subfolder", "compression-4", "--dry_run")
    sizes = {name: int(size.replace(",", "")) for size, name in re.findall(r"^ *([\d,]+)  (\S+)$", said, re.M)}
    weights = "encoder_adapter/adapter_model.safetensors"
    assert sizes[f"compression-4/{weights}"] == (checkpoint / weights).stat().st_size
    assert {"modeling_clara.py", "README.md", "compression-4/config.json"} <= set(sizes)
    assert f"{sum(sizes.values()):,}  bytes in {len(sizes)} files to team/clara; nothing was sent" in said
    left = said.split("not uploaded: ")[1]
    beside = ["global_step3/mp_rank_00_model_states.pt", "helper.py", "metrics.jsonl", "optimizer.pt"]
    assert left.split(", ") == [".env", "fingerprint.py", *beside]
    assert hub.requests == [] and SECRET not in said


def refused(capsys, *words) -> str:
    with pytest.raises(SystemExit) as ended:
        push.main([str(word) for word in words])
    said = capsys.readouterr()
    assert ended.value.code == 2 and said.err.count("\n") == 1 and not said.out
    return said.err


def test_a_checkpoint_that_others_could_not_load_is_refused(copy, capsys, vectors, tmp_path, monkeypatch):
    def said(*more, checkpoint=copy, repo_id="team/clara") -> str:
        return refused(capsys, "--checkpoint", checkpoint, "--repo_id", repo_id, "--dry_run", *more)

    assert "a place on this machine that others do not have" in said("--license", "mit")
    assert "names no licence" in said("--base_model", BASE)
    assert "no directory" in said(*GIVEN, checkpoint=tmp_path / "nothing")
    assert "lacks an owner" in said(*GIVEN, repo_id="clara")
    assert "cannot be the name" in said(*GIVEN, repo_id="team/cla ra")
    assert "cannot be the name" in said("--base_model", "/models/base", "--license", "mit")
    assert "cannot be a folder" in said(*GIVEN, "--subfolder", "../up")
    assert "convert it first" in said(*GIVEN, checkpoint=vectors / "checkpoints" / "c8_stage1")

    config = json.loads((copy / "config.json").read_text())
    (tmp_path / "models" / "local").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    (copy / "config.json").write_text(json.dumps({**config, "decoder_model_name": "models/local"}))
    assert "'models/local', a place on this machine" in said("--license", "mit"), "it only looks like a Hub id"
    (copy / "config.json").write_text(json.dumps(config))

    for name, reason in (
        ("tokens.py", "tokens.py is missing"),
        ("special_embeddings.safetensors", "special_embeddings.safetensors is missing"),
        ("query_reasoner_adapter/adapter_model.safetensors", "adapter_model.safetensors is missing"),
        ("decoder_adapter/adapter_config.json", "adapter_config.json is missing"),
        ("config.json", "config.json is missing"),
    ):
        (copy / name).rename(tmp_path / "aside")
        assert reason in said(*GIVEN)
        (tmp_path / "aside").rename(copy / name)
    whole = (copy / "encoder_adapter/adapter_model.safetensors").read_bytes()
    (copy / "encoder_adapter/adapter_model.safetensors").write_bytes(whole[:-100])
    assert "cut short or damaged" in said(*GIVEN)


def test_adapters_that_do_not_belong_together_are_refused(copy, capsys):
    from safetensors.torch import load_file, save_file

    path = copy / "decoder_adapter" / "adapter_model.safetensors"
    whole = load_file(path)

    def said(state: dict) -> str:
        save_file(state, path)
        return refused(capsys, "--checkpoint", copy, "--repo_id", "team/clara", "--dry_run", *GIVEN)

    some = next(key for key in whole if "lora_B" in key)
    assert "is not a whole adapter" in said({key: value for key, value in whole.items() if key != some})
    layer = some.split(".lora_")[0]
    assert "has other layers than" in said({key: value for key, value in whole.items() if not key.startswith(layer)})
    assert "holds NaN or infinity" in said({**whole, some: torch.full_like(whole[some], torch.nan)})


@pytest.mark.parametrize("place", ["README.md", "tokens.py", "config.json"])
def test_a_secret_in_what_is_uploaded_is_refused_and_not_repeated(copy, capsys, monkeypatch, place):
    text = (copy / place).read_text()
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef" * 2)
    for secret in (SECRET, "0123456789abcdef" * 2):
        changed = (
            json.dumps({**json.loads(text), "note": secret}) if place == "config.json" else f"{text}\n# {secret}\n"
        )
        (copy / place).write_text(changed)
        said = refused(capsys, "--checkpoint", copy, "--repo_id", "team/clara", "--dry_run", *GIVEN)
        assert f"{place} holds what looks like a token or key" in said and secret not in said


def test_a_card_keeps_its_text_and_loses_places_of_this_machine(copy):
    from openrlhf.models.publish import plan

    (copy / "README.md").write_text(
        "---\nlicense: mit\nbase_model: local\ntags: [mine, clara]\n---\n# Mine\n\nData: `/home/me/data/train.jsonl`, "
        'half and/or all of https://example.org/a/b.\n\nmodel = AutoModel.from_pretrained("PATH_OF_THIS_DIRECTORY")\n'
    )
    card = plan(copy, "team/clara", base_model=BASE)["README.md"]
    facts, text = metadata(card), card.decode()
    assert facts["license"] == "mit" and facts["base_model"] == BASE and facts["tags"][:2] == ["mine", "clara"]
    assert "Data: `train.jsonl`, half and/or all of https://example.org/a/b." in text and "/home" not in text
    assert 'AutoModel.from_pretrained("team/clara")' in text


def test_what_the_hub_refuses_is_one_line_and_leaves_nothing_half_done(checkpoint, hub, tmp_path):
    def said(*more, repo_id="team/clara", token=fake_hub.TOKEN) -> str:
        words = ("-m", "openrlhf.cli.push", "--checkpoint", checkpoint, "--repo_id", repo_id, *more)
        done = run(hub, tmp_path, *words, token=token)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert not token.strip() or token not in done.stderr
        return done.stderr.strip().splitlines()[-1]

    assert "nobody is logged in" in said(*GIVEN, token=" ")
    assert said(*GIVEN, token=SECRET).startswith("push: ") and hub.repositories.keys() == {BASE}
    missing = ["--base_model", "team/nowhere", "--license", "mit"]
    assert "the base model team/nowhere is not on the Hub" in said(*missing)
    hub.repositories["team/open"] = fake_hub.Repository(private=False)
    assert "is there already and is public" in said(*GIVEN, "--private", repo_id="team/open")
    assert list(hub.repositories["team/open"].files) == [".gitattributes"]
    hub.refuse_commits = True
    assert "over your storage limit" in said(*GIVEN)
    assert list(hub.repositories["team/clara"].files) == [".gitattributes"]
