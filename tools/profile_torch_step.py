"""Where the CPU seconds of a PyTorch training step go, and what each trick in it is worth.

    OMP_NUM_THREADS=1 python tools/profile_torch_step.py
    OMP_NUM_THREADS=1 python tools/profile_torch_step.py --without onednn --operators

Prints process CPU time per step beside the matrix-multiply rate of the same process. Its figures
stand in `docs/results/torch_step_profile.md`.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from typing import Any

import numpy as np

SIZES = {
    "17m": {"vocab_size": 8192, "hidden_size": 384, "intermediate_size": 1024,
            "num_hidden_layers": 8, "num_attention_heads": 6},
    "1m": {"vocab_size": 2048, "hidden_size": 128, "intermediate_size": 352,
           "num_hidden_layers": 4, "num_attention_heads": 2},
}  # fmt: skip
ROWS, LENGTH = 8, 256
TRICKS = ("memory", "onednn", "hand", "kernels")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="17m")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--micro-batch", type=int, default=ROWS)
    parser.add_argument("--without", default="", help=f"of {', '.join(TRICKS)}, by commas")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--operators", action="store_true", help="print PyTorch's profile too")
    arguments = parser.parse_args()
    leave_out(set(filter(None, arguments.without.split(","))))
    step, flops = make_step(arguments)
    for _ in range(2):
        step()
    faults, seconds, rates = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, [], []
    for _ in range(arguments.steps):
        rates.append(gemm_rate())
        start = time.process_time()
        step()
        seconds.append(time.process_time() - start)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    median, rate = statistics.median(seconds), statistics.median(rates)
    print(
        f"CPU ms per step: median {median * 1e3:.0f}, least {min(seconds) * 1e3:.0f};"
        f" tokens per CPU second {ROWS * LENGTH / median:.0f};"
        f" GEMM {rate / 1e9:.0f} GF/s, share of it {flops / median / rate:.0%};"
        f" page faults per step {faults // arguments.steps}"
    )
    if arguments.operators:
        print_operators(step)


def leave_out(tricks: set[str]) -> None:
    """Run without some of what makes the step fast."""
    from solollm_torch import ops, process, products

    if unknown := tricks - set(TRICKS):
        raise SystemExit(f"unknown: {', '.join(unknown)}; known: {', '.join(TRICKS)}")
    if "memory" in tricks:
        process.keep_freed_memory = lambda: None  # type: ignore[assignment]
    if "onednn" in tricks or "hand" in tricks:  # autograd cannot see through oneDNN's operator
        products.rule = lambda: products.Rule(False, False)  # type: ignore[assignment]
    if "hand" in tricks:
        ops.by_hand = lambda: False


def make_step(arguments: argparse.Namespace) -> tuple[Any, float]:
    """A function that trains one step, and the step's FLOPs."""
    from solollm_torch.backend import TorchBackend

    from solollm.architecture import ModelConfig
    from solollm.backend import Batch, Plan, SessionOptions
    from solollm.config import OptimizerTable

    fields = SIZES[arguments.size]
    model = ModelConfig.model_validate(
        fields | {"head_dim": 64, "num_key_value_heads": fields["num_attention_heads"],
                  "tie_word_embeddings": True}
    )  # fmt: skip
    options = SessionOptions(
        OptimizerTable(name="adamw"),
        backend_options={
            "compile": arguments.compile,
            "kernels": not {"kernels", "hand"} & set(arguments.without.split(",")),
        },
    )
    plan = Plan(arguments.micro_batch, False, arguments.dtype, LENGTH, ROWS)
    session = TorchBackend().train_session(model, options, plan)
    ids = np.random.default_rng(0).integers(0, model.vocab_size, (ROWS, LENGTH + 1)).astype("int32")
    batch = Batch(ids[:, :-1].copy(), ids[:, 1:].copy(), float(ROWS * LENGTH))
    return (
        lambda: session.train_step(batch, lr=1e-3).result(),
        model.flops_per_token(LENGTH) * ROWS * LENGTH,
    )


def gemm_rate() -> float:
    """FLOPs per CPU second of PyTorch's own fp32 product of [2048, 1024] and [1024, 1024]."""
    import torch

    left, right = torch.ones(2048, 1024), torch.ones(1024, 1024)
    start = time.process_time()
    for _ in range(3):
        left @ right
    return 3 * 2 * 2048 * 1024 * 1024 / (time.process_time() - start)


def print_operators(step: Any) -> None:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(3):
            step()
    table = profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=30)
    print(table)


if __name__ == "__main__":
    main()
