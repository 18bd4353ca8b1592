"""What fine-tuning costs: peak memory by method, and speed beside transformers, peft and
bitsandbytes on the same processor.

    python tools/bench_finetune.py memory [--seq-len 512] [--rows 1] [--backend mlx]
    python tools/bench_finetune.py speed  [--seq-len 512] [--rows 2] [--steps 3] [--turns 2]
    python tools/bench_finetune.py padded --data gsm8k/train.jsonl [--samples 24]

`memory` trains a step of each method in a fresh process and prints its peak above what the process
held once its frameworks were imported; on MLX, the peak that its allocator counts. `speed` takes
turns in one process on full rows; `padded` on real rows of unequal length, which the peer pads and
we pack, and counts only tokens that are somebody's. Times are processor seconds of this process, on
one thread. The model is the 125m preset over a vocabulary of 32,000 ids with random weights:
neither cares what they are.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil

from solollm.adapters import AdapterOptions
from solollm.architecture import ModelConfig, initial_parameter, parameter_table
from solollm.backend import Backend, Batch, HostTensor, Plan, SessionOptions, TrainSession
from solollm.config import OptimizerTable
from solollm.dial import preset
from solollm.finetune.packing import SampleStream
from solollm.finetune.rendering import Rendered, render
from solollm.finetune.samples import Samples, SampleSet
from solollm.model_folder import write_model_folder
from solollm.strictfile import encode_json
from solollm.tokenizer import Tokenizer

VOCAB_SIZE = 32_000
METHODS = ("full", "lora", "qlora", "peer")
RANK, ALPHA, LR = 16, 32.0, 2e-4


class InitialSource:
    """A base that is made as it is read."""

    def __init__(self, model: ModelConfig) -> None:
        self._specs = {spec.name: spec for spec in parameter_table(model)}

    def names(self) -> Sequence[str]:
        return list(self._specs)

    def read(self, name: str) -> HostTensor:
        return HostTensor.of(initial_parameter(self._specs[name], 0))


class Turn(NamedTuple):
    """Tokens trained on and processor seconds."""

    tokens: int
    seconds: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=["memory", "speed", "padded", "child"])
    parser.add_argument("--method", choices=METHODS, default="qlora")
    parser.add_argument("--backend", choices=["torch", "mlx"], default="torch")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--rows", type=int, default=0)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--data", type=Path)
    arguments = parser.parse_args()
    if arguments.part == "child":
        print(json.dumps(child(arguments)))
        return 0
    print(describe(), flush=True)
    {"memory": memory, "speed": speed, "padded": padded}[arguments.part](arguments)
    return 0


def describe() -> str:
    from importlib.metadata import version

    names = ("torch", "mlx", "transformers", "peft", "bitsandbytes", "accelerate")
    shown = ", ".join(f"{name} {version(name)}" for name in names)
    model = preset("125m", VOCAB_SIZE)
    machine = f"{platform.machine()}, Python {platform.python_version()}"
    return f"{machine}, {shown}; {model.num_parameters():,} parameters"


def memory(arguments: argparse.Namespace) -> None:
    """Peaks of fresh processes."""
    rows = arguments.rows or 1
    peaks: dict[str, float] = {}
    for method in METHODS if arguments.backend == "torch" else METHODS[:3]:
        words = ["child", "--method", method, "--seq-len", str(arguments.seq_len)]
        words += ["--backend", arguments.backend]
        words += ["--rows", str(rows)]
        done = subprocess.run(
            [sys.executable, __file__, *words], check=True, capture_output=True, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        found = json.loads(done.stdout.splitlines()[-1])
        peaks[method] = found["peak"] - found["baseline"]
        less = 1 - peaks[method] / peaks["full"]
        name = "transformers + peft + bitsandbytes, QLoRA" if method == "peer" else method
        shown = f"{peaks[method] / 2**20:8.0f} MiB above {found['baseline'] / 2**20:.0f}"
        print(f"{name:42} {shown}  {less:6.1%} below full", flush=True)


def child(arguments: argparse.Namespace) -> dict[str, float]:
    """One step of one method; bytes before the model, and the most ever."""
    model, rows, length = preset("125m", VOCAB_SIZE), arguments.rows or 1, arguments.seq_len
    if arguments.backend == "mlx":
        from solollm_mlx.backend import MlxBackend

        session = make_session(model, arguments.method, rows=rows, seq_len=length, on=MlxBackend())
        session.train_step(full_rows(rows, length, 0), lr=LR).result()
        return {"baseline": 0, "peak": session.memory().peak_bytes}
    import torch

    torch.set_num_threads(1)
    if arguments.method == "peer":
        with tempfile.TemporaryDirectory() as folder:
            write_base(Path(folder) / "base", model)
            import_peer()
            baseline = resident_bytes()
            peer = Peer(Path(folder) / "base")
            peer.train([full_rows(rows, length, 0)])
        return {"baseline": baseline, "peak": peak_bytes()}
    import_ours(arguments.method)
    baseline = resident_bytes()
    session = make_session(model, arguments.method, rows=rows, seq_len=length)
    session.train_step(full_rows(rows, length, 0), lr=LR).result()
    return {"baseline": baseline, "peak": peak_bytes()}


def speed(arguments: argparse.Namespace) -> None:
    """Full rows, in turns."""
    rows = arguments.rows or 2
    batches = [full_rows(rows, arguments.seq_len, step) for step in range(arguments.steps)]
    tokens = rows * arguments.seq_len * arguments.steps
    with tempfile.TemporaryDirectory() as folder:
        ours, peer = both(Path(folder), rows, arguments.seq_len)
        compare(
            lambda: Turn(tokens, timed(lambda: ours(batches))),
            lambda: Turn(tokens, peer.train(batches)),
            arguments.turns,
        )


def padded(arguments: argparse.Namespace) -> None:
    """Real rows: the peer pads each of its batches to the longest, we pack; loss on answers."""
    texts = [json.loads(line) for line in arguments.data.read_text().splitlines()]
    tokenizer = a_tokenizer([f"{t['question']}\n{t['answer']}" for t in texts])
    turns = [
        [{"role": "user", "content": t["question"]}, {"role": "assistant", "content": t["answer"]}]
        for t in texts[: arguments.samples]
    ]
    rendered = [render(tokenizer, messages) for messages in turns]
    useful = sum(len(sample.ids) - 1 for sample in rendered)
    samples = SampleSet.of(tokenizer, Samples.of(rendered), Samples.of([]))
    stream = SampleStream(
        samples, "train", seq_len=arguments.seq_len, batch_size=2, seed=0, packing=True
    )
    batches = list(stream.epoch())
    theirs = [pad(rendered[i : i + 8]) for i in range(0, len(rendered), 8)]
    waste = 1 - useful / sum(batch.input_ids.size for batch in theirs)
    print(f"{useful:,} useful tokens; peer's padding {waste:.0%}, ours {1 - stream.fill:.0%}")
    with tempfile.TemporaryDirectory() as folder:
        ours, peer = both(Path(folder), 2, arguments.seq_len)
        compare(
            lambda: Turn(useful, timed(lambda: ours(batches))),
            lambda: Turn(useful, peer.train(theirs)),
            arguments.turns,
        )


def both(folder: Path, rows: int, seq_len: int) -> tuple[Callable[[Sequence[Batch]], None], Peer]:
    import torch

    torch.set_num_threads(1)
    model = preset("125m", VOCAB_SIZE)
    write_base(folder / "base", model)
    session = make_session(model, "qlora", rows=rows, seq_len=seq_len)

    def train(batches: Sequence[Batch]) -> None:
        for batch in batches:
            session.train_step(batch, lr=LR).result()

    train([full_rows(1, 64, 0)])  # the first step allocates
    peer = Peer(folder / "base")
    peer.train([full_rows(1, 64, 0)])
    return train, peer


def compare(ours: Callable[[], Turn], peer: Callable[[], Turn], turns: int) -> None:
    found: dict[str, list[float]] = {"ours": [], "peer": []}
    for _ in range(turns):
        for name, run in (("ours", ours), ("peer", peer)):
            turn = run()
            found[name].append(turn.tokens / turn.seconds)
    for name, rates in found.items():
        shown = ", ".join(f"{rate:.1f}" for rate in rates)
        print(f"{name}: {np.median(rates):.1f} tokens per processor second (turns: {shown})")
    ratios = [a / b for a, b in zip(found["ours"], found["peer"], strict=True)]
    print(f"ours / peer: {np.median(ratios):.2f} (turns: {', '.join(f'{r:.2f}' for r in ratios)})")


class Peer:
    """transformers' Trainer over a peft model on a bitsandbytes 4-bit base, with SDPA."""

    def __init__(self, base: Path) -> None:
        import torch
        from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        quantised = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(
            base, quantization_config=quantised, attn_implementation="sdpa", device_map="cpu",
            dtype=torch.float32,
        )  # fmt: skip
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        self.model = get_peft_model(
            model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear")
        )
        self.model.config.use_cache = False

    def train(self, batches: Sequence[Batch]) -> float:
        """Processor seconds of the Trainer's own steps over these batches."""
        import torch
        from transformers import Trainer, TrainerCallback, TrainingArguments

        items = [
            {"input_ids": torch.from_numpy(batch.input_ids.astype(np.int64)),
             "labels": torch.from_numpy(unshifted(batch)),
             "attention_mask": torch.from_numpy(mask_of(batch))}
            for batch in batches
        ]  # fmt: skip

        class Clock(TrainerCallback):  # type: ignore[misc]
            seconds = 0.0

            def on_step_begin(self, *_: Any, **__: Any) -> None:
                self.begun = time.process_time()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                self.seconds += time.process_time() - self.begun

        clock = Clock()
        with tempfile.TemporaryDirectory() as out:
            settings = TrainingArguments(
                out, max_steps=len(items), per_device_train_batch_size=1, learning_rate=LR,
                use_cpu=True, report_to=[], save_strategy="no", logging_strategy="no",
                disable_tqdm=True, max_grad_norm=1.0, remove_unused_columns=False,
            )  # fmt: skip
            Trainer(
                self.model, settings, train_dataset=items, data_collator=lambda rows: rows[0],
                callbacks=[clock],
            ).train()  # fmt: skip
        return clock.seconds


