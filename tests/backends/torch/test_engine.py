"""The torch engine: equal to transformers, to itself in any company, and strict at its edges."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from solollm_torch.engine import TorchEngine
from solollm_torch.model import Decoder
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from solollm.architecture import ModelConfig
from solollm.backend import (
    BITS_DTYPE,
    EngineOptions,
    HostTensor,
    Request,
    SamplingParams,
    TokenEvent,
)
from solollm.errors import BackendError, ConfigError, IntegrityError
from solollm.generation import Completion, generate, loglikelihood
from solollm.tensorfile import write_tensors

LENGTHS = (1, 5, 40, 17, 3, 60, 80, 22)
SAMPLED = SamplingParams(temperature=1.0, top_k=50, top_p=0.95, seed=3)


def random_decoder(config: ModelConfig) -> Decoder:
    """Every matrix at 1/sqrt(fan_in), none at zero; norms near one."""
    generator = torch.Generator().manual_seed(0)
    decoder = Decoder(config)
    for name, weight in decoder.masters().items():
        noise = torch.randn(weight.shape, generator=generator)
        scale = weight.shape[-1] ** -0.5
        decoder.load([(name, scale * noise if weight.ndim == 2 else 1 + 0.1 * noise)])
    return decoder


def engine_of(decoder: Decoder, batch: int = 8, **options: bool | int) -> TorchEngine:
    return TorchEngine(decoder, EngineOptions(max_batch_size=batch, backend_options=options))


def prompts_of(config: ModelConfig, lengths: Sequence[int] = LENGTHS) -> list[list[int]]:
    generator = np.random.default_rng(4)
    return [generator.integers(0, config.vocab_size, length).tolist() for length in lengths]


def full_logprobs(decoder: Decoder, ids: Sequence[int]) -> np.ndarray:
    """log_softmax of the training forward, float32 [T, V]."""
    with torch.no_grad():
        return decoder.logits(torch.tensor([list(ids)]))[0].log_softmax(-1).numpy()


def assert_same(actual: Sequence[Completion], expected: Sequence[Completion]) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert one.ids == other.ids
        assert one.finish_reason == other.finish_reason
        np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def decoder(tiny_config: ModelConfig) -> Decoder:
    return random_decoder(tiny_config)


@pytest.fixture(scope="module")
def wide_config(tiny_config: ModelConfig) -> ModelConfig:
    """Wide enough that matrices are packed."""
    changes = {"hidden_size": 256, "intermediate_size": 320, "tie_word_embeddings": True}
    return tiny_config.model_copy(update=changes | {"head_dim": 64, "vocab_size": 320})


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("variant", ["llama", "qk_norm", "wide", "multi_head"])
def test_greedy_equals_transformers(
    tiny_config: ModelConfig, wide_config: ModelConfig, variant: str, pack: bool
) -> None:
    """Guards the whole inference forward, which is written separately from training's."""
    config = {
        "llama": tiny_config,
        "qk_norm": tiny_config.model_copy(update={"qk_norm": True}),
        "wide": wide_config,
        "multi_head": tiny_config.model_copy(update={"num_key_value_heads": 4}),
    }[variant]
    decoder = random_decoder(config)
    settings = {k: v for k, v in config.to_hf().items() if k != "architectures"}
    reference: LlamaForCausalLM | Qwen3ForCausalLM = (
        Qwen3ForCausalLM(Qwen3Config(**settings))
        if config.qk_norm
        else LlamaForCausalLM(LlamaConfig(**settings))
    )
    reference.load_state_dict(decoder.masters(), strict=not config.tie_word_embeddings)
    reference.eval().generation_config.eos_token_id = None
    prompts = prompts_of(config)
    engine = engine_of(decoder, batch=3, pack=pack, prefill_tokens=16)
    for prompt, completion in zip(
        prompts, generate(engine, [Request(p, 20) for p in prompts]), strict=True
    ):
        ids = torch.tensor([prompt])
        expected = reference.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip
        assert list(completion.ids) == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("sampling", [SamplingParams(), SAMPLED], ids=["greedy", "sampled"])
def test_a_batch_equals_one_by_one(
    wide_config: ModelConfig, sampling: SamplingParams, pack: bool
) -> None:
    """Guards padding, masks and slots: company changes no token, and no log-probability by more
    than rounding."""
    decoder = random_decoder(wide_config)
    requests = [Request(prompt, 25, sampling) for prompt in prompts_of(wide_config)]
    alone = [generate(engine_of(decoder, batch=1), [request])[0] for request in requests]
    assert_same(generate(engine_of(decoder, pack=pack), requests), alone)
    assert_same(generate(engine_of(decoder, batch=3, pack=pack), requests[::-1]), alone[::-1])
    assert_same(generate(engine_of(decoder, prefill_tokens=7, pack=pack), requests), alone)


