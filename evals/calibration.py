"""calibration.json -> may this metric block? A judge may when it was measured against people and met the bars."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from goldgate.evals.judge import judge_digest

CALIBRATION = Path(__file__).parent / "calibration.json"
"""Written by `python -m goldgate.evals.calibrate`."""


@lru_cache(maxsize=1)
def records() -> dict[str, Any]:
    """Return metric -> calibration record; empty when there is no file."""
    if not CALIBRATION.exists():
        return {}
    data: dict[str, Any] = json.loads(CALIBRATION.read_text(encoding="utf-8"))
    metrics: dict[str, Any] = data.get("metrics", {})
    return metrics


def is_calibrated(metric: str) -> bool:
    """True when the metric's judge, as its code stands now, met the bars; changed code is uncalibrated."""
    record = records().get(metric)
    return bool(record and record.get("passes") is True and record.get("judge_digest") == judge_digest())
