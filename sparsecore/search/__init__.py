"""Searches: values with one signature, `search(model, batches, *, sparsity) -> Ticket`."""

from .concrete import ConcreteSearch, SearchError
from .one_shot import OneShot

__all__ = ["ConcreteSearch", "OneShot", "SearchError"]