def test_logprobs_equal_the_training_forward(decoder: Decoder) -> None:
    """Guards what GRPO compares: log p of each sampled token at its position, unprocessed."""
    (prompt,) = prompts_of(decoder.config, [30])
    (completion,) = generate(engine_of(decoder), [Request(prompt, 20, SAMPLED)])
    logprobs = full_logprobs(decoder, [*prompt, *completion.ids])
    expected = [logprobs[29 + i, token] for i, token in enumerate(completion.ids)]
    np.testing.assert_allclose(completion.logprobs, expected, rtol=0, atol=1e-5)


def test_joining_and_leaving_changes_nothing(decoder: Decoder) -> None:
    """Guards continuous batching: slots freed in the middle, prompts read between steps."""
    requests = [
        Request(prompt, 5 + 4 * index, SAMPLED)
        for index, prompt in enumerate(prompts_of(decoder.config))
    ]
    alone = [generate(engine_of(decoder), [request])[0] for request in requests]
    running = engine_of(decoder, batch=4, prefill_tokens=16).open()
    tokens: dict[int, list[int]] = {}
    order = []
    for request in requests:
        order.append(running.add(request))
        for event in running.step():
            tokens.setdefault(event.request_id, []).append(event.token)
    while events := running.step():
        for event in events:
            tokens.setdefault(event.request_id, []).append(event.token)
    assert [tuple(tokens[request_id]) for request_id in order] == [c.ids for c in alone]


def test_every_active_request_advances_by_one(decoder: Decoder) -> None:
    """Guards the seam's promise for a step, and one event per request and step."""
    running = engine_of(decoder).open()
    ids = [running.add(Request(prompt, 3)) for prompt in prompts_of(decoder.config, [4, 9, 2])]
    for _ in range(3):
        assert sorted(event.request_id for event in running.step()) == ids
    assert running.step() == []


def test_seeds_decide_the_tokens(decoder: Decoder) -> None:
    """Guards reproducible samples: equal seeds agree, different seeds differ."""
    (prompt,) = prompts_of(decoder.config, [12])
    requests = [Request(prompt, 20, SamplingParams(1.0, seed=seed)) for seed in (1, 2, 1)]
    first, second, third = generate(engine_of(decoder), requests)
    assert first.ids == third.ids != second.ids


def test_a_shared_beginning_is_copied_not_changed(decoder: Decoder) -> None:
    """Guards the reuse of keys, values and scores between prompts that begin alike: running,
    finished, longer, shorter and equal ones."""
    base = prompts_of(decoder.config, [90])[0]
    prompts = [base, base, base[:80], [*base[:70], 5, 6, 7], [*base, 1, 2], base[:71]]
    requests = [Request(prompt, 6, score_prompt=True) for prompt in prompts]
    requests += [Request(prompt, 6) for prompt in prompts]
    requests += [Request(prompt, 0, score_prompt=True) for prompt in prompts]
    alone = [generate(engine_of(decoder), [request])[0] for request in requests]
    for batch, prefill_tokens in ((1, 512), (4, 32), (12, 512)):
        engine = engine_of(decoder, batch=batch, prefill_tokens=prefill_tokens)
        together = generate(engine, requests)
        assert_same(together, alone)
        for one, other in zip(together, alone, strict=True):
            if other.prompt_scores is not None:
                assert one.prompt_scores is not None
                np.testing.assert_allclose(
                    one.prompt_scores.logprobs, other.prompt_scores.logprobs, rtol=0, atol=1e-5
                )


