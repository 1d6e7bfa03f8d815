"""Removes dead units exactly: `tracing` reads a model's graph, `walk` follows units through it, `groups` decides."""

from .compacted import Compacted, compact

__all__ = ["Compacted", "compact"]
