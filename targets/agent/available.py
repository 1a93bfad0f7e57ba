"""How much memory a process may still take here: what the system has free, and what the cgroups leave."""

from __future__ import annotations

from pathlib import Path
from typing import Optional

from portcall.targets.agent.cgroups import own_folders, read
from portcall.targets.agent.fingerprint import _ROOT, _meminfo, _number


def available_bytes(root: Path = _ROOT) -> Optional[int]:
    """Return the memory that can be taken without swapping or being killed; None where the system does not tell.

    The least of MemAvailable in /proc/meminfo and, for every cgroup of this process and its parents (v1 and v2), its
    limit minus its use; file cache that the kernel can drop does not count as used. root: where /proc and /sys are.
    """
    found = [_meminfo(root).get("MemAvailable")]
    for folder in own_folders(root, ""):
        found.append(_left(folder, "memory.max", "memory.current", "inactive_file"))
    for folder in own_folders(root, "memory"):
        found.append(_left(folder, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"))
    return min((value for value in found if value is not None), default=None)


def _left(folder: Path, limit_file: str, usage_file: str, cache_key: str) -> Optional[int]:
    limit, usage = _number(read(folder, limit_file)), _number(read(folder, usage_file))
    if limit is None or usage is None or limit >= 1 << 62:  # v1 says "no limit" with about 2^63
        return None
    stat = (line.split() for line in (read(folder, "memory.stat") or "").splitlines())
    cache = next((int(parts[1]) for parts in stat if len(parts) == 2 and parts[0] == cache_key), 0)
    return max(0, limit - max(0, usage - cache))
