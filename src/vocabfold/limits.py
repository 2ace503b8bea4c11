"""What this process may use of its machine."""

from __future__ import annotations

import os
from pathlib import Path

CONTROL_GROUP = Path("/sys/fs/cgroup")


def _control_group_limit(file_name: str) -> list[str]:
    try:
        return (CONTROL_GROUP / file_name).read_text().split()
    except OSError:
        return []


def usable_cores() -> int:
    """Cores that this process may use, a container's quota included; at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    match _control_group_limit("cpu.max"):
        case [quota, period] if quota.isdigit():
            cores = min(cores, round(int(quota) / int(period)))
    return max(cores, 1)


def memory_bytes() -> int:
    """Bytes of physical memory, or a container's limit where that is less."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    match _control_group_limit("memory.max"):
        case [limit] if limit.isdigit():
            return min(physical, int(limit))
    return physical
