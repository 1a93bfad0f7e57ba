"""``python -m portcall``, and what the console script starts."""

import os
import signal
import sys

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main() -> int:
    """Run the command line: safe from the user's folder on sys.path, and from Ctrl-C while modules are imported."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)  # until cli.main takes over: end at once, without a traceback
    here = os.path.realpath("")  # a file or folder there must not shadow a real module
    sys.path[:] = [entry for entry in sys.path if entry and os.path.realpath(entry) != here]
    from portcall.cli import main as run

    try:
        return run()
    finally:
        for number in SIGNALS:  # the outcome is told: let it stand
            signal.signal(number, signal.SIG_IGN)


if __name__ == "__main__":
    sys.exit(main())
