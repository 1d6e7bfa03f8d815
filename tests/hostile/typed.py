"""Command lines of hostile options, each given to the command line itself."""

import shutil
from pathlib import Path

from .judge import command
from .options import argv, prepare
from .sandbox import Run


def before_typing(cache: Path) -> Run:
    """Makes the files that command lines name, in the cache."""

    def run(seed: int, folder: Path) -> str:
        prepare(folder)
        shutil.copytree(folder, cache / "options")
        return "fine"

    return run


def typing(cache: Path) -> Run:
    """A command line, and how it ends."""

    def run(seed: int, folder: Path) -> str:
        shutil.copytree(cache / "options", folder, dirs_exist_ok=True)
        return command(argv(seed, folder))

    return run
