"""Generation on MLX beyond the conformance suite: torch's tokens, precisions, failures, folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mlx.core", reason="these tests need mlx")
pytest.importorskip("mlx_lm", reason="these tests need mlx-lm")
import mlx.core as mx
from solollm_mlx.backend import MlxBackend
from solollm_mlx.engine import MlxEngine
from solollm_mlx.state import from_host

from solollm.architecture import ModelConfig
from solollm.backend import EngineOptions, HostTensor, Request, SamplingParams, TokenEvent
from solollm.errors import BackendError, ConfigError, IntegrityError
from solollm.generation import generate
from solollm.tensorfile import write_tensors
from solollm.testing.bench import lively_parameters

SAMPLING = [
    SamplingParams(),
    SamplingParams(temperature=0.8, top_p=0.9, seed=3),
    SamplingParams(temperature=1.2, top_k=20, min_p=0.02, seed=4),
    SamplingParams(repetition_penalty=1.3),
]


def engine_of(model: ModelConfig, **options: Any) -> MlxEngine:
    weights = {name: from_host(host) for name, host in lively_parameters(model).items()}
    return MlxEngine(weights, model, EngineOptions(**options))


def prompts_of(lengths: list[int]) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 180, length).tolist() for length in lengths]


@pytest.fixture(scope="module")
def wide(tiny_config: ModelConfig) -> ModelConfig:
    return tiny_config.model_copy(
        update={"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    )


def test_tokens_equal_torchs(variant: ModelConfig) -> None:
    """Guards the sampled paths: the same weights, seeds and prompts give the same text on either
    backend, with the same log-probabilities."""
    torch = pytest.importorskip("torch", reason="this test compares with torch")
    from solollm_torch.engine import TorchEngine
    from solollm_torch.model import Decoder

    decoder = Decoder(variant)
    decoder.load((n, torch.from_numpy(host.data)) for n, host in lively_parameters(variant).items())
    options = EngineOptions(max_batch_size=3, vocab_size=180)
    requests = [
        Request(prompt, 12, sampling=sampling, score_prompt=True)
        for prompt, sampling in zip(prompts_of([5, 30, 1, 17]), SAMPLING, strict=True)
    ]
    expected = generate(TorchEngine(decoder, options), requests)
    actual = generate(engine_of(variant, max_batch_size=3, vocab_size=180), requests)
    for ours, theirs in zip(actual, expected, strict=True):
        assert (ours.ids, ours.finish_reason) == (theirs.ids, theirs.finish_reason)
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, rtol=0, atol=1e-4)
        assert ours.prompt_scores is not None
        assert theirs.prompt_scores is not None
        np.testing.assert_allclose(
            ours.prompt_scores.logprobs, theirs.prompt_scores.logprobs, rtol=0, atol=1e-4
        )
        np.testing.assert_array_equal(ours.prompt_scores.is_greedy, theirs.prompt_scores.is_greedy)


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"compute_dtype": "bfloat16"}, 0.05),
        ({"compute_dtype": "float16"}, 0.01),
        ({"backend_options": {"quantize_bits": 8}}, 0.05),
        ({"backend_options": {"quantize_bits": 4}}, 0.4),
    ],
    ids=["bf16", "fp16", "8-bit", "4-bit"],
)
def test_fewer_bits_are_close(wide: ModelConfig, options: dict[str, Any], tolerance: float) -> None:
    """Guards reduced precision and quantised weights: log-probabilities near the exact ones, and
    themselves in fp32 (in bf16 they would have two digits)."""
    prompt = prompts_of([40])[0]
    requests = [Request(prompt, 0, score_prompt=True), Request(prompt, 4)]
    exact, _ = generate(engine_of(wide), requests)
    scored, continued = generate(engine_of(wide, **options), requests)
    assert exact.prompt_scores is not None
    assert scored.prompt_scores is not None
    error = np.abs(scored.prompt_scores.logprobs - exact.prompt_scores.logprobs).max()
    assert 0 < error < tolerance * np.abs(exact.prompt_scores.logprobs).max()
    values = np.array(continued.logprobs, np.float32)
    assert (values.view(np.uint32) & 0xFFFF).any(), "log-probabilities rounded to bf16"


def test_long_prompts_are_scored_in_pieces(wide: ModelConfig) -> None:
    """Guards the logits of a scored prompt, held 128 positions at a time, and its padding."""
    model = wide.model_copy(update={"max_position_embeddings": 400})
    rows = prompts_of([300, 129, 2])
    together = generate(
        engine_of(model, max_batch_size=2), [Request(r, 0, score_prompt=True) for r in rows]
    )
    for row, completion in zip(rows, together, strict=True):
        (alone,) = generate(engine_of(model), [Request(row, 0, score_prompt=True)])
        assert completion.prompt_scores is not None
        assert alone.prompt_scores is not None
        assert len(completion.prompt_scores.logprobs) == len(row) - 1
        np.testing.assert_allclose(
            completion.prompt_scores.logprobs, alone.prompt_scores.logprobs, rtol=0, atol=1e-4
        )


def test_a_failing_logits_processor_fails_its_own_request(tiny_config: ModelConfig) -> None:
    """Guards one user's broken constraint against everybody else's requests: mlx-lm's batch must
    not be left half stepped."""

    def broken(ids: Any, row: np.ndarray) -> np.ndarray:
        if len(ids) > 21:
            raise ValueError("broken")
        return row

    prompts = prompts_of([20, 30])
    (expected,) = generate(engine_of(tiny_config), [Request(prompts[1], 6)])
    decoder = engine_of(tiny_config).open()
    bad = decoder.add(Request(prompts[0], 6, logits_processors=[broken]))
    good = decoder.add(Request(prompts[1], 6))
    events: list[TokenEvent] = []
    events += decoder.step()
    for _ in range(2):
        with pytest.raises(ValueError, match="broken"):
            decoder.step()
    decoder.cancel(bad)
    while more := decoder.step():
        events += more
    assert tuple(e.token for e in events if e.request_id == good) == expected.ids
    of_bad = [event for event in events if event.request_id == bad]
    assert of_bad[-1].finish_reason == "cancelled"


def test_a_processor_is_not_asked_after_the_last_token(tiny_config: ModelConfig) -> None:
    """Guards constraints with an end of their own: mlx-lm samples one token more than it gives."""
    lengths: list[int] = []

    def watch(ids: Any, row: np.ndarray) -> np.ndarray:
        lengths.append(len(ids))
        return row

    prompt = prompts_of([5])[0]
    engine = engine_of(tiny_config)
    (free,) = generate(engine, [Request(prompt, 4, logits_processors=[watch])])
    assert lengths == [5, 6, 7, 8]
    lengths.clear()
    stop = frozenset({free.ids[1]})
    (stopped,) = generate(engine, [Request(prompt, 4, stop_ids=stop, logits_processors=[watch])])
    assert stopped.finish_reason == "stop"
    assert lengths == [5 + index for index in range(len(stopped.ids))]


def test_diverged_weights_are_named(tiny_config: ModelConfig) -> None:
    """Guards an endless stream of token 0 from a model of NaN."""
    tensors = lively_parameters(tiny_config)
    tensors["model.norm.weight"] = HostTensor.of(np.full(32, np.nan, np.float32))
    weights = {name: from_host(host) for name, host in tensors.items()}
    for sampling in (SamplingParams(), SamplingParams(temperature=1.0)):
        engine = MlxEngine(weights, tiny_config, EngineOptions())
        with pytest.raises(BackendError, match="no finite logits"):
            generate(engine, [Request([1, 2], 3, sampling=sampling)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_seq_len": 129}, "max_seq_len 129"),
        ({"vocab_size": 193}, "vocab_size 193"),
        ({"max_batch_size": 0}, "max_batch_size 0"),
        ({"backend_options": {"quantise_bits": 4}}, "did you mean `quantize_bits`"),
    ],
)
def test_bad_options_are_refused(
    tiny_config: ModelConfig, options: dict[str, Any], message: str
) -> None:
    """Guards settings that could only fail later."""
    with pytest.raises(ConfigError, match=message):
        engine_of(tiny_config, **options)


def write_checkpoint(folder: Path, model: ModelConfig, tensors: dict[str, HostTensor]) -> None:
    (folder / "config.json").write_text(json.dumps(model.to_hf()))
    specs = [(name, host.dtype, host.shape) for name, host in tensors.items()]
    write_tensors(folder / "model.safetensors", specs, tensors.items())


def test_a_bf16_checkpoint_generates_like_its_weights(
    tiny_config: ModelConfig, tmp_path: Path
) -> None:
    """Guards foreign folders: half precision, and a tied head that was written a second time."""
    model = tiny_config.model_copy(update={"tie_word_embeddings": True})
    rounded = {}
    for name, host in lively_parameters(model).items():
        bits = (host.data.view(np.uint32) >> 16).astype(np.uint16)
        rounded[name] = HostTensor("BF16", host.shape, bits)
    written = rounded | {"lm_head.weight": rounded["model.embed_tokens.weight"]}
    write_checkpoint(tmp_path, model, written)
    requests = [Request(prompt, 8) for prompt in prompts_of([9, 3])]
    loaded = generate(MlxBackend().engine(tmp_path, EngineOptions()), requests)
    exact = {name: from_host(host).astype(mx.float32) for name, host in rounded.items()}
    assert loaded == generate(MlxEngine(exact, model, EngineOptions()), requests)


def test_a_folder_that_does_not_fit_is_refused(tiny_config: ModelConfig, tmp_path: Path) -> None:
    """Guards against generating from half a model, or from what is no checkpoint."""
    with pytest.raises(ConfigError, match="is not a checkpoint"):
        MlxEngine.load(tmp_path, EngineOptions())
    deeper = tiny_config.model_copy(update={"num_hidden_layers": 3})
    write_checkpoint(tmp_path, deeper, lively_parameters(tiny_config))
    with pytest.raises(IntegrityError, match=r"missing model\.layers\.2"):
        MlxEngine.load(tmp_path, EngineOptions())
    (tmp_path / "config.json").write_text(
        json.dumps(tiny_config.to_hf() | {"intermediate_size": 65})
    )
    with pytest.raises(
        IntegrityError, match=r"gate_proj\.weight: \[64, 32\] instead of \[65, 32\]"
    ):
        MlxEngine.load(tmp_path, EngineOptions())
