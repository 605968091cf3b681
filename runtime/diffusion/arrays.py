"""Names for types of arrays, and for the few values that have no narrower type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Float32: TypeAlias = NDArray[np.float32]
Float64: TypeAlias = NDArray[np.float64]
Int64: TypeAlias = NDArray[np.int64]
Bool: TypeAlias = NDArray[np.bool_]
Array: TypeAlias = NDArray[Any]
"""An array of any dtype, which the function that takes it keeps or does not depend on."""
Parameters: TypeAlias = Mapping[str, Any]
"""The parameters of a schedule by name: numbers, and for `from_betas` a tuple of them."""
