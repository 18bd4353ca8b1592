"""What only a CUDA card can show, measured part by part; each adds to docs/results/gpu.json.

    python3 tools/gpu_check.py resident      1.3B in bf16: tokens/s, share of peak, every switch
    python3 tools/gpu_check.py offload7b     7B in 22.5 GiB of the card, beside itself uncapped
    python3 tools/gpu_check.py resume        bitwise resume; a run begun elsewhere goes on here
    python3 tools/gpu_check.py qlora         7B in NF4 with an adapter, beside transformers and peft
    python3 tools/gpu_check.py PART --tiny   the same code with a tiny model, on the CPU if need be

Each part takes less than eight minutes on a bare machine with Python 3.12 and torch 2.11; it needs
this checkout, its dependencies, and nothing downloaded. Without a card it says so and measures
nothing: what the documentation claims of cards then stays marked as unmeasured. A figure that could
not be measured is written down with the reason.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=sorted(PARTS), metavar="PART")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, also without a card")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "gpu.json")
    arguments = parser.parse_args(argv)
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not arguments.tiny:
        print(f"no CUDA card here: {arguments.part} is not measured, and claims about it stay so")
        return 0
    begun = time.monotonic()
    part = importlib.import_module(PARTS[arguments.part])
    measured = part.measure(device, tiny=arguments.tiny)
    record = {
        "command": f"python3 tools/gpu_check.py {arguments.part}"
        + (" --tiny" if arguments.tiny else ""),
        **circumstances(device),
        "seconds": round(time.monotonic() - begun, 1),
        "measured": measured,
    }
    add_to(arguments.out, arguments.part, record)
    print(json.dumps(record, indent=1))
    print(f"added to {arguments.out}")
    return 0


def circumstances(device: Any) -> dict[str, Any]:
    """Machine, versions, commit and date, and which card."""
    import torch
    from bench import circumstances as of_machine

    card = "none"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        card = f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB"
    return {**of_machine(), "card": card, "cuda": torch.version.cuda}


def add_to(path: Path, part: str, record: dict[str, Any]) -> None:
    """Put one part's record into the file, beside those of the others."""
    records = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**records, part: record}, indent=1)
    path.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
