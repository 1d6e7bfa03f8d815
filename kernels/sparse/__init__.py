"""Layers under a decided mask: one operator (`layers`) over the formats of kept weights."""
