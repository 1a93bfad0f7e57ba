"""``python -m portcall``."""

import sys

if not sys.flags.safe_path:
    sys.path.pop(0)  # the user's folder: a file or folder there must not shadow a real module

from portcall.cli import main

sys.exit(main())
