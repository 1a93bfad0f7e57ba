"""The loops of portcall.calibration.histogram, compiled (absent where no C compiler was)."""

from typing import Any

import numpy as np

def extent(values: np.ndarray[Any, Any], /) -> tuple[float, float]: ...
def count(values: np.ndarray[Any, Any], table: np.ndarray[Any, Any], exponent: int, step: int, /) -> None: ...