def make_session(
    model: ModelConfig, method: str, *, rows: int, seq_len: int, on: Backend | None = None
) -> TrainSession:
    """`on` None: PyTorch. On MLX without `mx.compile`: compiling takes longer than the step."""
    from solollm_torch.backend import TorchBackend

    table = OptimizerTable(name="adamw", weight_decay=0.0)
    adapter = None
    if method != "full":
        adapter = AdapterOptions(rank=RANK, alpha=ALPHA, base_bits=4 if method == "qlora" else None)
    session = (on or TorchBackend()).train_session(
        model,
        SessionOptions(table, adapter=adapter, backend_options={"compile": False} if on else {}),
        Plan(rows, False, "float32", seq_len, rows),
    )
    if adapter is not None:
        session.import_base(InitialSource(model))
    return session


def import_ours(method: str) -> None:
    import solollm_torch.adapter_session  # noqa: F401

    if method == "qlora":
        import bitsandbytes.functional  # noqa: F401


def import_peer() -> None:
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401
    from transformers import AutoModelForCausalLM, Trainer  # noqa: F401


def write_base(folder: Path, model: ModelConfig) -> None:
    source = InitialSource(model)
    specs = [(spec.name, "F32", spec.shape) for spec in parameter_table(model)]
    files = {"config.json": encode_json(model.to_hf())}
    tensors = ((name, source.read(name)) for name in source.names())
    write_model_folder(folder, files, specs, tensors)  # type: ignore[arg-type]


