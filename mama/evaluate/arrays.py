"""Array types of evaluation. Embeddings and maps come from the model in float32; metrics are computed in float64."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Float32s = NDArray[np.float32]
Float64s = NDArray[np.float64]
Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]
