"""What fine-tuning costs: peak memory by method, and speed beside transformers, peft and
bitsandbytes on the same processor.

    python tools/bench_finetune.py memory [--seq-len 512] [--rows 1] [--backend mlx]
    python tools/bench_finetune.py speed  [--seq-len 512] [--rows 2] [--turns 6]
    python tools/bench_finetune.py padded --data train.jsonl [--samples 48] [--turns 3]
    python tools/bench_finetune.py losses [--seq-len 512] [--steps 6]

`memory` trains a step of each method in a fresh process and prints its peak above what the process
held once its frameworks were imported; on MLX, the peak that its allocator counts. `speed` trains
on full rows, `padded` on GSM8K's rows of unequal length, which the peer pads and we pack, and
counts only tokens that are somebody's; a second peer has batches of like lengths, as its own option
`group_by_length` makes them. Each side lives in its own process, as its users run it, and they take
turns: one waits while the other trains, so that both meet the same machine. Times are processor
seconds of those processes, on one thread. `losses` says what the sides' losses differ by, and how
much of it is the rounding of the base. The sides themselves are in `finetune_sides`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import finetune_sides as sides
import numpy as np
import psutil
from finetune_sides import Turn, Work

PARTS = ("memory", "speed", "padded", "losses", "peak", "turns")
METHODS = ("full", "lora", "qlora", "peer")
SIDES = ("ours", "peer", "grouped peer")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--method", choices=METHODS, default="qlora")
    parser.add_argument("--side", choices=SIDES, default="ours")
    parser.add_argument("--backend", choices=["torch", "mlx"], default="torch")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--rows", type=int, default=0)
    parser.add_argument("--turns", type=int, default=0)
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--steps", type=int, default=6)
    arguments = parser.parse_args()
    if arguments.part not in ("peak", "turns"):
        print(describe(), flush=True)
    parts = (memory, speed, padded, losses, peak, turns)
    dict(zip(PARTS, parts, strict=True))[arguments.part](arguments)
    return 0


def describe() -> str:
    from importlib.metadata import version

    names = ("torch", "mlx", "transformers", "peft", "bitsandbytes", "accelerate")
    shown = ", ".join(f"{name} {version(name)}" for name in names)
    machine = f"{platform.machine()}, Python {platform.python_version()}"
    return f"{machine}, {shown}; {sides.MODEL.num_parameters():,} parameters"


def memory(arguments: argparse.Namespace) -> None:
    """Peaks of fresh processes."""
    peaks: dict[str, float] = {}
    for method in METHODS if arguments.backend == "torch" else METHODS[:3]:
        words = ["peak", "--method", method, "--seq-len", str(arguments.seq_len)]
        words += ["--backend", arguments.backend, "--rows", str(arguments.rows or 1)]
        done = subprocess.run(
            [sys.executable, __file__, *words], check=True, stdout=subprocess.PIPE, text=True,
            env=one_thread(),
        )  # fmt: skip
        found = json.loads(done.stdout.splitlines()[-1])
        peaks[method] = found["peak"] - found["baseline"]
        less = 1 - peaks[method] / peaks["full"]
        name = "transformers + peft + bitsandbytes, QLoRA" if method == "peer" else method
        shown = f"{peaks[method] / 2**20:8.0f} MiB above {found['baseline'] / 2**20:.0f}"
        print(f"{name:42} {shown}  {less:6.1%} below full", flush=True)


def peak(arguments: argparse.Namespace) -> None:
    """In a process of its own: one step of one method; bytes before the model, and the most."""
    batch = sides.full_rows(arguments.rows, arguments.seq_len, 0)
    place = {"rows": arguments.rows, "seq_len": arguments.seq_len}
    if arguments.backend == "mlx":
        from solollm_mlx.backend import MlxBackend

        session = sides.make_session(arguments.method, **place, on=MlxBackend())
        session.train_step(batch, lr=sides.LR).result()
        print(json.dumps({"baseline": 0, "peak": session.memory().peak_bytes}))
        return
    if arguments.method == "peer":
        sides.import_peer()
        baseline = psutil.Process().memory_info().rss
        sides.Peer().train([batch], lambda: None, lambda _: None)
    else:
        sides.import_ours(arguments.method)
        baseline = psutil.Process().memory_info().rss
        session = sides.make_session(arguments.method, **place)
        session.train_step(batch, lr=sides.LR).result()
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"baseline": baseline, "peak": highest}))


def speed(arguments: argparse.Namespace) -> None:
    """Full rows; the losses of the two sides agree, for they train the same adapter."""
    found = compare(arguments, ("ours", "peer"), arguments.turns or 6, works(arguments))
    show_apart("peer", *([turn.loss for turn in found[side]] for side in ("ours", "peer")))


def losses(arguments: argparse.Namespace) -> None:
    """Along the same steps: the peer as it is, and over a base whose magnitudes are ours."""
    batches = [sides.full_rows(1, arguments.seq_len, step) for step in range(arguments.steps)]
    session = sides.make_session("qlora", rows=1, seq_len=arguments.seq_len)
    ours = [session.train_step(batch, lr=sides.LR).result().loss for batch in batches]
    session.close()
    for name, our_magnitudes in (("peer", False), ("peer, our magnitudes", True)):
        theirs: list[float] = []
        peer = sides.Peer(our_magnitudes=our_magnitudes)
        peer.train(batches, lambda: None, theirs.append)
        show_apart(name, ours, theirs)


def show_apart(name: str, ours: Sequence[float], theirs: Sequence[float]) -> None:
    apart = [abs(a - b) / b for a, b in zip(ours, theirs, strict=True)]
    for side, shown in (("ours", ours), (name, theirs)):
        print(f"losses, {side}: {', '.join(f'{loss:.6f}' for loss in shown)}")
    print(f"relative difference: {', '.join(f'{value:.0e}' for value in apart)}", flush=True)


def padded(arguments: argparse.Namespace) -> None:
    """Real rows: the peer pads each of its batches to the longest, we pack; loss on answers."""
    found = works(arguments)
    for side, work in found.items():
        positions = sum(batch.input_ids.size for batch in work.batches)
        shape = f"{len(work.batches)} steps, padding {1 - work.tokens / positions:.1%}"
        print(f"{side}: {work.tokens:,} useful tokens, {shape}", flush=True)
    compare(arguments, SIDES, arguments.turns or 3, found)


def works(arguments: argparse.Namespace) -> dict[str, Work]:
    """What a turn of each side trains on."""
    rows, length = arguments.rows or 2, arguments.seq_len
    if arguments.data is None:
        work = Work([sides.full_rows(rows, length, 1)], rows * length)
        return dict.fromkeys(SIDES, work)
    return sides.real_rows(arguments.data, samples=arguments.samples, seq_len=length)


def compare(
    arguments: argparse.Namespace, names: tuple[str, ...], count: int, work: dict[str, Work]
) -> dict[str, list[Turn]]:
    """Take turns; print rates, in useful tokens, and ratios."""
    tokens = {name: work[name].tokens for name in names}
    children = {name: child(arguments, name, count) for name in names}
    found: dict[str, list[Turn]] = {name: [] for name in names}
    for process in children.values():
        answer(process)  # it is warm
    for _ in range(count):
        for name, process in children.items():
            found[name].append(Turn(*answer(process, ask=True)))
            print(f"{name}: {tokens[name] / found[name][-1].seconds:.1f}", flush=True)
    for process in children.values():
        process.communicate()
    rates = {name: [tokens[name] / turn.seconds for turn in turns] for name, turns in found.items()}
    for name in names:
        shown = ", ".join(f"{rate:.1f}" for rate in rates[name])
        print(f"{name}: {np.median(rates[name]):.1f} tokens per processor second ({shown})")
    for name in names[1:]:
        ratios = [a / b for a, b in zip(rates["ours"], rates[name], strict=True)]
        shown = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"ours / {name}: {np.median(ratios):.3f} ({shown})", flush=True)
    return found


def child(arguments: argparse.Namespace, name: str, count: int) -> subprocess.Popen[str]:
    words = ["turns", "--side", name, "--seq-len", str(arguments.seq_len), "--turns", str(count)]
    words += ["--rows", str(arguments.rows), "--samples", str(arguments.samples)]
    words += [] if arguments.data is None else ["--data", str(arguments.data)]
    return subprocess.Popen(
        [sys.executable, __file__, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True, env=one_thread(),
    )  # fmt: skip


def answer(process: subprocess.Popen[str], *, ask: bool = False) -> Any:
    """The next line that the child prints as JSON, after it was asked for a turn."""
    assert process.stdin is not None
    assert process.stdout is not None
    if ask:
        process.stdin.write("\n")
        process.stdin.flush()
    for line in process.stdout:
        if line.startswith("["):
            return json.loads(line)
    raise SystemExit(f"the child {process.args!r} ended early")


def turns(arguments: argparse.Namespace) -> None:
    """In a process of its own: a turn for every line that comes in."""
    work = works(arguments)[arguments.side]
    run = sides.our_turns if arguments.side == "ours" else sides.peer_turns
    run(work, arguments.turns)


def one_thread() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


if __name__ == "__main__":
    sys.exit(main())
