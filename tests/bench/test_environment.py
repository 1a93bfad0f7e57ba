from __future__ import annotations

import copy
import json
from typing import Any

from portcall.bench.environment import Row, difference
from portcall.targets.agent import fingerprint


def environment() -> dict[str, Any]:
    return {
        "machine": {"cpu_model": "A", "logical_cpus": 2, "cpu_flags": ["avx2"], "absent": {"board": "none"}},
        "stack": {"runtime": "x 1", "environment_variables": {"OMP_NUM_THREADS": "1"}, "absent": {}},
        "state": {"before": {"time": "t"}},
    }


def test_the_same_environment_differs_in_nothing() -> None:
    other = environment()
    other["machine"]["absent"] = {"board": "another reason"}
    other["state"] = {"before": {"time": "later"}}
    found = difference(environment(), other)
    assert found.is_comparable and not found.stack


def test_a_machine_that_differs_is_incomparable_and_named() -> None:
    other = environment()
    other["machine"]["cpu_flags"] = ["avx2", "avx512_vnni"]
    found = difference(environment(), other)
    assert not found.is_comparable
    assert found.machine == (Row("cpu_flags", ["avx2"], ["avx2", "avx512_vnni"]),)


def test_a_stack_that_differs_is_printed_fact_by_fact() -> None:
    other = copy.deepcopy(environment())
    other["stack"]["runtime"] = "x 2"
    other["stack"]["environment_variables"] = {"KMP_AFFINITY": "compact"}
    found = difference(environment(), other)
    assert found.is_comparable
    assert [str(row) for row in found.stack] == [
        "environment_variables.KMP_AFFINITY: (not there) -> compact",
        "environment_variables.OMP_NUM_THREADS: 1 -> (not there)",
        "runtime: x 1 -> x 2",
    ]
    assert json.loads(json.dumps(found.to_json()))["stack"][2] == {"key": "runtime", "a": "x 1", "b": "x 2"}


def test_it_agrees_with_the_identity_of_the_real_machine() -> None:
    facts = fingerprint.machine()
    stored = json.loads(json.dumps(facts))
    real = {"machine": facts, "stack": fingerprint.stack()}
    again = {"machine": stored, "stack": json.loads(json.dumps(fingerprint.stack()))}
    assert difference(real, again).is_comparable and not difference(real, again).stack
    moved = {**again, "machine": {**stored, "logical_cpus": 4096}}
    assert not difference(real, moved).is_comparable
    assert fingerprint.identity(moved["machine"]) != fingerprint.identity(facts)
