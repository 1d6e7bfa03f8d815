"""Searches: values with one signature, `search(model, batches, *, sparsity) -> Ticket`."""

from .concrete import ConcreteSearch
from .one_shot import OneShot
from .protocol import Search, SearchError, Watch

__all__ = ["ConcreteSearch", "OneShot", "Search", "SearchError", "Watch"]
