"""Generating speed: this engine against `transformers` generate with a static KV cache.

    python tools/bench_decode.py [--preset 15m] [--batch 1 8] [--dtype float32]

Both run in this process on the same weights, prompts and threads, in turns, greedily, without stop
ids; the tokens must be equal. Reported is the median over the rounds of each ratio, so that other
load on the machine cancels out: CPU seconds (all threads) and wall seconds, prompt included.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
import transformers
from solollm_torch.engine import TorchEngine
from solollm_torch.model import Decoder

from solollm.architecture import ModelConfig, initial_parameters
from solollm.backend import EngineOptions, Request
from solollm.dial import preset
from solollm.generation import generate

Generate = Callable[[np.ndarray], np.ndarray]  # prompts [B, T] -> new tokens [B, new_tokens]


def decoder_of(config: ModelConfig) -> Decoder:
    """A decoder of distinct logits: the initial weights, with the zero matrices filled in."""
    decoder = Decoder(config)
    generator = torch.Generator().manual_seed(0)
    for name, value in initial_parameters(config, seed=0):
        weight = torch.from_numpy(value)
        if not weight.any():
            weight.normal_(std=weight.shape[1] ** -0.5, generator=generator)
        decoder.load([(name, weight)])
    return decoder


def ours(decoder: Decoder, new_tokens: int, batch: int, pack: bool) -> Generate:
    options = EngineOptions(max_batch_size=batch, backend_options={"pack": pack})
    engine = TorchEngine(decoder, options)

    def run(prompts: np.ndarray) -> np.ndarray:
        requests = [Request(row.tolist(), new_tokens) for row in prompts]
        return np.array([completion.ids for completion in generate(engine, requests)])

    return run


def theirs(decoder: Decoder, new_tokens: int) -> Generate:
    config = decoder.config
    hf_config = transformers.LlamaConfig(**config.to_hf())
    model = transformers.LlamaForCausalLM(hf_config).eval()
    model.load_state_dict(decoder.masters(), strict=not config.tie_word_embeddings)
    model.generation_config.eos_token_id = None

    def run(prompts: np.ndarray) -> np.ndarray:
        ids = torch.from_numpy(prompts)
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens,
                do_sample=False, cache_implementation="static", disable_compile=True,
                pad_token_id=0,
            )  # fmt: skip
        return out[:, prompts.shape[1] :].numpy()

    return run


def timed(run: Generate, prompts: np.ndarray) -> tuple[float, float, np.ndarray]:
    """(CPU seconds, wall seconds, tokens)."""
    cpu, wall = time.process_time(), time.perf_counter()
    tokens = run(prompts)
    return time.process_time() - cpu, time.perf_counter() - wall, tokens


def compare(stacks: Sequence[Generate], prompts: np.ndarray, rounds: int) -> dict[str, float]:
    """Medians over the rounds; ratios are the second stack's time over the first's."""
    for run in stacks:
        run(prompts)
    samples = []
    for _ in range(rounds):
        (cpu, wall, tokens), (cpu_2, wall_2, tokens_2) = (timed(run, prompts) for run in stacks)
        share = float((tokens == tokens_2).mean())
        samples.append((cpu_2 / cpu, wall_2 / wall, tokens.size / wall, tokens.size / cpu, share))
    names = ("cpu_ratio", "wall_ratio", "tokens_per_second", "tokens_per_cpu_second", "equal")
    return {n: statistics.median(c) for n, c in zip(names, zip(*samples, strict=True), strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="15m")
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-pack", action="store_true", help="the layout of a live session")
    arguments = parser.parse_args()
    config = preset(arguments.preset, arguments.vocab_size)
    print(
        f"{arguments.preset} ({config.num_parameters():,} parameters, float32), prompt"
        f" {arguments.prompt_tokens}, new {arguments.new_tokens}, threads"
        f" {torch.get_num_threads()}, torch {torch.__version__}, transformers"
        f" {transformers.__version__}, {platform.machine()}"
    )
    decoder = decoder_of(config)
    generator = np.random.default_rng(0)
    speeds = {}
    for batch in arguments.batch:
        prompts = generator.integers(1, arguments.vocab_size, (batch, arguments.prompt_tokens))
        stacks = (
            ours(decoder, arguments.new_tokens, batch, not arguments.no_pack),
            theirs(decoder, arguments.new_tokens),
        )
        result = compare(stacks, prompts, arguments.rounds)
        speeds[batch] = result["tokens_per_cpu_second"]
        print(f"batch {batch}: " + ", ".join(f"{k} {v:.2f}" for k, v in result.items()), flush=True)
    if len(speeds) > 1:
        low, high = min(speeds), max(speeds)
        gain = speeds[high] / speeds[low]
        print(f"tokens per CPU second, batch {high} over batch {low}: {gain:.2f}")


if __name__ == "__main__":
    main()
