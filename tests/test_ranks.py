"""Several ranks: the same masks go on, whatever would leave ranks unequal stops before anything changes."""

import os
import socket
from pathlib import Path

import pytest
import torch
from helpers import rand, randn, seeded
from torch import distributed, multiprocessing, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import sparsecore as sc


def work(rank: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", rank=rank, world_size=2)
    model = sc.sparsify_(
        seeded(lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)))
    )
    layers = sc.sparse_layers(model)
    for layer in layers.values():
        layer.set_mask_(rand(*layer.weight_shape) < 0.4)
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(parallel.parameters(), 0.1, momentum=0.9)
    for index in range(4):
        if index == 2:  # while the reducer's hooks hang on the parameters
            sc.remask_(
                model, {n: la.pattern.mask.roll(1, 0) for n, la in layers.items()}, optimizer
            )
        optimizer.zero_grad()
        F.cross_entropy(parallel(randn(16, 8, seed=rank)), torch.arange(16) % 4).backward()
        optimizer.step()
    weights = torch.cat([layer.weight.detach().flatten() for layer in layers.values()])
    both = [torch.zeros_like(weights) for _ in range(2)]
    distributed.all_gather(both, weights)
    refused = []
    for what in (
        lambda: sc.remask_(model, {"0": rand(16, 8, seed=rank) < 0.5}),
        lambda: sc.plan_(model, "state"),
        lambda: sc.OneShot(sc.scores.magnitude)(
            model, [(randn(4, 8), torch.arange(4))], sparsity=0.5
        ),
    ):
        try:
            what()
        except ValueError as error:
            refused.append(str(error))
    sc.plan_(model, "mask")
    distributed.destroy_process_group()
    found = torch.equal(*both), bool(weights.any()), *("rank" in text for text in refused)
    (Path(folder) / str(rank)).write_text(repr(found))


@pytest.mark.slow
def test_two_ranks(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(work, (port, str(tmp_path)), nprocs=2)  # pyright: ignore
    told = {(tmp_path / str(rank)).read_text() for rank in range(2)}
    assert told == {repr((True, True, True, True, True))}
