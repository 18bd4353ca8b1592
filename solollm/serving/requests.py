"""From a checked request to jobs for an engine: prompts laid out and counted, limits applied."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from solollm.backend import SamplingParams
from solollm.errors import SoloLLMError
from solollm.serving.answering import ChoiceText
from solollm.serving.api_errors import ApiError, invalid
from solollm.serving.catalogue import ServedModel
from solollm.serving.limits import Limits
from solollm.serving.schemas import (
    ChatRequest,
    CompletionRequest,
    Content,
    JsonObjectFormat,
    JsonSchemaFormat,
    NamedTool,
    RegexFormat,
)
from solollm.serving.text_filter import FilterContext, FilterFactory, StopStrings
from solollm.serving.token_engine import Constraint, TokenJob
from solollm.serving.tool_calls import ToolParser, ToolUse

_COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions


@dataclass(frozen=True)
class Prepared:
    """A request ready to run: one job per choice, and the way its tokens become text."""

    model: ServedModel
    jobs: tuple[TokenJob, ...]
    contexts: tuple[FilterContext, ...]  # per job
    stops: tuple[str, ...]
    is_chat: bool
    is_scored: bool
    prompt_tokens: int
    tools: ToolUse | None = None

    def choices(self, filters: FilterFactory | None) -> list[ChoiceText]:
        """A fresh reader for each job."""
        return [
            ChoiceText(
                index, self.model.tokenizer,
                [StopStrings(self.stops), *(filters(context) if filters else ())],
                is_scored=self.is_scored, parser=ToolParser(self.tools) if self.tools else None,
            )
            for index, context in enumerate(self.contexts)
        ]  # fmt: skip


def prepare_chat(request: ChatRequest, model: ServedModel, limits: Limits) -> Prepared:
    """Raises ApiError for what this model or server cannot do."""
    if len(request.messages) > limits.max_messages:
        raise invalid(f"more than {limits.max_messages} messages", "messages")
    use = _tool_use(request, model, limits)
    messages = [_message(message) for message in request.messages]
    prompt = _chat_prompt(model, messages, use)
    wanted = request.max_completion_tokens or request.max_tokens
    job = _job(request, model, limits, prompt=prompt, max_new_tokens=wanted)
    top = request.top_logprobs or 0
    if top > limits.max_top_logprobs:
        raise invalid(f"at most {limits.max_top_logprobs}", "top_logprobs")
    if use is not None and use.constraint is not None:
        if job.constraint is not None:
            raise invalid("`response_format` and a required tool exclude each other", "tool_choice")
        job = replace(job, constraint=use.constraint)
    spoken = [{"role": m["role"], "content": m["content"] or ""} for m in messages]
    jobs = _choices(replace(job, top_logprobs=top), request.n or 1, limits)
    return Prepared(
        model, jobs, (FilterContext(spoken, True),) * len(jobs), _stops(request.stop, limits),
        is_chat=True, is_scored=bool(request.logprobs), prompt_tokens=len(prompt), tools=use,
    )  # fmt: skip


def prepare_completion(request: CompletionRequest, model: ServedModel, limits: Limits) -> Prepared:
    """Raises ApiError for what this model or server cannot do."""
    top = request.logprobs or 0
    if top > limits.max_top_logprobs:
        raise invalid(f"at most {limits.max_top_logprobs}", "logprobs")
    prompts = [_text_prompt(model, prompt) for prompt in _prompts(request.prompt, limits)]
    jobs: list[TokenJob] = []
    contexts: list[FilterContext] = []
    for ids in prompts:
        job = _job(
            request, model, limits, prompt=ids,
            max_new_tokens=request.max_tokens or _COMPLETION_TOKENS,
        )  # fmt: skip
        of_prompt = _choices(replace(job, top_logprobs=top), request.n or 1, limits)
        jobs += of_prompt
        message = {"role": "user", "content": model.tokenizer.decode(ids)}
        contexts += [FilterContext([message], False)] * len(of_prompt)
    return Prepared(
        model, tuple(jobs), tuple(contexts), _stops(request.stop, limits),
        is_chat=False, is_scored=request.logprobs is not None,
        prompt_tokens=sum(map(len, prompts)),
    )  # fmt: skip


def _job(
    request: ChatRequest | CompletionRequest, model: ServedModel, limits: Limits,
    *, prompt: list[int], max_new_tokens: int | None,
) -> TokenJob:  # fmt: skip
    context = model.engine.info.max_seq_len
    room = context - len(prompt)
    if room < 1:
        raise ApiError(
            400, f"The prompt has {len(prompt)} tokens; this model's context holds {context},"
            " the answer included", code="context_length_exceeded",
            param="messages" if isinstance(request, ChatRequest) else "prompt",
        )  # fmt: skip
    if max_new_tokens is not None and max_new_tokens > limits.max_new_tokens:
        raise invalid(f"at most {limits.max_new_tokens} new tokens", "max_tokens")
    sampling = SamplingParams(
        temperature=1.0 if request.temperature is None else float(request.temperature),
        top_k=request.top_k or 0,
        top_p=1.0 if request.top_p is None else float(request.top_p),
        min_p=float(request.min_p or 0.0),
        repetition_penalty=float(request.repetition_penalty or 1.0),
        seed=secrets.randbelow(2**62) if request.seed is None else request.seed,
    )
    return TokenJob(
        prompt_ids=tuple(prompt),
        max_new_tokens=min(max_new_tokens or limits.max_new_tokens, room),
        sampling=sampling,
        stop_ids=model.stop_ids,
        penalties=(float(request.frequency_penalty or 0), float(request.presence_penalty or 0)),
        logit_bias=_bias(request.logit_bias, model, limits),
        constraint=_constraint(request, limits),
        adapter=model.adapter,
    )


def _choices(job: TokenJob, n: int, limits: Limits) -> tuple[TokenJob, ...]:
    """`n` jobs that differ in their seed."""
    if n > limits.max_choices:
        raise invalid(f"at most {limits.max_choices} choices", "n")
    seeds = range(job.sampling.seed, job.sampling.seed + n)
    return tuple(replace(job, sampling=replace(job.sampling, seed=seed)) for seed in seeds)


def _bias(given: dict[str, float] | None, model: ServedModel, limits: Limits) -> dict[int, float]:
    if not given:
        return {}
    if len(given) > limits.max_logit_bias:
        raise invalid(f"at most {limits.max_logit_bias} tokens", "logit_bias")
    bias = {}
    for key, value in given.items():
        size = model.tokenizer.vocab_size
        if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < size):
            raise invalid(f"{key[:40]!r} is no token id below {size}", "logit_bias")
        bias[int(key)] = float(value)
    return bias


def _constraint(request: ChatRequest | CompletionRequest, limits: Limits) -> Constraint | None:
    wanted = request.response_format
    constraint = None
    if isinstance(wanted, JsonObjectFormat):
        constraint = Constraint("json_schema", '{"type": "object"}')
    elif isinstance(wanted, JsonSchemaFormat):
        schema = wanted.json_schema.schema_
        constraint = Constraint("json_schema", json.dumps({} if schema is None else schema))
    elif isinstance(wanted, RegexFormat):
        constraint = Constraint("regex", wanted.pattern)
    if constraint is not None and len(constraint.source) > limits.max_constraint_chars:
        raise invalid(f"at most {limits.max_constraint_chars} characters", "response_format")
    return constraint


def _stops(given: str | list[str] | None, limits: Limits) -> tuple[str, ...]:
    stops = [given] if isinstance(given, str) else list(given or ())
    if len(stops) > limits.max_stops:
        raise invalid(f"at most {limits.max_stops} stop strings", "stop")
    for stop in stops:
        if not 0 < len(stop) <= limits.max_stop_chars:
            raise invalid(f"a stop string has 1 to {limits.max_stop_chars} characters", "stop")
    return tuple(stops)


def _prompts(
    given: str | list[str] | list[int] | list[list[int]], limits: Limits
) -> Sequence[str | list[int]]:
    """The prompts of a completion, each a text or token ids."""
    if isinstance(given, str):
        return [given]
    if not len(given) > 0:
        raise invalid("the prompt is empty", "prompt", "empty_prompt")
    if isinstance(given[0], int):
        return [given]
    if len(given) > limits.max_prompts:
        raise invalid(f"at most {limits.max_prompts} prompts", "prompt")
    return cast("list[str | list[int]]", given)


def _text_prompt(model: ServedModel, prompt: str | list[int]) -> list[int]:
    if not prompt:
        raise invalid("a prompt is empty", "prompt", "empty_prompt")
    if isinstance(prompt, str):
        return [model.tokenizer.bos_id, *_encoded(model, prompt)]
    size = model.tokenizer.vocab_size
    for token in prompt:
        if not 0 <= token < size:
            raise invalid(f"token id {token} is outside the vocabulary of {size}", "prompt")
    return prompt


def _encoded(model: ServedModel, text: str) -> list[int]:
    try:
        return model.encode(text)
    except SoloLLMError as error:
        raise invalid(str(error), "prompt") from error


def _chat_prompt(
    model: ServedModel, messages: Sequence[dict[str, Any]], use: ToolUse | None
) -> list[int]:
    tools = use.tools if use is not None and use.choice != "none" else ()
    try:
        return model.encode_chat(messages, tools)
    except SoloLLMError as error:
        raise invalid(str(error), "messages") from error


def _message(message: Any) -> dict[str, Any]:
    """A message as chat templates know it. `developer` is a newer word for `system`."""
    role = "system" if message.role == "developer" else message.role
    plain: dict[str, Any] = {"role": role, "content": _joined(message.content)}
    for call in getattr(message, "tool_calls", None) or ():
        plain.setdefault("tool_calls", []).append(_template_call(call))
    if role == "tool":
        plain["tool_call_id"] = message.tool_call_id
    return plain


def _template_call(call: Any) -> dict[str, Any]:
    """Templates want the arguments as an object."""
    try:
        arguments = json.loads(call.function.arguments)
    except (ValueError, RecursionError) as error:
        raise invalid(f"`arguments` of {call.id[:40]!r} is no JSON", "messages") from error
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}


def _joined(content: Content | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.text for part in content)


def _tool_use(request: ChatRequest, model: ServedModel, limits: Limits) -> ToolUse | None:
    if not request.tools:
        return None
    if model.tools is None:
        raise invalid(
            f"{model.name!r} was not tuned to call tools: its chat template has no place for them",
            "tools", "tools_not_supported",
        )  # fmt: skip
    if len(request.tools) > limits.max_tools:
        raise invalid(f"at most {limits.max_tools} tools", "tools")
    choice = request.tool_choice or "auto"
    tools = tuple(tool.model_dump(exclude_none=True) for tool in request.tools)
    if not isinstance(choice, NamedTool):
        return ToolUse(model.tools, tools, choice)
    names = [tool.function.name for tool in request.tools]
    if choice.function.name not in names:
        raise invalid(f"no tool is called {choice.function.name!r}", "tool_choice")
    return ToolUse(model.tools, tools, "required", only=choice.function.name)
