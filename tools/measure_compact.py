"""Does a model learn in compact mode what it learns with float32 masters and moments?

    OMP_NUM_THREADS=1 python tools/measure_compact.py [--steps 300] [--lr 1e-3]

A small model reads a random chain of tokens, each with four successors, 6 rows of 24 tokens a
step, so that no text is seen twice. Printed is the mean loss of the last 20 and 60 steps for each
way to hold the state, by FSDP2 in host memory with lagged clipping; and of plain float32.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np
from solollm_torch.backend import TorchBackend

from solollm.backend import Batch, Plan, SessionOptions
from solollm.config import OptimizerTable
from solollm.testing.bench import TIED

ROWS, LENGTH = 6, 24
HOST = {"offload": "fsdp"}
EXACT = "float32, resident, exact clipping"
WAYS: dict[str, tuple[dict[str, bool | int | float | str], int]] = {
    EXACT: ({}, 32),
    "float32, resident": ({}, 32),
    "float32": (HOST, 32),
    "split master, fp32 moments": ({"master": "split", **HOST}, 32),
    "split master, bf16 moments (compact)": ({"master": "split", **HOST}, 16),
    "bf16 master, bf16 moments": ({"master": "bfloat16", **HOST}, 16),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float, default=1e-3)
    arguments = parser.parse_args()
    for name, (options, bits) in WAYS.items():
        table = OptimizerTable.model_validate(
            {"name": "adamw", "clip": "exact" if name == EXACT else "lagged", "state_bits": bits}
        )
        plan = Plan(2, False, "float32", LENGTH, ROWS)
        session = TorchBackend().train_session(
            TIED, SessionOptions(table, backend_options={"threads": 1, **options}), plan
        )
        losses = [
            session.train_step(batch, lr=arguments.lr).result().loss
            for batch in chain(arguments.steps)
        ]
        print(f"{name:38} {np.mean(losses[-20:]):.5f} {np.mean(losses[-60:]):.5f}", flush=True)
        session.close()


def chain(count: int) -> Iterator[Batch]:
    """Batches of the chain, the same ones every time."""
    rng = np.random.default_rng(3)
    successors = rng.integers(0, TIED.vocab_size, (TIED.vocab_size, 4))
    for _ in range(count):
        tokens = np.zeros((ROWS, LENGTH + 1), np.int32)
        tokens[:, 0] = rng.integers(0, TIED.vocab_size, ROWS)
        for position in range(1, LENGTH + 1):
            choice = rng.choice(4, ROWS, p=[0.6, 0.2, 0.1, 0.1])
            tokens[:, position] = successors[tokens[:, position - 1], choice]
        labels = tokens[:, 1:].copy()
        yield Batch(tokens[:, :-1].copy(), labels, float(labels.size))


if __name__ == "__main__":
    main()
