"""Layers under gates: one file a strategy, `layers` chooses among them."""
