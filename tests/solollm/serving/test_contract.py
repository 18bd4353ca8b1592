"""The contract of the server, through the official client, the same on every engine."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from solollm.tokenizer import Tokenizer

MODEL = "tiny"
PROMPT = "def number_7():"
CHAT: list[Any] = [{"role": "user", "content": "number"}]
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"enum": [1, 2, 3]}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(
    scope="module", params=["torch", "mlx", pytest.param("vllm", marks=pytest.mark.vllm)]
)
def url(request: pytest.FixtureRequest, serving: Callable[..., Any]) -> str:
    return str(serving(request.param).url)


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as made:
        yield made


def complete(client: openai.OpenAI, prompt: Any = PROMPT, **options: Any) -> Any:
    settings = {"max_tokens": 16, "temperature": 0, **options}
    return client.completions.create(model=MODEL, prompt=prompt, **settings)


def chat(client: openai.OpenAI, **options: Any) -> Any:
    settings = {"messages": CHAT, "max_tokens": 16, "temperature": 0, **options}
    return client.chat.completions.create(model=MODEL, **settings)


def test_models_are_listed_and_found(client: openai.OpenAI) -> None:
    """A client that asks what there is before it asks anything else."""
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_greedy_text_is_that_of_transformers(
    client: openai.OpenAI, served_checkpoint: Path, served_tokenizer: Tokenizer
) -> None:
    """A front that tokenizes, masks or detokenizes otherwise than the model was trained with."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        served_checkpoint, dtype=torch.float32
    )
    for prompt in (PROMPT, "value = 3 + 4\n", "x"):
        ids = [served_tokenizer.bos_id, *served_tokenizer.encode(prompt)]
        with torch.no_grad():
            expected = model.generate(
                torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                max_new_tokens=24, do_sample=False, eos_token_id=None,
                pad_token_id=served_tokenizer.pad_id,
                suppress_tokens=list(range(served_tokenizer.vocab_size, 320)),
            )[0, len(ids) :].tolist()  # fmt: skip
        stop = next((i for i, t in enumerate(expected) if t in served_tokenizer.stop_ids), 24)
        text = complete(client, prompt, max_tokens=24).choices[0].text
        assert text == served_tokenizer.decode(expected[:stop])


def test_a_streamed_chat_adds_up_to_the_whole_one(client: openai.OpenAI) -> None:
    """Characters cut, lost or doubled between chunks; a usage that counts differently."""
    whole = chat(client, max_tokens=40)
    chunks = list(chat(client, max_tokens=40, stream=True, stream_options={"include_usage": True}))
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert deltas[0].role == "assistant"
    assert "".join(d.content or "" for d in deltas) == whole.choices[0].message.content
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert [r for r in reasons if r] == [whole.choices[0].finish_reason]
    assert chunks[-1].usage == whole.usage
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens


def test_a_streamed_completion_adds_up_to_the_whole_one(client: openai.OpenAI) -> None:
    """The same for the older endpoint, with two choices that must not mix."""
    options = {"n": 2, "temperature": 1, "seed": 5, "max_tokens": 30}
    whole = complete(client, **options)
    texts = ["", ""]
    for chunk in complete(client, stream=True, **options):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]


def test_the_same_seed_gives_the_same_text(client: openai.OpenAI) -> None:
    """Sampling that depends on what else runs, or ignores the seed."""
    texts = [complete(client, temperature=1, seed=seed).choices[0].text for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]
    unseeded = {complete(client, temperature=1).choices[0].text for _ in range(4)}
    assert len(unseeded) > 1


def test_choices_differ_and_the_first_is_that_of_one(client: openai.OpenAI) -> None:
    """`n` choices that are copies of one."""
    several = chat(client, n=3, temperature=1, seed=11).choices
    assert [choice.index for choice in several] == [0, 1, 2]
    assert len({choice.message.content for choice in several}) == 3
    alone = chat(client, temperature=1, seed=11).choices[0]
    assert alone.message.content == several[0].message.content


def test_a_stop_string_ends_the_text_and_is_not_in_it(client: openai.OpenAI) -> None:
    """A stop string that leaks into a stream piece by piece, or is found only in whole tokens."""
    free = complete(client, max_tokens=40).choices[0].text
    stop = free[5:8]
    expected = free[: free.index(stop)]
    cut = complete(client, max_tokens=40, stop=[stop, "never"]).choices[0]
    assert (cut.text, cut.finish_reason) == (expected, "stop")
    chunks = complete(client, max_tokens=40, stop=stop, stream=True)
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == expected


def test_logprobs_are_those_of_the_tokens(client: openai.OpenAI) -> None:
    """Log-probabilities of other tokens, or after temperature and bias."""
    entries = chat(client, logprobs=True, top_logprobs=5).choices[0].logprobs.content
    assert len(entries) == 16
    for entry in entries:
        values = [top.logprob for top in entry.top_logprobs]
        assert values == sorted(values, reverse=True)
        assert len(values) == 5
        assert entry.bytes == entry.top_logprobs[0].bytes  # greedy
        np.testing.assert_allclose(entry.logprob, values[0], atol=1e-4)
        assert sum(np.exp(values)) <= 1.0001
    warm = complete(client, logprobs=2, temperature=1.5, seed=1, max_tokens=1).choices[0].logprobs
    cold = complete(client, logprobs=2, max_tokens=1).choices[0].logprobs
    for token, value in cold.top_logprobs[0].items():
        np.testing.assert_allclose(warm.top_logprobs[0][token], value, atol=1e-4)


