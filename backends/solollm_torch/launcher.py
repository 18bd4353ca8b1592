"""What torchrun tells a process that it has started. Imports no framework."""

from __future__ import annotations

import os
from collections.abc import Mapping


def launched(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher has started this process as one of several."""
    return int(environment.get("WORLD_SIZE", "1")) > 1 and "RANK" in environment


def local_rank(environment: Mapping[str, str] = os.environ) -> int:
    """Which of this machine's processes this is: the number of its card."""
    return int(environment.get("LOCAL_RANK", "0"))
