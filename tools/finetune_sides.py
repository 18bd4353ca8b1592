"""The two sides of `bench_finetune.py`: our adapter session, and transformers' Trainer over peft
and bitsandbytes; and the batches that both train on.

The model is the 125m preset over a vocabulary of 32,000 ids (in the environment: `BENCH_PRESET`,
`BENCH_VOCAB`) with random weights: neither side cares what they are. Both start from the same
adapter, and take AdamW with the same numbers.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from solollm.adapters import AdapterOptions, adapter_table
from solollm.architecture import initial_parameter, parameter_table
from solollm.backend import Backend, Batch, InitialWeights, Plan, SessionOptions, TrainSession
from solollm.config import OptimizerTable
from solollm.dial import preset
from solollm.finetune.packing import SampleStream
from solollm.finetune.rendering import Rendered, render
from solollm.finetune.samples import Samples, SampleSet
from solollm.model_folder import write_model_folder
from solollm.strictfile import encode_json
from solollm.tokenizer import Tokenizer

VOCAB_SIZE = int(os.environ.get("BENCH_VOCAB", "32000"))
MODEL = preset(os.environ.get("BENCH_PRESET", "125m"), VOCAB_SIZE)
RANK, ALPHA, LR = 16, 32.0, 2e-4
TABLE = OptimizerTable(name="adamw", weight_decay=0.0)
PEER_ROWS = 8  # samples that the peer pads to one length


class Work(NamedTuple):
    """What one turn trains on, and how many tokens of it are somebody's."""

    batches: list[Batch]
    tokens: int


class Turn(NamedTuple):
    """Processor seconds of a turn, and the loss of its first step."""

    seconds: float
    loss: float


def adapter_options(method: str) -> AdapterOptions:
    return AdapterOptions(rank=RANK, alpha=ALPHA, base_bits=None if method == "lora" else 4)


def make_session(
    method: str, *, rows: int, seq_len: int, on: Backend | None = None
) -> TrainSession:
    """`on` None: PyTorch. On MLX without `mx.compile`: compiling takes longer than the step."""
    from solollm_torch.backend import TorchBackend

    adapter = None if method == "full" else adapter_options(method)
    session = (on or TorchBackend()).train_session(
        MODEL,
        SessionOptions(TABLE, adapter=adapter, backend_options={"compile": False} if on else {}),
        Plan(rows, False, "float32", seq_len, rows),
    )
    if adapter is not None:
        session.import_base(InitialWeights(MODEL, 0))
    return session


def our_turns(work: Work, count: int) -> None:
    """Say that all is warm, then train a turn whenever told to, and say what it took."""
    rows, seq_len = (max(batch.input_ids.shape[i] for batch in work.batches) for i in (0, 1))
    session = make_session("qlora", rows=rows, seq_len=seq_len)
    session.train_step(warm_up(), lr=LR).result()  # the first step allocates
    say(None)
    for _ in range(count):
        wait()
        begun = time.process_time()
        losses = [session.train_step(batch, lr=LR).result().loss for batch in work.batches]
        say(Turn(time.process_time() - begun, losses[0]))


def peer_turns(work: Work, count: int) -> None:
    """The same of the peer. A turn is the time within the Trainer's own steps."""
    steps = [warm_up(), *(work.batches * count)]
    position, begun, seconds, losses = 0, 0.0, 0.0, [0.0]

    def before() -> None:
        nonlocal begun, seconds, losses
        if position > 0 and (position - 1) % len(work.batches) == 0:
            if position == 1:
                say(None)
            wait()
            seconds, losses = 0.0, []
        begun = time.process_time()

    def after(loss: float) -> None:
        nonlocal position, seconds
        seconds += time.process_time() - begun
        losses.append(loss)
        if position > 0 and position % len(work.batches) == 0:
            say(Turn(seconds, losses[0]))
        position += 1

    Peer().train(steps, before, after)


def wait() -> None:
    """Until told to go on, or to end because nobody asks any more."""
    if not sys.stdin.readline():
        raise SystemExit(0)


def say(turn: Turn | None) -> None:
    print(json.dumps([] if turn is None else turn), flush=True)


class Peer:
    """transformers' Trainer over a peft model on a bitsandbytes 4-bit base, with SDPA.

    `our_magnitudes`: the 8 bits of each block's magnitude are rounded as we do, not as bitsandbytes
    does on this device."""

    def __init__(self, *, our_magnitudes: bool = False) -> None:
        import torch
        from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        quantised = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            write_base(Path(folder) / "base")
            model = AutoModelForCausalLM.from_pretrained(
                Path(folder) / "base", quantization_config=quantised, attn_implementation="sdpa",
                device_map="cpu", dtype=torch.float32,
            )  # fmt: skip
        if our_magnitudes:
            take_our_magnitudes(model)
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        self.model = get_peft_model(
            model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear")
        )
        self.model.config.use_cache = False
        parameters = dict(self.model.named_parameters())
        for spec in adapter_table(MODEL, adapter_options("qlora")):
            name = spec.name.replace(".weight", ".default.weight")
            parameters[name].data.copy_(torch.from_numpy(initial_parameter(spec, 0)))

    def train(
        self, batches: Sequence[Batch], before: Callable[[], None], after: Callable[[float], None]
    ) -> None:
        """Train on each batch in order; `before` is called before each step of the Trainer's, and
        `after` with its loss after it."""
        import torch
        from transformers import Trainer, TrainerCallback, TrainingArguments

        items = [
            {"input_ids": torch.from_numpy(batch.input_ids.astype(np.int64)),
             "labels": torch.from_numpy(unshifted(batch)),
             "attention_mask": torch.from_numpy(mask_of(batch))}
            for batch in batches
        ]  # fmt: skip

        class InOrder(Trainer):  # type: ignore[misc]
            def _get_train_sampler(self, *_: Any) -> Any:
                return torch.utils.data.SequentialSampler(items)

            def training_step(self, *arguments: Any, **named: Any) -> Any:
                self.loss = super().training_step(*arguments, **named)
                return self.loss

        class Watch(TrainerCallback):  # type: ignore[misc]
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                before()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                after(float(trainer.loss))

        with tempfile.TemporaryDirectory() as out:
            settings = TrainingArguments(
                out, max_steps=len(items), per_device_train_batch_size=1, learning_rate=LR,
                lr_scheduler_type="constant", adam_beta1=TABLE.beta1, adam_beta2=TABLE.beta2,
                adam_epsilon=TABLE.eps, max_grad_norm=TABLE.clip_norm, use_cpu=True, report_to=[],
                save_strategy="no", logging_strategy="no", disable_tqdm=True,
                remove_unused_columns=False,
            )  # fmt: skip
            trainer = InOrder(
                self.model, settings, train_dataset=items, data_collator=lambda rows: rows[0],
                callbacks=[Watch()],
            )  # fmt: skip
            trainer.train()


