"""Benchmarks through lm-evaluation-harness (lm-eval), with SoloLLM's engine as its model.

The prompts, the few-shot examples, the extraction of answers and the metrics are lm-eval's own, of
the installed version; only the questions may come from local copies. `mmlu` is run with 5 shots and
`gsm8k_cot` with its fixed 8, as published tables have it.

lm-eval is optional and imported only here and in `harness_model`, when a benchmark is run.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from solollm.completion import TextModel
from solollm.errors import BackendError, ConfigError, nearest
from solollm.evaluation.local_data import by_subject, read_gsm8k, read_mmlu

SUPPORTED = ("0.4.9", "0.5")  # from, below
DEFAULT_SHOTS = {"mmlu": 5}  # where lm-eval itself would ask without examples
DEFAULT_SEED = 1234  # lm-eval's own
_Z95 = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Benchmark:
    """A task or group of lm-eval. `path`: a local copy of its data, for `mmlu` and `gsm8k_cot`;
    None: lm-eval downloads it."""

    name: str
    path: Path | None = None


@dataclass(frozen=True)
class HarnessOptions:
    """`limit`: at most so many items of each benchmark, spread evenly over its subjects; 0: all.
    `num_shots`: None keeps each task's own (5 for MMLU)."""

    limit: int = 0
    num_shots: int | None = None
    chat_template: bool = False
    system: str = ""
    add_bos: bool | None = None
    seed: int = DEFAULT_SEED


@dataclass(frozen=True)
class Score:
    """One metric of one benchmark. `interval` is the 95% confidence interval of `value`: Wilson's
    where every item scores 0 or 1, else value +- 1.96 standard errors. `parts`: by subject."""

    benchmark: str
    metric: str
    value: float
    interval: tuple[float, float]
    num_items: int
    num_shots: int
    version: str
    is_whole: bool
    parts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class HarnessResult:
    """The scores, the rows of each benchmark's items, and lm-eval's log of each item: task -> items
    with prompt, answer, metrics."""

    scores: tuple[Score, ...]
    items: Mapping[str, Sequence[Mapping[str, Any]]]
    samples: Mapping[str, Sequence[Mapping[str, Any]]]
    lm_eval_version: str
    seed: int


def require_lm_eval() -> str:
    """The installed lm-eval's version. Raises ConfigError where there is none that is known."""
    from importlib.metadata import PackageNotFoundError, version

    fix = "pip install 'solollm[eval]'"
    try:
        found = version("lm-eval")
    except PackageNotFoundError:
        found = ""
    if not found or importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "this needs lm-evaluation-harness, which is not installed",
            why="benchmarks run through it, so that their scores mean what published ones mean",
            fix=fix,
        )
    if not _numbers(SUPPORTED[0]) <= _numbers(found) < _numbers(SUPPORTED[1]):
        raise ConfigError(
            f"lm-eval {found} is installed, which is not known here",
            why=f"versions from {SUPPORTED[0]} and below {SUPPORTED[1]} are",
            fix=fix,
        )
    return found


def run_benchmarks(
    model: TextModel,
    benchmarks: Sequence[Benchmark],
    options: HarnessOptions = HarnessOptions(),
    *,
    tell: Callable[[str, int, int], None] = lambda kind, done, total: None,
) -> HarnessResult:
    """Score a model.

    Raises:
        ConfigError: no lm-eval, an unknown task, data that is not there or cannot be downloaded.
        DataError: a broken row of a local copy.
    """
    version = require_lm_eval()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from solollm.evaluation.harness_model import EngineLM

    lm = EngineLM(model, add_bos=options.add_bos, seed=options.seed, tell=tell)
    tasks = load_tasks(benchmarks)
    results = evaluate_tasks(lm, tasks, options)
    scores = [score for name, leaves in tasks.items() for score in _scores(name, leaves, results)]
    items = {name: _items(leaves, results) for name, leaves in tasks.items()}
    return HarnessResult(tuple(scores), items, results["samples"], version, options.seed)


