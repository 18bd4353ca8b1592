"""The quickstart's last lesson: the model learns to answer questions about Python's own library.

Questions and answers come from the docstrings of public functions and classes; a tenth of them is
held out by name. Base and tuned model are asked the same held-out questions: how well the right
answer is predicted, how often it is told from three others, how often an answer ends by itself.
"""

from __future__ import annotations

import ast
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from solollm.backend import EngineOptions, Request
from solollm.completion import TextModel, open_model
from solollm.data.sources import standard_library_sources
from solollm.durable import replace_file
from solollm.errors import SoloLLMError
from solollm.generation import generate, loglikelihood
from solollm.story import Narrator, start

_HELD_OUT_SHARE = 10  # one in so many
_ASKED = 24  # held-out questions that are scored
_CHOICES = 4
_ROWS, _SEQ_LEN, _STEPS = 4, 256, 160
_MIN_CHARS, _MAX_CHARS = 20, 160
_MAX_FILES = 260


class Pair(NamedTuple):
    """A question about a name, and what its docstring says first."""

    name: str
    question: str
    answer: str

    @property
    def is_held_out(self) -> bool:
        digest = hashlib.blake2b(self.name.encode(), digest_size=4).digest()
        return int.from_bytes(digest) % _HELD_OUT_SHARE == 0


class Score(NamedTuple):
    """Over the held-out questions: bits per byte of the right answer, the share that is told from
    three others (chance: a quarter), the share of answers that end by themselves."""

    bits_per_byte: float
    chosen: float
    ended: float


class Tuned(NamedTuple):
    """What tuning changed."""

    pairs: int
    before: Score
    after: Score

    def __str__(self) -> str:
        return (
            f"{self.pairs:,} questions; held-out answers {self.before.bits_per_byte:.2f} ->"
            f" {self.after.bits_per_byte:.2f} bits per byte, told from three others"
            f" {self.before.chosen:.0%} -> {self.after.chosen:.0%}, ended"
            f" {self.before.ended:.0%} -> {self.after.ended:.0%}"
        )


def docstring_pairs(sources: Sequence[str]) -> Iterator[Pair]:
    """Pairs of the public functions and classes of Python files whose docstring begins with a
    sentence; a name is asked about once."""
    seen: set[str] = set()
    for source in sources:
        path = Path(source)
        try:
            tree = ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError):
            continue  # the corpus has counted it already
        module = path.stem if path.stem != "__init__" else path.parent.name
        for node in tree.body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            answer = _first_sentence(ast.get_docstring(node) or "")
            name = f"{module}.{node.name}"
            if answer and name not in seen:
                seen.add(name)
                verb = "do" if isinstance(node, ast.FunctionDef) else "stand for"
                yield Pair(name, f"What does {name} {verb}?", answer)


def _first_sentence(docstring: str) -> str:
    first = " ".join(docstring.split("\n\n")[0].split())
    sentence = first.split(". ")[0].rstrip(".") + "."
    return sentence if _MIN_CHARS <= len(sentence) <= _MAX_CHARS else ""


def tune(narrator: Narrator, folder: Path, run: Path, backend: str) -> Tuned:
    """Tune the quickstart's model on such pairs and ask it, before and after.

    Raises:
        SoloLLMError: the training stage failed; its own message stands above.
    """
    narrator.stage("Teaching it to answer", "from the docstrings of Python's own library")
    pairs = list(docstring_pairs(standard_library_sources()[:_MAX_FILES]))
    asked = [pair for pair in pairs if pair.is_held_out][:_ASKED]
    rows = [
        json.dumps({"question": pair.question, "answer": pair.answer})
        for pair in pairs
        if not pair.is_held_out
    ]
    data = folder / "questions.jsonl"
    replace_file(data, "".join(f"{row}\n" for row in rows).encode())
    narrator.say(f"{len(rows):,} questions to learn from; {len(asked)} held out are asked later")
    before = _score(run, backend, asked)
    tuned = folder / "tuned"
    words = [
        "finetune", str(run), "--data", str(data), "--run", str(tuned), "--method", "full",
        "--backend", backend,
    ]  # fmt: skip
    settings = [
        f"train.steps={_STEPS}", f"train.batch_size={_ROWS}", f"data.seq_len={_SEQ_LEN}",
        "finetune.over_length=drop", "eval.sample_tokens=32", "optimizer.lr=0.002",
    ]  # fmt: skip
    narrator.command([*words, "--set", settings[0]])
    child = start([*words, *(word for item in settings for word in ("--set", item))])
    if child.wait() != 0:
        raise SoloLLMError(
            f"tuning ended with exit code {child.returncode}",
            why="its own message stands above",
            fix="`solollm doctor` looks at the machine",
        )
    after = _score(tuned, backend, asked)
    for name, before_value, after_value in (
        ("answer, bits per byte", f"{before.bits_per_byte:.2f}", f"{after.bits_per_byte:.2f}"),
        ("told from three others", f"{before.chosen:.0%}", f"{after.chosen:.0%} (chance 25%)"),
        ("answers that end", f"{before.ended:.0%}", f"{after.ended:.0%}"),
    ):
        narrator.say(f"{name}: base {before_value}, tuned {after_value}")
    _show(narrator, tuned, backend, asked[:3])
    return Tuned(len(rows), before, after)


def _score(run: Path, backend: str, asked: Sequence[Pair]) -> Score:
    model = open_model(run, backend=backend, options=EngineOptions(max_batch_size=_CHOICES * 4))
    prompts = [_prompt(model, pair) for pair in asked]
    end = (model.tokenizer.end_id,)
    answers = [(*model.tokenizer.encode(pair.answer), *end) for pair in asked]
    contexts, continuations = [], []
    for place, prompt in enumerate(prompts):
        for choice in range(_CHOICES):  # the right one first
            contexts.append(prompt)
            continuations.append(answers[(place + choice) % len(answers)])
    likelihoods = loglikelihood(model.engine, list(zip(contexts, continuations, strict=True)))
    nats = [nats for nats, _ in likelihoods]
    right = sum(nats[::_CHOICES])
    num_bytes = sum(len(pair.answer.encode()) for pair in asked)
    means = [n / len(c) for n, c in zip(nats, continuations, strict=True)]
    groups = [means[i : i + _CHOICES] for i in range(0, len(means), _CHOICES)]
    chosen = sum(group[0] == max(group) for group in groups)
    done = generate(model.engine, [Request(prompt, 64, stop_ids=model.stop_ids)
                                   for prompt in prompts])  # fmt: skip
    ended = sum(one.finish_reason == "stop" for one in done)
    model.engine.close()
    return Score(-right / math.log(2) / num_bytes, chosen / len(asked), ended / len(asked))


def _prompt(model: TextModel, pair: Pair) -> list[int]:
    return model.tokenizer.apply_chat_template([{"role": "user", "content": pair.question}])


def _show(narrator: Narrator, run: Path, backend: str, asked: Sequence[Pair]) -> None:
    model = open_model(run, backend=backend, options=EngineOptions(max_batch_size=len(asked)))
    requests = [Request(_prompt(model, pair), 48, stop_ids=model.stop_ids) for pair in asked]
    for pair, done in zip(asked, generate(model.engine, requests), strict=True):
        narrator.text(f"{pair.question} ", model.tokenizer.decode(list(done.text_ids)))
    model.engine.close()
