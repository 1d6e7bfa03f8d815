"""Examples that plans are measured with: inputs one by one or a batch's dict, outputs of any kind."""

from dataclasses import dataclass

import pytest
import torch
from helpers import rand, seeded
from torch import Tensor, nn
from torch.nn import functional as F

import sparsecore as sc
from sparsecore import steptime
from sparsecore.outputs import tensors_in


@dataclass
class Output:
    loss: Tensor | None
    logits: Tensor


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.mid, self.head = nn.Embedding(20, 16), nn.Linear(16, 32), nn.Linear(32, 4)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> Output:
        seen = self.emb(input_ids) * attention_mask[..., None]
        logits = self.head(self.mid(seen).relu().mean(1))
        return Output(None if labels is None else F.cross_entropy(logits, labels), logits)


IDS = torch.arange(40).view(8, 5) % 20
BATCH = {"input_ids": IDS, "attention_mask": torch.ones(8, 5), "labels": torch.arange(8) % 4}


def masked() -> nn.Module:
    model = sc.sparsify_(seeded(Tokens))
    for layer in sc.sparse_layers(model).values():
        layer.set_mask_(rand(*layer.weight_shape) < 0.1)
    return model


@pytest.mark.parametrize("example", [(BATCH,), (IDS, BATCH["attention_mask"])])
def test_a_step_is_measured_backward_too(example: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: seen.append(1) or grad(*a, **k))
    steptime.step_time(masked(), example, 0.0)
    assert seen
    model = sc.plan_(masked(), "auto", *example)
    assert all("first use" not in row.choice.reason for row in sc.report(model))
    torch.testing.assert_close(model(**BATCH).logits, masked()(**BATCH).logits)


def test_tensors_of_outputs() -> None:
    a, b = torch.zeros(1), torch.ones(2)
    for output in ((a, [b]), {"x": a, "y": (b, None)}, Output(a, b), [Output(None, a), b]):
        assert all(x is y for x, y in zip(tensors_in(output), (a, b), strict=True))


def test_what_takes_tensors_alone_says_so() -> None:
    with pytest.raises(ValueError, match="TrainStep takes batches of any kind"):
        sc.graphed(masked(), BATCH)  # pyright: ignore
    with pytest.raises(ValueError, match="compact: expected the model's inputs one by one"):
        sc.compact(masked(), BATCH)  # pyright: ignore
