"""The device table: what a plan assumes of hardware that it cannot measure from here.

Datasheet figures and the share of them that training was seen to reach, each with its source. They
make projections; a calibration on the device itself (`solollm.calibration`) replaces the rates.
Bytes are those of the vendor's gigabyte names in binary units; rates are per second and dense
(without sparsity), with fp32 accumulation.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from solollm.errors import ConfigError, nearest
from solollm.hardware import Gpu, HostSystem, Machine

GIB = 1 << 30
Kind = Literal["cuda", "apple", "cpu"]


class Share(NamedTuple):
    """The part of the datasheet's peak that training reaches, and who measured it."""

    value: float
    source: str


_SHARES = {
    "geforce": Share(0.55, "LLaMA-Factory with Liger on a 4090: 55-62% (LLM.Q repository)"),
    "a100": Share(0.52, "TinyLlama README: 24k tokens/s at 1.1B on an A100"),
    "hopper": Share(0.40, "torchtitan 8B on H100: 33-39%, nanochat 40-46%"),
    "apple": Share(0.42, "mlx-examples issue 127: 34-47% of the fp32 rate, M1 Pro to M3 Max"),
    "cpu": Share(0.65, "this project, docs/results/train.md: share of the matrix-multiply rate"),
}
# Of the memory's bandwidth, what generating one token at a time reaches.
_DECODE_SHARES = {
    "cuda": Share(0.6, "Llama-2-7B in 4 bits on a 4090: llama.cpp 57%, ExLlamaV2 67%, MLC 77%"),
    "apple": Share(0.43, "mlx-vlm PR 2153: 1B in bf16 on an M3 Ultra"),
    "cpu": Share(0.6, "taken from cards: not measured on processors"),
}


@dataclass(frozen=True)
class Device:
    """One kind of machine to train on.

    `memory_bytes` is what the device's allocator may fill: a card's own memory, or all unified
    memory of a Mac. `flops` is the peak in `compute_dtype`; `link` the bytes per second that
    pinned memory crosses to the card, one way; `watts` what board (or chip) and host draw under
    load. `float32_flops` is the peak of fp32 products that are not rounded to fewer bits first.
    """

    name: str
    kind: Kind
    family: str
    memory_bytes: int
    flops: float
    compute_dtype: Literal["float32", "bfloat16", "float16"]
    bandwidth: float
    link: float
    watts: float
    source: str
    host_bytes: int = 0  # memory beside the device's own; 0 where it is one
    measured_flops: float = 0.0  # what a calibration reached; 0: none
    float32_flops: float = 0.0  # 0: as in `compute_dtype`

    @property
    def share(self) -> Share:
        """Of `flops`, what training is expected to reach."""
        if self.measured_flops:
            return Share(self.measured_flops / self.flops, "calibrated on this machine")
        return _SHARES[self.family]

    @property
    def decode_share(self) -> Share:
        """Of `bandwidth`, what generating is expected to reach."""
        return _DECODE_SHARES[self.kind]

    @property
    def training_flops(self) -> float:
        """FLOP per second that a plan counts on."""
        return self.flops * self.share.value

    @property
    def float32_training_flops(self) -> float:
        """The same for what is computed in fp32."""
        return (self.float32_flops or self.flops) * self.share.value

    @property
    def is_unified(self) -> bool:
        return self.kind != "cuda"


