"""What only a CUDA card can show, measured part by part; each adds to docs/results/gpu.json.

    python3 tools/gpu_check.py resident      1.3B in bf16: tokens/s, share of peak, every switch
    python3 tools/gpu_check.py offload7b     7B in 22.5 GiB of the card, beside itself uncapped
    python3 tools/gpu_check.py resume        bitwise resume; a run begun elsewhere goes on here
    python3 tools/gpu_check.py qlora         7B in NF4 with an adapter, beside transformers and peft
    python3 tools/gpu_check.py PART --tiny   the same code with a tiny model, on the CPU if need be

Each part ends within eight minutes on a bare machine with Python 3.12 and torch 2.11; it needs this
checkout and its dependencies. Without a card it says so and measures nothing: what the
documentation claims of cards then stays marked as unmeasured.

The figures that claims rest on come first, and each is written down as soon as it is there. What
could not be measured is written down with the reason, and costs no other figure; where the card
itself no longer answers, the part ends. `--only NAME` takes single figures, and adds to those of
the same commit on the same card.

For a machine without a network, wheels can travel with the checkout (45 MB). On one with a network:

    pip download --only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64 \\
        --platform manylinux2014_x86_64 -d wheels pydantic psutil transformers
    pip download --no-deps -d wheels liger-kernel cut-cross-entropy

and there `python3 tools/gpu_check.py PART --wheels wheels`. They go before what is installed, but
for NumPy and PyTorch, which belong together. The part `qlora` also needs bitsandbytes (60 MB), and
peft and accelerate for its peer.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import json
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
for place in (ROOT, ROOT / "backends", ROOT / "tools"):
    if str(place) not in sys.path:
        sys.path.insert(0, str(place))

PARTS = {
    "resident": "gpu_resident", "offload7b": "gpu_offload", "resume": "gpu_resume",
    "qlora": "gpu_qlora",
}  # fmt: skip
NEEDED = ("torch", "numpy", "pydantic", "psutil")
INSTALLED_FIRST = ("torch", "triton", "numpy")
LIMIT_SECONDS = 460.0  # of the eight minutes; starting Python and PyTorch takes some


def main(argv: list[str] | None = None) -> int:
    begun = time.monotonic()
    arguments = _arguments(argv)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.wheels is not None:
            use_wheels(arguments.wheels, Path(folder))
        missing = [module for module in NEEDED if find_spec(module) is None]
        if missing:
            print(f"not installed: {', '.join(missing)}; --wheels takes them from a folder")
            return 2
        return _measure(arguments, begun)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=sorted(PARTS), metavar="PART")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, also without a card")
    parser.add_argument("--only", action="append", default=[], help="one figure, by its name")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels for what is not installed")
    parser.add_argument("--limit", type=float, default=LIMIT_SECONDS, help="seconds for the part")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "gpu.json")
    return parser.parse_args(argv)


def _measure(arguments: argparse.Namespace, begun: float) -> int:
    import torch

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cpu" and not arguments.tiny:
        print(f"no CUDA card here: {arguments.part} is not measured, and claims about it stay so")
        return 0
    # Whatever hangs, even inside a kernel: what is written stays, and the traceback says where.
    faulthandler.dump_traceback_later(arguments.limit, exit=True)
    part = importlib.import_module(PARTS[arguments.part])
    command = f"python3 tools/gpu_check.py {arguments.part}" + (" --tiny" * arguments.tiny)
    ledger = Ledger(arguments.out, arguments.part, {"command": command, **circumstances(device)})
    longest, failure = 0.0, ""
    for name, measure in part.figures(device, tiny=arguments.tiny):
        if arguments.only and name not in arguments.only and not name.startswith("of "):
            continue
        since = time.monotonic()
        if arguments.limit - (since - begun) < longest:
            ledger.leave_out(name)
            continue
        found = attempt(measure)
        took = time.monotonic() - since
        longest = max(longest, took)
        print(f"{time.monotonic() - begun:6.0f} s  {name}: {json.dumps(found)[:200]}", flush=True)
        ledger.add(name, found, part.conclude, seconds=time.monotonic() - begun)
        failure = release(device)
        if failure:
            print(f"the card no longer answers after {name}: {failure}")
            break
    faulthandler.cancel_dump_traceback_later()
    print(json.dumps(ledger.record, indent=1))
    print(f"added to {arguments.out}")
    return 1 if failure else 0


def attempt(measure: Callable[[], Any]) -> Any:
    """What it gives, or why it gave nothing: one failing figure must not cost the others."""
    try:
        return measure()
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {str(error)[:400]}"}


def release(device: Any) -> str:
    """Give back what a figure held, and the code compiled for it. Why the card no longer answers,
    or the empty string: an error inside a kernel is final for a process."""
    import gc

    import torch

    torch.compiler.reset()
    gc.collect()
    if device.type != "cuda":
        return ""
    try:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.ones(1, device=device).sum().item()
    except RuntimeError as error:
        return str(error)[:400]
    return ""


class Ledger:
    """One part's record in the file, beside those of the others: whole on the disk after every
    figure. Figures of the same commit on the same card, with the same command, are kept."""

    def __init__(self, path: Path, part: str, head: dict[str, Any]) -> None:
        self._path, self._part = path, part
        old = self._records().get(part, {})
        same = all(old.get(key) == head[key] for key in ("command", "commit", "card"))
        self.record = {**head, "seconds": 0.0, "measured": old["measured"] if same else {}}

    def add(
        self,
        name: str,
        value: Any,
        conclude: Callable[[dict[str, Any]], None],
        *,
        seconds: float,
    ) -> None:
        """`conclude` derives shares and ratios from all figures that are there."""
        self.record["measured"][name] = value
        conclude(self.record["measured"])
        self.record["seconds"] = round(seconds, 1)
        self._write()

    def leave_out(self, name: str) -> None:
        """Say that there was no time for it, unless it is there from an earlier run."""
        self.record["measured"].setdefault(name, {"failed": "not begun: too little time was left"})
        self._write()

    def _write(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**self._records(), self._part: self.record}, indent=1)
        unfinished = self._path.with_suffix(".part")
        unfinished.write_text(text + "\n", encoding="utf-8")
        unfinished.replace(self._path)

    def _records(self) -> dict[str, Any]:
        if not self._path.exists():
            return {}
        records: dict[str, Any] = json.loads(self._path.read_text(encoding="utf-8"))
        return records


def use_wheels(wheels: Path, folder: Path) -> None:
    """Unpack every wheel into `folder`, and look there before looking among installed packages: an
    old one of those may be too old for the rest of the wheels."""
    for wheel in sorted(wheels.glob("*.whl")):
        name = wheel.name.partition("-")[0]
        if name in INSTALLED_FIRST and find_spec(name) is not None:
            continue
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    installed = (index for index, path in enumerate(sys.path) if path.endswith("-packages"))
    sys.path.insert(next(installed, len(sys.path)), str(folder))


def circumstances(device: Any) -> dict[str, Any]:
    """Machine, versions, commit and date, and which card."""
    import torch
    from bench import circumstances as of_machine

    card = "none"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        card = f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB"
    return {**of_machine(), "card": card, "cuda": torch.version.cuda}


if __name__ == "__main__":
    sys.exit(main())
