"""The fresh process that one step of one contender runs in: ``INTERPRETER -m benchmarks.calibration_step JOB ANSWER``.

JSON in, JSON out. It may be the interpreter of the contender's own environment.
"""

from __future__ import annotations

import importlib.metadata
import json
import resource
import sys
from pathlib import Path
from typing import Any

from benchmarks.calibration_contenders import Job, Watch, find


def main(job_path: Path, answer_path: Path) -> None:
    """Run the step that the job names and write what it took, or the error that it ended in."""
    job = json.loads(job_path.read_text())
    # RLIMIT_DATA counts private writable memory; RLIMIT_AS would count mapped libraries and files too.
    resource.setrlimit(resource.RLIMIT_DATA, (job["memory_limit_bytes"],) * 2)
    contender = find(job["contender"])
    given = Job(job["model"], job["graph"], job["images"], job["threads"], job["previous"])
    watch = Watch()
    answer: dict[str, Any]
    try:
        value = contender.steps[job["step"]](given, watch)
    except Exception as error:  # whatever a contender raises is the reason in its row
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        answer = {"error": ": ".join([type(error).__name__, *lines[:1]])}
    else:
        answer = {
            "value": value,
            "seconds": watch.seconds,
            "peak_rss_bytes": watch.peak_rss_bytes,
            "versions": {d: importlib.metadata.version(d) for d in contender.distributions},
        }
    answer_path.write_text(json.dumps(answer))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
