"""Triton as kernels are written in it, or where it does not import (macOS, Windows) a stand-in that nothing runs in.

Files that define kernels take Triton from here, so that they import everywhere.  Without it everything is plain
PyTorch, and a kernel that is launched all the same says in one line what is missing.
"""

from typing import Any, NoReturn

MISSING: str | None = None  # why no kernel runs here, and what to do about it

try:
    import triton
    import triton.language as tl
    from triton import OutOfResources, knobs
    from triton.language.extra import libdevice
    from triton.runtime import JITFunction, driver
except ImportError as error:
    MISSING = (
        f"needs Triton, which does not import here ({error}); on Linux: pip install 'triton>=3.6'"
    )

    class _Absent(Exception):
        """What Triton's classes are here: nothing is an instance, and nobody raises it."""

    class _Name:
        """Every name, decorator, constant and kernel; false, as no option is on."""

        def __getattr__(self, name: str) -> "_Name":
            if name.startswith("__"):  # Python's own questions
                raise AttributeError(name)
            return self

        def __call__(self, *args: Any, **kwargs: Any) -> "_Name":
            return self

        def __bool__(self) -> bool:
            return False

        def __getitem__(self, grid: Any) -> NoReturn:
            raise ModuleNotFoundError(f"a kernel {MISSING}", name="triton")

    JITFunction: Any = _Absent
    OutOfResources: Any = _Absent
    triton: Any = _Name()
    tl: Any = triton
    knobs: Any = triton
    libdevice: Any = triton
    driver: Any = triton

__all__ = [
    "MISSING",
    "JITFunction",
    "OutOfResources",
    "driver",
    "knobs",
    "libdevice",
    "tl",
    "triton",
]
