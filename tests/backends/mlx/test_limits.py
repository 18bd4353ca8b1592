"""What MLX may take of a Mac, on figures of Macs; and the timing of dtypes, on this processor."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("mlx.core", reason="these tests need mlx")

from solollm_mlx import limits
from solollm_mlx.limits import DeviceLimits, MemoryBounds, memory_bounds, require_buffers
from solollm_mlx.timing import matmul_rates

from solollm.architecture import ModelConfig
from solollm.backend import Plan
from solollm.dial import preset
from solollm.errors import BackendError

GIB = 1 << 30
MAC_16 = DeviceLimits(int(10.7 * GIB), 4 * GIB)  # a 16 GB Mac, and its largest buffer


def _plan(resident: int = 3 * GIB, rows: int = 4) -> Plan:
    return Plan(
        rows, False, "float32", seq_len=2048, batch_size=64,
        memory_bytes={"weights, gradients, optimizer": resident},
    )  # fmt: skip


def test_bounds_stay_below_what_metal_recommends() -> None:
    """MLX's defaults, 1.5 times the recommendation with a cache as large, left as they are."""
    bounds = memory_bounds(MAC_16, _plan())
    assert bounds.memory_bytes == pytest.approx(0.9 * 10.7 * GIB)
    assert bounds.cache_bytes == pytest.approx(10.7 * GIB / 8, abs=1)
    assert bounds.wired_bytes == pytest.approx(3.3 * GIB)
    large = memory_bounds(DeviceLimits(96 * GIB, 8 * GIB), _plan(resident=200 * GIB))
    assert large.cache_bytes == 2 * GIB
    assert large.wired_bytes == large.memory_bytes < 96 * GIB


def test_the_process_is_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds that are computed and not set, or set crosswise."""
    seen: dict[str, int] = {}
    for name in ("memory", "cache", "wired"):
        monkeypatch.setattr(
            limits.mx, f"set_{name}_limit", lambda value, name=name: seen.update({name: value})
        )
    limits.bind_memory(MAC_16, _plan())
    bounds = memory_bounds(MAC_16, _plan())
    assert MemoryBounds(seen["memory"], seen["cache"], seen["wired"]) == bounds
    seen.clear()
    limits.bind_memory(DeviceLimits(0, 0), _plan())  # a virtual GPU that tells nothing
    assert not seen


def test_a_buffer_that_metal_refuses_is_named_before_training(tiny_config: ModelConfig) -> None:
    """A run that ends at its first step with a text of Metal's."""
    require_buffers(tiny_config, _plan(), MAC_16)
    model = preset("7b", 32_768)
    with pytest.raises(BackendError, match="activations of a micro-batch of 64") as caught:
        require_buffers(model, _plan(rows=64), MAC_16)
    assert "micro_batch_size" in caught.value.fix
    huge = model.model_copy(update={"vocab_size": 400_000})
    with pytest.raises(BackendError, match="embed_tokens"):
        require_buffers(huge, _plan(rows=1), MAC_16)


def test_a_cpu_has_no_limits() -> None:
    """A Linux machine bound by a Mac's figures."""
    assert limits.device_limits() is None


def test_every_dtype_is_timed() -> None:
    """A rate that is zero, or missing, and so never chosen."""
    rates = matmul_rates(("float32", "bfloat16"), seconds=0.0, size=64)
    assert set(rates) == {"float32", "bfloat16"}
    assert min(rates.values()) > 0


@pytest.mark.parametrize(("platform", "expected"), [("darwin", "1"), ("linux", "None")])
def test_the_watchdog_is_relaxed_before_mlx_is_imported(platform: str, expected: str) -> None:
    """The variable set after Metal has read it, or on other systems; the owner's value replaced."""
    script = (
        "import os, sys\n"
        "from solollm_mlx.backend import MlxBackend, WATCHDOG_VARIABLE\n"
        f"sys.platform = {platform!r}\n"
        "MlxBackend(); print(os.environ.get(WATCHDOG_VARIABLE), 'mlx.core' in sys.modules)\n"
    )

    def answer(**variables: str) -> str:
        environment = {**os.environ, **variables}
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True,
            check=True,
        )  # fmt: skip
        return done.stdout.strip()

    assert answer() == f"{expected} False"
    assert answer(AGX_RELAX_CDM_CTXSTORE_TIMEOUT="0") == "0 False"
