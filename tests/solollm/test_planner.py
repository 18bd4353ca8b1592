"""What fits: the order of choices, the table of bytes, the cheapest remedy."""

from __future__ import annotations

from typing import Any

import pytest

from solollm.architecture import ModelConfig
from solollm.backend import (
    Backend,
    Capabilities,
    ComputeDType,
    MemoryCosts,
    Probe,
    Ranks,
    SessionOptions,
)
from solollm.config import OptimizerTable, RunConfig, parse_config
from solollm.dial import preset
from solollm.errors import ConfigError, PlanError
from solollm.hardware import Gpu, Machine
from solollm.planner import Plan, Room, format_bytes, memory_limit_bytes, plan, room_of_all

MIB = 1 << 20
MODEL = preset("15m", 8192)


class _Costs(Backend):
    """A backend whose memory is a plain formula: 16 (or 10 with 8-bit states) bytes a parameter,
    1 MiB per token, 64 KiB per checkpointed token; half of the tokens' in bfloat16."""

    name = "costs"
    dtypes: tuple[ComputeDType, ...] = ("float32", "bfloat16")

    @classmethod
    def probe(cls) -> Probe:
        return Probe(True, "", "cpu", 0)

    def capabilities(self) -> Capabilities:
        return Capabilities("cpu", self.dtypes, "float32", ("lm",), ("adamw",), (32, 8))

    def memory_costs(
        self,
        model: ModelConfig,
        options: SessionOptions,
        compute_dtype: ComputeDType,
        *,
        device: str = "",
    ) -> MemoryCosts:
        per_parameter = 16 if options.optimizer.state_bits == 32 else 10
        width = 1.0 if compute_dtype == "float32" else 0.5
        return MemoryCosts(100 * MIB, per_parameter, width * MIB, width * MIB / 16, 8 * MIB)

    def train_session(self, *_: Any) -> Any:
        raise NotImplementedError

    def engine(self, *_: Any) -> Any:
        raise NotImplementedError


FIXED = 108 * MIB + 16 * MODEL.num_parameters()  # framework, loss, weights


def _machine(free_bytes: float) -> Machine:
    """A machine on which exactly `free_bytes` may be planned with."""
    return Machine("Linux 6", "x86_64", "cpu", 2, 2, 1 << 40, int(free_bytes / 0.8) + 1)


def _plan(free_bytes: float, batch_size: int = 8, **train: Any) -> Plan:
    config = parse_config({"train": train}) if train else RunConfig()
    options = SessionOptions(OptimizerTable())
    return plan(
        MODEL, options, config, _Costs(), batch_size=batch_size, seq_len=256,
        machine=_machine(free_bytes),
    )  # fmt: skip


def test_room_for_everything_runs_the_batch_whole() -> None:
    """A micro-batch smaller than needed: more launches for nothing."""
    chosen = _plan(FIXED + 8 * 256 * MIB)
    assert (chosen.micro_batch_size, chosen.activation_checkpointing) == (8, False)
    assert chosen.compute_dtype == "float32"
    assert sum(chosen.memory_bytes.values()) <= chosen.memory_limit_bytes


def test_one_byte_less_halves_the_micro_batch() -> None:
    """The limit compared wrongly, or activations not counted per row."""
    assert _plan(FIXED + 8 * 256 * MIB - MIB).micro_batch_size == 4


def test_checkpointing_comes_only_when_one_row_does_not_fit() -> None:
    """A third of the speed given away although a smaller micro-batch would have fitted."""
    plain = _plan(FIXED + 256 * MIB)
    assert (plain.micro_batch_size, plain.activation_checkpointing) == (1, False)
    tight = _plan(FIXED + 255 * MIB)
    assert (tight.micro_batch_size, tight.activation_checkpointing) == (8, True)


def test_a_batch_that_is_no_power_of_two_is_cut_into_powers() -> None:
    """Micro-batch sizes 12, 8, 4, 2, 1 for a batch of 12."""
    assert _plan(FIXED + 12 * 256 * MIB, batch_size=12).micro_batch_size == 12
    assert _plan(FIXED + 11 * 256 * MIB, batch_size=12).micro_batch_size == 8


def test_a_processor_gets_no_larger_micro_batch_than_helps() -> None:
    """All the memory of a laptop taken for rows that make nothing faster."""
    assert _plan(1e12, batch_size=64).micro_batch_size == 16
    assert _plan(1e12, batch_size=64, micro_batch_size=64).micro_batch_size == 64


def test_settings_given_are_kept() -> None:
    """The planner overruling the user."""
    chosen = _plan(1e12, micro_batch_size=2, activation_checkpointing=True)
    assert (chosen.micro_batch_size, chosen.activation_checkpointing) == (2, True)
    assert _plan(1e12, compute_dtype="bfloat16").compute_dtype == "bfloat16"


def test_untrainable_dtype_is_a_config_error() -> None:
    """fp16 accepted on a backend that cannot scale its loss."""
    with pytest.raises(ConfigError, match="float16"):
        _plan(1e12, compute_dtype="float16")


