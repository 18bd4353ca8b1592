"""Every benchmark whose figures the documentation quotes; each writes its JSON to docs/results/.

    python3 tools/bench.py                    all parts, about fifteen minutes on two cores
    python3 tools/bench.py train              beside transformers and litgpt, in one process
    python3 tools/bench.py ways               our own ways to hold a model: time, memory, copies
    python3 tools/bench.py recipe             held-out bits per byte in 90 and 180 seconds
    python3 tools/bench.py tokenizer decode   against `tokenizers`; against transformers' generate

litgpt comes without its dependencies into an environment of its own (`.venv-bench`), which sees the
packages of this interpreter.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import venv
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
PEERS = ("litgpt==0.5.13", "lightning==2.6.*", "lightning-utilities", "torchmetrics")
PARTS: dict[str, list[str]] = {
    "train": ["-m", "solollm", "bench", "train", "--rounds", "5", "--json"],
    "ways": [
        "-m",
        "solollm",
        "bench",
        "train",
        "--alone",
        "--recompute",
        "--rounds=3",
        "--way=resident",
        "--way=streaming",
        "--way=FSDP2 offload",
        "--json",
    ],
    "recipe": [
        "tools/bench_recipe.py",
        "--seconds",
        "90",
        "--seconds",
        "180",
        "--depth",
        "3",
        "--rows",
        "4",
        "--lr",
        "0.007",
    ],
    "tokenizer": ["tools/bench_tokenizer.py", "--json"],
    "decode": ["tools/bench_decode.py"],
    "mlx-decode": ["tools/bench_decode_mlx.py"],
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], metavar="PART")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    failed = [name for name in arguments.parts or PARTS if not run(name, arguments.threads)]
    print(f"benchmarks: {', '.join(failed)} failed" if failed else "benchmarks: all done")
    return 1 if failed else 0


def run(name: str, threads: int) -> bool:
    """One part; whether it ended well. Prints what it measured and writes it down."""
    python = bench_environment() if name == "train" else Path(sys.executable)
    command = PARTS[name]
    # Threads that wait in a loop would be charged to whoever waits.
    settings = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
    print(f"\n{name}: {' '.join(['python', *command])}  ({threads} threads)", flush=True)
    done = subprocess.run(
        [str(python), *command], cwd=ROOT, env={**os.environ, **settings}, check=False,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    print(done.stdout, flush=True)
    if done.returncode != 0:
        return False
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    record = {
        "command": f"python3 tools/bench.py {name} --threads {threads}", **circumstances(),
        "measured": lines[0] if len(lines) == 1 else lines or done.stdout.splitlines(),
    }  # fmt: skip
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path.relative_to(ROOT)}")
    return True


def bench_environment() -> Path:
    """The interpreter of `.venv-bench`: this one's packages, this checkout, and the peers that
    would bring half the world with them."""
    folder = ROOT / ".venv-bench"
    python = folder / "bin" / "python"
    if not (folder / "solollm-bench").exists():
        venv.create(folder, with_pip=True, clear=True)
        site = next(folder.glob("lib/python*/site-packages"))
        # Not purelib alone: an interpreter may itself see packages of another one.
        seen = [path for path in sys.path if path.endswith("-packages")]
        seen += [str(ROOT), str(ROOT / "backends")]
        (site / "solollm-bench.pth").write_text("\n".join(seen) + "\n", encoding="utf-8")
        print(f"downloading {', '.join(PEERS)} (about 2 MB) into {folder.name}", flush=True)
        subprocess.run(
            [str(python), "-m", "pip", "install", "--quiet", "--no-deps", *PEERS], check=True
        )
        (folder / "solollm-bench").touch()
    return python


def circumstances() -> dict[str, Any]:
    """Machine, versions, commit and date, as docs/results/README.md asks."""
    from solollm.hardware import read_machine

    machine = read_machine()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    versions = {"python": platform.python_version()}
    for package in ("torch", "transformers", "tokenizers", "numpy", "mlx"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "date": date.today().isoformat(),
        "machine": f"{machine.cpu}, {machine.cores} cores, {machine.ram_bytes / 2**30:.0f} GiB",
        "versions": versions,
        "commit": commit.stdout.strip(),
        "load": os.getloadavg()[0],
    }


if __name__ == "__main__":
    sys.exit(main())
