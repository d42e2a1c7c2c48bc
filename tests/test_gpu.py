"""What a GPU computes against what the CPU computes, in float32. Skipped where there is no GPU."""

import pytest
import torch

from openrlhf.models.adapters import set_dropout
from openrlhf.models.lora import keep_mask
from tests.tiny import ANSWERS, DOCS, QUESTIONS, gradients, make_batch, new_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CLOSE = {"rtol": 1e-3, "atol": 1e-4}


def test_vectors_and_answers_are_those_of_the_cpu(mistral):
    model = new_model(mistral)
    expected, _ = model.compress_documents(DOCS)
    answers, chosen = model.generate_from_questions(QUESTIONS, [DOCS] * 3, 12)
    model.to("cuda")
    vectors, _ = model.compress_documents(DOCS)
    assert vectors.device.type == "cuda"
    torch.testing.assert_close(vectors.cpu(), expected, **CLOSE)
    there, selected = model.generate_from_questions(QUESTIONS, [DOCS] * 3, 12)
    assert there == answers and torch.equal(selected.cpu(), chosen.cpu())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("stage", ["stage1_2", "stage2"])
def test_losses_and_gradients_are_those_of_the_cpu(mistral, stage, checkpointing):
    found = []
    for device in ("cpu", "cuda"):
        model = new_model(mistral)
        set_dropout(model.decoder, 0.0)
        model.to(device).train_stage(stage)
        model.train()
        if checkpointing:
            model.checkpoint_layers()
        if stage == "stage2":
            model.cache_frozen_documents()
        batch = make_batch(model, stage, [DOCS[:3]] * 3, QUESTIONS, ANSWERS)
        batch = {key: v.to(device) if isinstance(v, torch.Tensor) else v for key, v in batch.items()}
        loss, _ = model(batch=batch, compute_logits=False)
        loss.backward()
        found.append((loss.detach().cpu(), {name: grad.cpu() for name, grad in gradients(model).items()}))
    (loss, grads), (other_loss, other_grads) = found
    torch.testing.assert_close(other_loss, loss, **CLOSE)
    for name, grad in grads.items():
        torch.testing.assert_close(other_grads[name], grad, rtol=1e-2, atol=1e-3 * float(grad.abs().max()), msg=name)


def test_dropout_masks_have_the_probability_asked_for():
    keep = keep_mask(torch.empty(1000, 1000, device="cuda"), 0.1)
    assert keep.dtype == torch.uint8 and abs(float((keep == 0).double().mean()) - 0.1) < 0.003
