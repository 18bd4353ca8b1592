"""`solollm plan`, as typed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from solollm.commands.plan import command
from solollm.errors import ConfigError, PlanError

GIB = 2**30


def _run(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(command, list(words), catch_exceptions=True)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def _json(*words: str) -> Any:
    code, output = _run(*words, "--json")
    assert code == 0, output
    return json.loads(output)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_plan_for_a_card_says_all_it_promises() -> None:
    """A plan without disk, without energy, or one that does not say that it is a projection."""
    code, text = _run("--preset", "1.3b", "--device", "rtx-4090")
    assert code == 0
    for word in ("weights", "gradients", "optimizer", "one checkpoint", "tokens/s", "kWh"):
        assert word in text, word
    assert "projection" in text


@pytest.mark.slow
def test_hours_choose_a_larger_model_for_a_faster_device() -> None:
    """`--hours` that ignores the device it was asked for."""
    slow = _json("--hours", "24", "--device", "rtx-3060")
    fast = _json("--hours", "24", "--device", "h200")
    assert fast["num_parameters"] > 2 * slow["num_parameters"]
    assert slow["hours"] <= 24
    assert fast["hours"] <= 24


def test_hours_with_a_model_decide_the_steps() -> None:
    """A named model replaced because hours were given."""
    made = _json("--hours", "24", "--preset", "1.3b", "--device", "rtx-4090")
    assert made["num_parameters"] > 1.2e9
    assert made["hours"] == pytest.approx(24, rel=0.01)


def test_energy_and_money_are_the_device_s_watts_times_hours() -> None:
    """The article's 1,200 hours on a 4090 cost 540 to 720 kWh, not 12,000."""
    made = _json("--hours", "1200", "--preset", "1.3b", "--device", "rtx-4090", "--price", "0.10")
    assert 540 < made["kilowatt_hours"] < 720
    assert made["money"] == pytest.approx(made["kilowatt_hours"] * 0.10)


def test_a_calibration_measures_and_is_remembered(tmp_path: Path) -> None:
    """A calibrated plan whose next plan knows nothing of it."""
    asked = ("--depth", "2", "--set", "model.max_position_embeddings=64",
             "--set", "train.batch_size=2", "--set", "backend=torch")  # fmt: skip
    before = _json(*asked)
    assert not before["is_measured"]
    measured = _json(*asked, "--calibrate", "8")
    assert measured["is_measured"]
    assert measured["calibrated_cpu_seconds"] > 0
    assert (tmp_path / "cache/solollm/rates.json").is_file()
    assert _json(*asked)["is_measured"]


@pytest.mark.slow
def test_a_comparison_lists_devices_that_fit_and_that_do_not() -> None:
    """Devices that cannot hold the model missing from the table, as if nobody had asked."""
    found = _json("--preset", "7b", "--compare")
    assert found["h200"]["tokens_per_second"] > found["a100-80"]["tokens_per_second"]
    assert found["m3-ultra-512"]["backend"] == "mlx"
    assert "refused" in found["rtx-3070"]
    assert found["rtx-3070"]["fix"]


def test_the_largest_model_grows_with_the_memory_and_fits() -> None:
    """A Mac owner told of a model that its memory does not hold."""
    small, large = (_json("--largest", "--device", name) for name in ("m2-16", "m4-max-64"))
    assert 1e8 < small["num_parameters"] < large["num_parameters"]
    for made in (small, large):
        used = sum(made["device_bytes"].values())
        assert 0.5 * made["device_limit_bytes"] < used <= made["device_limit_bytes"]


def test_a_7b_fits_24_gb_with_64_beside_it_and_is_told_what_32_need() -> None:
    """The claim that the project is about; and a refusal that names no way out."""
    made = _json("--preset", "7b", "--device", "rtx-4090", "--host-memory", "64")
    assert made["settings"] == {"offload": "streaming"}
    assert made["state_bits"] == 8
    assert sum(made["device_bytes"].values()) <= made["device_limit_bytes"] <= 22.5 * GIB
    assert sum(made["host_bytes"].values()) <= 48 * GIB
    with pytest.raises(PlanError) as caught:
        _json("--preset", "7b", "--device", "rtx-4090", "--host-memory", "32")
    assert caught.value.exit_code == 4
    assert "master=bfloat16" in caught.value.fix
    agreed = ("--set", "backend_options.torch.offload=streaming", "--set",
              "backend_options.torch.master=bfloat16")  # fmt: skip
    smaller = _json("--preset", "7b", "--device", "rtx-4090", "--host-memory", "32", *agreed)
    assert sum(smaller["host_bytes"].values()) <= 28 * GIB


_TUNING = ("--preset", "1.3b", "--device", "rtx-4090", "--tokens", "1e7",
           "--set", "optimizer.name=adamw", "--set", "data.seq_len=512",
           "--set", "train.batch_size=64")  # fmt: skip


def test_an_adapter_is_planned_as_what_it_is() -> None:
    """A LoRA run planned with a whole model's checkpoints, or in a way that its session refuses."""
    made = _json(*_TUNING, "--set", "finetune.method=lora")
    assert {option["name"] for option in made["options"]} == {"resident", "resident, 8-bit"}
    assert made["checkpoint_bytes"] < 0.1 * _json(*_TUNING)["checkpoint_bytes"]
    full = _json(*_TUNING, "--set", "finetune.method=full")
    assert made["tokens_per_second"] > 1.3 * full["tokens_per_second"]


def test_answers_that_are_drawn_take_time_and_memory() -> None:
    """GRPO planned like supervised tuning: a night for what takes a week."""
    lora = (*_TUNING, "--set", "finetune.method=lora")
    plain = _json(*lora)
    drawing = _json(*lora, "--set", "finetune.objective=grpo", "--set", "train.micro_batch_size=1")
    assert drawing["drawing_seconds"] > 0
    assert drawing["step_seconds"] > plain["step_seconds"] + 0.9 * drawing["drawing_seconds"]
    assert drawing["device_bytes"]["drawing answers"] > 0
    code, text = _run(*lora, "--set", "finetune.objective=grpo")
    assert code == 0
    assert "drawing answers" in text


def test_a_fine_tuning_must_say_how_long_it_is() -> None:
    """Pretraining's horizon planned for three epochs over a thousand rows."""
    with pytest.raises(ConfigError, match="how long"):
        _json(*_TUNING[:4], "--set", "finetune.method=lora")


def test_a_calibration_of_dpo_over_a_base_takes_its_steps() -> None:
    """A measurement that fails for want of a reference, or of a base."""
    asked = ("--depth", "2", "--set", "model.max_position_embeddings=64", "--tokens", "1e5",
             "--set", "train.batch_size=2", "--set", "backend=torch", "--set",
             "optimizer.name=adamw", "--set", "finetune.objective=dpo")  # fmt: skip
    assert _json(*asked, "--calibrate", "4")["is_measured"]