def test_prefix_sharing_saves_work(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the point of it: four answers to one question read the question once."""
    engine = engine_of(decoder)
    fed: list[int] = []
    prefill = engine.inference.prefill

    def counting(input_ids: torch.Tensor, *rest: object) -> torch.Tensor:
        fed.append(len(input_ids))
        return prefill(input_ids, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(engine.inference, "prefill", counting)
    question = prompts_of(decoder.config, [100])[0]
    loglikelihood(engine, [(question, [answer, 9]) for answer in (3, 4, 5, 6)])
    assert sum(fed) <= 101 + 3 * 3


def test_prompt_scores_equal_the_full_forward(decoder: Decoder) -> None:
    """Guards evaluation: log p of every prompt token and whether it was the argmax."""
    for prompt in prompts_of(decoder.config, [2, 40, 129]):
        (completion,) = generate(
            engine_of(decoder, prefill_tokens=33), [Request(prompt, 0, score_prompt=True)]
        )
        assert completion.prompt_scores is not None
        expected = full_logprobs(decoder, prompt[:-1])
        picked = expected[np.arange(len(prompt) - 1), prompt[1:]]
        np.testing.assert_allclose(completion.prompt_scores.logprobs, picked, rtol=0, atol=1e-5)
        greedy = expected.argmax(-1) == prompt[1:]
        np.testing.assert_array_equal(completion.prompt_scores.is_greedy, greedy)
        assert completion.prompt_scores.logprobs.dtype == np.float32


def test_loglikelihood_equals_the_full_forward(decoder: Decoder) -> None:
    """Guards the sums that multiple-choice benchmarks compare, over-long pairs included."""
    context, continuation = prompts_of(decoder.config, [135, 7])
    (total, is_greedy) = loglikelihood(engine_of(decoder), [(context, continuation)])[0]
    ids = [*context, *continuation][-129:]
    logprobs = full_logprobs(decoder, ids[:-1])[-7:]
    assert total == pytest.approx(logprobs[np.arange(7), continuation].sum(), abs=1e-4)
    assert is_greedy == bool((logprobs.argmax(-1) == continuation).all())


def test_padding_ids_are_never_generated(tiny_config: ModelConfig) -> None:
    """Guards the rows beyond the tokenizer's vocabulary, which a random head likes as well."""
    decoder = random_decoder(tiny_config)
    options = EngineOptions(vocab_size=150)
    engine = TorchEngine(decoder, options)
    requests = [Request([1], 60, SamplingParams(2.0, seed=s)) for s in range(8)] + [
        Request([2], 60)
    ]
    for completion in generate(engine, requests):
        assert max(completion.ids) < 150


def test_stop_ids_and_the_end_of_the_context(decoder: Decoder) -> None:
    """Guards the three ends of a request; the stop id is the last token given out."""
    engine = engine_of(decoder)
    (prompt,) = prompts_of(decoder.config, [100])
    free, full = generate(engine, [Request(prompt, 5), Request(prompt, 500)])
    assert (len(full.ids), full.finish_reason) == (29, "length")  # the last is never fed
    (stopped,) = generate(engine, [Request(prompt, 5, stop_ids=frozenset([free.ids[2]]))])
    cut = free.ids.index(free.ids[2]) + 1
    assert (stopped.ids, stopped.finish_reason) == (free.ids[:cut], "stop")


def test_no_new_tokens_and_nothing_to_score(decoder: Decoder) -> None:
    """Guards the requests that need no step of the model at all."""
    empty, alone = generate(
        engine_of(decoder), [Request([1, 2], 0), Request([3], 0, score_prompt=True)]
    )
    assert (empty.ids, empty.finish_reason, empty.prompt_scores) == ((), "length", None)
    assert alone.prompt_scores is not None
    assert len(alone.prompt_scores.logprobs) == 0


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([], 5), "empty"),
        (Request([1] * 129, 5), "too long"),
        (Request([1] * 130, 0, score_prompt=True), "too long"),
        (Request([1, 192], 5), "token id 192"),
        (Request([-1], 5), "token id -1"),
        (Request([1], -1), "negative"),
        (Request([1], 5, SamplingParams(temperature=-1)), "temperature"),
        (Request([1], 5, adapter="x"), "adapter"),
    ],
)
def test_bad_requests_are_refused(decoder: Decoder, request_: Request, message: str) -> None:
    """Guards the decoder against requests from outside."""
    running = engine_of(decoder).open()
    with pytest.raises(ConfigError, match=message):
        running.add(request_)
    assert running.step() == []


def test_cancelling(decoder: Decoder) -> None:
    """Guards leaving while waiting, reading and running, and that the others go on undisturbed."""
    prompts = prompts_of(decoder.config, [60, 30, 20])
    expected = generate(engine_of(decoder), [Request(prompts[1], 8)])[0].ids
    running = engine_of(decoder, batch=2, prefill_tokens=16).open()
    reading, kept, waiting = (running.add(Request(prompt, 8)) for prompt in prompts)
    events = running.step()
    running.cancel(reading)
    running.cancel(waiting)
    running.cancel(waiting)
    running.cancel(12345)
    while more := running.step():
        events += more
    ended = {e.request_id: e for e in events if e.finish_reason == "cancelled"}
    assert set(ended) == {reading, waiting}
    assert all(event.token == -1 for event in ended.values())
    assert tuple(e.token for e in events if e.request_id == kept) == expected
    assert running.step() == []
    again = [running.add(Request([1, token], 1)) for token in (2, 3)]
    assert sorted(event.request_id for event in running.step()) == again, "a slot was lost"


