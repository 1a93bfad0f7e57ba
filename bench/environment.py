"""What differs between the environments of two measurements: the machine (then they are incomparable) and the stack."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Row:
    """One fact that differs: its key ("." between the parts) and both values; None where a side does not have it."""

    key: str
    a: Any
    b: Any

    def to_json(self) -> dict[str, Any]:
        return {"key": self.key, "a": self.a, "b": self.b}

    def __str__(self) -> str:
        return f"{self.key}: {_shown(self.a)} -> {_shown(self.b)}"


@dataclass(frozen=True, slots=True)
class Difference:
    """machine: any row makes two measurements incomparable. stack: may differ, and is printed."""

    machine: tuple[Row, ...]
    stack: tuple[Row, ...]

    @property
    def is_comparable(self) -> bool:
        return not self.machine

    def to_json(self) -> dict[str, Any]:
        return {
            "comparable": self.is_comparable,
            "machine": [row.to_json() for row in self.machine],
            "stack": [row.to_json() for row in self.stack],
        }


def difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> Difference:
    """Return how two environments differ: each the key "environment" of a bench result.

    The reasons for what is absent do not count, nor does the state of the moment. Two machines without a row have the
    same ``fingerprint.identity``.
    """
    return Difference(_rows(a["machine"], b["machine"]), _rows(a["stack"], b["stack"]))


def _rows(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[Row, ...]:
    left, right = dict(_flat(a)), dict(_flat(b))
    return tuple(
        Row(key, left.get(key), right.get(key))
        for key in sorted({*left, *right})
        if left.get(key) != right.get(key)
    )


def _flat(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in facts.items():
        if not prefix and key == "absent":
            continue
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, list(value) if isinstance(value, tuple) else value


def _shown(value: Any) -> str:
    return "(not there)" if value is None else str(value)