_NVIDIA = "NVIDIA architecture whitepapers and product pages"
# fp32 products over bf16 ones: cards multiply bf16 on tensor cores, and fp32 elsewhere.
_FLOAT32_SHARES = {"geforce": 1 / 2, "a100": 19.5 / 312, "hopper": 67 / 989}
_HOST_WATTS = 100  # processor, memory, disk and losses of the power supply beside a card
# name: TFLOP/s bf16 with fp32 accumulation, GB, GB/s, board watts, link GB/s one way.
_GEFORCE: dict[str, tuple[float, float, float, float, float]] = {
    "rtx-3060": (25.5, 12, 360, 170, 25), "rtx-3060-ti": (32.4, 8, 448, 200, 25),
    "rtx-3070": (40.6, 8, 448, 220, 25), "rtx-3070-ti": (43.5, 8, 608, 290, 25),
    "rtx-3080": (59.5, 10, 760, 320, 25), "rtx-3080-ti": (68.2, 12, 912, 350, 25),
    "rtx-3090": (71.0, 24, 936, 350, 25), "rtx-3090-ti": (80.0, 24, 1008, 450, 25),
    "rtx-4060": (30.2, 8, 272, 115, 13), "rtx-4060-ti-16": (44.1, 16, 288, 165, 13),
    "rtx-4070": (58.3, 12, 504, 200, 25), "rtx-4070-super": (71.0, 12, 504, 220, 25),
    "rtx-4070-ti": (80.2, 12, 504, 285, 25), "rtx-4070-ti-super": (88.2, 16, 672, 285, 25),
    "rtx-4080": (97.5, 16, 717, 320, 25), "rtx-4080-super": (104.4, 16, 736, 320, 25),
    "rtx-4090": (165.2, 24, 1008, 450, 25), "rtx-5060": (38.4, 8, 448, 145, 28),
    "rtx-5060-ti-16": (47.4, 16, 448, 180, 28), "rtx-5070": (61.7, 12, 672, 250, 55),
    "rtx-5070-ti": (87.9, 16, 896, 300, 55), "rtx-5080": (112.6, 16, 960, 360, 55),
    "rtx-5090": (209.5, 32, 1792, 575, 55),
}  # fmt: skip
_DATACENTRE: dict[str, tuple[float, float, float, float, float]] = {
    "a100-40": (312, 40, 1555, 400, 25), "a100-80": (312, 80, 2039, 400, 25),
    "h100-80": (989, 80, 3350, 700, 55), "h200": (989, 141, 4800, 700, 55),
}  # fmt: skip
# chip: fp32 TFLOP/s of its GPU, memory GB/s, watts of the machine under load, whether bf16 is
# native, memory sizes sold (GB).
_APPLE_SOURCE = "huggingface.js hardware.ts and its PRs 1044, 2033; watts: estimates"
_APPLE: dict[str, tuple[float, float, float, bool, tuple[int, ...]]] = {
    "m1": (2.6, 68, 30, False, (8, 16)), "m1-pro": (5.2, 200, 45, False, (16, 32)),
    "m1-max": (10.4, 400, 85, False, (32, 64)), "m1-ultra": (21.0, 800, 150, False, (64, 128)),
    "m2": (3.6, 100, 30, False, (8, 16, 24)), "m2-pro": (6.8, 200, 50, False, (16, 32)),
    "m2-max": (13.5, 400, 95, False, (32, 64, 96)),
    "m2-ultra": (27.2, 800, 180, False, (64, 128, 192)),
    "m3": (4.1, 100, 30, True, (8, 16, 24)), "m3-pro": (7.4, 150, 50, True, (18, 36)),
    "m3-max": (14.2, 400, 95, True, (36, 48, 64, 96, 128)),
    "m3-ultra": (28.4, 819, 180, True, (96, 256, 512)),
    "m4": (4.6, 120, 35, True, (16, 24, 32)), "m4-pro": (9.2, 273, 60, True, (24, 48, 64)),
    "m4-max": (18.4, 546, 110, True, (36, 48, 64, 128)),
    "m5": (5.7, 153, 35, True, (16, 24, 32)), "m5-pro": (11.4, 307, 60, True, (24, 48, 64)),
    "m5-max": (22.8, 614, 110, True, (36, 48, 64, 128)),
}  # fmt: skip
# Peak fp32 rate of one core of a server or desktop processor, by the width of its vectors.
_CPU_GFLOPS_PER_CORE = {"avx512": 100.0, "avx2": 70.0, "other": 35.0}
_CPU_WATTS_PER_CORE = 8.0
DEFAULT_HOST_BYTES = 64 * GIB
_DECORATION = re.compile(r"nvidia|geforce|apple|gpu|tesla|sxm\d?|pcie|hbm\w*|\d+gb")


def _cards() -> list[Device]:
    found = []
    for table in (_GEFORCE, _DATACENTRE):
        for name, (tflops, size, bandwidth, watts, link) in table.items():
            family = "a100" if name.startswith("a100") else "hopper"
            family = "geforce" if table is _GEFORCE else family
            found.append(
                Device(
                    name, "cuda", family, int(size * GIB), tflops * 1e12, "bfloat16",
                    bandwidth * 1e9, link * 1e9, watts + _HOST_WATTS, _NVIDIA, DEFAULT_HOST_BYTES,
                    float32_flops=tflops * 1e12 * _FLOAT32_SHARES[family],
                )
            )  # fmt: skip
    return found


def _macs() -> list[Device]:
    found = []
    for chip, (tflops, bandwidth, watts, has_bf16, sizes) in _APPLE.items():
        for size in sizes:
            found.append(
                Device(
                    f"{chip}-{size}", "apple", "apple", size * GIB, tflops * 1e12,
                    "bfloat16" if has_bf16 else "float32", bandwidth * 1e9, 0.0, watts,
                    _APPLE_SOURCE,
                )
            )  # fmt: skip
    return found


def device_table() -> tuple[Device, ...]:
    """Every device known by name, cards first."""
    return (*_cards(), *_macs())


