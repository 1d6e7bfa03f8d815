"""SynFlow on inputs of all kinds: of a batch it takes how a sample looks, and needs nothing more."""

from typing import Any

import pytest
import torch
from helpers import randn, seeded
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import sparsecore as sc
from sparsecore.scores import synflow

LABELS = torch.tensor([0, 2, 1, 0])


class Translating(nn.Module):
    """Makes a decoder's inputs of the labels, as T5 does."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.encode, self.out = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        if labels is None:
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        state = self.encode(self.embed(input_ids)).mean(1, keepdim=True)
        logits = self.out(self.embed(labels) + state)
        return {"loss": F.cross_entropy(logits.mT, labels), "logits": logits}


class Judging(nn.Module):
    """Cannot be called without labels, and has no embedding."""

    def __init__(self, *, gives: str = "dict") -> None:
        super().__init__()
        self.out, self.gives = nn.Linear(4, 3), gives

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        logits = self.out(x)
        loss = F.cross_entropy(logits, labels)
        return {
            "dict": {"loss": loss, "logits": logits},
            "tuple": (loss, logits),
            "loss": loss,
        }[self.gives]


class OfImages(nn.Module):
    """A list of images of several sizes, as torchvision's detectors take it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)

    def forward(self, images: list[Tensor]) -> Tensor:
        return self.out(torch.stack([self.conv(x[None]).mean((0, 2, 3)) for x in images]))


class OfSequences(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.out = nn.LSTM(4, 6), nn.Linear(6, 3)

    def forward(self, x: PackedSequence | Tensor) -> Tensor:
        return self.out(self.rnn(x)[1][0][0])


def found(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    return synflow(sc.sparsify_(model), [batch], 0)


def test_labels_that_a_forward_needs() -> None:
    tokens = torch.arange(20).view(4, 5) % 5
    values = found(seeded(Translating), {"input_ids": tokens, "labels": tokens[:, :2]})
    assert values["out"].sum() == pytest.approx(1) and bool(values["encode"].all())
    x = randn(4, 4)
    alone = found(nn.Sequential(seeded(Judging).out), (x, LABELS))["0"]
    for gives in ("dict", "tuple"):
        values = found(seeded(lambda g=gives: Judging(gives=g)), {"x": x, "labels": LABELS})
        assert torch.allclose(values["out"], alone)
    with pytest.raises(ValueError, match=r"expected inputs that .*Judging.forward takes"):
        found(seeded(lambda: Judging(gives="loss")), {"x": x, "labels": LABELS})


@pytest.mark.parametrize("nest", [list, tuple])
def test_a_list_of_images(nest: type) -> None:
    sizes = [(5, 6), (7, 5), (5, 6)]
    images = nest(randn(3, *size) for size in sizes)
    one = found(seeded(OfImages), ([images[0]], LABELS[:1]))
    for name, values in found(seeded(OfImages), (images, LABELS[:3])).items():
        assert torch.allclose(values, one[name])


def test_packed_sequences() -> None:
    packed = pack_sequence([randn(n, 4) for n in (5, 3, 2)])
    values = found(seeded(OfSequences), (packed, LABELS[:3]))
    assert values["out"].sum() == pytest.approx(1) and bool(values["rnn.ih_l0"].any())
