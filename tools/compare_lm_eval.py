"""SoloLLM's engine beside lm-eval's own `hf` model: same checkpoint, same questions, float32.

    python tools/overfit_checkpoint.py --data ../shared/data --out tuned
    python tools/compare_lm_eval.py tuned/step-00000200 --data ../shared/data --limit 200

For MMLU (5 shots) and GSM8K (8 shots): the largest difference of a log-likelihood, texts that
differ and the gap between the two best tokens where they part, the scores, and items per
CPU-second of each model (process time of its own calls; prompts are built outside). Then the same
with a context so short that every prompt is cut. Ends with 1 where something disagrees.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from lm_eval.models.huggingface import HFLM

from solollm.backend import EngineOptions, Request
from solollm.completion import TextModel, open_model
from solollm.evaluation.harness import (
    Benchmark,
    HarnessOptions,
    evaluate_tasks,
    load_tasks,
    require_lm_eval,
)
from solollm.evaluation.harness_model import MAX_GEN_TOKENS, EngineLM
from solollm.generation import generate
from solollm.hardware import read_machine

LOGPROB_TOLERANCE = 1e-4
GAP_TOLERANCE = 1e-4


def timed(lm: Any) -> Callable[[], float]:
    """Count the process time of the calls that score and generate; the returned function reads
    the count and sets it back."""
    spent = [0.0]

    def wrap(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **named: Any) -> Any:
            begun = time.process_time()
            try:
                return call(*args, **named)
            finally:
                spent[0] += time.process_time() - begun

        return run

    lm.loglikelihood = wrap(lm.loglikelihood)
    lm.generate_until = wrap(lm.generate_until)

    def read() -> float:
        total, spent[0] = spent[0], 0.0
        return total

    return read


def items_of(lm: Any, benchmark: Benchmark, limit: int) -> list[dict[str, Any]]:
    """lm-eval's log of the items, in one order, strict filter only where there are two."""
    result = evaluate_tasks(lm, load_tasks([benchmark]), HarnessOptions(limit=limit))
    samples = result["samples"]
    items = [item for task in sorted(samples) for item in samples[task]]
    return [item for item in items if item["filter"] in ("none", "strict-match")]


def compare_choices(ours: Sequence[Any], theirs: Sequence[Any]) -> dict[str, Any]:
    """MMLU: log-likelihoods and scores."""
    largest, flags = 0.0, 0
    for mine, hf in zip(ours, theirs, strict=True):
        assert mine["prompt_hash"] == hf["prompt_hash"], "the models were asked different prompts"
        for (a, greedy_a), (b, greedy_b) in zip(
            mine["filtered_resps"], hf["filtered_resps"], strict=True
        ):
            largest = max(largest, abs(a - b))
            flags += greedy_a != greedy_b
    return {
        "items": len(ours), "largest_logprob_difference": largest,
        "greedy_flags_that_differ": flags,
        "score_ours": sum(i["acc"] for i in ours) / len(ours),
        "score_hf": sum(i["acc"] for i in theirs) / len(theirs),
        "agrees": largest <= LOGPROB_TOLERANCE
        and [item["acc"] for item in ours] == [item["acc"] for item in theirs],
    }  # fmt: skip


def compare_texts(
    model: TextModel, hf: Any, ours: Sequence[Any], theirs: Sequence[Any]
) -> dict[str, Any]:
    """GSM8K: texts and scores; where texts part, the gap there."""
    gaps = []
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["prompt_hash"] == other["prompt_hash"], "asked different prompts"
        if mine["resps"] != other["resps"]:
            gaps.append(gap_where_they_part(model, hf, mine["arguments"][0][0]))
    scores = [[item["exact_match"] for item in log] for log in (ours, theirs)]
    return {
        "items": len(ours), "texts_that_differ": len(gaps), "gaps_where_they_part": gaps,
        "score_ours": sum(scores[0]) / len(ours), "score_hf": sum(scores[1]) / len(theirs),
        "characters": sum(len(item["resps"][0][0]) for item in ours),
        "agrees": all(gap < GAP_TOLERANCE for gap in gaps) and scores[0] == scores[1],
    }  # fmt: skip


