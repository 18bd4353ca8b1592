"""What `solollm bench train` makes of its measurements."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from solollm import benchmark
from solollm.architecture import ModelConfig
from solollm.backend import Capabilities, Copies, MatmulRate
from solollm.benchmark import Work, bench_train, overlap, ways_by_name
from solollm.devices import GIB
from solollm.errors import ConfigError
from solollm.hardware import Gpu, Machine
from solollm.testing.toy import ToyBackend


class _OnACard(ToyBackend):
    """The toy, said to compute on a card."""

    def capabilities(self) -> Capabilities:
        return replace(super().capabilities(), device="cuda:0")

    def matmul_rate(self, *_: object, **__: object) -> MatmulRate:
        return MatmulRate(per_second=1e9, per_cpu_second=1e3)


@pytest.fixture
def with_a_4090(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu("NVIDIA GeForce RTX 4090", "nvidia", 24 * GIB, 23 * GIB)
    machine = Machine("Linux 6", "x86_64", "cpu", 8, 16, 64 * GIB, 50 * GIB, (gpu,))
    monkeypatch.setattr(benchmark, "read_machine", lambda: machine)


def test_overlap_is_the_longer_of_computing_and_copying_over_the_step() -> None:
    """A step that waits for every copy reported as one that hides them."""
    hidden = Copies(10, 10, load_seconds=0.6, store_seconds=0.2, stalled_seconds=0.0)
    assert overlap(hidden, 1.0) == 1.0
    bound_by_copies = Copies(10, 10, load_seconds=1.0, store_seconds=0.2, stalled_seconds=0.7)
    assert overlap(bound_by_copies, 1.0) == 1.0
    in_turn = Copies(10, 10, load_seconds=0.5, store_seconds=0.0, stalled_seconds=0.5)
    assert overlap(in_turn, 1.0) == 0.5
    assert overlap(Copies(10, 10), 1.0) is None, "on a processor nothing runs beside it"
    assert overlap(None, 1.0) is None


def test_what_is_not_measured_is_null(tiny_config: ModelConfig) -> None:
    """A share of a peak that a processor does not have; NaN, which is no JSON."""
    measured = bench_train(ToyBackend(), Work(tiny_config, 2, 16), rounds=1)
    written = json.loads(json.dumps(measured.to_json(), allow_nan=False))
    stack = written["stacks"][0]
    for name in ("share_of_gemm", "share_of_datasheet", "copies", "overlap"):
        assert stack[name] is None, name
    assert written["ceilings"]["datasheet_flops"] is None
    assert written["peers"] == {}


@pytest.mark.usefixtures("with_a_4090")
def test_a_card_is_timed_by_the_wall_and_held_against_its_datasheet(
    tiny_config: ModelConfig,
) -> None:
    """A card's share of a rate per processor second, which is the host waiting; a bf16 peak held
    against fp32 arithmetic."""
    work = Work(tiny_config, 2, 16, compute_dtype="bfloat16")
    stack = bench_train(_OnACard(), work, rounds=1).stacks[0]
    flops_per_second = work.flops / stack.seconds[0]
    assert stack.share_of_gemm == pytest.approx(flops_per_second / 1e9)
    assert stack.share_of_datasheet == pytest.approx(flops_per_second / 165.2e12)
    in_fp32 = bench_train(_OnACard(), replace(work, compute_dtype="float32"), rounds=1)
    assert in_fp32.stacks[0].share_of_datasheet is None


def test_an_unknown_way_names_the_nearest() -> None:
    """A typo answered with a traceback, or by timing something else."""
    with pytest.raises(ConfigError, match="did you mean `resident`"):
        ways_by_name(ToyBackend(), ["residnet"])
