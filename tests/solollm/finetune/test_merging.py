"""A tuned run gives its answers and leaves as a whole model: from the adapter, merged, in PEFT."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from solollm_torch.backend import TorchBackend

from solollm.adapted import AdapterFolder, MergedSource, as_held
from solollm.backend import Batch, EngineOptions, HostTensor, Request, SamplingParams
from solollm.checkpoint import Checkpoint, latest_checkpoint
from solollm.cli import main
from solollm.completion import open_model
from solollm.config import RunConfig
from solollm.errors import ConfigError
from solollm.export import export_model
from solollm.finetune.tuning import finetune
from solollm.generation import generate
from solollm.pretraining import open_session, prepare
from solollm.run_paths import with_paths_to
from solollm.run_streams import open_streams
from solollm.runs import Run
from solollm.serving.engine_choice import EngineSettings
from solollm.serving.server import ModelSource, ServeOptions, open_catalogue
from solollm.serving.token_engine import TokenJob
from solollm.tensorfile import open_weights

LogitsOf = Callable[[str, Path, np.ndarray], np.ndarray]
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture(scope="module", params=["lora", "qlora"])
def tuned(
    request: pytest.FixtureRequest, tuning: Callable[..., RunConfig],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:  # fmt: skip
    """A run whose adapter matters."""
    run = tmp_path_factory.mktemp("tuned") / "run"
    config = tuning(f"finetune.method={request.param}", "optimizer.lr=0.02", "train.steps=12",
                    "finetune.adapter.use_rslora=true")  # fmt: skip
    finetune(config, run)
    return run


def newest(run: Path) -> Checkpoint:
    checkpoint, _ = latest_checkpoint(run / "checkpoints")
    assert checkpoint is not None
    return checkpoint


def session_logprobs(run: Path, batch: Batch) -> np.ndarray:
    """What the run's own session says."""
    prepared = prepare(with_paths_to(Run.open(run).config, run))
    shape = prepared.shape
    streams = open_streams(prepared.config, batch_size=shape.batch_size, seq_len=shape.seq_len)
    session = open_session(prepared, streams, newest(run)).session
    return session.token_logprobs(batch)


def test_the_merged_model_has_the_adapters_logits(
    tuned: Path, tmp_path: Path, logits_of: LogitsOf
) -> None:
    """Guards: an adapter merged into another base than the quantised one it was trained over."""
    out = tmp_path / "merged"
    assert main(["export", str(tuned), "--to", "hf", "--merge", "--out", str(out)]) == 0
    ids = np.random.default_rng(0).integers(10, 280, (3, 24))
    logits = logits_of("transformers", out, ids).astype(np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    logprobs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    labels = np.roll(ids, -1, axis=1).astype(np.int32)
    theirs = np.take_along_axis(logprobs, labels[..., None], -1)[..., 0]
    ours = session_logprobs(tuned, Batch(ids.astype(np.int32), labels, 72.0))
    limit = 1e-3 * float(np.abs(logits).max())
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=limit)
    assert float(np.abs(ours - theirs).max()) < 1e-4
    with pytest.raises(ConfigError, match="--merge"):
        export_model(tuned, tmp_path / "no")