def load_tasks(benchmarks: Sequence[Benchmark]) -> dict[str, list[Any]]:
    """Benchmark name -> the single tasks of lm-eval that it consists of."""
    from lm_eval.tasks import TaskManager

    tasks = {b.name: _local(b.name, b.path) for b in benchmarks if b.path is not None}
    named = [benchmark.name for benchmark in benchmarks if benchmark.path is None]
    # The index of lm-eval's own tasks takes some twenty seconds.
    manager: Any = TaskManager() if named else None
    for name in named:
        if name not in manager.all_tasks:
            raise ConfigError(
                f"lm-eval has no task {name!r}",
                why=nearest(name, manager.all_tasks),
                fix="`lm-eval ls tasks` lists them",
            )
        tasks[name] = _download(manager, name)
    return tasks


def evaluate_tasks(lm: Any, tasks: Mapping[str, Sequence[Any]], options: HarnessOptions) -> Any:
    """lm-eval's results for any of its models; what `simple_evaluate` does without its survey of
    the installed frameworks. Seeds Python's and NumPy's generators."""
    from lm_eval.evaluator import evaluate

    random.seed(options.seed)
    np.random.seed(options.seed)
    samples: dict[str, list[int]] = {}
    chosen: dict[str, Any] = {}
    for name, leaves in tasks.items():
        for task, count in zip(leaves, _counts(leaves, options.limit), strict=True):
            _set_shots(task, options.num_shots, DEFAULT_SHOTS.get(name, 0))
            task.set_fewshot_seed(seed=options.seed)
            if count:  # lm-eval takes an empty list for no limit
                samples[task.config.task] = list(range(count))
                chosen[task.config.task] = task
    return evaluate(
        lm, {"tasks": chosen, "groups": {}}, samples=samples, bootstrap_iters=0,
        system_instruction=options.system or None, apply_chat_template=options.chat_template,
        fewshot_as_multiturn=options.chat_template,
    )  # fmt: skip


def _set_shots(task: Any, asked: int | None, default: int) -> None:
    own = task.get_config("num_fewshot")
    if own == 0:  # zero in a task's file is meant
        return
    task.set_config(
        key="num_fewshot", value=next(s for s in (asked, own, default) if s is not None)
    )


def _counts(tasks: Sequence[Any], limit: int) -> list[int]:
    """How many of each task's items: taken in turn until `limit` are together (0: all)."""
    sizes = [len(task.eval_docs) for task in tasks]
    if not limit:
        return sizes
    counts = [0] * len(tasks)
    left = min(limit, sum(sizes))
    while left:
        still = [place for place, size in enumerate(sizes) if counts[place] < size][:left]
        for place in still:
            counts[place] += 1
        left -= len(still)
    return counts


def _local(name: str, path: Path) -> list[Any]:
    if name == "mmlu":
        return _local_mmlu(path)
    if name == "gsm8k_cot":
        rows = [problem._asdict() for problem in read_gsm8k(path)]
        return _tasks_over("gsm8k", {"gsm8k_cot": {"test": rows}})
    raise ConfigError(
        f"no local copy of {name!r} can be read",
        why="local copies are known of mmlu and gsm8k_cot",
        fix=f"give --task {name} to have lm-eval download it",
    )


def _local_mmlu(path: Path) -> list[Any]:
    splits = {split: by_subject(items) for split, items in read_mmlu(path).items()}
    lacking = sorted(set(splits["test"]) - set(splits["dev"]))
    if lacking:
        raise ConfigError(
            f"{path} has no dev questions for {', '.join(lacking[:3])}",
            why="they are the five examples of every prompt",
            fix="add the dev folder of the same release",
        )
    data = {
        f"mmlu_{subject}": {
            "test": [item.row() for item in items],
            "dev": [item.row() for item in splits["dev"][subject]],
        }
        for subject, items in splits["test"].items()
    }
    return _tasks_over("mmlu/default", data)


