"""The device table and this machine as one of its rows."""

from __future__ import annotations

import pytest

from solollm.devices import DEFAULT_HOST_BYTES, GIB, device, device_table, this_device
from solollm.errors import ConfigError
from solollm.hardware import Gpu, Machine


def _machine(*gpus: Gpu) -> Machine:
    return Machine("Linux 6", "x86_64", "some processor", 8, 16, 64 * GIB, 50 * GIB, gpus)


def test_every_row_can_be_planned_with() -> None:
    """A row with a rate in the wrong unit: plans that are wrong by a thousand."""
    names = [entry.name for entry in device_table()]
    assert len(names) == len(set(names))
    for entry in device_table():
        assert 1e12 < entry.flops < 1e15, entry.name
        assert 50e9 < entry.bandwidth < 10e12, entry.name
        assert 4 * GIB <= entry.memory_bytes <= 512 * GIB, entry.name
        assert 20 < entry.watts < 1000, entry.name
        assert 0 < entry.share.value < 1
        assert entry.share.source
        assert entry.source
        assert (entry.link > 0) == (entry.kind == "cuda")


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("rtx-4090", "rtx-4090"),
        ("RTX 4090", "rtx-4090"),
        ("m4_max-64", "m4-max-64"),
        ("m4-max", "m4-max-128"),
        ("m3-ultra", "m3-ultra-512"),
        ("h100", "h100-80"),
        ("A100", "a100-80"),
    ],
)
def test_a_device_is_found_by_the_names_people_type(asked: str, found: str) -> None:
    """`--device "RTX 4090"` refused for its space."""
    assert device(asked).name == found


def test_an_unknown_device_names_the_nearest() -> None:
    """A typo answered by a list of forty names alone."""
    with pytest.raises(ConfigError) as caught:
        device("rtx-4009")
    assert "rtx-4090" in str(caught.value)
    with pytest.raises(ConfigError, match="no device 'rtx'"):  # whose number is no size
        device("rtx")


def test_host_memory_belongs_to_cards_only() -> None:
    """A Mac planned with 64 GB of host memory that it does not have."""
    assert device("rtx-4090").host_bytes == DEFAULT_HOST_BYTES
    assert device("rtx-4090", host_bytes=32 * GIB).host_bytes == 32 * GIB
    with pytest.raises(ConfigError, match="one memory"):
        device("m4-max-64", host_bytes=32 * GIB)


@pytest.mark.parametrize(
    ("driver", "memory", "found"),
    [
        ("NVIDIA GeForce RTX 4090", 24, "rtx-4090"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", 16, "rtx-4070-ti-super"),
        ("NVIDIA H100 80GB HBM3", 80, "h100-80"),
        ("NVIDIA H200", 141, "h200"),
        ("NVIDIA A100-SXM4-40GB", 40, "a100-40"),
        ("NVIDIA A100-SXM4-80GB", 80, "a100-80"),
    ],
)
def test_a_card_is_known_by_its_drivers_name(driver: str, memory: int, found: str) -> None:
    """A 4090 planned with the rates of an unknown card."""
    gpu = Gpu(driver, "nvidia", memory * GIB, (memory - 1) * GIB)
    here = this_device(_machine(gpu), device_name="cuda:0")
    assert (here.flops, here.link) == (device(found).flops, device(found).link)
    assert here.memory_bytes == (memory - 1) * GIB, "what is free, not what is built in"
    assert here.host_bytes == 50 * GIB


def test_an_unknown_card_says_that_it_is_one() -> None:
    """A plan for a card of next year that looks as sure as one for a known card."""
    here = this_device(
        _machine(Gpu("NVIDIA RTX 9999", "nvidia", 48 * GIB, 40 * GIB)), device_name="cuda:0"
    )
    assert "calibrate" in here.source


def test_a_measured_rate_replaces_the_tables() -> None:
    """A calibration made and ignored."""
    here = this_device(_machine(), device_name="cpu", measured_flops=123e9)
    assert here.training_flops == pytest.approx(123e9)
    assert "calibrated" in here.share.source
