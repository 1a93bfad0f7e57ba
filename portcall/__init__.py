"""portcall: port one model to every device format, prove that it still computes the same, and measure what it costs.

The verbs (``export``, ``verify``, ``inspect``, ``debug``, ``benchmark``, ``compare``, ``profile``, ``report``,
``calibrate``, ``doctor``, ``load``) load when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from portcall.api import (
        benchmark,
        calibrate,
        compare,
        debug,
        doctor,
        export,
        inspect,
        load,
        profile,
        report,
        verify,
    )

__all__ = [
    "__version__",
    "benchmark",
    "calibrate",
    "compare",
    "debug",
    "doctor",
    "export",
    "inspect",
    "load",
    "profile",
    "report",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        import portcall.api

        return getattr(portcall.api, name)
    raise AttributeError(f"module 'portcall' has no attribute {name!r}")
