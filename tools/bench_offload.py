"""What streaming costs and what compact states lose, here; writes docs/results/offload.json.

    python3 tools/bench_offload.py              all parts, about ten minutes of one core
    python3 tools/bench_offload.py step         CPU time of a streamed step beside the resident one
    python3 tools/bench_offload.py losses       1,000 steps in 8 and 16 bits, 300 with split masters

Steps are timed in turns in one process and compared by processor time: other work on the machine
slows all of them alike. Losses are those of a small byte-level model on the standard library's own
sources, as in `tests/backends/torch/test_optim.py`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import sysconfig
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench import RESULTS, circumstances
from solollm_torch.offload import StreamingSession
from solollm_torch.session import TorchSession
from solollm_torch.traffic import Streaming, step_traffic

from solollm.architecture import ModelConfig
from solollm.backend import Batch, Plan, SessionOptions
from solollm.benchmark import DEFAULT_MODEL
from solollm.config import OptimizerTable

CPU = torch.device("cpu")
BYTES_MODEL = ModelConfig(
    vocab_size=256, hidden_size=64, intermediate_size=192, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=2, head_dim=32, tie_word_embeddings=True,
)  # fmt: skip
ROWS, LENGTH = 8, 64
Settings = Mapping[str, Any]


def session(model: ModelConfig, plan: Plan, table: Settings, options: Settings) -> TorchSession:
    kind = StreamingSession if options.get("offload") == "streaming" else TorchSession
    return kind(
        model,
        SessionOptions(OptimizerTable.model_validate(table), backend_options=dict(options)),
        plan,
        CPU,
    )


def measure_step(rounds: int) -> dict[str, Any]:
    """CPU seconds per step, streamed and resident in turns, in both modes of clipping."""
    rows, length = 8, 256
    plan = Plan(rows, True, "float32", length, rows)
    stacks: dict[str, TorchSession] = {}
    for clip in ("exact", "lagged"):
        table = {"name": "adamw", "state_bits": 8, "clip": clip}
        for name, options in (
            ("resident", {"master": "split"}), ("streaming", {"offload": "streaming"})
        ):  # fmt: skip
            stacks[f"{name}, {clip}"] = session(DEFAULT_MODEL, plan, table, options)
    stacks["resident, fp32"] = session(DEFAULT_MODEL, plan, {"name": "adamw"}, {})
    seconds: dict[str, list[float]] = {name: [] for name in stacks}
    losses: dict[str, list[float]] = {name: [] for name in stacks}
    for index in range(rounds + 1):
        batch = counting_batch(DEFAULT_MODEL.vocab_size, rows, length, seed=index)
        for name, stack in stacks.items():
            begun = time.process_time()
            losses[name].append(stack.train_step(batch, lr=1e-3).result().loss)
            seconds[name].append(time.process_time() - begun)
    measured: dict[str, Any] = {
        name: {"cpu_seconds": spent[1:], "median": statistics.median(spent[1:])}
        for name, spent in seconds.items()
    }
    for clip in ("exact", "lagged"):
        pairs = zip(
            seconds[f"streaming, {clip}"][1:], seconds[f"resident, {clip}"][1:], strict=True
        )
        streaming = stacks[f"streaming, {clip}"]
        assert isinstance(streaming, StreamingSession)
        table = OptimizerTable.model_validate({"name": "adamw", "state_bits": 8, "clip": clip})
        formula = step_traffic(DEFAULT_MODEL, table, Streaming(), num_micro_batches=1)
        measured[f"ratio, {clip}"] = statistics.median(a / b for a, b in pairs)
        measured[f"traffic, {clip}"] = {
            "counted": streaming.traffic._asdict(), "formula": formula._asdict(),
        }  # fmt: skip
        measured[f"same losses, {clip}"] = (
            losses[f"streaming, {clip}"] == losses[f"resident, {clip}"]
        )
    return {"model": DEFAULT_MODEL.model_dump(), "rows": rows, "seq_len": length, **measured}


def counting_batch(vocab_size: int, rows: int, length: int, *, seed: int) -> Batch:
    """Rows that count up by steps of their own."""
    generator = np.random.default_rng(seed)
    start = generator.integers(0, vocab_size, (rows, 1))
    stride = generator.integers(1, 8, (rows, 1))
    ids = ((start + stride * np.arange(length + 1)) % vocab_size).astype(np.int32)
    return Batch(ids[:, :-1].copy(), ids[:, 1:].copy(), float(rows * length))


VARIANTS: dict[str, tuple[int, Settings, Settings]] = {
    "fp32, 1,000 steps": (1000, {"state_bits": 32}, {}),
    "8-bit moments, 1,000 steps": (1000, {"state_bits": 8}, {}),
    "16-bit moments, 1,000 steps": (1000, {"state_bits": 16}, {}),
    "8-bit moments, split masters, 1,000 steps": (1000, {"state_bits": 8}, {"master": "split"}),
    "8-bit moments, bf16 masters, 1,000 steps": (1000, {"state_bits": 8}, {"master": "bfloat16"}),
    "fp32, 300 steps": (300, {"state_bits": 32}, {}),
    "split masters, 300 steps": (300, {"state_bits": 32}, {"master": "split"}),
    "bf16 masters, 300 steps": (300, {"state_bits": 32}, {"master": "bfloat16"}),
}


def measure_losses(seeds: int) -> dict[str, Any]:
    """Mean loss of the last 60 steps, per seed, and how far its mean over seeds is from fp32's."""
    text = library_bytes()
    found = {
        name: [final_loss(text, *how, seed=seed) for seed in range(seeds)]
        for name, how in VARIANTS.items()
    }
    result: dict[str, Any] = {}
    for name, losses in found.items():
        reference = (
            found["fp32, " + name.rsplit(", ", 1)[1]]
            if "1,000" not in name
            else found["fp32, 1,000 steps"]
        )
        gap = statistics.mean(losses) / statistics.mean(reference) - 1
        result[name] = {"losses": losses, "gap_to_fp32": gap}
    return {"model": BYTES_MODEL.model_dump(), "rows": ROWS, "seq_len": LENGTH, **result}