def test_a_failing_logits_processor_leaves_the_decoder_whole(decoder: Decoder) -> None:
    """Guards one user's broken constraint against everybody else's requests."""

    def broken(ids: object, row: np.ndarray) -> np.ndarray:
        raise ValueError("broken")

    prompts = prompts_of(decoder.config, [20, 30])
    expected = generate(engine_of(decoder), [Request(prompts[1], 6)])[0].ids
    running = engine_of(decoder).open()
    bad = running.add(Request(prompts[0], 6, logits_processors=[broken]))
    good = running.add(Request(prompts[1], 6))
    events: list[TokenEvent] = []
    for _ in range(2):
        with pytest.raises(ValueError, match="broken"):
            running.step()
    running.cancel(bad)
    while more := running.step():
        events += more
    assert tuple(e.token for e in events if e.request_id == good) == expected


def test_diverged_weights_are_named(tiny_config: ModelConfig) -> None:
    """Guards an endless stream of token 0 from a model of NaN."""
    decoder = random_decoder(tiny_config)
    decoder.load([("model.norm.weight", torch.full((32,), torch.nan))])
    with pytest.raises(BackendError, match="no finite logits"):
        generate(engine_of(decoder), [Request([1, 2], 3)])


def test_a_live_engine_reads_the_weights_as_they_are(tiny_config: ModelConfig) -> None:
    """Guards samples during training: no copy is kept of what the optimizer changes in place."""
    decoder = random_decoder(tiny_config)
    engine = engine_of(decoder)
    before = generate(engine, [Request([1, 2, 3], 10)])[0].ids
    decoder.load((name, weight * 1.5 + 0.1) for name, weight in decoder.masters().items())
    after = generate(engine, [Request([1, 2, 3], 10)])[0].ids
    assert before != after == generate(engine_of(decoder), [Request([1, 2, 3], 10)])[0].ids


def test_bfloat16_is_close(wide_config: ModelConfig) -> None:
    """Guards the reduced precision path: the same first token, log-probabilities near."""
    decoder = random_decoder(wide_config)
    options = EngineOptions(compute_dtype="bfloat16")
    prompts = prompts_of(wide_config, [9, 30])
    requests = [Request(prompt, 0, score_prompt=True) for prompt in prompts]
    exact = generate(engine_of(decoder), requests)
    for one, other in zip(generate(TorchEngine(decoder, options), requests), exact, strict=True):
        assert one.prompt_scores is not None
        assert other.prompt_scores is not None
        scale = np.abs(other.prompt_scores.logprobs).max()
        np.testing.assert_allclose(
            one.prompt_scores.logprobs, other.prompt_scores.logprobs, rtol=0, atol=0.05 * scale
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (EngineOptions(max_seq_len=129), "max_seq_len 129"),
        (EngineOptions(vocab_size=193), "vocab_size 193"),
        (EngineOptions(max_batch_size=0), "max_batch_size 0"),
        (EngineOptions(backend_options={"pakc": True}), "did you mean `pack`"),
    ],
)
def test_bad_options_are_refused(decoder: Decoder, options: EngineOptions, message: str) -> None:
    """Guards settings that could only fail later."""
    with pytest.raises(ConfigError, match=message):
        TorchEngine(decoder, options)


def write_checkpoint(folder: Path, decoder: Decoder, *, dtype: torch.dtype) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(decoder.config.to_hf()))
    tag = "BF16" if dtype == torch.bfloat16 else "F32"
    tensors = []
    for name, weight in decoder.masters().items():
        bits = weight.to(dtype).view(torch.uint16 if tag == "BF16" else dtype).numpy()
        assert bits.dtype == BITS_DTYPE[tag]
        tensors.append((name, HostTensor(tag, tuple(weight.shape), bits)))
    specs = [(name, host.dtype, host.shape) for name, host in tensors]
    write_tensors(folder / "model.safetensors", specs, tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_generates_like_its_model(
    tmp_path: Path, wide_config: ModelConfig, dtype: torch.dtype
) -> None:
    """Guards loading from disk: names, dtypes, the tied head, packing by default."""
    decoder = random_decoder(wide_config)
    decoder.load((n, w.to(dtype).float()) for n, w in decoder.masters().items())
    write_checkpoint(tmp_path, decoder, dtype=dtype)
    requests = [Request(prompt, 20) for prompt in prompts_of(wide_config)]
    loaded = TorchEngine.load(tmp_path, EngineOptions())
    assert_same(generate(loaded, requests), generate(engine_of(decoder), requests))


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path: Path, decoder: Decoder) -> None:
    """Guards against generating from half a model, or from what is no checkpoint."""
    with pytest.raises(ConfigError, match="is not a checkpoint"):
        TorchEngine.load(tmp_path, EngineOptions())
    write_checkpoint(tmp_path, decoder, dtype=torch.float32)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(IntegrityError, match=r"model\.layers\.2"):
        TorchEngine.load(tmp_path, EngineOptions())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 65}))
    with pytest.raises(IntegrityError, match=r"gate_proj\.weight has shape \[64, 32\]"):
        TorchEngine.load(tmp_path, EngineOptions())