def test_an_adapter_of_an_unquantised_base_is_pefts(
    tuned: Path, base: Path, logits_of: LogitsOf, tmp_path: Path
) -> None:
    """Guards: a checkpoint that PEFT loads and computes otherwise; over a quantised base PEFT gets
    the base as it was held."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    checkpoint = newest(tuned)
    assert checkpoint.adapter is not None
    whole = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    codec = checkpoint.adapter.base.codec
    held = {}
    for name, parameter in whole.named_parameters():
        tensor = HostTensor.of(parameter.detach().numpy())
        held[name] = torch.from_numpy(as_held(name, tensor, codec).float32())
    whole.load_state_dict(held, strict=False)
    model = PeftModel.from_pretrained(whole, checkpoint.path)
    ids = np.random.default_rng(1).integers(10, 280, (2, 20))
    with torch.no_grad():
        theirs = model(torch.from_numpy(ids)).logits.numpy()
    out = tmp_path / "merged"
    export_model(tuned, out, merge=True)
    ours = logits_of("torch", out, ids)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


def test_a_tuned_run_is_talked_to_as_any_other(
    tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards: an engine over the base alone, or over the base as it was before it was quantised."""
    model = open_model(tuned)
    assert model.is_chat
    prompt = model.tokenizer.apply_chat_template([{"role": "user", "content": "What is number_3?"}])
    asked = [Request(prompt, 12), Request(prompt, 12, adapter="tuned")]
    completions = generate(model.engine, asked)
    assert completions[0].ids == completions[1].ids
    with pytest.raises(ConfigError, match="no adapter 'other'"):
        generate(model.engine, [Request(prompt, 2, adapter="other")])
    ids = [*prompt, *completions[0].ids]
    inputs = np.array([ids[:-1]], np.int32)
    labels = np.array([ids[1:]], np.int32)
    scored = session_logprobs(tuned, Batch(inputs, labels, float(labels.size)))
    np.testing.assert_allclose(
        completions[0].logprobs, scored[0, len(prompt) - 1 :], rtol=0, atol=1e-4
    )
    assert main(["generate", str(tuned), "value", "--max-new-tokens", "3"]) == 0


def test_a_base_that_moved_is_asked_for(
    tuned: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: a traceback, or a wrong base taken, where an adapter was copied without its run."""
    import shutil

    alone = tmp_path / "alone"
    shutil.copytree(newest(tuned).path, alone)
    with pytest.raises(ConfigError, match="--base FOLDER"):
        export_model(alone, tmp_path / "out", merge=True)
    export_model(alone, tmp_path / "out", merge=True, base=base)
    engine = TorchBackend().engine(base, EngineOptions())
    assert engine.model.vocab_size
    source: Any = MergedSource(
        open_weights(base), AdapterFolder(alone, newest(tuned).model), newest(tuned).model
    )
    again = open_weights(tmp_path / "out")
    for name in again.names():
        assert np.array_equal(again.read(name).float32(), source.read(name).float32())


def served_ids(source: Path, name: str, adapters: dict[str, Path], prompt: list[int]) -> list[int]:
    """What the built-in engine says greedily under a name, of a worker of its own."""
    settings = EngineSettings(engine="builtin", backend="torch", adapters=adapters)
    catalogue, _ = open_catalogue([ModelSource(source, "own")], ServeOptions(engines=settings))
    model = catalogue.find(name)
    assert model.is_chat

    async def answered() -> list[int]:
        await model.engine.start()
        job = TokenJob(tuple(prompt), 12, SamplingParams(), model.stop_ids, adapter=model.adapter)
        stream = await model.engine.open([job])
        ids = []
        while taken := await stream.next():
            ids += [token.id for _, token in taken]
        await stream.close()
        await model.engine.stop()
        return ids

    return asyncio.run(answered())


def test_a_tuned_run_is_served_by_itself_and_beside_its_base(tuned: Path, base: Path) -> None:
    """Guards: an adapter's run that a server takes for no model; a run's adapter by name that
    answers over a base held otherwise than in training."""
    opened = open_model(tuned, backend="torch")
    prompt = opened.tokenizer.apply_chat_template([{"role": "user", "content": "What?"}])
    (expected,) = generate(opened.engine, [Request(prompt, 12, stop_ids=opened.stop_ids)])
    assert served_ids(tuned, "own", {}, prompt) == list(expected.ids)
    assert served_ids(base, "mine", {"mine": tuned}, prompt) == list(expected.ids)
    settings = EngineSettings(engine="http://127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"vLLM serves no adapter's run .*--adapter NAME="):
        open_catalogue([ModelSource(tuned)], ServeOptions(engines=settings))
