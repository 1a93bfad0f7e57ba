"""Files in the system's page cache: how much of them, and how to drop them."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import sys
from typing import Optional, Sequence, Tuple

_DROP_CACHES = "/proc/sys/vm/drop_caches"


def drop(files: Sequence[str]) -> Tuple[Optional[str], Optional[str]]:
    """Drop *files* from the page cache by ``posix_fadvise(POSIX_FADV_DONTNEED)``; return (method, reason).

    Needs no privileges. Pages that are dirty are written first; pages that another process has mapped stay. method is
    None, and the reason says why, where this system has no such call or a file cannot be opened.
    """
    if not hasattr(os, "posix_fadvise"):
        return None, f"{sys.platform} has no posix_fadvise"
    for path in files:
        try:
            fd = os.open(path, os.O_RDONLY)
        except OSError as error:
            return None, f"cannot open {path}: {error.strerror}"
        try:
            with contextlib.suppress(OSError):  # a read-only file system has nothing dirty
                os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            return None, f"posix_fadvise failed on {path}: {error.strerror}"
        finally:
            os.close(fd)
    return "posix_fadvise", None


def drop_all() -> Tuple[Optional[str], Optional[str]]:
    """Drop the whole system's clean page cache through /proc/sys/vm/drop_caches; return (method, reason).

    It needs root, and slows whatever else runs here. Source: Linux, Documentation/admin-guide/sysctl/vm.rst.
    """
    try:
        os.sync()
        with open(_DROP_CACHES, "w") as stream:
            stream.write("1\n")
    except OSError as error:
        return None, f"cannot write {_DROP_CACHES}: {error.strerror}"
    return "drop_caches", None


def resident_bytes(files: Sequence[str]) -> Optional[int]:
    """Return how many bytes of *files* are in the page cache, in whole pages, by ``mincore``; None where not told.

    Only files of this user's own or that it may write count: of others Linux says that all is there (mincore(2)).
    """
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
    ]  # fmt: skip
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    pages, told = 0, False
    for path in files:
        try:
            fd = os.open(path, os.O_RDONLY)
        except OSError:
            continue
        try:
            status = os.fstat(fd)
            if not status.st_size or not (status.st_uid == os.geteuid() or os.access(path, os.W_OK)):
                continue
            address = libc.mmap(None, status.st_size, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
            if address in (None, ctypes.c_void_p(-1).value):
                continue
            vector = (ctypes.c_ubyte * (-(-status.st_size // mmap.PAGESIZE)))()
            if libc.mincore(address, status.st_size, vector) == 0:
                pages += sum(page & 1 for page in bytes(vector))
                told = True
            libc.munmap(address, status.st_size)
        finally:
            os.close(fd)
    return pages * mmap.PAGESIZE if told else None
