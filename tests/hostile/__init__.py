"""Hostile input, kind by kind: `python -m tests.hostile --count 2000 --seed 0`.

A kind is a function `run(seed, folder) -> "fine" | "refused"` that draws one input from its seed, gives it to a command
or a call in that folder, and raises `judge.Failure` (or anything else) where a promise of the README is broken: one
line, exit code 2, nothing lost.  Each input has a process of its own (`sandbox`).
"""

import os

for _name in (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
):  # before torch is imported: two tries share the cores
    os.environ.setdefault(_name, "1")
