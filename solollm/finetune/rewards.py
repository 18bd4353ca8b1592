"""What an answer is worth: rewards that can be checked, for GRPO.

    gsm8k              1 where the number after the last `####` or `The answer is` is the right one
    exact              1 where the whole answer is the right one, spaces and case apart
    regex              1 where `finetune.grpo.pattern` is found; {answer} in it is the answer
    my_rewards:score   a function of the user's own file `my_rewards.py` in the current folder:
                       score(prompt, completion, answer) -> a number

Patterns and functions run in a child process with a time limit each (`solollm.confined`): one that
hangs costs its limit and gives 0. A function's file is only ever taken from the current folder by
a plain name, never from a run: a run that came from elsewhere brings no code. Its digest is kept
in the run, so that a changed file is noticed when the run goes on.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from solollm import durable
from solollm.config import GrpoTable
from solollm.confined import Confined, Refusal
from solollm.errors import ConfigError, IntegrityError
from solollm.strictfile import encode_json, parse_json, read_bytes

BUILT_IN = ("gsm8k", "exact", "regex")
_FUNCTION = re.compile(r"[A-Za-z_]\w*:[A-Za-z_]\w*")
_RECORD = "reward.json"  # among a run's samples
_MARK = re.compile(r"####|The answer is")  # GSM8K's own, and that of lm-eval's `gsm8k_cot`
_NUMBER = re.compile(r"-?\d[\d,]*\.?\d*")


class Answered(NamedTuple):
    """One completion beside the prompt it completes and the right answer."""

    prompt: str
    completion: str
    answer: str


def final_answer(text: str) -> str | None:
    """The number after the last mark of a final answer, without thousands' commas; None where there
    is none. The marks are those of GSM8K's rows and of `solollm data tuning`'s, so that either may
    be tuned on first."""
    *before, after = _MARK.split(text)
    found = _NUMBER.search(after) if before else None
    return found.group().replace(",", "").rstrip(".") if found else None


def gsm8k(completion: str, answer: str) -> float:
    """1 where both end in the same number."""
    found, right = final_answer(completion), final_answer(answer)
    if found is None or right is None:
        return 0.0
    return float(float(found) == float(right))


def exact(completion: str, answer: str) -> float:
    """1 where both are the same text, spaces and case apart."""
    return float(" ".join(completion.split()).lower() == " ".join(answer.split()).lower())


class Scorer:
    """Rewards by one table, until `close`. `timeouts` counts what took too long."""

    def __init__(self, table: GrpoTable) -> None:
        """Raises as `require_reward`."""
        require_reward(table)
        self.timeouts = 0
        self._table = table
        self._child: Confined | None = None
        if table.reward not in ("gsm8k", "exact"):
            self._child = Confined(
                "solollm.finetune.rewards:confined_reward", seconds=table.reward_seconds
            )

    def rewards(self, answered: Sequence[Answered]) -> list[float]:
        """One finite number each.

        Raises:
            ConfigError: the user's function failed or gave no number.
        """
        return [self._reward(one) for one in answered]

    def close(self) -> None:
        if self._child is not None:
            self._child.close()

    def _reward(self, one: Answered) -> float:
        if self._table.reward == "gsm8k":
            return gsm8k(one.completion, one.answer)
        if self._table.reward == "exact":
            return exact(one.completion, one.answer)
        assert self._child is not None, "patterns and functions are confined"
        request = {
            "reward": self._table.reward, "pattern": self._table.pattern, **one._asdict(),
            "folder": str(Path.cwd()),
        }  # fmt: skip
        try:
            return float(self._child.ask(request))
        except Refusal as refusal:
            raise ConfigError(
                f"the reward {self._table.reward} does not work",
                why=str(refusal),
                fix="it takes (prompt, completion, answer) and gives a finite number",
            ) from None
        except IntegrityError:  # too slow or too large: the child is gone, the next has a new one
            self.timeouts += 1
            return 0.0


def require_reward(table: GrpoTable) -> None:
    """Raise ConfigError where there is no such reward, file or pattern."""
    if table.reward not in BUILT_IN and not _FUNCTION.fullmatch(table.reward):
        raise ConfigError(
            f"finetune.grpo.reward = {table.reward!r} is no reward",
            fix=f"use {', '.join(BUILT_IN)}, or FILE:FUNCTION for FILE.py in this folder",
        )
    if table.reward == "regex" and not table.pattern:
        raise ConfigError(
            "finetune.grpo.reward = 'regex' has no pattern",
            why="an empty one is found in every answer, and all of them would be right",
            fix="give --set finetune.grpo.pattern=..., in which {answer} is the right one",
        )
    if table.reward == "regex":
        _compile(table.pattern, "")
    if table.reward not in BUILT_IN:
        _file_of(table.reward)


def require_same_reward(table: GrpoTable, samples: Path, *, may_write: bool) -> None:
    """Keep the digest of the user's own reward file beside a run's samples when it begins, and
    compare it whenever the run goes on: another reward would teach something else.

    Raises:
        ConfigError: no such file. IntegrityError: another content than the run began with.
    """
    if not _FUNCTION.fullmatch(table.reward):
        return
    file, kept = _file_of(table.reward), samples / _RECORD
    digest = hashlib.sha256(read_bytes(file)).hexdigest()
    if not kept.is_file():
        if may_write:
            record = {"file": file.name, "sha256": digest}
            durable.replace_file(kept, encode_json(record))
        return
    record = parse_json(read_bytes(kept), kept)
    before = record.get("sha256") if isinstance(record, dict) else None
    if before != digest:
        raise IntegrityError(
            f"{file.name} in the current folder is not the reward that this run began with",
            why=f"its sha256 is {digest[:12]}, {kept} says {str(before)[:12]}",
            fix=f"put the file back as it was; or delete {kept} to go on with the changed one",
        )


def _file_of(reward: str) -> Path:
    """The user's file, in the current folder. Raises ConfigError where it is not."""
    file = Path(f"{reward.partition(':')[0]}.py")
    if not file.is_file():
        raise ConfigError(
            f"there is no {file} in the current folder",
            why=f"finetune.grpo.reward is {reward}",
            fix="start from the folder that holds it",
        )
    return file


def confined_reward(request: Mapping[str, Any]) -> float:
    """The reward of one answer, in the child process. Raises Refusal with what is wrong."""
    one = Answered(request["prompt"], request["completion"], request["answer"])
    if request["reward"] == "regex":
        return float(_compile(request["pattern"], one.answer).search(one.completion) is not None)
    module, _, name = request["reward"].partition(":")
    try:
        value = float(_function(Path(request["folder"]), module, name)(*one))
    except MemoryError:
        raise
    except Exception as error:  # whatever a user's function raises is told to him
        raise Refusal(f"{type(error).__name__}: {error!s:.300}") from error
    if not math.isfinite(value):
        raise Refusal(f"it gave {value}")
    return value


@functools.cache
def _function(folder: Path, module: str, name: str) -> Any:
    """The user's function. Its file is run once in the child, not once per answer: what was
    compared when the run began is what rewards it to the end."""
    spec = importlib.util.spec_from_file_location(module, folder / f"{module}.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return getattr(loaded, name)


def _compile(pattern: str, answer: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern.replace("{answer}", re.escape(answer)))
    except re.error as error:
        raise ConfigError(
            f"finetune.grpo.pattern = {pattern!r} is no regular expression",
            why=str(error),
            fix="mend it; a bracket that is meant as one is written \\(",
        ) from error
