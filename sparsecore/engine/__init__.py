"""One engine for every step: what it launches, what it feeds, how it chooses."""

from .auto import launch
from .engine import (
    ENGINES,
    AbstractStep,
    Engine,
    EngineError,
    Timeline,
    Way,
    check_engine,
    compiled_call,
    plainly,
    stamp,
    structure,
)
from .evaluation import Evaluation
from .feeds import Feed, Given, Loaded, Resident, feed_of
from .layout import Layout, capturable_, state_kept, takes_images
from .own_loop import TrainStep, graphed
from .training_step import TrainingStep

__all__ = [
    "ENGINES",
    "AbstractStep",
    "Engine",
    "EngineError",
    "Evaluation",
    "Feed",
    "Given",
    "Layout",
    "Loaded",
    "Resident",
    "Timeline",
    "TrainStep",
    "TrainingStep",
    "Way",
    "capturable_",
    "check_engine",
    "compiled_call",
    "feed_of",
    "graphed",
    "launch",
    "plainly",
    "stamp",
    "state_kept",
    "structure",
    "takes_images",
]
