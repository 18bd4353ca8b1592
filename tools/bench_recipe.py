"""What a few minutes of training reach: held-out bits per byte on Python's standard library.

    python3 tools/bench_recipe.py --seconds 90 --seconds 180     quality in time
    python3 tools/bench_recipe.py --ladder 2 3 4                 depths at the dial's own horizons

The text is the running Python's standard library without tests and codec tables; the files whose
SHA-1 is 0 modulo 20 are held out (5%). Seconds are process CPU time over the number of threads, so
that a machine with neighbours gives the same figure as a quiet one. The figure is taken over the
whole held-out text in windows that do not overlap. `data_wait_share`: of the time that passed, what
steps waited for their batch.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from solollm.backend import Plan, SessionOptions, TrainSession
from solollm.config import OptimizerTable, ScheduleTable
from solollm.data.build import build_corpus
from solollm.data.sources import standard_library_sources
from solollm.data.stream import BatchStream, Prefetch, open_stream
from solollm.dial import from_depth, horizon
from solollm.held_out import held_out_loss
from solollm.registry import select_backend
from solollm.schedule import lr_at

PROBE_STEPS = 12


def main() -> None:
    arguments = _arguments()
    threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus"
        build_corpus(
            standard_library_sources(), corpus, vocab_size=arguments.vocab_size,
            split_rule="sha1-mod20",
        )  # fmt: skip
        for depth in arguments.ladder:
            print(json.dumps(train_horizon(corpus, depth, arguments)), flush=True)
        for seconds in arguments.seconds:
            print(json.dumps(train_for(corpus, seconds, threads, arguments)), flush=True)


def train_for(
    corpus: Path, seconds: float, threads: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Train for a budget of CPU seconds per thread, the first steps of which measure the speed."""
    model = from_depth(arguments.depth, arguments.vocab_size)
    session, stream, held_out = _open(corpus, model, arguments)
    ahead = Prefetch(stream)
    begun, started = time.process_time(), time.perf_counter()

    def spent() -> float:
        return (time.process_time() - begun) / threads

    # The schedule needs to know its end: the last steps correct the first guess as they go.
    step, total, waited = 0, 10**6, 0.0
    while step < total:
        if step >= PROBE_STEPS:
            total = max(step + 1, int(seconds / (spent() / step)))
        lr = lr_at(
            min(step, total - 1),
            total_steps=total,
            peak_lr=arguments.lr,
            table=_schedule(arguments),
        )
        asked = time.perf_counter()
        batch = ahead.batch(step)
        waited += time.perf_counter() - asked
        session.train_step(batch, lr=lr).result()
        step += 1
    used, passed = spent(), time.perf_counter() - started
    ahead.close()
    measured = held_out_loss(session, held_out, held_out.steps_per_epoch)
    session.close()
    return {
        "seconds": round(used, 1), "bits_per_byte": round(measured.bits_per_byte, 4),
        "steps": step, "data_wait_share": round(waited / passed, 5),
        "tokens_per_second": round(step * arguments.rows * arguments.seq_len / used),
        "parameters": model.num_parameters(), "threads": threads, **_settings(arguments),
    }  # fmt: skip


def train_horizon(corpus: Path, depth: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train the dial's model of this depth for the dial's own horizon."""
    model = from_depth(depth, arguments.vocab_size)
    dial = horizon(model)
    seq_len = model.max_position_embeddings
    arguments = argparse.Namespace(
        **{**vars(arguments), "seq_len": seq_len, "rows": max(1, dial.tokens_per_step // seq_len),
           "lr": dial.lr, "depth": depth}
    )  # fmt: skip
    session, stream, held_out = _open(corpus, model, arguments)
    total = math.ceil(dial.total_tokens / dial.tokens_per_step)
    begun = time.process_time()
    for step in range(total):
        lr = lr_at(step, total_steps=total, peak_lr=dial.lr, table=ScheduleTable())
        session.train_step(stream.batch(step), lr=lr)
    measured = held_out_loss(session, held_out, held_out.steps_per_epoch)
    session.close()
    return {
        "depth": depth, "parameters": model.num_parameters(), "steps": total,
        "bits_per_byte": round(measured.bits_per_byte, 4),
        "cpu_seconds": round(time.process_time() - begun), **_settings(arguments),
    }  # fmt: skip


def _open(
    corpus: Path, model: Any, arguments: argparse.Namespace
) -> tuple[TrainSession, BatchStream, BatchStream]:
    table = OptimizerTable(name=arguments.optimizer, weight_decay=arguments.weight_decay)
    rows, seq_len = arguments.rows, arguments.seq_len
    session = select_backend(arguments.backend).backend.train_session(
        model, SessionOptions(table, seed=arguments.seed),
        Plan(rows, False, "float32", seq_len, rows),
    )  # fmt: skip

    def stream(split: Any) -> BatchStream:
        return open_stream(
            corpus, split=split, seq_len=seq_len, batch_size=rows, seed=arguments.seed,
            mask_documents=not arguments.no_mask,
        )  # fmt: skip

    return session, stream("train"), stream("validation")


def _schedule(arguments: argparse.Namespace) -> ScheduleTable:
    return ScheduleTable(decay_fraction=arguments.decay_fraction)


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    names = ("optimizer", "lr", "rows", "seq_len", "vocab_size", "depth", "weight_decay",
             "decay_fraction", "no_mask", "seed")  # fmt: skip
    return {name: getattr(arguments, name) for name in names}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, action="append", default=[])
    parser.add_argument("--ladder", type=int, nargs="+", default=[], metavar="DEPTH")
    parser.add_argument("--optimizer", default="muon", choices=("muon", "adamw"))
    parser.add_argument("--lr", type=float, default=6e-3)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--decay-fraction", type=float, default=0.5)
    parser.add_argument("--no-mask", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", default="auto")
    return parser.parse_args()


if __name__ == "__main__":
    main()