def take_our_magnitudes(model: Any) -> None:
    """Replace the statistics of every matrix in 4 bits; its codes are the same by either side."""
    import torch
    from solollm_torch.quant import Nf4Matrix

    source = InitialWeights(MODEL, 0)
    for name, weight in model.named_parameters():
        if hasattr(weight, "quant_state"):
            matrix = Nf4Matrix(weight.quant_state.shape, torch.device("cpu"), torch.float32)
            matrix.encode(torch.from_numpy(source.read(name).float32()))
            assert matrix._codes is not None
            assert torch.equal(matrix._codes.view(-1), weight.data.view(-1)), name
            weight.quant_state = matrix._state


def import_ours(method: str) -> None:
    import solollm_torch.adapter_session  # noqa: F401

    if method == "qlora":
        import bitsandbytes.functional  # noqa: F401


def import_peer() -> None:
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401
    from transformers import AutoModelForCausalLM, Trainer  # noqa: F401


def write_base(folder: Path) -> None:
    source = InitialWeights(MODEL, 0)
    specs = [(spec.name, "F32", spec.shape) for spec in parameter_table(MODEL)]
    files = {"config.json": encode_json(MODEL.to_hf())}
    tensors = ((name, source.read(name)) for name in source.names())
    write_model_folder(folder, files, specs, tensors)  # type: ignore[arg-type]


def warm_up() -> Batch:
    return full_rows(1, 64, 0)


def full_rows(rows: int, length: int, step: int) -> Batch:
    """Rows without padding, every token learnt. transformers, which shifts labels itself, has none
    for a row's last position."""
    ids = np.random.default_rng(step).integers(0, VOCAB_SIZE, (rows, length)).astype(np.int32)
    labels = np.full_like(ids, -100)
    labels[:, :-1] = ids[:, 1:]
    return Batch(ids, labels, float(rows * (length - 1)))


def real_rows(path: Path, *, samples: int, seq_len: int) -> dict[str, Work]:
    """About so many questions and answers of a GSM8K file, loss on the answers: for each side some
    of the batches that it makes of an epoch of the whole file. Ours are packed; the peer's padded
    to their longest, in any order or as its own `group_by_length` puts them together."""
    texts = [json.loads(line) for line in path.read_text().splitlines()]
    tokenizer = a_tokenizer([f"{t['question']}\n{t['answer']}" for t in texts])
    turns = (
        [{"role": "user", "content": t["question"]}, {"role": "assistant", "content": t["answer"]}]
        for t in texts
    )
    whole = (render(tokenizer, messages) for messages in turns)
    rendered = [sample for sample in whole if len(sample.ids) - 1 <= seq_len]
    lengths = [len(sample.ids) - 1 for sample in rendered]
    split = SampleSet.of(tokenizer, Samples.of(rendered), Samples.of([]))
    stream = SampleStream(split, "train", seq_len=seq_len, batch_size=2, seed=0, packing=True)
    steps = range(max(1, round(samples * float(np.mean(lengths)) / (2 * seq_len))))
    packed = [index for step in steps for row in stream.rows_of(step) for index in row]
    count = samples // PEER_ROWS
    any_order = np.random.default_rng(0).permutation(len(rendered))[: count * PEER_ROWS]
    orders = {
        "peer": any_order.reshape(-1, PEER_ROWS).tolist(),
        "grouped peer": grouped(lengths, count),
    }
    works = {"ours": Work([stream.batch(step) for step in steps], sum(lengths[i] for i in packed))}
    for side, order in orders.items():
        batches = [pad([rendered[i] for i in batch]) for batch in order]
        works[side] = Work(batches, sum(lengths[i] for batch in order for i in batch))
    return works


def grouped(lengths: Sequence[int], count: int) -> list[list[int]]:
    """So many of the batches that transformers' sampler makes of a whole epoch, evenly spaced. Of
    a few samples alone it would group none: it sorts within a quarter of them, or 400."""
    import torch
    from transformers.trainer_pt_utils import LengthGroupedSampler

    generator = torch.Generator().manual_seed(0)
    order = list(LengthGroupedSampler(PEER_ROWS, lengths=list(lengths), generator=generator))
    middles = (np.arange(count) + 0.5) / count
    places = (middles * (len(order) // PEER_ROWS)).astype(int) * PEER_ROWS
    return [order[first : first + PEER_ROWS] for first in places]


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
