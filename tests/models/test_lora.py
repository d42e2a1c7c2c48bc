"""Our forward pass of a LoRA layer against PEFT's, against autograd, and against its own definition."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear

from openrlhf.models.adapters import DECODER, ENCODER
from openrlhf.models.lora import LoraLinear, fixed_linear, keep_mask, use_own_forward
from tests.tiny import DOCS, new_model

P = round(0.25 * 2**16) / 2**16


def layer(dtype: torch.dtype, bias: bool, p: float = 0.0) -> tuple[Linear, Linear]:
    """The same weights in PEFT's layer and in ours."""
    pair = []
    for _ in range(2):
        torch.manual_seed(1)
        base = torch.nn.Sequential(torch.nn.Linear(24, 40, bias=bias)).to(dtype)
        config = LoraConfig(r=4, lora_alpha=8, lora_dropout=p, target_modules=["0"])
        inject_adapter_in_model(config, base, adapter_name="one")
        torch.nn.init.normal_(base[0].lora_B["one"].weight)
        pair.append(base.to(dtype))
    use_own_forward(pair[1])
    assert type(pair[0][0]) is Linear and type(pair[1][0]) is LoraLinear
    return pair[0][0], pair[1][0]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("with_gradients", [False, True])
def test_outputs_and_gradients_are_those_of_peft(bias, with_gradients):
    theirs, ours = layer(torch.float64, bias)
    x = torch.randn(3, 5, 24, dtype=torch.float64)
    if not with_gradients:
        with torch.no_grad():
            torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)
        return
    results = []
    for module in (theirs, ours):
        given = x.clone().requires_grad_()
        out = module(given)
        out.square().sum().backward()
        grads = [module.lora_A["one"].weight.grad, module.lora_B["one"].weight.grad]
        results.append([out.detach(), given.grad, *grads])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


def test_bfloat16_is_rounded_less_often_than_by_peft():
    theirs, ours = layer(torch.bfloat16, False)
    exact = layer(torch.float64, False)[0]
    for name, parameter in exact.named_parameters():
        parameter.data.copy_(dict(theirs.named_parameters())[name])
    x = torch.randn(200, 24).bfloat16()
    with torch.no_grad():
        wrong = [(module(x).double() - exact(x.double())).norm() for module in (ours, theirs)]
    assert wrong[0] <= wrong[1] < 0.02 * exact(x.double()).norm()


def test_gradients_through_dropout_are_those_of_the_dropped_input():
    _, ours = layer(torch.float64, True, 0.25)
    ours.train()
    x = torch.randn(7, 24, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(3)
    out = ours(x)
    out.sin().sum().backward()
    got = [out.detach(), x.grad, ours.lora_A["one"].weight.grad, ours.lora_B["one"].weight.grad]
    a, b = (w.detach().clone().requires_grad_() for w in (ours.lora_A["one"].weight, ours.lora_B["one"].weight))
    plain = x.detach().clone().requires_grad_()
    torch.manual_seed(3)
    keep = keep_mask(x, P)
    assert 0 < int((keep == 0).sum()) < keep.numel()
    expected = ours.base_layer(plain) + 2.0 * (plain * keep / (1 - P)) @ a.t() @ b.t()
    expected.sin().sum().backward()
    for mine, theirs in zip(got, [expected.detach(), plain.grad, a.grad, b.grad], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("shape", [(1,), (3, 5), (1000, 1001)])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_masks_drop_with_the_probability_asked_for(shape, p):
    torch.manual_seed(0)
    keep = keep_mask(torch.empty(shape), p)
    assert keep.shape == shape and set(keep.unique().tolist()) <= {0, 1}
    if keep.numel() > 1000:
        share = float((keep == 0).double().mean())
        assert abs(share - p) < 5 * (p * (1 - p) / keep.numel()) ** 0.5 + 2**-17
        columns = (keep == 0).double().mean(0)
        assert columns.std() < 1.2 * (p * (1 - p) / shape[0]) ** 0.5, "entries of one draw must be independent"
        neighbours = (keep[:, 1:] == keep[:, :-1]).double().mean()
        assert abs(neighbours - (p**2 + (1 - p) ** 2)) < 0.003
    torch.manual_seed(0)
    assert torch.equal(keep, keep_mask(torch.empty(shape), p)), "one seed, one mask"


def test_every_layer_of_every_adapter_runs_our_forward_pass(mistral):
    model = new_model(mistral)
    assert model.router.layers and all(type(module) is LoraLinear for module in model.router.layers)


def test_merged_weights_answer_for_their_adapter_alone(mistral):
    model = new_model(mistral)
    before = {key: p.clone() for key, p in model.state_dict().items()}
    documents, _ = model.compress_documents(DOCS)
    prompts = [model.answer_prompt("Who?", 1)]
    answers = model.generate_from_prompts(prompts, [documents[:1]], 8)
    embeds, mask = torch.randn(2, 6, model.decoder.config.hidden_size), torch.ones(2, 6, dtype=torch.long)
    with torch.no_grad():
        plain = {name: model.hidden(name, embeds, mask) for name in (ENCODER, DECODER, None)}
        model.merge_adapter(DECODER)
        merged = {name: model.hidden(name, embeds, mask) for name in (ENCODER, DECODER, None)}
    assert torch.equal(merged[ENCODER], plain[ENCODER]) and torch.equal(merged[None], plain[None])
    assert not torch.equal(merged[DECODER], plain[DECODER]), "the merged weights must have been used"
    torch.testing.assert_close(merged[DECODER], plain[DECODER], rtol=1e-4, atol=1e-5)
    assert model.generate_from_prompts(prompts, [documents[:1]], 8) == answers
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 48), (33, 48), (2, 5, 48)])
def test_fixed_weights_multiply_as_they_do_in_a_linear_layer(dtype, bias, shape):
    weight, x = torch.randn(80, 48).to(dtype), torch.randn(shape).to(dtype)
    offset = torch.randn(80).to(dtype) if bias else None
    with torch.no_grad():
        ours, plain = fixed_linear(weight, offset)(x), torch.nn.functional.linear(x, weight, offset)
    assert ours.shape == plain.shape and ours.dtype == dtype
    if dtype == torch.bfloat16:  # one rounding, at most, of sums that may be taken in another order
        torch.testing.assert_close(ours, plain, rtol=2**-7, atol=2**-7)
    else:
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)


def test_a_pass_with_gradients_goes_through_base_and_adapter_although_merged(mistral):
    model = new_model(mistral)
    embeds, mask = torch.randn(2, 6, model.decoder.config.hidden_size), torch.ones(2, 6, dtype=torch.long)
    weight = model.router.layers[0].lora_B[DECODER].weight
    weight.requires_grad_(True)
    gradients = []
    for _ in range(2):
        (gradient,) = torch.autograd.grad(model.hidden(DECODER, embeds, mask).square().sum(), weight)
        gradients.append(gradient)
        model.merge_adapter(DECODER)
    assert gradients[0].abs().max() > 0 and torch.equal(*gradients)


def test_training_leaves_no_outdated_merged_weights_behind(mistral):
    model = new_model(mistral)
    model.merge_adapter(DECODER)
    assert model.fixed_head is not None
    model.train_stage("stage1")
    assert not any(module.merged_products for module in model.router.layers) and model.fixed_head is None
    model.merge_adapter(DECODER)
    model.reset_adapter(DECODER)
    assert not any(module.merged_products for module in model.router.layers)
