"""The errors that portcall raises: one message says what was wrong, what was found and what to do."""

from __future__ import annotations


class PortcallError(Exception):
    """Base of every error that portcall raises on purpose; *fix* says what to do about it."""

    kind = "error"

    def __init__(self, message: str, fix: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.message}. {self.fix}" if self.fix else self.message


class BadInput(PortcallError):
    """What the user gave cannot be used; nothing was run (exit code 2)."""

    kind = "bad_input"


class UnsupportedError(PortcallError):
    """This model, precision or format is not supported by this backend (names what and where)."""

    kind = "unsupported"


class UnavailableError(PortcallError):
    """Something this machine lacks: a runtime, a library, a device."""

    kind = "unavailable"


class CellFailed(PortcallError):
    """One cell of the matrix went wrong while it ran."""

    kind = "failed"


class VerificationFailed(CellFailed):
    """An artifact does not compute what its source computes, or not in the arithmetic asked for (exit code 1)."""

    kind = "verification"


class BudgetBroken(CellFailed):
    """What was measured does not keep to a budget that was asked for (exit code 1)."""

    kind = "budget"


_KINDS = {
    cls.kind: cls
    for cls in (
        PortcallError,
        BadInput,
        UnsupportedError,
        UnavailableError,
        CellFailed,
        VerificationFailed,
        BudgetBroken,
    )
}


def error_from_kind(kind: str, message: str, fix: str) -> PortcallError:
    """Return the error that a worker reported as *kind*, rebuilt on this side."""
    return _KINDS.get(kind, PortcallError)(message, fix)
