"""SoloLLM: one developer, one machine, one language model and its whole life.

The public names below load on first use, so that `import solollm` stays instant and never loads a
framework. `docs/tour.md` follows one batch through the house.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "ModelConfig": "solollm.architecture",
    "RunConfig": "solollm.config",
    "load_config": "solollm.config",
    "SoloLLMError": "solollm.errors",
}
__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:
    from solollm.architecture import ModelConfig as ModelConfig
    from solollm.config import RunConfig as RunConfig
    from solollm.config import load_config as load_config
    from solollm.errors import SoloLLMError as SoloLLMError


def __getattr__(name: str) -> Any:
    module = _PUBLIC.get(name)
    if module is None:
        raise AttributeError(f"module 'solollm' has no attribute {name!r}")
    return getattr(import_module(module), name)


def __dir__() -> list[str]:
    return sorted(__all__)
