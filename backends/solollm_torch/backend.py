"""The entry point `solollm.backends: torch`: what PyTorch can do here, its sessions and engines."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
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
    Way,
)
from solollm.config import OptimizerTable
from solollm.errors import BackendError, ConfigError

Settings = Mapping[str, bool | int | float | str]
if TYPE_CHECKING:
    import torch

    from solollm_torch.session import TorchSession

SPLIT: Settings = {"master": "split"}
STREAMING: Settings = {"offload": "streaming"}
INPUTS_TOO: Settings = {**STREAMING, "offload_residuals": True}
CUDA_WAYS = (
    Way("resident"),
    Way("split", SPLIT, None, "gradients in bfloat16; the weights stay exact"),
    Way("split, 8-bit", SPLIT, 8, "gradients in bfloat16, moments in 8 bits"),
    Way("streaming", STREAMING, 8, "state in host memory, moments in 8 bits"),
    Way("streaming, inputs", INPUTS_TOO, 8, "block inputs in host memory, too"),
    Way("FSDP2 offload", {"offload": "fsdp"}, None, "copies that nothing hides"),
    Way(
        "streaming, 4 bytes", {**STREAMING, "master": "bfloat16"}, 8,
        "weights in bfloat16, rounded stochastically", consent=True,
    ),
)  # fmt: skip
SHARDED_WAYS = (
    Way("shared out"),
    Way("shared out, in host memory", {"offload": "fsdp"}, None, "copies beside the computation"),
)
CUDA_PRIORITY, CPU_PRIORITY = 90, 10
TESTED = ((2, 11), (2, 14))  # from here, to below here
# Linux's driver says so in /proc; WSL2 has no such entry but a device of its own.
NVIDIA_DRIVER_SIGNS = (Path("/proc/driver/nvidia/version"), Path("/dev/dxg"))


class TorchBackend(Backend):
    """PyTorch on an NVIDIA card, or on the CPU of any machine."""

    name = "torch"

    @classmethod
    def probe(cls) -> Probe:
        if find_spec("torch") is None:
            fix = "pip install 'solollm[torch]'"
            return Probe(False, f"torch is not installed ({fix})", "", 0)
        # A build for CUDA carries its tag or its runtime; asking torch itself would import it.
        cuda_build = not version("torch").endswith("+cpu")
        if cuda_build and any(sign.exists() for sign in NVIDIA_DRIVER_SIGNS):
            return Probe(True, "PyTorch on an NVIDIA card", "cuda", CUDA_PRIORITY)
        return Probe(True, "PyTorch on the CPU", "cpu", CPU_PRIORITY)

    def capabilities(self) -> Capabilities:
        import torch

        device = _device()
        bf16 = _computes_bf16(device)
        return Capabilities(
            device=str(device),
            train_dtypes=("float32", "bfloat16") if bf16 else ("float32",),
            preferred_dtype="bfloat16" if bf16 and device.type == "cuda" else "float32",
            objectives=("lm", "dpo", "grpo"),
            optimizers=("adamw", "muon"),
            state_bits=(32, 16, 8),
            adapters=("lora", "qlora-nf4") if find_spec("bitsandbytes") else ("lora",),
            paged_states=device.type == "cuda" and find_spec("bitsandbytes") is not None,
            multi_device=True,
            versions={"torch": torch.__version__, "python": platform.python_version()},
        )

    def memory_costs(
        self,
        model: ModelConfig,
        options: SessionOptions,
        compute_dtype: ComputeDType,
        *,
        device: str = "",
    ) -> MemoryCosts:
        import torch

        from solollm_torch import memory, memory_offload
        from solollm_torch.launcher import launched

        place = torch.device(device) if device else _device()
        costs = memory.memory_costs(model, options, compute_dtype, place)
        offload = options.backend_options.get("offload")
        if offload == "streaming":
            return memory_offload.streaming_costs(
                costs, model, options, compute_dtype, device=place
            )
        if offload != "fsdp" and (device or not launched()):
            return costs
        on_host = offload == "fsdp" and place.type == "cuda"
        costs = memory.sharded_costs(
            costs, model, compute_dtype, on_host=on_host,
            world_size=1 if device else self.ranks().world_size,
        )  # fmt: skip
        moved = memory_offload.sharded_traffic_bytes(model) if on_host else {}
        return replace(costs, traffic_bytes=moved)

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
        import torch

        from solollm_torch.memory_rollouts import rollout_bytes

        return rollout_bytes(
            model, options, compute_dtype, sequences=sequences, length=length,
            device=torch.device(device) if device else _device(),
        )  # fmt: skip

    def ways(self, device: str = "", *, adapter: bool = False) -> Sequence[Way]:
        from solollm_torch.launcher import launched

        if adapter:  # which is refused in every other way
            return (Way("resident"),)
        if not (device or _device().type).startswith("cuda"):
            return (Way("resident"),)
        return SHARDED_WAYS if launched() and not device else CUDA_WAYS

    def train_session(
        self, model: ModelConfig, options: SessionOptions, plan: Plan
    ) -> TorchSession:
        from solollm_torch.adapter_session import AdapterSession
        from solollm_torch.launcher import launched
        from solollm_torch.session import TorchSession

        _check_version()
        offload = str(options.backend_options.get("offload", "none"))
        if offload not in ("none", "fsdp", "streaming"):
            raise ConfigError(
                f"offload = {offload!r} is not a way to hold a model",
                fix="use none, fsdp or streaming",
            )
        sharded = launched() or offload == "fsdp"
        if options.optimizer.paged and (sharded or offload == "streaming"):
            raise ConfigError(
                "optimizer.paged does not go with several processes or with offload",
                why="each rank holds its share of the states, or the host holds them already",
                fix="leave one of the two out",
            )
        if sharded and options.adapter is None:
            from solollm_torch.sharded_session import ShardedSession

            return ShardedSession(model, options, plan, _device())
        if sharded:
            raise ConfigError(
                "an adapter trains in one process, without offload = fsdp",
                why="its base is frozen, and small enough in 4 bits",
                fix="start it without torchrun; `base_bits = 4` makes the base small",
            )
        if offload == "streaming":
            from solollm_torch.offload import StreamingSession

            return StreamingSession(model, options, plan, _device())
        kind = TorchSession if options.adapter is None else AdapterSession
        return kind(model, options, plan, _device())

    def ranks(self) -> Ranks:
        from solollm_torch.launcher import launched

        if not launched():
            return Ranks()
        from solollm_torch.ranks import TorchRanks

        return TorchRanks(_device())

    def peers(self) -> Mapping[str, str]:
        from solollm_torch.peers import known_peers

        return known_peers(_device())

    def peer(
        self,
        name: str,
        model: ModelConfig,
        table: OptimizerTable,
        *,
        seed: int,
        compute_dtype: ComputeDType = "float32",
    ) -> Peer:
        from solollm_torch.gradients import DTYPES
        from solollm_torch.peers import make_peer

        return make_peer(
            name, model, table, seed=seed, device=_device(), compute_dtype=DTYPES[compute_dtype]
        )

    def matmul_rate(
        self, model: ModelConfig, num_tokens: int, compute_dtype: ComputeDType = "float32"
    ) -> MatmulRate:
        from solollm_torch.gradients import DTYPES
        from solollm_torch.rates import matmul_rate

        return matmul_rate(model, num_tokens, device=_device(), dtype=DTYPES[compute_dtype])

    def memory(self, *, restart_peak: bool = False) -> MemoryStats:
        from solollm_torch import process

        device = _device()
        if not process.counts_peaks(device):
            return MemoryStats(0, 0)
        if restart_peak:
            process.restart_peak(device)
        return process.memory_stats(device)

    def copy_bytes_per_second(self) -> float:
        from solollm_torch.rates import copy_bytes_per_second

        return copy_bytes_per_second(_device())

    def engine(self, checkpoint: Path, options: EngineOptions) -> Engine:
        from solollm_torch.engine import TorchEngine

        _check_version()
        return TorchEngine.load(checkpoint, options, _device())


def _device() -> torch.device:
    import torch

    from solollm_torch.launcher import local_rank

    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank())


def _computes_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies bf16 natively, not by widening it."""
    import torch

    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and _cpu_has_bf16_products()


def _cpu_has_bf16_products() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return False
    flags = cpuinfo.read_text(encoding="utf-8", errors="replace").split()
    return "avx512_bf16" in flags or "amx_bf16" in flags


def _check_version() -> None:
    found = version("torch")
    release = tuple(int(part) for part in found.split("+")[0].split(".")[:2])
    if not TESTED[0] <= release < TESTED[1]:
        raise BackendError(
            f"torch {found} is not supported",
            why="tested with 2.11 to 2.13",
            fix="pip install 'torch>=2.11,<2.14'",
        )