def full_rows(rows: int, length: int, step: int) -> Batch:
    """Rows without padding whose every token is learnt."""
    ids = np.random.default_rng(step).integers(0, VOCAB_SIZE, (rows, length + 1)).astype(np.int32)
    return Batch(ids[:, :-1].copy(), ids[:, 1:].copy(), float(rows * length))


def pad(rendered: Sequence[Rendered]) -> Batch:
    """What a collator makes of some samples: padded to the longest, loss on answers."""
    width = max(len(sample.ids) for sample in rendered) - 1
    ids = np.zeros((len(rendered), width), np.int32)
    labels, segments = np.full_like(ids, -100), np.ones_like(ids)
    for row, (tokens, produced) in enumerate(rendered):
        count = len(tokens) - 1
        ids[row, :count], segments[row, :count] = tokens[:-1], 0
        labels[row, :count] = np.where(produced[1:], tokens[1:], -100)
    return Batch(ids, labels, float((labels >= 0).sum()), segments)


def unshifted(batch: Batch) -> np.ndarray:
    """Labels as transformers wants them, which shifts by itself."""
    labels = np.full_like(batch.labels, -100)
    labels[:, 1:] = batch.labels[:, :-1]
    return labels.astype(np.int64)


def mask_of(batch: Batch) -> np.ndarray:
    segments = np.zeros_like(batch.input_ids) if batch.segment_ids is None else batch.segment_ids
    return np.asarray(segments == 0, np.int64)


def a_tokenizer(texts: Sequence[str]) -> Tokenizer:
    from solollm.tokenizer_training import train_tokenizer

    return train_tokenizer(texts, 8192)


def timed(run: Callable[[], None]) -> float:
    begun = time.process_time()
    run()
    return time.process_time() - begun


def resident_bytes() -> int:
    return int(psutil.Process().memory_info().rss)


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    sys.exit(main())
