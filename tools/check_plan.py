"""Plans against what becomes of them: peak memory and seconds per step of real sessions.

    python tools/check_plan.py memory            each shape in a fresh process, two steps
    python tools/check_plan.py time --steps 200  calibrated from cut models, then really run

`memory` compares plan and peak, both above what the process held when the framework was imported:
of the plan, without what it counts for a process at that moment.
`time` calibrates (`solollm.calibration`: half and a quarter of the layers, one and up to four
micro-batches) and then runs the whole shape, so no shape is compared with a measurement of itself.
Both print one line of JSON per shape.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from solollm.architecture import ModelConfig
from solollm.backend import Plan, SessionOptions
from solollm.config import OptimizerTable

# name: hidden, layers, heads, kv heads, intermediate, vocabulary, optimizer; rows, length,
# micro-batch, recompute
MEMORY = {
    "narrow": ((192, 10, 3, 3, 512, 4096, "adamw"), (32, 256, 32, False)),
    "wide": ((768, 6, 12, 12, 2048, 8192, "adamw"), (4, 256, 4, False)),
    "deep": ((256, 16, 4, 4, 704, 4096, "muon"), (16, 256, 16, False)),
    "grouped": ((384, 8, 6, 2, 1024, 8192, "muon"), (16, 256, 16, False)),
    "recomputing": ((512, 12, 8, 8, 1376, 8192, "adamw"), (16, 256, 16, True)),
    "recomputing deep": ((256, 20, 4, 4, 704, 4096, "adamw"), (32, 256, 32, True)),
    "recomputing wide": ((768, 4, 12, 4, 2048, 8192, "muon"), (8, 512, 8, True)),
    "recomputing long rows": ((320, 10, 5, 5, 864, 4096, "adamw"), (4, 1024, 4, True)),
    "recomputing grouped": ((640, 6, 10, 2, 1728, 16384, "muon"), (16, 256, 8, True)),
    "recomputing narrow": ((192, 24, 3, 1, 512, 4096, "adamw"), (48, 256, 48, True)),
    "micro-batches": ((384, 8, 6, 6, 1024, 16384, "adamw"), (32, 256, 8, False)),
    "long rows": ((320, 8, 5, 5, 864, 4096, "muon"), (4, 1024, 4, False)),
}
TIME = {
    "d4": ((128, 4, 2, 2, 352, 2048, "muon"), (8, 256, 8, False)),
    "d6": ((256, 6, 4, 4, 704, 2048, "muon"), (4, 256, 4, False)),
    "adamw": ((192, 8, 3, 3, 512, 4096, "adamw"), (4, 256, 4, False)),
    "micro-batches": ((128, 6, 2, 2, 352, 2048, "muon"), (8, 256, 2, False)),
    "recomputing": ((192, 6, 3, 3, 512, 2048, "muon"), (8, 256, 4, True)),
    "long rows": ((128, 8, 2, 2, 352, 2048, "adamw"), (2, 1024, 1, False)),
}
Shape = tuple[tuple[int, int, int, int, int, int, str], tuple[int, int, int, bool]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=("memory", "time"))
    parser.add_argument("--only", default="", help="one shape by name")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--calibrate", type=int, default=80, help="steps of measuring")
    arguments = parser.parse_args()
    shapes = MEMORY if arguments.part == "memory" else TIME
    if arguments.only:
        run = _memory if arguments.part == "memory" else _time
        print(json.dumps({"shape": arguments.only, **run(shapes[arguments.only], arguments)}))
        return 0
    for name in shapes:
        words = [sys.executable, __file__, arguments.part, "--only", name]
        words += ["--steps", str(arguments.steps), "--calibrate", str(arguments.calibrate)]
        subprocess.run(words, check=True, env={"OMP_NUM_THREADS": "1", **os.environ})
    return 0


def _pieces(shape: Shape) -> tuple[ModelConfig, SessionOptions, Plan]:
    (hidden, layers, heads, kv_heads, inter, vocab, optimizer), (rows, length, micro, again) = shape
    model = ModelConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=inter, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=hidden // heads,
        max_position_embeddings=length, tie_word_embeddings=True,
    )  # fmt: skip
    options = SessionOptions(OptimizerTable.model_validate({"name": optimizer}))
    return model, options, Plan(micro, again, "float32", length, rows)


def _memory(shape: Shape, _: argparse.Namespace) -> dict[str, float]:
    from solollm_torch.backend import TorchBackend
    from solollm_torch.memory import CPU_FIRST_USE_BYTES, CPU_PROCESS_BYTES
    from solollm_torch.session import TorchSession  # noqa: F401  (the baseline holds the framework)

    from solollm.calibration import synthetic_batch

    model, options, plan = _pieces(shape)
    backend = TorchBackend()
    costs = backend.memory_costs(model, options, "float32")
    tokens = plan.micro_batch_size * plan.seq_len
    per_token = costs.per_token_bytes + costs.allocator_per_token_bytes
    if plan.activation_checkpointing:
        per_token = costs.per_token_checkpointed_bytes
        per_token += costs.allocator_per_token_checkpointed_bytes
    planned = costs.fixed_bytes - CPU_PROCESS_BYTES + CPU_FIRST_USE_BYTES
    planned += sum(costs.state_bytes.values()) + costs.loss_chunk_bytes + int(per_token * tokens)
    batch = synthetic_batch(model, plan.batch_size, plan.seq_len)
    before = _peak_bytes()
    session = backend.train_session(model, options, plan)
    for _ in range(2):
        session.train_step(batch, lr=1e-3).result()
    session.settle()
    measured = _peak_bytes() - before
    return {"planned_mb": planned / 1e6, "measured_mb": measured / 1e6, "ratio": planned / measured}


def _time(shape: Shape, arguments: argparse.Namespace) -> dict[str, float]:
    from solollm_torch.backend import TorchBackend

    from solollm.calibration import calibrate, synthetic_batch

    model, options, plan = _pieces(shape)
    backend = TorchBackend()
    found = calibrate(
        backend, model, options, plan, steps=arguments.calibrate,
        sample_batch=lambda rows, length: synthetic_batch(model, rows, length),
    )  # fmt: skip
    session = backend.train_session(model, options, plan)
    batch = synthetic_batch(model, plan.batch_size, plan.seq_len)
    session.train_step(batch, lr=1e-3).result()
    spent = []
    for _ in range(arguments.steps):
        begun = time.process_time()
        session.train_step(batch, lr=1e-3).result()
        session.settle()
        spent.append(time.process_time() - begun)
    measured = statistics.fmean(spent)
    return {
        "planned_cpu_seconds": found.step_cpu_seconds,
        "measured_cpu_seconds": measured,
        "ratio": found.step_cpu_seconds / measured,
        "steps": arguments.steps,
    }


def _peak_bytes() -> int:
    """The process's peak resident memory so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this tool reads /proc/self/status: run it on Linux")


if __name__ == "__main__":
    sys.exit(main())
