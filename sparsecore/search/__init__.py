"""Searches: values with one signature, `search(model, batches, *, sparsity) -> Ticket`."""

from .concrete import ConcreteSearch
from .continuous import ContinuousSparsification
from .edge_popup import EdgePopup
from .iterative import Iterative
from .joint import JointSearch
from .one_shot import OneShot
from .protocol import Search, SearchError, Watch
from .rewinding import Rewinding
from .strong import StrongSearch

__all__ = [
    "ConcreteSearch",
    "ContinuousSparsification",
    "EdgePopup",
    "Iterative",
    "JointSearch",
    "OneShot",
    "Rewinding",
    "Search",
    "SearchError",
    "StrongSearch",
    "Watch",
]
