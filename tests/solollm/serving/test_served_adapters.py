"""Adapters by name behind the server: listed, chosen by `model`, as good as merged, or refused."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from solollm.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, AdapterOptions, peft_config
from solollm.architecture import ModelConfig
from solollm.backend import EngineOptions, Request
from solollm.commands.serve import command
from solollm.engine_input import read_model_config
from solollm.errors import ConfigError, IntegrityError, SoloLLMError
from solollm.frozen_base import BaseRecord
from solollm.generation import generate
from solollm.serving.engine_choice import EngineSettings
from solollm.serving.server import ModelSource, ServeOptions, open_catalogue, serve
from solollm.strictfile import encode_json
from solollm.testing.adapter_folders import random_factors, write_arrays, write_mlx_lm, write_peft
from solollm.tokenizer import Tokenizer

PIRATE = AdapterOptions(rank=4, alpha=4)
POET = AdapterOptions(rank=8, alpha=6, target_modules=("q_proj", "v_proj", "up_proj", "down_proj"))
PROMPTS = ("def number_7():", "value = 3 + 4\n", "return", "def number_12():\n    value")
NAMES = ("tiny", "pirate", "poet")


@pytest.fixture(scope="module")
def model(served_checkpoint: Path) -> ModelConfig:
    return read_model_config(served_checkpoint)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, model: ModelConfig) -> dict[str, Path]:
    """`poet-mlx` is the poet in mlx-lm's layout."""
    home = tmp_path_factory.mktemp("adapters")
    return {
        "pirate": write_peft(home / "pirate", model, PIRATE),
        "poet": write_peft(home / "poet", model, POET),
        "poet-mlx": write_mlx_lm(home / "poet-mlx", model, POET),
    }


@pytest.fixture(
    scope="module", params=["torch", "mlx", pytest.param("vllm", marks=pytest.mark.vllm)]
)
def client(
    request: pytest.FixtureRequest, serving: Callable[..., object], folders: dict[str, Path]
) -> Iterator[openai.OpenAI]:
    """Of a server with both adapters; vLLM reads PEFT's layout alone."""
    poet = folders["poet" if request.param == "vllm" else "poet-mlx"]
    adapters = {"pirate": folders["pirate"], "poet": poet}
    url = serving(request.param, adapters=adapters, max_batch_size=4).url  # type: ignore[attr-defined]
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def merged(
    served_checkpoint: Path, served_tokenizer: Tokenizer, folders: dict[str, Path]
) -> dict[tuple[str, str], str]:
    """What base and merged models say greedily, by name and prompt."""
    backend = importlib.import_module("solollm_torch.backend").TorchBackend()
    texts = {}
    for name in NAMES:
        options = EngineOptions(1, vocab_size=served_tokenizer.vocab_size)
        if name != "tiny":
            options = EngineOptions(
                1, vocab_size=served_tokenizer.vocab_size, adapters={name: folders[name]},
                adapter=name,
            )  # fmt: skip
        engine = backend.engine(served_checkpoint, options)
        for prompt in PROMPTS:
            ids = [served_tokenizer.bos_id, *served_tokenizer.encode(prompt)]
            stops = frozenset(served_tokenizer.stop_ids)
            (found,) = generate(engine, [Request(ids, 12, stop_ids=stops)])
            kept = found.ids[:-1] if found.finish_reason == "stop" else found.ids
            texts[name, prompt] = served_tokenizer.decode(kept)
    return texts


def test_each_name_answers_as_its_merged_model(
    client: openai.OpenAI, merged: dict[tuple[str, str], str]
) -> None:
    """Guards: an answer of another's adapter among requests that run at once, or of the base."""

    def ask(pair: tuple[str, str]) -> str:
        name, prompt = pair
        answer = client.completions.create(model=name, prompt=prompt, max_tokens=12, temperature=0)
        assert answer.model == name
        return answer.choices[0].text

    pairs = [(name, prompt) for prompt in PROMPTS for name in NAMES]
    with ThreadPoolExecutor(len(pairs)) as pool:
        found = dict(zip(pairs, pool.map(ask, pairs), strict=True))
    assert found == merged
    for prompt in PROMPTS:
        assert len({merged[name, prompt] for name in NAMES}) == 3, "they say the same"


def test_they_are_listed_with_their_base(client: openai.OpenAI) -> None:
    """Guards: a chat page or a program that cannot offer what is there."""
    cards = {card.id: card.model_dump() for card in client.models.list()}
    assert list(cards) == list(NAMES)
    assert {card["root"] for card in cards.values()} == {"tiny"}


def test_an_unknown_name_is_not_found(client: openai.OpenAI) -> None:
    """Guards: a misspelt adapter that is answered by the base."""
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="pirat", prompt="x", max_tokens=2)
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"
    assert "`pirate`" in str(caught.value)