def _tasks_over(folder: str, data: Mapping[str, Mapping[str, Any]]) -> list[Any]:
    """lm-eval's own tasks of one of its folders, over other rows."""
    import lm_eval.tasks
    from datasets import Dataset, DatasetDict

    place = Path(lm_eval.tasks.__file__).parent / folder
    manager = lm_eval.tasks.TaskManager(include_path=place, include_defaults=False)
    unknown = sorted(set(data) - set(manager.all_tasks))
    if unknown:
        raise ConfigError(
            f"lm-eval knows no {', '.join(unknown[:3])}",
            why=f"it has the tasks {', '.join(manager.all_subtasks[:3])}, ...",
            fix="give the files the subjects' published names, such as anatomy_test.csv",
        )

    def rows_of(splits: Mapping[str, Any]) -> Callable[..., Any]:
        def rows(**_: Any) -> Any:
            return DatasetDict({s: Dataset.from_list(list(r)) for s, r in splits.items()})

        return rows

    # Only a member of a group may change its registered task; the group itself is not needed.
    members = [{"task": name, "custom_dataset": rows_of(splits)} for name, splits in data.items()]
    return list(manager.load([{"group": "local", "task": members}])["tasks"].values())


def _download(manager: Any, name: str) -> list[Any]:
    """A task, or those of a group or tag; fetches the data, or finds it in `datasets`' cache."""
    try:
        return list(manager.load([name])["tasks"].values())
    except Exception as error:  # whatever the many loaders of lm-eval's tasks raise
        local = {"mmlu": "--mmlu FOLDER", "gsm8k_cot": "--gsm8k FILE"}.get(name)
        raise ConfigError(
            f"the data of {name} cannot be loaded",
            why=f"{type(error).__name__}: {error}",
            fix=f"use a local copy: {local}" if local else "go online, or fill the datasets cache",
        ) from error


def _items(tasks: Sequence[Any], results: Any) -> list[Mapping[str, Any]]:
    """The row of each item once: it is logged for every filter of an answer."""
    rows = {
        (task.config.task, sample["doc_id"]): sample["doc"]
        for task in tasks
        for sample in results["samples"].get(task.config.task, ())
    }
    return [row for row in rows.values() if isinstance(row, Mapping)]


def _scores(name: str, tasks: Sequence[Any], results: Any) -> list[Score]:
    """The metrics of one benchmark, over all items of its tasks together."""
    names = [task.config.task for task in tasks if task.config.task in results["samples"]]
    sizes = {task.config.task: len(task.eval_docs) for task in tasks}
    values: dict[str, dict[str, list[float]]] = {}  # metric -> task -> items
    for name_of_task, sample in ((n, sample) for n in names for sample in results["samples"][n]):
        for metric in sample["metrics"]:
            key = metric if sample["filter"] == "none" else f"{metric},{sample['filter']}"
            if isinstance(sample[metric], int | float):
                of_task = values.setdefault(key, {}).setdefault(name_of_task, [])
                of_task.append(float(sample[metric]))
    found = []
    for key, by_task in values.items():
        pooled = [value for part in by_task.values() for value in part]
        parts = {task: float(np.mean(part)) for task, part in by_task.items()}
        found.append(
            Score(
                benchmark=name,
                metric=key,
                value=float(np.mean(pooled)),
                interval=confidence_interval(pooled),
                num_items=len(pooled),
                num_shots=int(results["n-shot"][names[0]]),
                version=str(results["versions"][names[0]]),
                is_whole=len(pooled) == sum(sizes.values()),
                parts=parts if len(parts) > 1 else {},
            )
        )
    if not found:
        raise BackendError(
            f"lm-eval gives no score per item for {name}",
            why="its metric is one of the whole corpus, such as perplexity",
            fix="use `--text FILE` for bits per byte",
        )
    return found


def confidence_interval(values: Sequence[float]) -> tuple[float, float]:
    """95%, of the mean. Wilson (1927) for zeros and ones: right near 0 and 1 too, where the plain
    interval of a score of 0 would have no width."""
    count, mean = len(values), float(np.mean(values))
    if set(values) <= {0.0, 1.0}:
        centre = mean + _Z95**2 / (2 * count)
        spread = _Z95 * math.sqrt(mean * (1 - mean) / count + _Z95**2 / (4 * count**2))
        scale = 1 + _Z95**2 / count
        return (max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale))
    error = float(np.std(values, ddof=1)) / math.sqrt(count) if count > 1 else math.inf
    return (mean - _Z95 * error, mean + _Z95 * error)


def _numbers(version: str) -> tuple[int, ...]:
    parts = []
    for part in version.split("."):
        digits = "".join(c for c in part if c.isdigit())
        parts.append(int(digits or 0))
    return tuple(parts)