def final_loss(
    text: np.ndarray, steps: int, table: Settings, options: Settings, *, seed: int
) -> float:
    model_session = TorchSession(
        BYTES_MODEL,
        SessionOptions(
            OptimizerTable.model_validate({"name": "adamw", **table}), seed=seed,
            backend_options=dict(options),
        ),
        Plan(ROWS, False, "float32", LENGTH, ROWS),
        CPU,
    )  # fmt: skip
    generator, losses = np.random.default_rng(seed), []
    for step in range(steps):
        starts = generator.integers(0, len(text) - LENGTH - 1, ROWS)
        rows = np.stack([text[s : s + LENGTH + 1] for s in starts]).astype(np.int32)
        batch = Batch(rows[:, :-1].copy(), rows[:, 1:].copy(), float(ROWS * LENGTH))
        lr = 1e-3 * min(1.0, (step + 1) / 20, 2 * (1 - step / steps))
        losses.append(model_session.train_step(batch, lr=lr).result().loss)
    model_session.close()
    return float(np.mean(losses[-60:]))


def library_bytes() -> np.ndarray:
    """The first 400 kB of the standard library's sources."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = b"".join(path.read_bytes() for path in files[:40])
    return np.frombuffer(text[:400_000], np.uint8)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", choices=[[], "step", "losses"], metavar="PART")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    path = RESULTS / "offload.json"
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for part in arguments.parts or ("step", "losses"):
        measured = (
            measure_step(arguments.rounds) if part == "step" else measure_losses(arguments.seeds)
        )
        threads = torch.get_num_threads()
        record[part] = {
            "command": f"python3 tools/bench_offload.py {part}", "threads": threads,
            **circumstances(), "measured": measured,
        }  # fmt: skip
        print(json.dumps(record[part], indent=1))
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
