"""SoloLLM's engine as a model of lm-evaluation-harness.

It answers exactly as the harness's own `hf` model does on the same folder: the same token ids, the
same cuts of what is too long, the same ends of a generation. What differs is how the work is done:
requests go to the engine in the order of their ids, so that those that begin alike (the questions
of one subject, the answers to one question) share what was computed.

Imported only by `harness`, which first looks whether lm-eval is there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from solollm.backend import Request, SamplingParams
from solollm.completion import TextModel, generation_ends
from solollm.errors import ConfigError
from solollm.generation import feed, loglikelihood
from solollm.tokenizer import TOKENIZER, StreamDecoder

MAX_GEN_TOKENS = 256  # what `hf` generates at most where a task says nothing
_SAMPLED = {"top_k": 50, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
_READ = {"until", "do_sample", "temperature", "max_gen_toks", *_SAMPLED}
Tell = Callable[[str, int, int], None]


class EngineLM(TemplateLM):  # type: ignore[misc]  # lm-eval is optional, and untyped here
    """`add_bos`: begin every context with the tokenizer's bos; None: only where its own files say
    so, as `hf` does. `tell` hears (kind of request, done, total)."""

    backend = "causal"

    def __init__(
        self,
        model: TextModel,
        *,
        add_bos: bool | None = None,
        seed: int = 0,
        tell: Tell = lambda kind, done, total: None,
    ) -> None:
        super().__init__()
        self._model = model
        self._tokenizer = model.tokenizer
        self._tell = tell
        self._seed = seed
        self._bos_text = self._tokenizer.decode([self._tokenizer.bos_id], skip_special=False)
        in_files = _files_add_bos(self._tokenizer.files()[TOKENIZER], self._bos_text)
        self._adds_bos = in_files if add_bos is None else add_bos
        special = sorted(self._tokenizer.special_tokens, key=len, reverse=True)
        self._special = re.compile(f"({'|'.join(map(re.escape, special))})")
        self._ends = frozenset((self._tokenizer.eos_id, *generation_ends(model.checkpoint)))

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self._tokenizer.bos_id

    @property
    def max_length(self) -> int:
        return self._model.max_seq_len

    @property
    def tokenizer_name(self) -> str:
        return self._tokenizer.digest

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Ids of a text in which special tokens, which chat templates write, count as such."""
        ids: list[int] = []
        for piece in self._special.split(string):
            known = self._tokenizer.special_tokens.get(piece)
            ids += self._tokenizer.encode(piece) if known is None else [known]
        begun = add_special_tokens is None and string.startswith(self._bos_text)
        if self._adds_bos and add_special_tokens is not False and not begun:
            return [self._tokenizer.bos_id, *ids]
        return ids

    def loglikelihood(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return answers

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        answers = loglikelihood(
            self._model.engine, pairs, tell=lambda done, total: self._tell("scoring", done, total)
        )
        for request, answer in zip(requests, answers, strict=True):
            if request[0] is not None:  # a window of a rolling score has no text of its own
                self.cache_hook.add_partial("loglikelihood", request[0], answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
        """log p of whole texts, each from the prefix token on, in disjoint full windows."""
        windows: list[tuple[None, list[int], list[int]]] = []
        ends: list[int] = []
        for (text,) in (request.args for request in requests):
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(text), prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length, context_len=1,
            )  # fmt: skip
            windows += [(None, *make_disjoint_window(window)) for window in rolling]
            ends.append(len(windows))
        scores = [score for score, _ in self._loglikelihood_tokens(windows)]
        starts = [0, *ends[:-1]]
        return [sum(scores[a:b]) for a, b in zip(starts, ends, strict=True)]

    def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
        jobs = [
            self._job(context, settings, place)
            for place, (context, settings) in enumerate(request.args for request in requests)
        ]
        order = sorted(range(len(jobs)), key=lambda place: tuple(jobs[place].request.prompt_ids))
        decoder = self._model.engine.open()
        queued = [jobs[place].request for place in order]
        done = 0
        in_flight = 2 * self._model.engine.options.max_batch_size
        for index, event in feed(decoder, queued, in_flight=in_flight):
            job = jobs[order[index]]
            complete = job.take(event.token)
            if event.finish_reason is not None:
                job.finish()
                done += 1
                self._tell("generating", done, len(jobs))
            elif complete:
                decoder.cancel(event.request_id)
        for request, job in zip(requests, jobs, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, job.text)
        return [job.text for job in jobs]

    def _job(self, context: str, settings: Mapping[str, Any], place: int) -> _Job:
        """What to generate, read from a task's settings as `hf` reads them."""
        given = normalize_gen_kwargs(dict(settings), MAX_GEN_TOKENS)
        unknown = sorted(set(given) - _READ)
        if unknown:
            raise ConfigError(
                f"the task asks for the generation settings {', '.join(unknown)}",
                why=f"SoloLLM's engine knows {', '.join(sorted(_READ))}",
                fix="run this task with lm-eval's own `hf` model on the exported checkpoint",
            )
        eos_text = self._tokenizer.decode([self.eot_token_id], skip_special=False)
        stops = handle_stop_sequences(given.get("until"), eos=eos_text)
        new_tokens = int(given["max_gen_toks"])
        room = self.max_length - new_tokens
        if room <= 0:
            raise ConfigError(
                f"the task generates up to {new_tokens} tokens",
                why=f"the model's context of {self.max_length} leaves no room for a prompt",
                fix="choose another task, or a model of longer context: a new one gets it by"
                f" `solollm pretrain --set model.max_position_embeddings={2 * new_tokens}`",
            )
        sampling = SamplingParams()
        if given.get("do_sample"):
            chosen = {name: given.get(name, default) for name, default in _SAMPLED.items()}
            temperature = float(given.get("temperature") or 1.0)
            sampling = SamplingParams(temperature=temperature, seed=self._seed + place, **chosen)
        ids = self.tok_encode(context)[-room:] or [self.prefix_token_id]
        request = Request(ids, new_tokens, sampling, self._ends)
        return _Job(request, [stop for stop in stops if stop], self._tokenizer.stream())

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as text; without a generation prompt it ends inside the last message,
        which the model is to go on with."""
        text = self._tokenizer.chat_template.render(chat_history, add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()
        return text[: text.rindex(last) + len(last)]

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self._tokenizer.chat_template.source if chat_template else None


class _Job:
    """A generation under way: `text` grows until one of `stops` stands in it, then is cut there."""

    def __init__(self, request: Request, stops: Sequence[str], decoder: StreamDecoder) -> None:
        self.request = request
        self.text = ""
        self._stops = stops
        self._longest = max(map(len, stops), default=0)
        self._decoder = decoder
        self._is_cut = False

    def take(self, token: int) -> bool:
        """One more token (-1: the end without one). True once the text is complete."""
        if self._is_cut:
            return True
        is_end = token in self.request.stop_ids
        self._append(self._decoder.push(token) if token >= 0 and not is_end else "")
        return self._is_cut

    def finish(self) -> None:
        """No token follows: what half a character there is counts as text too."""
        if not self._is_cut:
            self._append(self._decoder.finish())

    def _append(self, new: str) -> None:
        searched = max(0, len(self.text) - self._longest)
        self.text += new
        found = [at for stop in self._stops if (at := self.text.find(stop, searched)) >= 0]
        if found:
            self.text = self.text[: min(found)]
        self._is_cut = bool(found)


def _files_add_bos(content: bytes, bos: str) -> bool:
    """Whether a tokenizer.json puts `bos` before every text (its post-processor, which SoloLLM
    itself never runs)."""
    processor = json.loads(content).get("post_processor") or {}
    for part in processor.get("processors", [processor]):
        template = part.get("single", []) if part.get("type") == "TemplateProcessing" else []
        if template and template[0].get("SpecialToken", {}).get("id") == bos:
            return True
    return False
