"""Searches: values with one signature, `search(model, batches, *, sparsity) -> Ticket`."""

from .concrete import ConcreteSearch
from .continuous import ContinuousSparsification
from .dynamic import SET, GradualMagnitude, RigL
from .edge_popup import EdgePopup
from .iterative import Iterative
from .joint import JointSearch
from .one_shot import OneShot
from .protocol import Search, SearchError, Watch
from .rewinding import Rewinding
from .strong import StrongSearch

__all__ = [
    "SET",
    "ConcreteSearch",
    "ContinuousSparsification",
    "EdgePopup",
    "GradualMagnitude",
    "Iterative",
    "JointSearch",
    "OneShot",
    "Rewinding",
    "RigL",
    "Search",
    "SearchError",
    "StrongSearch",
    "Watch",
]
