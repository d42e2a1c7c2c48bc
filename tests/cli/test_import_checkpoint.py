"""Converting a checkpoint of the public format."""

from pathlib import Path

import pytest
import torch

from openrlhf.cli.import_checkpoint import main
from openrlhf.models.modeling_clara import CLaRa

VECTORS = Path(__file__).parents[1] / "data" / "vectors"
PUBLIC, BASE = VECTORS / "checkpoints" / "c8_stage2", VECTORS / "decoders" / "sys"
TEXTS = ["Marie Curie was born in Warsaw in 1867.", "A violin has four strings."]


def test_the_converted_checkpoint_gives_the_same_vectors(tmp_path):
    main(["--source", str(PUBLIC), "--target", str(tmp_path / "ours"), "--decoder_model_name", str(BASE)])
    assert not (tmp_path / "ours" / "adapters.pth").exists()
    public = CLaRa.from_pretrained(PUBLIC, decoder_model_name=str(BASE))
    ours = CLaRa.from_pretrained(tmp_path / "ours")
    assert torch.equal(ours.compress_documents(TEXTS)[0], public.compress_documents(TEXTS)[0])
    assert torch.equal(ours.encode_queries(TEXTS), public.encode_queries(TEXTS))


def test_an_existing_checkpoint_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SystemExit) as stop:
        main(["--source", str(PUBLIC), "--target", str(tmp_path), "--decoder_model_name", str(BASE)])
    assert stop.value.code == 2
    assert "already holds a checkpoint" in capsys.readouterr().err
    assert (tmp_path / "config.json").read_text() == "{}"


def test_a_missing_base_model_is_said_in_words(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--source", str(PUBLIC), "--target", str(tmp_path / "ours"), "--decoder_model_name", "./nowhere"])
    assert stop.value.code == 1
    assert "pass decoder_model_name=" in capsys.readouterr().err
    assert not (tmp_path / "ours").exists()
