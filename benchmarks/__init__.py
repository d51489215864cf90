"""Measurements anyone can repeat: `python -m benchmarks.run --suite data`.

A suite is a module here with `results() -> list[dict]`; every dict is made by `measured`, so that all numbers come with
how often they were taken and how far they spread.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

SEED = 0


def measured(name: str, unit: str, values: Sequence[float], **facts: Any) -> dict[str, Any]:
    """One line of results: the median of repeated values and their 10th and 90th percentile. Unit "ratio" is shown first."""
    p10, median, p90 = np.percentile(values, [10, 50, 90]).tolist()
    return {"name": name, "unit": unit, "n": len(values), "median": median, "p10": p10, "p90": p90, **facts}