def gap_where_they_part(model: TextModel, hf: Any, prompt: str) -> float:
    """The difference of the two best logits, by `hf`, at the first token that differs."""
    ids = hf.tok_encode(prompt)[-(model.max_seq_len - MAX_GEN_TOKENS) :]
    mine = generate(model.engine, [Request(ids, MAX_GEN_TOKENS, stop_ids=model.stop_ids)])[0].ids
    with torch.inference_mode():
        out = hf.model.generate(torch.tensor([ids]), max_new_tokens=MAX_GEN_TOKENS, do_sample=False)
        theirs = out[0, len(ids) :].tolist()
        first = next(
            (n for n, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b),
            min(len(mine), len(theirs)) - 1,
        )
        logits = hf.model(torch.tensor([ids + theirs[:first]])).logits[0, -1]
    best, second = logits.topk(2).values.tolist()
    return float(best - second)


def compare(
    folder: Path, data: Path, *, limit: int, batch_size: int, context: int
) -> dict[str, Any]:
    """Both benchmarks with one context length (0: the model's)."""
    options = EngineOptions(max_batch_size=batch_size, max_seq_len=context)
    model = open_model(folder, backend="torch", options=options)
    ours = EngineLM(model)
    theirs = HFLM(
        pretrained=str(folder), dtype="float32", device="cpu", batch_size=batch_size,
        max_length=model.max_seq_len,
    )  # fmt: skip
    clocks = [timed(ours), timed(theirs)]
    report: dict[str, Any] = {"context": model.max_seq_len}
    for benchmark in (Benchmark("mmlu", data / "mmlu"), Benchmark("gsm8k_cot", data / "gsm8k")):
        mine = items_of(ours, benchmark, limit)
        seconds = [clocks[0]()]
        hf = items_of(theirs, benchmark, limit)
        seconds.append(clocks[1]())
        is_choice = benchmark.name == "mmlu"
        found = compare_choices(mine, hf) if is_choice else compare_texts(model, theirs, mine, hf)
        clocks[1]()
        cut = sum(
            len(theirs.tok_encode(i["arguments"][0][0])) > _room(model, is_choice) for i in mine
        )
        report[benchmark.name] = {
            **found, "prompts_cut": cut, "cpu_seconds": seconds,
            "items_per_cpu_second": [len(mine) / spent for spent in seconds],
            "ratio": seconds[1] / seconds[0],
        }  # fmt: skip
        print(json.dumps({benchmark.name: report[benchmark.name]}), flush=True)
    return report


def _room(model: TextModel, is_choice: bool) -> int:
    """Prompt tokens beyond which it is cut."""
    return model.max_seq_len if is_choice else model.max_seq_len - MAX_GEN_TOKENS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="holds gsm8k/ and mmlu/")
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=8, help="of both models")
    parser.add_argument("--short", type=int, default=512, help="the second context; 0: none")
    parser.add_argument("--short-limit", type=int, default=40)
    parser.add_argument("--out", type=Path, help="write the result here too, as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    asked = [(0, options.limit)] + ([(options.short, options.short_limit)] if options.short else [])
    reports = [
        compare(
            options.checkpoint, options.data, limit=limit, batch_size=options.batch_size, context=c
        )
        for c, limit in asked
    ]
    machine = read_machine()
    document = {
        "command": " ".join(["tools/compare_lm_eval.py", *sys.argv[2:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{machine.cpu}, {machine.cores} cores, {machine.os}", "threads": 1,
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__,
            "transformers": transformers.__version__, "lm_eval": require_lm_eval(),
        },
        "batch_size": options.batch_size, "reports": reports,
    }  # fmt: skip
    if options.out:
        options.out.write_text(json.dumps(document, indent=1) + "\n")
    agrees = all(r[name]["agrees"] for r in reports for name in ("mmlu", "gsm8k_cot"))
    print("agrees" if agrees else "DISAGREES")
    return 0 if agrees else 1


if __name__ == "__main__":
    sys.exit(main())