def device(name: str, *, host_bytes: int = 0) -> Device:
    """The device of a name: `rtx-4090`, `h200`, `m4-max-64`; a chip without a size has its
    largest. `host_bytes` replaces the 64 GiB assumed beside a card.

    Raises:
        ConfigError: an unknown name (says the nearest), or host memory for a machine that has none.
    """
    wanted = re.sub(r"[\s_]+", "-", name.strip().lower())
    table = {entry.name: entry for entry in device_table()}
    found = table.get(wanted)
    if found is None:
        with_sizes = [n for n in table if n in _DATACENTRE or table[n].kind == "apple"]
        sized = [n for n in with_sizes if n.rpartition("-")[0] == wanted]
        found = table[sized[-1]] if sized else None
    if found is None:
        raise ConfigError(
            f"no device {name!r} is known",
            why=f"the table has {', '.join(families())}",
            fix=nearest(wanted, table) or "use `--device this` on the machine itself",
        )
    if host_bytes and found.is_unified:
        raise ConfigError(
            f"{found.name} has one memory for processor and GPU",
            fix="leave --host-memory out; the size is in the device's name",
        )
    return replace(found, host_bytes=host_bytes) if host_bytes else found


def families() -> Sequence[str]:
    """The names to show: cards by name, Macs by chip."""
    cards = [*_GEFORCE, *_DATACENTRE]
    return [*cards, *(f"{chip}-{'|'.join(map(str, row[4]))}" for chip, row in _APPLE.items())]


def this_device(machine: Machine, *, device_name: str, measured_flops: float = 0.0) -> Device:
    """This machine as a device. `device_name` is the backend's own: "cpu", "cuda:0", "gpu".

    A card or chip that the table knows gives its rates; memory is what is free here now.
    """
    if device_name.startswith("cpu") or not machine.gpus:
        return _this_cpu(machine, measured_flops)
    gpu, known = _gpu(machine, device_name), table_entry(machine, device_name)
    if gpu.vendor == "nvidia":
        base = known or device("rtx-3060")
        return Device(
            gpu.name, "cuda", base.family, gpu.free_bytes or gpu.memory_bytes, base.flops,
            base.compute_dtype, base.bandwidth, base.link, base.watts,
            base.source if known else "unknown card: rates of an RTX 3060; calibrate",
            machine.available_bytes, measured_flops, base.float32_flops,
        )  # fmt: skip
    base = known or device("m1")
    return Device(
        gpu.name, "apple", "apple", gpu.free_bytes, base.flops, base.compute_dtype,
        base.bandwidth, 0.0, base.watts,
        base.source if known else "unknown chip: rates of an M1; calibrate", 0, measured_flops,
    )  # fmt: skip


def table_entry(machine: Machine, device_name: str) -> Device | None:
    """What the table says of the card or chip that a backend computes on; None for a processor,
    which has no datasheet rate, and for one that the table does not know."""
    if device_name.startswith("cpu") or not machine.gpus:
        return None
    gpu = _gpu(machine, device_name)
    return _match(gpu.name, gpu.memory_bytes if gpu.vendor == "nvidia" else machine.ram_bytes)


def _gpu(machine: Machine, device_name: str) -> Gpu:
    index = device_name.partition(":")[2]
    return machine.gpus[min(int(index) if index.isdigit() else 0, len(machine.gpus) - 1)]


def _this_cpu(machine: Machine, measured_flops: float) -> Device:
    flags = HostSystem().read("/proc/cpuinfo")
    width = next((w for w in ("avx512", "avx2") if w in flags), "other")
    flops = _CPU_GFLOPS_PER_CORE[width] * 1e9 * machine.cores
    return Device(
        machine.cpu, "cpu", "cpu", machine.available_bytes, flops, "float32",
        10e9 * machine.cores, 0.0, 30 + _CPU_WATTS_PER_CORE * machine.cores,
        f"{machine.cores} cores with {width}: an estimate; calibrate", 0, measured_flops,
    )  # fmt: skip


def _match(name: str, memory_bytes: int) -> Device | None:
    """The table's entry for a driver's name: "NVIDIA GeForce RTX 4070 Ti SUPER", "Apple M4 Max"."""
    words = re.split(r"[\s-]+", name.lower())
    slug = "-".join(word for word in words if word and not _DECORATION.fullmatch(word))
    entries = [
        entry for entry in device_table()
        if slug in (entry.name, re.sub(r"-\d{2,3}$", "", entry.name))
    ]  # fmt: skip
    if not entries:
        return None
    return min(entries, key=lambda entry: abs(entry.memory_bytes - memory_bytes))
