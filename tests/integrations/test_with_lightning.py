"""lightning: its Trainer, its checkpoints."""

from pathlib import Path

import pytest
import torch
from helpers import mlp, randn
from integration import check_dense, check_zeros, moved, package, snapshot, ticketed
from torch import Tensor, nn
from torch.nn import functional as F

import sparsecore as sc

lightning = package("lightning")

X, Y = randn(32, 12), torch.arange(32) % 4


def loader() -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(list(zip(X, Y, strict=True)), 8)


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-2, weight_decay=0.1)


def fit(module: nn.Module, folder: Path, epochs: int = 2, **options) -> None:
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, default_root_dir=folder,
        enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip
    trainer.fit(module, loader())
    trainer.save_checkpoint(folder / "last.ckpt", weights_only=True)


@pytest.mark.parametrize("search", ["magnitude", "snip", "joint"])
def test_its_trainer_keeps_pruned_weights_zero(search: str, tmp_path: Path) -> None:
    module = Module()
    masks = ticketed(module, loader(), search)
    before = snapshot(module)
    fit(module, tmp_path, enable_checkpointing=False)
    moved(before, module)
    check_zeros(module, masks)
    again = sc.sparsify_(Module())
    again.load_state_dict(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"])
    torch.testing.assert_close(again(X), module(X))
    check_zeros(again, masks)
    check_dense(module, lambda model: model(X))


def test_a_plan_is_trained_by_it(tmp_path: Path) -> None:
    module = Module()
    masks = ticketed(module, loader())
    sc.plan_(module, "csr", X)
    fit(module, tmp_path, enable_checkpointing=False)
    check_zeros(sc.densify_(module), masks)


def test_gradients_are_gathered_and_clipped(tmp_path: Path) -> None:
    module = Module()
    masks = ticketed(module, loader())
    fit(
        module, tmp_path, enable_checkpointing=False, accumulate_grad_batches=2,
        gradient_clip_val=0.5, precision="bf16-mixed",
    )  # fmt: skip
    check_zeros(module, masks)
