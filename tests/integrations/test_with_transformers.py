"""transformers: Trainer, save_pretrained, tied heads and encoders with decoders."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import randn, seeded
from integration import (
    check_dense,
    check_state,
    check_zeros,
    masks_of,
    moved,
    package,
    snapshot,
    ticketed,
)
from torch import Tensor, nn

import sparsecore as sc

hf = package("transformers")

V, B, T = 60, 4, 6
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
TOKENS = torch.randint(3, V, (B, T), generator=torch.Generator().manual_seed(0))
IMAGES = randn(B, 3, 16, 16)
WORDS = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}
CLASSES = torch.arange(B) % 3


def vit() -> nn.Module:
    config = hf.ViTConfig(**SMALL, image_size=16, patch_size=8, num_labels=3)
    return hf.ViTForImageClassification(config)


def bert() -> nn.Module:
    return hf.BertForSequenceClassification(hf.BertConfig(**SMALL, vocab_size=V, num_labels=3))


def tokens() -> nn.Module:
    return hf.BertForTokenClassification(hf.BertConfig(**SMALL, vocab_size=V, num_labels=3))


def masked_lm() -> nn.Module:
    return hf.BertForMaskedLM(hf.BertConfig(**SMALL, vocab_size=V))


def gpt2() -> nn.Module:
    config = hf.GPT2Config(
        vocab_size=V, n_positions=16, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    )
    return hf.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    config = hf.LlamaConfig(
        **SMALL, vocab_size=V, num_key_value_heads=2, max_position_embeddings=32
    )
    return hf.LlamaForCausalLM(config)


def t5() -> nn.Module:
    config = hf.T5Config(
        vocab_size=V, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
        decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return hf.T5ForConditionalGeneration(config)


def whisper() -> nn.Module:
    config = hf.WhisperConfig(
        vocab_size=V, num_mel_bins=8, d_model=32, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48,
        max_source_positions=10, max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1,
    )  # fmt: skip
    return hf.WhisperForConditionalGeneration(config)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor]]] = {
    "vit": (vit, {"pixel_values": IMAGES, "labels": CLASSES}),
    "bert": (bert, {**WORDS, "labels": CLASSES}),
    "tokens": (tokens, {**WORDS, "labels": TOKENS % 3}),
    "masked-lm": (masked_lm, {**WORDS, "labels": TOKENS}),
    "gpt2": (gpt2, {**WORDS, "labels": TOKENS}),
    "llama": (llama, {**WORDS, "labels": TOKENS}),
    "t5": (t5, {**WORDS, "labels": TOKENS}),
    "whisper": (whisper, {"input_features": randn(B, 8, 20), "labels": TOKENS}),
}
each_network = pytest.mark.parametrize("name", NETWORKS)


def network(name: str) -> tuple[nn.Module, dict[str, Tensor], Callable[[nn.Module], Tensor]]:
    make, batch = NETWORKS[name]
    return seeded(make), batch, lambda model: model(**batch).logits


class Samples(torch.utils.data.Dataset):
    """The batch's samples, one by one, as a Trainer collates them."""

    def __init__(self, batch: dict[str, Tensor]) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return B

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {key: value[i] for key, value in self.batch.items()}


def train(model: nn.Module, batch: dict[str, Tensor], folder: Path, **options: Any) -> None:
    arguments = hf.TrainingArguments(
        str(folder), max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2, weight_decay=0.1,
        report_to=[], use_cpu=True, logging_strategy="no", disable_tqdm=True, **options,
    )  # fmt: skip
    hf.Trainer(model, arguments, train_dataset=Samples(batch)).train()


@pytest.mark.parametrize("search", ["magnitude", "snip", "joint"])
@each_network
def test_a_ticket_is_found_with_the_models_own_loss(name: str, search: str) -> None:
    model, batch, run = network(name)
    loader = torch.utils.data.DataLoader(Samples(batch), batch_size=2)
    ticketed(model, loader, search)
    check_dense(model, run)


@each_network
def test_trainer_keeps_pruned_weights_zero(name: str, tmp_path: Path) -> None:
    model, batch, run = network(name)
    masks = ticketed(model, [batch])
    before = snapshot(model)
    train(model, batch, tmp_path, save_strategy="no")
    moved(before, model)
    check_zeros(model, masks)
    check_dense(model, run)


@each_network
def test_files(name: str, tmp_path: Path) -> None:
    model, batch, run = network(name)
    masks = ticketed(model, [batch])
    check_state(model, lambda: network(name)[0], run, tmp_path / "state.pt")
    with torch.no_grad():
        expected = run(model.eval())
    model.save_pretrained(tmp_path)  # safetensors
    plain = type(model).from_pretrained(tmp_path).eval()  # as somebody who does not know of masks
    with torch.no_grad():
        torch.testing.assert_close(run(plain), expected)
    for name_of, mask in masks.items():
        assert torch.all(plain.get_submodule(name_of).weight[~mask] == 0)
    dense = check_dense(model, run)
    dense.save_pretrained(tmp_path / "dense")
    again = type(model).from_pretrained(tmp_path / "dense").eval()
    with torch.no_grad():
        torch.testing.assert_close(run(again), expected)


def test_a_trainers_checkpoint_goes_on(tmp_path: Path) -> None:
    model, batch, _ = network("gpt2")
    masks = ticketed(model, [batch])
    train(model, batch, tmp_path, save_steps=2)
    again, _, _ = network("gpt2")
    ticketed(again, [batch])
    arguments = hf.TrainingArguments(
        str(tmp_path), max_steps=6, per_device_train_batch_size=2, use_cpu=True, report_to=[],
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = hf.Trainer(again, arguments, train_dataset=Samples(batch))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    check_zeros(again, masks)


@pytest.mark.parametrize("name", ["gpt2", "t5", "whisper", "masked-lm"])
def test_a_tied_head_has_the_masks_of_its_embedding(name: str) -> None:
    model, batch, _ = network(name)
    sc.sparsify_(model, lambda _, module: isinstance(module, (nn.Linear, nn.Embedding)))
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert head.weight is embedding.weight
    ticket = sc.OneShot(sc.scores.magnitude)(model, [batch], sparsity=0.5)
    ticket.apply_(model)
    assert head.weight is embedding.weight
    masks = masks_of(model)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    check_zeros(model, masks)
    assert head.weight is embedding.weight
    assert (head.weight == 0).any()


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_generation(name: str) -> None:
    model, batch, _ = network(name)
    ticketed(model, [batch])
    model.eval()
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    before = model.generate(batch["input_ids"], **options)
    assert torch.equal(sc.densify_(model).generate(batch["input_ids"], **options), before)


PLANNED = [
    ("gpt2", "state"),  # its Conv1D layers have no other
    *((name, plan) for name in ("vit", "bert", "llama") for plan in ("state", "csr", "compact")),
]


@pytest.mark.parametrize(("name", "plan"), PLANNED)
def test_plans(name: str, plan: str) -> None:
    model, batch, run = network(name)
    ticketed(model, [batch], filter_fn=["!*wte", "!lm_head"])
    model.eval()
    expected = run(model)
    sc.plan_(model, plan)
    torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-5)
    model(**batch).loss.backward()


def test_a_plan_of_a_shared_weight_is_refused_before_anything_changes() -> None:
    model, batch, run = network("gpt2")
    masks = ticketed(model, [batch])
    expected = run(model.eval())
    with pytest.raises(ValueError, match=r"shared by transformer\.wte"):
        sc.plan_(model, "state")
    assert torch.equal(run(model), expected)
    check_zeros(model, masks)
