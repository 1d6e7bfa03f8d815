"""Searches: values with one signature, `search(model, batches, *, sparsity) -> Ticket`."""

from .concrete import ConcreteSearch
from .joint import JointSearch
from .one_shot import OneShot
from .protocol import Search, SearchError, Watch
from .rewinding import Rewinding
from .strong import StrongSearch

__all__ = [
    "ConcreteSearch",
    "JointSearch",
    "OneShot",
    "Rewinding",
    "Search",
    "SearchError",
    "StrongSearch",
    "Watch",
]
