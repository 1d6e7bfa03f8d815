"""peft: adapters beside masked layers, trained and merged."""

from pathlib import Path

import pytest
import torch
from helpers import seeded
from integration import check_dense, check_zeros, package, ticketed
from torch import Tensor, nn

import sparsecore as sc

peft = package("peft")
hf = package("transformers")

TOKENS = torch.randint(3, 60, (4, 6), generator=torch.Generator().manual_seed(0))
BATCH = {"input_ids": TOKENS, "labels": TOKENS}
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}


def llama() -> nn.Module:
    config = hf.LlamaConfig(
        **SMALL, vocab_size=60, num_key_value_heads=2, max_position_embeddings=32
    )
    return seeded(lambda: hf.LlamaForCausalLM(config))


def run(model: nn.Module) -> Tensor:
    return model(**BATCH).logits


def adapted(model: nn.Module) -> nn.Module:
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    torch.manual_seed(0)
    return peft.get_peft_model(model, config)


def trained(model: nn.Module) -> nn.Module:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-1)
    for _ in range(3):
        optimizer.zero_grad()
        model(**BATCH).loss.backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("search", ["magnitude", "snip", "joint"])
def test_adapters_train_beside_a_ticket(search: str) -> None:
    model = llama()
    masks = ticketed(model, [BATCH], search)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model = adapted(model)
    start = run(model.eval())
    trained(model.train())
    assert not torch.equal(run(model.eval()), start)
    base = model.unload()
    check_zeros(base, masks)
    for name, value in before.items():
        assert torch.equal(base.get_parameter(name), value), name
    check_dense(base, run)


def test_a_merged_adapter_is_in_the_weights() -> None:
    """Merging into a dense copy of the ticket gives the very function of ticket and adapter."""
    model = llama()
    ticketed(model, [BATCH])
    model = trained(adapted(sc.densify_(model)))
    with torch.no_grad():
        expected = run(model.eval())
        merged = model.merge_and_unload()
        torch.testing.assert_close(run(merged), expected, rtol=1e-4, atol=1e-5)


def test_merging_into_masked_layers_keeps_the_ticket() -> None:
    """The adapter is added to kept weights; pruned ones stay zero, so the function is that of the masked sum."""
    model = llama()
    masks = ticketed(model, [BATCH])
    model = trained(adapted(model))
    expected = {}
    for name, mask in masks.items():
        layer = model.base_model.model.get_submodule(name)
        weight = layer.base_layer.weight if hasattr(layer, "base_layer") else layer.weight
        delta = layer.get_delta_weight("default") if hasattr(layer, "base_layer") else 0.0
        expected[name] = ((weight + delta) * mask).detach()
    merged = model.merge_and_unload().eval()
    check_zeros(merged, masks)
    for name, weight in expected.items():
        torch.testing.assert_close(merged.get_submodule(name).weight.detach(), weight)
    check_dense(merged, run)


def test_adapters_go_through_a_file(tmp_path: Path) -> None:
    model = llama()
    ticketed(model, [BATCH])
    model = trained(adapted(model))
    with torch.no_grad():
        expected = run(model.eval())
    model.save_pretrained(str(tmp_path))
    base = llama()
    ticketed(base, [BATCH])
    again = peft.PeftModel.from_pretrained(base, str(tmp_path)).eval()
    with torch.no_grad():
        torch.testing.assert_close(run(again), expected)
