"""What torchrun tells a process that it has started. Imports no framework."""

from __future__ import annotations

import os


def launched() -> bool:
    """Whether a launcher has started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def local_rank() -> int:
    """Which of this machine's processes this is: the number of its card."""
    return int(os.environ.get("LOCAL_RANK", "0"))
