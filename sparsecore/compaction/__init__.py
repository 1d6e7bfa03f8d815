"""Removes dead units exactly: see `compacted`."""

from .compacted import Compacted, compact

__all__ = ["Compacted", "compact"]
