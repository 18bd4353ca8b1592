"""Sixty steps on GSM8K's training questions, by every method."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from solollm.config import RunConfig
from solollm.finetune.tuning import finetune
from solollm.runs import Run


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_sixty_steps_lower_the_held_out_loss(
    tuning: Callable[..., RunConfig], shared_data: Path, tmp_path: Path, method: str
) -> None:
    """Guards: a method that runs and learns nothing of real rows."""
    rows = (shared_data / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    for name, part in (("train", rows[:600]), ("held_out", rows[-40:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(part), encoding="utf-8")
    config = tuning(
        f"finetune.method={method}", f"finetune.data={json.dumps([str(tmp_path / 'train.jsonl')])}",
        f"finetune.held_out={json.dumps([str(tmp_path / 'held_out.jsonl')])}",
        "finetune.over_length=cut_end", "data.seq_len=256", "train.steps=60", "eval.every_steps=20",
        "eval.batches=6", "optimizer.lr=0.002",
    )  # fmt: skip
    finetune(config, tmp_path / "run")
    losses = [r["loss"] for r in Run.open(tmp_path / "run").read_metrics() if r["kind"] == "eval"]
    assert len(losses) == 3
    assert losses[-1] < losses[0] - 0.05
    print(f"{method}: held-out loss {losses[0]:.3f} after 20 steps, {losses[-1]:.3f} after 60")