def test_a_bias_decides(client: openai.OpenAI, served_tokenizer: Tokenizer) -> None:
    """A bias that is ignored, or applied to another token."""
    (token,) = served_tokenizer.encode("7")
    assert complete(client, logit_bias={str(token): 100}).choices[0].text == "7" * 16
    barred = complete(client, logit_bias={str(token): -100}, max_tokens=100).choices[0].text
    assert "7" not in barred


def test_penalties_forbid_repetition(client: openai.OpenAI, served_tokenizer: Tokenizer) -> None:
    """Penalties that are ignored, or count the prompt."""
    (token,) = served_tokenizer.encode("7")
    repeated = complete(client, logit_bias={str(token): 20}, frequency_penalty=2)
    assert 0 < repeated.choices[0].text.count("7") < 16


def test_a_schema_is_met(client: openai.OpenAI) -> None:
    """A schema that is only a wish."""
    schema = {
        "type": "object",
        "properties": {
            "name": {"enum": ["ada", "bob"]},
            "age": {"type": "integer", "minimum": 0, "maximum": 99},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema}}
    for seed in range(3):
        made = chat(client, response_format=form, temperature=1, seed=seed, max_tokens=60)
        value = json.loads(made.choices[0].message.content)
        assert value["name"] in ("ada", "bob")
        assert 0 <= value["age"] <= 99
        assert made.choices[0].finish_reason == "stop"


def test_an_expression_is_matched(client: openai.OpenAI) -> None:
    """A regular expression that is searched instead of matched."""
    form: Any = {"type": "regex", "pattern": "[0-9]{3}-(ab|cd)"}
    made = chat(client, extra_body={"response_format": form}, temperature=1, seed=2)
    assert re.fullmatch("[0-9]{3}-(ab|cd)", made.choices[0].message.content)


def test_a_required_tool_is_called(client: openai.OpenAI) -> None:
    """A call that arrives as text, or with arguments outside its schema; streamed or not."""
    options: dict[str, Any] = {
        "tools": [WEATHER], "tool_choice": "required", "max_tokens": 120, "temperature": 1,
        "seed": 1,
    }  # fmt: skip
    choice = chat(client, **options).choices[0]
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls
    arguments = json.loads(call.function.arguments)
    assert call.function.name == "weather"
    assert arguments["city"] in ("Oslo", "Rome")
    assert arguments["days"] in (1, 2, 3)
    deltas = [c.choices[0].delta for c in chat(client, stream=True, **options)]
    (streamed,) = [call for delta in deltas for call in delta.tool_calls or ()]
    assert streamed.function.arguments == call.function.arguments
    assert not "".join(delta.content or "" for delta in deltas)


def test_a_conversation_with_tools_can_go_on(client: openai.OpenAI) -> None:
    """Results of tools, which a template must be given as it knows them."""
    call = {
        "id": "c1", "type": "function",
        "function": {"name": "weather", "arguments": '{"city": "Oslo", "days": 1}'},
    }  # fmt: skip
    messages = [
        *CHAT,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
    ]
    short, long = chat(client), chat(client, messages=messages, tools=[WEATHER])
    assert long.usage.prompt_tokens > short.usage.prompt_tokens + 20


def test_prompts_may_be_ids_and_several(client: openai.OpenAI, served_tokenizer: Tokenizer) -> None:
    """Batches whose answers come in another order than their prompts."""
    prompts = [PROMPT, "return", "1 + 1"]
    alone = [complete(client, prompt).choices[0].text for prompt in prompts]
    together = complete(client, prompts)
    assert [choice.text for choice in together.choices] == alone
    ids = [[served_tokenizer.bos_id, *served_tokenizer.encode(prompt)] for prompt in prompts]
    assert [choice.text for choice in complete(client, ids).choices] == alone


def test_many_at_once_get_what_each_gets_alone(client: openai.OpenAI) -> None:
    """Streams that mix, and batches that change what a request says."""
    prompts = [f"def number_{n}" for n in range(12)]
    alone = [complete(client, prompt).choices[0].text for prompt in prompts]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda p: complete(client, p).choices[0].text, prompts))
    assert together == alone


def test_errors_name_what_is_wrong(client: openai.OpenAI) -> None:
    """Errors that a client cannot branch on."""
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="/etc", prompt="x")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        complete(client, "value " * 600)
    assert (long.value.code, long.value.param) == ("context_length_exceeded", "prompt")
    with pytest.raises(openai.APIStatusError) as wrong_method:
        client.post("/models", cast_to=object)
    assert wrong_method.value.code == "method_not_allowed"
    with pytest.raises(openai.BadRequestError) as unknown:
        complete(client, extra_body={"temprature": 1})
    assert "`temperature`" in unknown.value.message
    for form in (
        {"type": "regex", "pattern": "(("},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no"}}},
    ):
        with pytest.raises(openai.BadRequestError) as bad:
            chat(client, extra_body={"response_format": form})
        assert bad.value.param == "response_format"
    assert chat(client).choices[0].message.content  # the engine is as well as before


def test_the_context_is_the_limit(client: openai.OpenAI) -> None:
    """Answers that are asked for beyond the context, which must end with it."""
    made = complete(client, max_tokens=10_000, logit_bias={"20": 100})
    assert made.choices[0].finish_reason == "length"
    assert made.usage.total_tokens == 512


def test_a_client_that_leaves_frees_its_place(client: openai.OpenAI, url: str) -> None:
    """Generations that go on for nobody."""
    stream = complete(client, max_tokens=10_000, logit_bias={"20": 100}, stream=True)
    next(iter(stream))
    stream.close()
    deadline = time.monotonic() + 20
    while _active(url) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert _active(url) == 0


def _active(url: str) -> float:
    page = httpx.get(f"{url}/metrics").text
    return float(re.findall(r"^solollm_active_sequences\{.*\} (.*)$", page, re.M)[0])
