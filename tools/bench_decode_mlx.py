"""Generating speed on MLX: our engine against mlx-lm called directly.

    python tools/bench_decode_mlx.py [--preset 15m] [--batch 1 8] [--rounds 9]

One prompt is compared with `mlx_lm.generate.generate_step`, several with its `BatchGenerator`. Both
run in this process on the same weights and prompts, in turns, greedily, without stop ids; the
tokens must be equal. Reported is the median over pairs of their CPU seconds over ours, prompt
included. See docs/results/mlx.md for the BLAS library that has to be preloaded on Linux.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import mlx.core as mx
import numpy as np
from mlx_lm.generate import BatchGenerator, generate_step
from solollm_mlx import mlx_lm_adapter
from solollm_mlx.engine import MlxEngine

from solollm.architecture import ModelConfig, initial_parameters
from solollm.backend import EngineOptions, Request
from solollm.dial import preset
from solollm.generation import generate

Generate = Callable[[np.ndarray], np.ndarray]  # prompts [B, T] -> new tokens [B, new_tokens]


def weights_of(config: ModelConfig) -> dict[str, mx.array]:
    """Distinct logits: the initial weights, with the zero matrices filled in."""
    generator = np.random.default_rng(0)
    weights = {}
    for name, value in initial_parameters(config, seed=0):
        if not value.any():
            value = generator.standard_normal(value.shape, np.float32) * value.shape[1] ** -0.5
        weights[name] = mx.array(value)
    return weights


def ours(config: ModelConfig, weights: dict[str, mx.array], new_tokens: int) -> Generate:
    engine = MlxEngine(weights, config, EngineOptions(max_batch_size=64))

    def run(prompts: np.ndarray) -> np.ndarray:
        requests = [Request(row.tolist(), new_tokens) for row in prompts]
        return np.array([completion.ids for completion in generate(engine, requests)])

    return run


def theirs(config: ModelConfig, weights: dict[str, mx.array], new_tokens: int) -> Generate:
    model = mlx_lm_adapter.build_model(config, weights)

    def single(prompt: np.ndarray) -> np.ndarray:
        steps = generate_step(mx.array(prompt), model, max_tokens=new_tokens)
        return np.array([[int(token) for token, _ in steps]])

    def batched(prompts: np.ndarray) -> np.ndarray:
        generator = BatchGenerator(
            model, completion_batch_size=64, prefill_batch_size=64, max_tokens=new_tokens
        )
        uids = generator.insert([row.tolist() for row in prompts])
        tokens: dict[int, list[int]] = {uid: [] for uid in uids}
        while responses := generator.next_generated():
            for response in responses:
                tokens[response.uid].append(int(response.token))
        generator.close()
        return np.array([tokens[uid] for uid in uids])

    return lambda prompts: single(prompts[0]) if len(prompts) == 1 else batched(prompts)


def timed(run: Generate, prompts: np.ndarray) -> tuple[float, np.ndarray]:
    """(CPU seconds, tokens)."""
    begun = time.process_time()
    tokens = run(prompts)
    return time.process_time() - begun, tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", default="15m")
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    config = preset(arguments.preset, arguments.vocab_size)
    weights = weights_of(config)
    stacks = [make(config, weights, arguments.new_tokens) for make in (ours, theirs)]
    generator = np.random.default_rng(0)
    for batch in arguments.batch:
        prompts = generator.integers(1, arguments.vocab_size, (batch, arguments.prompt_tokens))
        equal = np.array_equal(*(run(prompts) for run in stacks))
        ratios, speeds = [], []
        for index in range(arguments.rounds):
            order = stacks if index % 2 == 0 else stacks[::-1]
            spent = {id(run): timed(run, prompts)[0] for run in order}
            ratios.append(spent[id(stacks[1])] / spent[id(stacks[0])])
            speeds.append(batch * arguments.new_tokens / spent[id(stacks[0])])
        report = {
            "preset": arguments.preset, "batch": batch, "pairs": arguments.rounds,
            "cpu_ratio": statistics.median(ratios), "ratios": ratios, "equal_tokens": equal,
            "tokens_per_cpu_second": statistics.median(speeds),
        }  # fmt: skip
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
