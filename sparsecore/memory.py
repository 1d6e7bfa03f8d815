"""How much memory is left, on a machine and under the limits that a process has; what needs more is refused."""

import os
from pathlib import Path

import torch

_PLENTY = 2**63 - 1


def free_bytes(device: torch.device | str = "cpu") -> int:
    """What can still be allocated there: on the CPU the least of what the machine, control groups and the process's
    own limit leave, swap included."""
    device = torch.device(device)
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return max(0, min(_of_machine(), _of_control_groups(), _of_process()))


def require_bytes(
    what: str,
    needed: float,
    mend: str,
    device: torch.device | str = "cpu",
    of: str = "",
    *,
    free: int | None = None,
) -> None:
    """Errors: ValueError, with both numbers, where `what` needs more bytes than `device` has left.

    Args:
        of: what the bytes are made of, in words.
        free: how many were left; None: as many as are now.
    """
    free = free_bytes(device) if free is None else free
    if needed > free:
        made = f" ({of})" if of else ""
        raise ValueError(
            f"{what}: expected at most the {gib(free)} of memory that are free on {device}, got at least "
            f"{gib(needed)}{made}; {mend}"
        )


def gib(count: float) -> str:
    """Bytes as text."""
    return f"{count / 2**30:,.1f} GiB"


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, ValueError):  # another system, or not for everyone
        return ""


def _of_machine() -> int:
    lines = (line.split() for line in _read(Path("/proc/meminfo")).splitlines())
    found = {words[0].rstrip(":"): int(words[1]) << 10 for words in lines if len(words) > 1}
    if "MemAvailable" in found:
        return found["MemAvailable"] + found.get("SwapFree", 0)
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # Windows says it elsewhere
        return _PLENTY


def _of_control_groups(root: Path = Path("/sys/fs/cgroup"), own: str | None = None) -> int:
    """What limits on the process's group, and on all groups around it, leave; what may be reclaimed counts as left."""
    least = _PLENTY
    for line in (_read(Path("/proc/self/cgroup")) if own is None else own).splitlines():
        _, kinds, name = line.split(":", 2)
        if kinds == "":  # version 2
            base, most, used, reclaimed = root, "memory.max", "memory.current", "inactive_file"
        elif "memory" in kinds.split(","):
            base, most, used = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            reclaimed = "total_inactive_file"
        else:
            continue
        group = base / name.lstrip("/")
        # Within a container the group's own name may not be there, and its limit lies at the root.
        for folder in (f for f in (group, *group.parents) if f == base or base in f.parents):
            limit, now = _read(folder / most).strip(), _read(folder / used).strip()
            if limit.isdigit() and now.isdigit():
                stat = dict(
                    line.split(" ", 1) for line in _read(folder / "memory.stat").splitlines()
                )
                least = min(least, int(limit) - int(now) + int(stat.get(reclaimed, 0)))
    return least


def _of_process() -> int:
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    except (ImportError, OSError):  # not on Windows
        return _PLENTY
    if limit == resource.RLIM_INFINITY:
        return _PLENTY
    pages = _read(Path("/proc/self/statm")).split()
    return limit - (int(pages[0]) * os.sysconf("SC_PAGE_SIZE") if pages else 0)