@pytest.mark.parametrize(
    ("free_bytes", "train", "fix"),
    [
        (FIXED + 20 * MIB, {"activation_checkpointing": False}, "leave micro-batch"),
        (FIXED + 10 * MIB, {}, "train.compute_dtype=bfloat16"),
        (FIXED - 10 * MIB, {}, "optimizer.state_bits=8"),
        (1 * MIB, {}, "no setting makes it fit"),
    ],
)
def test_what_does_not_fit_names_the_cheapest_change(
    free_bytes: float, train: dict[str, Any], fix: str
) -> None:
    """A refusal without a way out, or one that costs more than needed."""
    with pytest.raises(PlanError) as caught:
        _plan(free_bytes, **train)
    assert fix in caught.value.fix
    assert "activations" in caught.value.why
    assert caught.value.exit_code == 4


def test_a_smaller_preset_is_the_last_resort() -> None:
    """A 7B model on a laptop answered with settings that cannot help."""
    with pytest.raises(PlanError) as caught:
        plan(
            preset("7b", 8192), SessionOptions(OptimizerTable()), RunConfig(), _Costs(),
            batch_size=1, seq_len=256, machine=_machine(4 << 30),
        )  # fmt: skip
    assert "--preset 350m" in caught.value.fix


def test_memory_limit_follows_the_device() -> None:
    """The second card's work planned with the first card's memory, or with the RAM."""
    gpus = (Gpu("a", "nvidia", 24 << 30, 20 << 30), Gpu("b", "nvidia", 12 << 30, 10 << 30))
    machine = Machine("Linux", "x86_64", "cpu", 1, 1, 64 << 30, 50 << 30, gpus)
    assert memory_limit_bytes("cuda:0", machine) == int(0.9 * (20 << 30))
    assert memory_limit_bytes("cuda:1", machine) == int(0.9 * (10 << 30))
    assert memory_limit_bytes("cpu", machine) == int(0.8 * (50 << 30))


class _Drawing(_Costs):
    """The same, whose engine takes 10 MiB per sequence at once."""

    def rollout_bytes(self, *_: Any, sequences: int, **__: Any) -> dict[str, int]:
        return {"keys and values": 10 * MIB * sequences}


def _grpo(free_bytes: float, **grpo: Any) -> Plan:
    config = parse_config({"finetune": {"objective": "grpo", "grpo": grpo}})
    return plan(
        MODEL, SessionOptions(OptimizerTable()), config, _Drawing(), batch_size=64, seq_len=256,
        machine=_machine(free_bytes),
    )  # fmt: skip


def test_answers_count_for_what_they_take_beyond_a_step() -> None:
    """A GRPO run that fits while it trains and dies while it draws; or one charged for both, which
    are never there together."""
    whole = FIXED + 8 * 256 * MIB
    made = _grpo(whole, rollout_batch_size=32)
    assert made.micro_batch_size == 8
    assert "drawing answers" not in made.memory_bytes, (
        "8 rows of a step are 2048 MiB, 32 answers 320"
    )
    tight = _grpo(FIXED + 400 * MIB, rollout_batch_size=32)
    assert tight.memory_bytes["drawing answers"] == 320 * MIB - (256 + 8) * MIB
    assert sum(tight.memory_bytes.values()) == FIXED - 8 * MIB + 320 * MIB


def test_fewer_answers_at_once_are_offered_first() -> None:
    """A user told to quantise his optimizer, where drawing in turns costs nothing learnt."""
    with pytest.raises(PlanError) as caught:
        _grpo(FIXED + 300 * MIB, rollout_batch_size=64, group_size=8)
    assert "finetune.grpo.rollout_batch_size=16" in caught.value.fix


def test_format_bytes() -> None:
    """Units off by 1024, or digits lost."""
    sizes = [0, 1023, 1536, 5 << 30, 3 << 50]
    assert [format_bytes(n) for n in sizes] == ["0 B", "1023 B", "1.5 KiB", "5 GiB", "3.07e+03 TiB"]


class Poorer(Ranks):
    """One of two ranks of this machine; the other has 3 GB of memory and a card of 9."""

    world_size, local_world_size = 2, 2

    def largest(self, *values: float) -> tuple[float, ...]:
        return tuple(map(max, values, (-9e9, -3e9)))


def test_several_ranks_plan_with_what_the_poorest_has() -> None:
    """Each with its own plan, ranks take different micro-batches and wait for each other; each with
    all of a shared memory, they take it twice."""
    card = room_of_all(Room(12_000_000_000, 16_000_000_000, is_cpu=False), Poorer())
    assert (card.device_bytes, card.host_bytes) == (9_000_000_000, 3_000_000_000)
    shared = room_of_all(Room(12_000_000_000, 4_000_000_000, is_cpu=False), Poorer())
    assert shared.host_bytes == 2_000_000_000
    assert room_of_all(Room(12_000_000_000), Poorer()).device_bytes == 6_000_000_000
    assert room_of_all(Room(12_345), Ranks()) == Room(12_345)