def _serve(checkpoint: Path, adapters: dict[str, Path], engine: str = "builtin") -> None:
    settings = EngineSettings(engine=engine, adapters=adapters)
    options = ServeOptions(port=0, engines=settings)
    serve([ModelSource(checkpoint, "tiny")], options, on_ready=lambda _: pytest.fail("it serves"))


def _other_rank(folder: Path, model: ModelConfig) -> None:
    (folder / ADAPTER_CONFIG).write_bytes(encode_json(peft_config(PIRATE)))


def _other_shape(folder: Path, model: ModelConfig) -> None:
    wider = model.model_copy(update={"intermediate_size": 192})
    (folder / ADAPTER_WEIGHTS).unlink()
    write_arrays(folder / ADAPTER_WEIGHTS, random_factors(wider, POET))


def _half(folder: Path, model: ModelConfig) -> None:
    (folder / ADAPTER_WEIGHTS).write_bytes((folder / ADAPTER_WEIGHTS).read_bytes()[:-100])


def _not_there(folder: Path, model: ModelConfig) -> None:
    shutil.rmtree(folder)


def _other_base(folder: Path, model: ModelConfig) -> None:
    record = BaseRecord(content="b" * 64, config=model.to_hf())
    (folder / "base.json").write_bytes(encode_json(record.model_dump(mode="json")))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (_other_rank, IntegrityError, r"poet.*gate_proj.*is missing"),
        (_other_shape, IntegrityError, r"poet.*has shape .*this base and rank need"),
        (_half, IntegrityError, "poet"),
        (_not_there, ConfigError, r"poet holds no adapter.*adapter_config\.json"),
        (_other_base, IntegrityError, r"for the adapter poet, is not the base"),
    ],
)  # fmt: skip
def test_one_that_does_not_fit_is_one_error_at_the_start(
    served_checkpoint: Path, model: ModelConfig, folders: dict[str, Path], tmp_path: Path,
    change: Callable[[Path, ModelConfig], None], error: type[SoloLLMError], message: str,
) -> None:  # fmt: skip
    """Guards: a server that comes up and fails at the first request for the adapter, or half an
    adapter that is served."""
    shutil.copytree(folders["poet"], tmp_path / "poet")
    change(tmp_path / "poet", model)
    with pytest.raises(error, match=message):
        _serve(served_checkpoint, {"pirate": folders["pirate"], "poet": tmp_path / "poet"})


def test_a_name_is_taken_once(served_checkpoint: Path, folders: dict[str, Path]) -> None:
    """Guards: an adapter that hides its base."""
    with pytest.raises(ConfigError, match="two models would be called 'tiny'"):
        _serve(served_checkpoint, {"tiny": folders["pirate"]})


def test_a_run_of_an_adapter_is_offered_with_its_own_endings(
    served_checkpoint: Path, model: ModelConfig, folders: dict[str, Path], tmp_path: Path,
    served_tokenizer: Tokenizer,
) -> None:  # fmt: skip
    """Guards: a tuned adapter served with the template and endings of a base that knows neither."""
    plain = tmp_path / "plain"
    shutil.copytree(served_checkpoint, plain)
    for name in ("chat_template.jinja", "generation_config.json"):
        (plain / name).unlink(missing_ok=True)
    own = tmp_path / "own"
    shutil.copytree(folders["pirate"], own)
    from solollm.frozen_base import BaseSource
    from solollm.tensorfile import open_weights

    weights = open_weights(plain)
    record = BaseRecord(content=BaseSource(weights).content(), config=model.to_hf())
    weights.close()
    (own / "base.json").write_bytes(encode_json(record.model_dump(mode="json")))
    ends = {"eos_token_id": [served_tokenizer.end_id]}
    files = {**served_tokenizer.files(), "generation_config.json": encode_json(ends)}
    for name, content in files.items():
        (own / name).write_bytes(content)
    settings = EngineSettings(engine="builtin", adapters={"own": own})
    catalogue, _ = open_catalogue([ModelSource(plain, "plain")], ServeOptions(engines=settings))
    base, tuned = catalogue
    assert (base.is_chat, tuned.is_chat) == (False, True)
    assert tuned.stop_ids >= {served_tokenizer.end_id}
    assert (tuned.root, tuned.adapter, tuned.engine) == ("plain", "own", base.engine)


def test_the_command_takes_them_by_name() -> None:
    """Guards: the one way, of every engine."""
    (option,) = [p for p in command.params if p.name == "adapters"]
    assert option.opts == ["--adapter"]
    assert option.multiple  # type: ignore[attr-defined]
