"""Several adapters over one base, in one batch: each answers as if it were merged."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from solollm.adapters import ADAPTER_CONFIG, AdapterOptions, peft_config
from solollm.backend import Backend, Engine, EngineOptions, Request
from solollm.errors import ConfigError, IntegrityError
from solollm.frozen_base import BaseRecord
from solollm.generation import Completion, generate
from solollm.strictfile import encode_json
from solollm.testing.adapter_folders import write_base, write_mlx_lm, write_peft
from solollm.testing.bench import QUANTISABLE, REAL_VOCAB_SIZE

MODEL = QUANTISABLE
PIRATE = AdapterOptions(rank=4, alpha=8)
POET = AdapterOptions(
    rank=7, alpha=6, use_rslora=True, target_modules=("q_proj", "v_proj", "down_proj")
)
ADAPTERS = {"pirate": PIRATE, "poet": POET}
CLOSE = 1e-4  # two likeliest tokens this near to each other may change places


@pytest.fixture(scope="module", params=["torch", "mlx"])
def backend(request: pytest.FixtureRequest) -> Backend:
    pytest.importorskip({"mlx": "mlx_lm"}.get(request.param, request.param))
    module = importlib.import_module(f"solollm_{request.param}.backend")
    made: Backend = getattr(module, f"{request.param.title()}Backend")()
    return made


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"), MODEL)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One in PEFT's layout, one in mlx-lm's."""
    home = tmp_path_factory.mktemp("adapters")
    return {
        "pirate": write_peft(home / "pirate", MODEL, PIRATE),
        "poet": write_mlx_lm(home / "poet", MODEL, POET),
    }


def options_of(folders: dict[str, Path], batch: int = 3) -> EngineOptions:
    return EngineOptions(max_batch_size=batch, adapters=folders, vocab_size=REAL_VOCAB_SIZE)


def prompts() -> list[list[int]]:
    """Some begin alike, so that one's keys tempt another."""
    generator = np.random.default_rng(7)
    shared = generator.integers(0, REAL_VOCAB_SIZE, 22).tolist()
    tails = [generator.integers(0, REAL_VOCAB_SIZE, n).tolist() for n in (1, 6, 3, 9)]
    return [shared, [*shared, *tails[0]], [*shared, *tails[1]], tails[2], tails[3]]


def alone(
    backend: Backend, base: Path, folders: dict[str, Path], name: str | None
) -> list[Completion]:
    """What the merged model (or the base) says to every prompt, one at a time."""
    options = EngineOptions(max_batch_size=1, vocab_size=REAL_VOCAB_SIZE)
    if name is not None:
        options = replace(options, adapters={name: folders[name]}, adapter=name)
    engine = backend.engine(base, options)
    requests = [Request(prompt, 8, score_prompt=True) for prompt in prompts()]
    return [generate(engine, [request])[0] for request in requests]


def assert_alike(found: Sequence[Completion], expected: Sequence[Completion]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.ids == other.ids
        np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=0, atol=CLOSE)
        assert one.prompt_scores is not None
        assert other.prompt_scores is not None
        scores = one.prompt_scores.logprobs, other.prompt_scores.logprobs
        np.testing.assert_allclose(*scores, rtol=0, atol=CLOSE)


def together(engine: Engine, names: Sequence[str | None]) -> dict[str | None, list[Completion]]:
    """Every prompt with every adapter, mixed in one batch."""
    pairs = [(name, prompt) for prompt in prompts() for name in names]
    requests = [Request(prompt, 8, score_prompt=True, adapter=name) for name, prompt in pairs]
    completions = generate(engine, requests)
    return {
        name: [c for (of, _), c in zip(pairs, completions, strict=True) if of == name]
        for name in names
    }


def test_adapters_in_one_batch_answer_as_the_merged_models(
    backend: Backend, base: Path, folders: dict[str, Path]
) -> None:
    """Guards: a row that gets another's factors, keys taken over from another adapter, a base that
    is touched by its adapters."""
    names: list[str | None] = [None, "pirate", "poet"]
    found = together(backend.engine(base, options_of(folders)), names)
    expected = {name: alone(backend, base, folders, name) for name in names}
    for name in names:
        assert_alike(found[name], expected[name])
    texts = {name: [c.ids for c in expected[name]] for name in names}
    assert texts[None] != texts["pirate"] != texts["poet"] != texts[None], "they say the same"


def test_a_default_among_several(backend: Backend, base: Path, folders: dict[str, Path]) -> None:
    """Guards: a request without a name that gets the base, where an adapter is the default."""
    engine = backend.engine(base, replace(options_of(folders), adapter="poet"))
    found = together(engine, [None, "pirate"])
    assert_alike(found[None], alone(backend, base, folders, "poet"))
    assert_alike(found["pirate"], alone(backend, base, folders, "pirate"))
    with pytest.raises(ConfigError, match=r"no adapter 'pirat'.*`pirate`"):
        generate(engine, [Request([1], 2, adapter="pirat")])


@pytest.mark.parametrize("codec", ["nf4", "affine4"])
def test_adapters_over_a_quantised_base(
    backend: Backend, base: Path, tmp_path: Path, codec: str
) -> None:
    """Guards: adapters that learnt over codes and answer over other weights; one base held for two
    adapters that learnt over different ones."""
    record = BaseRecord(content="a" * 64, config=MODEL.to_hf(), codec=codec)  # type: ignore[arg-type]
    folders = {
        name: write_peft(tmp_path / name, MODEL, options, record)
        for name, options in ADAPTERS.items()
    }
    found = together(backend.engine(base, options_of(folders)), ["pirate", "poet"])
    for name in ADAPTERS:
        assert_alike(found[name], alone(backend, base, folders, name))
    folders["plain"] = write_peft(tmp_path / "plain", MODEL, POET)
    with pytest.raises(ConfigError, match=f"one base cannot be held .*{codec}"):
        backend.engine(base, options_of(folders))


def test_cancelling_leaves_the_other_adapters_alone(
    backend: Backend, base: Path, folders: dict[str, Path]
) -> None:
    """Guards: a request taken out of another adapter's batch, which has its own count."""
    expected = alone(backend, base, folders, "poet")[3]
    requests = backend.engine(base, options_of(folders)).open()
    prompt = prompts()[3]
    gone = [requests.add(Request(prompt, 8, adapter=name)) for name in ("pirate", None)]
    kept = requests.add(Request(prompt, 8, adapter="poet"))
    waiting = requests.add(Request(prompt, 8, adapter="pirate"))
    events = requests.step()
    for request_id in (*gone, waiting):
        requests.cancel(request_id)
    while more := requests.step():
        events += more
    assert tuple(e.token for e in events if e.request_id == kept) == expected.ids
    ended = {e.request_id for e in events if e.finish_reason == "cancelled"}
    assert ended == {*gone, waiting}


def test_an_adapter_of_another_model_is_refused(
    backend: Backend, base: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Guards: an adapter loaded in part, or a shape that fails only when a row meets it."""
    broken = write_peft(tmp_path / "broken", MODEL, PIRATE)
    (broken / ADAPTER_CONFIG).write_bytes(encode_json(peft_config(POET)))
    with pytest.raises(IntegrityError, match="broken"):
        backend.engine(base, options_of({**folders, "broken": broken}))
