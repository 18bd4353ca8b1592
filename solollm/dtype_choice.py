"""Which compute dtype this machine is fastest in, as `solollm doctor` has measured it.

The answer is kept per device and version of the framework in the user's cache folder,
where the planner finds it; without it the backend's own preference holds. A run that is resumed on
its machine keeps the dtype that it has.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from solollm import durable
from solollm.backend import Capabilities, ComputeDType
from solollm.errors import SoloLLMError

# 16 bits have to earn what they cost in precision, and fp16 its loss scaler.
WORTH_IT = 1.15


def fastest(rates: Mapping[ComputeDType, float]) -> ComputeDType:
    """fp32, unless bf16 is enough faster; fp16 only where it is enough faster than both."""
    best: ComputeDType = "float32"
    for other in ("bfloat16", "float16"):
        if rates.get(other, 0.0) > WORTH_IT * rates.get(best, 0.0):
            best = other
    return best


def preferred_dtype(capabilities: Capabilities) -> ComputeDType:
    """The measured choice for this device, else what the backend prefers."""
    found = _read().get(_key(capabilities))
    for dtype in capabilities.train_dtypes:
        if dtype == found:
            return dtype
    return capabilities.preferred_dtype


def remember(capabilities: Capabilities, rates: Mapping[ComputeDType, float]) -> ComputeDType:
    """Keep the choice; a cache folder that cannot be written costs only that."""
    choice = fastest(rates)
    kept = {**_read(), _key(capabilities): choice}
    path = cache_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        durable.replace_file(path, json.dumps(kept, indent=1).encode())
    except (OSError, SoloLLMError):
        return choice
    return choice


def cache_file() -> Path:
    """Where choices are kept."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(cache) if cache else Path.home() / ".cache") / "solollm" / "dtypes.json"


def _key(capabilities: Capabilities) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in capabilities.versions.items())
    return f"{versions} on {capabilities.device}"


def _read() -> dict[str, str]:
    try:
        kept = json.loads(cache_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(k): str(v) for k, v in kept.items()} if isinstance(kept, dict) else {}
