"""The entry point `solollm.backends: mlx`: what MLX can do here, and its sessions and engines."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from solollm.architecture import ModelConfig
from solollm.backend import (
    Backend,
    Capabilities,
    ComputeDType,
    Engine,
    EngineOptions,
    MatmulRate,
    MemoryCosts,
    MemoryStats,
    Peer,
    Plan,
    Probe,
    Ranks,
    SessionOptions,
)
from solollm.config import OptimizerTable
from solollm.errors import BackendError

if TYPE_CHECKING:
    from solollm_mlx.session import MlxSession

APPLE_GPU_PRIORITY, CPU_PRIORITY = 100, 5
# macOS ends a long step because the display waits for the GPU (mlx #3267, wontfix); this makes it
# wait. Metal reads it when a process first uses the GPU; who has set it keeps his value.
WATCHDOG_VARIABLE = "AGX_RELAX_CDM_CTXSTORE_TIMEOUT"
TESTED = ("0.32.4", "0.33")  # from here, to below here


class MlxBackend(Backend):
    """MLX on an Apple GPU; on a Linux CPU it is slow and meant for tests and for moving runs."""

    name = "mlx"

    def __init__(self) -> None:
        if "mlx.core" not in sys.modules and sys.platform == "darwin":
            os.environ.setdefault(WATCHDOG_VARIABLE, "1")

    @classmethod
    def probe(cls) -> Probe:
        if sys.platform == "darwin" and platform.machine() != "arm64":
            return Probe(False, "MLX has no build for Intel Macs", "", 0)
        missing = _missing_package()
        if missing:
            fix = "pip install 'solollm[mlx]'"
            return Probe(False, f"{missing} is not installed ({fix})", "", 0)
        if sys.platform == "darwin":
            return Probe(True, "MLX on an Apple GPU", "apple gpu", APPLE_GPU_PRIORITY)
        return Probe(True, "MLX on the CPU", "cpu", CPU_PRIORITY)

    def capabilities(self) -> Capabilities:
        return Capabilities(
            device=_device_name(),
            train_dtypes=("float32", "bfloat16", "float16"),
            preferred_dtype=_training_dtype(),
            objectives=("lm", "dpo", "grpo"),
            optimizers=("adamw", "muon"),
            state_bits=(32, 8),
            adapters=("lora", "qlora-affine4"),
            multi_device=True,
            versions={"mlx": _version(), "python": platform.python_version()},
        )

    def memory_costs(
        self,
        model: ModelConfig,
        options: SessionOptions,
        compute_dtype: ComputeDType,
        *,
        device: str = "",
    ) -> MemoryCosts:
        from solollm_mlx.memory import memory_costs

        return memory_costs(model, options, compute_dtype)

    def rollout_bytes(
        self,
        model: ModelConfig,
        options: SessionOptions,
        compute_dtype: ComputeDType,
        *,
        sequences: int,
        length: int,
        device: str = "",
    ) -> Mapping[str, int]:
        from solollm_mlx.memory_rollouts import rollout_bytes

        return rollout_bytes(
            model, options, compute_dtype, sequences=sequences, length=length,
            on_cpu=device == "cpu" or (not device and not _on_gpu()),
        )  # fmt: skip

    def train_session(self, model: ModelConfig, options: SessionOptions, plan: Plan) -> MlxSession:
        from solollm_mlx.adapter_session import AdapterSession
        from solollm_mlx.limits import bind_memory, device_limits, require_buffers
        from solollm_mlx.ranks import join
        from solollm_mlx.session import MlxSession

        _check_version()
        if limits := device_limits():
            require_buffers(model, plan, limits)
            bind_memory(limits, plan)
        kind = MlxSession if options.adapter is None else AdapterSession
        return kind(model, options, plan, join())

    def ranks(self) -> Ranks:
        from solollm_mlx.ranks import MlxRanks

        return MlxRanks()

    def peers(self) -> Mapping[str, str]:
        from solollm_mlx.peers import known_peers

        return known_peers()

    def peer(
        self,
        name: str,
        model: ModelConfig,
        table: OptimizerTable,
        *,
        seed: int,
        compute_dtype: ComputeDType = "float32",
    ) -> Peer:
        from solollm_mlx.peers import NAME, TrainerPeer
        from solollm_mlx.session import DTYPES

        if name != NAME:
            return super().peer(name, model, table, seed=seed, compute_dtype=compute_dtype)
        return TrainerPeer(model, table, seed, DTYPES[compute_dtype])

    def matmul_rate(
        self, model: ModelConfig, num_tokens: int, compute_dtype: ComputeDType = "float32"
    ) -> MatmulRate:
        from solollm_mlx.rates import matmul_rate

        return matmul_rate(model, num_tokens, compute_dtype)

    def memory(self, *, restart_peak: bool = False) -> MemoryStats:
        import mlx.core as mx

        if restart_peak:
            mx.reset_peak_memory()
        return MemoryStats(mx.get_active_memory(), mx.get_peak_memory())

    def dtype_rates(self, seconds: float) -> Mapping[ComputeDType, float]:
        from solollm_mlx.timing import matmul_rates

        return matmul_rates(self.capabilities().train_dtypes, seconds) if _on_gpu() else {}

    def copy_bytes_per_second(self) -> float:
        from solollm_mlx.rates import copy_bytes_per_second

        return copy_bytes_per_second()

    def engine(self, checkpoint: Path, options: EngineOptions) -> Engine:
        from solollm_mlx.engine import MlxEngine

        _check_version()
        if options.compute_dtype == "auto":
            options = replace(options, compute_dtype=_inference_dtype())
        return MlxEngine.load(checkpoint, options)


def _missing_package() -> str:
    """The first package that training and generation need and that is not here."""
    found = find_spec("mlx")
    if found is None or found.submodule_search_locations is None:
        return "mlx"
    # On Linux the library is a package of its own, which a plain `pip install mlx` leaves out.
    folders = [Path(folder) / "lib" for folder in found.submodule_search_locations]
    if not any(path.stem == "libmlx" for folder in folders for path in folder.glob("libmlx.*")):
        return "mlx[cpu]"
    return "" if find_spec("mlx_lm") else "mlx-lm"


def _version() -> str:
    try:
        return version("mlx")
    except PackageNotFoundError:
        return ""


def _check_version() -> None:
    from solollm_mlx.versions import within

    found = _version()
    if not within(found, *TESTED):
        raise BackendError(
            f"mlx {found} is not supported",
            why=f"tested with {TESTED[0]} to below {TESTED[1]}",
            fix=f"pip install 'mlx>={TESTED[0]},<{TESTED[1]}'",
        )


def _on_gpu() -> bool:
    import mlx.core as mx

    return bool(mx.default_device().type == mx.DeviceType.gpu)


def _device_name() -> str:
    import mlx.core as mx

    return str(mx.device_info().get("device_name", "gpu")) if _on_gpu() else "cpu"


def _emulates_bf16() -> bool:
    return any(chip in _device_name() for chip in ("M1", "M2"))


def _training_dtype() -> ComputeDType:
    """bf16 where the chip has it; M1 and M2 emulate it, so they take fp32 unless asked."""
    return "bfloat16" if _on_gpu() and not _emulates_bf16() else "float32"


def _inference_dtype() -> ComputeDType:
    """16 bits on a GPU: generation is bound by reading the weights."""
    if not _on_gpu():
        return "float32"
    return "float16" if _emulates_bf16() else "bfloat16"
