"""Other packages draw from the global generator as they like: every test has it to itself."""

import warnings
from collections.abc import Iterator

import pytest
import torch

import sparsecore as sc


@pytest.fixture(autouse=True)
def global_generator_untouched() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        warnings.simplefilter("ignore", sc.SparsityWarning)  # such small layers lose units
        yield
