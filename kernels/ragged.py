"""Rows of different lengths, stored one after another: where each begins, and pieces of them of one size."""

import torch
from torch import Tensor


def starts_of(counts: Tensor) -> Tensor:
    """int32 [rows + 1]: where each row of so many entries begins, and where the last one ends."""
    starts = torch.zeros(len(counts) + 1, dtype=torch.int32, device=counts.device)
    starts[1:] = counts.cumsum(0)
    return starts


def longest_first(counts: Tensor) -> Tensor:
    """int32 [rows]: the rows by length, so that the last programs to start are short."""
    return torch.argsort(counts, descending=True, stable=True).int()


def pieces_of(starts: Tensor, size: int) -> Tensor:
    """int32 [pieces, 2]: (row, first entry) of every `size` entries of each row."""
    counts = -(-starts.diff() // size)
    row = torch.arange(len(counts), device=starts.device).repeat_interleave(counts)
    turn = torch.arange(len(row), device=starts.device) - (counts.cumsum(0) - counts)[row]
    return torch.stack((row, starts[row] + turn * size), 1).int()
