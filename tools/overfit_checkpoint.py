"""A tiny model, trained here and now until it answers some GSM8K test problems by heart.

    python tools/overfit_checkpoint.py --data ../shared/data --out FOLDER [--items 24] [--steps 200]

It is good for one thing only: comparing evaluators (`tools/compare_lm_eval.py`) on a checkpoint
whose benchmark scores are above 0. It learns the first problems of the *test* split, in the prompt
of `gsm8k_cot` with its eight examples, and the dev questions of MMLU with their letters. Its scores
say nothing about the model.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from solollm.architecture import ModelConfig
from solollm.backend import Batch, Plan, SessionOptions, TrainSession
from solollm.checkpoint import DataPosition, Environment, TrainerState, save_checkpoint
from solollm.config import OptimizerTable
from solollm.evaluation.local_data import Problem, Question, read_gsm8k, read_mmlu
from solollm.evaluation.tuning_data import Example, choice_example, sum_example
from solollm.registry import select_backend
from solollm.tokenizer import Tokenizer
from solollm.tokenizer_training import train_tokenizer

SEQ_LEN, BATCH_SIZE, PEAK_LR, SEED = 1024, 2, 0.0015, 0


def gsm8k_shots() -> str:
    """The eight examples of lm-eval's `gsm8k_cot`, as every one of its prompts begins."""
    import lm_eval.tasks
    import yaml

    path = Path(lm_eval.tasks.__file__).parent / "gsm8k" / "gsm8k-cot.yaml"
    samples = yaml.safe_load(path.read_text())["fewshot_config"]["samples"]
    return "".join(f"Q: {s['question']}\nA: {s['target']}\n\n" for s in samples)


def as_text(example: Example) -> str:
    """One example as it stands among others in a prompt."""
    return f"{example.prompt} {example.answer}\n\n"


class Rows:
    """Batches whose rows are the eight examples and then problems, or multiple-choice items."""

    def __init__(self, tokenizer: Tokenizer, problems: list[Problem], dev: list[Question]) -> None:
        self._shots = tokenizer.encode(gsm8k_shots())
        self._problems = [tokenizer.encode(as_text(sum_example(p))) for p in problems]
        self._dev = [tokenizer.encode(as_text(choice_example(q))) for q in dev]
        self._random = np.random.default_rng(SEED)

    def batch(self) -> Batch:
        is_choice = self._random.random() < 0.25
        rows = [self._row(is_choice=is_choice) for _ in range(BATCH_SIZE)]
        ids = np.array(rows, np.int32)  # [B, SEQ_LEN + 1]
        return Batch(ids[:, :-1].copy(), ids[:, 1:].copy(), float(BATCH_SIZE * SEQ_LEN))

    def _row(self, *, is_choice: bool) -> list[int]:
        row = [] if is_choice else list(self._shots)
        source = self._dev if is_choice else self._problems
        while len(row) <= SEQ_LEN:
            row += source[int(self._random.integers(len(source)))]
        return row[: SEQ_LEN + 1]


def train(session: TrainSession, rows: Rows, steps: int) -> float:
    """A tenth of warm-up, then linear to zero; the last loss."""
    loss = float("nan")
    for step in range(steps):
        lr = PEAK_LR * min((step + 1) / (0.1 * steps), 1.0, (steps - step) / (0.5 * steps))
        loss = session.train_step(rows.batch(), lr=lr).result().loss
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step}: loss {loss:.3f}, {time.process_time():.0f} CPU s", flush=True)
    return loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="holds gsm8k/ and mmlu/")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--items", type=int, default=24)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--max-seq-len", type=int, default=2048)
    options = parser.parse_args()
    problems = read_gsm8k(options.data / "gsm8k")[: options.items]
    dev = read_mmlu(options.data / "mmlu")["dev"]
    texts = [as_text(sum_example(p)) for p in read_gsm8k(options.data / "gsm8k", "train")[:3000]]
    tokenizer = train_tokenizer(texts + [as_text(choice_example(q)) for q in dev], 3072)
    model = ModelConfig(
        vocab_size=tokenizer.padded_vocab_size, hidden_size=192, intermediate_size=512,
        num_hidden_layers=3, num_attention_heads=3, num_key_value_heads=1, head_dim=64,
        max_position_embeddings=options.max_seq_len, tie_word_embeddings=True, qk_norm=True,
    )  # fmt: skip
    backend = select_backend("torch").backend
    plan = Plan(BATCH_SIZE, False, "float32", SEQ_LEN, BATCH_SIZE)
    session = backend.train_session(model, SessionOptions(OptimizerTable(name="adamw"), SEED), plan)
    loss = train(session, Rows(tokenizer, problems, dev), options.steps)
    state = TrainerState(
        step=options.steps, tokens_seen=options.steps * BATCH_SIZE * SEQ_LEN,
        session_state=dict(session.session_state),
        data=DataPosition(fingerprint="0" * 16, seed=SEED, step=options.steps), best_loss=loss,
        environment=Environment(
            backend="torch", device="cpu", micro_batch_size=BATCH_SIZE, compute_dtype="float32"
        ),
    )  # fmt: skip
    path = save_checkpoint(
        options.out, model=model, snapshot=session.snapshot(), state=state,
        tokenizer_files=tokenizer.files(), token_ids=tokenizer.token_ids,
    )  # fmt: skip
    print(path)


if __name__ == "__main__":
    main()
