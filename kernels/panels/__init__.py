"""Products with panels: groups of rows that keep the same columns (K7)."""
