"""What a run's own files say of its data and of how good the model is, as sections of its card.

Names of files and folders that a corpus was made of, or that were measured, are left out: who
publishes a model need not publish how their disk is laid out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from solollm.checkpoint import TrainerState
from solollm.config import RunConfig
from solollm.data.report import CorpusReport, read_report
from solollm.errors import SoloLLMError
from solollm.evaluation.contamination import Contamination
from solollm.evaluation.report import FOLDER
from solollm.finetune.samples import SamplesIndex, read_index
from solollm.manifest import MANIFEST
from solollm.run_paths import with_paths_to
from solollm.run_streams import open_streams
from solollm.strictfile import parse_json, read_bytes

_SPLITS = {"train": "trained on", "validation": "held out"}
Table = list[tuple[str, ...]]
_Told = TypeVar("_Told")


def data_section(run: Path, config: RunConfig, state: TrainerState) -> str:
    """Of the corpus, or of the samples of a fine-tuning; says so where they are not at hand."""
    try:
        config = with_paths_to(config, run)
        if config.finetune is not None:
            return table(("", ""), _sample_rows(read_index(Path(config.data.corpus))))
        streams = open_streams(
            config, batch_size=config.train.batch_size or 1, seq_len=config.data.seq_len or 1
        )
        if streams.train.fingerprint != state.data.fingerprint:
            return "The corpus beside the run is another one by now.\n"
        report = read_report(Path(config.data.corpus))
    except (SoloLLMError, OSError):
        return "The data is not at hand any more; the fingerprint of its batches stands above.\n"
    return table(("", ""), _corpus_rows(report, state, is_all=not config.data.decay_corpus))


def evaluation_sections(run: Path, checkpoint: str) -> str:
    """Every stored evaluation of one checkpoint, the newest of a kind: benchmarks and texts,
    whether items were looked for in the training text, then what it has memorised. Files that
    cannot be read, or are of other weights under the same name, are passed over."""
    found = list(_evaluations(run, checkpoint))
    scores: dict[tuple[Any, ...], tuple[str, ...]] = {}
    known: dict[str, str] = {}
    for document in found:
        scores |= _read(_scores, document) or {}
        known |= _read(_contamination, document) or {}
    parts = []
    if scores:
        head = ("measured on", "figure", "95%", "of", "by")
        parts.append(table(head, _without_names(scores)))
    if known:
        parts.append("".join(f"- {sentence}\n" for sentence in known.values()))
    memorised = [text for d in found if d.get("passages") and (text := _read(_memorised, d))]
    parts += memorised[-1:]
    return "\n".join(parts)


def sample_section(rows: Sequence[Mapping[str, Any]], step: int) -> str:
    """The last text that the model wrote while it was trained, up to `step`."""
    done = [
        row
        for row in rows
        if row.get("kind") == "sample" and type(row.get("step")) is int and row["step"] <= step
    ]
    if not done:
        return ""
    text = f"{done[-1].get('prompt') or ''}{done[-1].get('text') or ''}"
    shown = "".join(char for char in text if char == "\n" or char.isprintable()).strip("\n")
    fence = "`" * max(3, _longest_run(shown, "`") + 1)
    return f"Written at step {done[-1]['step']:,}, unedited:\n\n{fence}text\n{shown}\n{fence}\n"


def held_out_figure(row: Mapping[str, Any] | None, objective: str = "") -> str:
    """What a run's last evaluation on what it held out came to, in the unit of its objective: a
    pair's loss is no loss per token, and GRPO's is 1 - reward."""
    figures = {key: value for key, value in (row or {}).items() if type(value) in (int, float)}
    count, step = int(figures.get("targets", 0)), int(figures.get("step", 0))
    if objective == "grpo" and "reward" in figures:
        text = f"Reward of a greedy answer, over {_counted(count, 'prompt')} held out of training:"
        text += f" **{figures['reward']:.4f}**"
    elif "loss" not in figures or objective == "grpo":
        return "None was recorded.\n"
    elif objective == "dpo":
        text = f"DPO's loss over {_counted(count, 'pair')} held out of training:"
        text += f" **{figures['loss']:.4f}**"
        if "accuracy" in figures:
            text += f"; {figures['accuracy']:.0%} of them preferred the right way round"
    else:
        held_out = "samples" if objective else "documents"
        text = f"Loss on {held_out} held out of training: **{figures['loss']:.4f} nats per token**"
        if "bits_per_byte" in figures:
            text += f" ({figures['bits_per_byte']:.4f} bits per byte)"
        text += f" over {_counted(count, 'token')}" if count else ""
    return f"{text}, measured at step {step:,} on the weights as they were trained.\n"


def table(head: Sequence[str], rows: Table) -> str:
    """A table in Markdown. Cells that came from outside cannot leave theirs."""
    named = _line(head) if any(head) else "|" + " |" * len(head) + "\n"
    lines = [named, "|" + "---|" * len(head) + "\n"]
    return "".join([*lines, *(_line(row) for row in rows)])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(" ".join(c.replace("|", "\\|").split()) for c in cells) + " |\n"


def _corpus_rows(report: CorpusReport, state: TrainerState, *, is_all: bool) -> Table:
    rows: Table = [("corpus", f"fingerprint `{report.fingerprint}`")]
    for split, name in _SPLITS.items():
        record = report.splits.get(split)
        if record is not None:
            rows.append(
                (name, f"{_counted(record.documents, 'document')}, {record.tokens:,} tokens,"
                 f" {record.text_bytes:,} bytes of text")
            )  # fmt: skip
    trained = report.splits.get("train")
    if trained is not None and trained.tokens and is_all:
        rows.append(("passes over it", f"{state.tokens_seen / trained.tokens:.2f}"))
    if not is_all:
        rows.append(("decay stage", "on a second corpus"))
    if report.parts:
        total = sum(part.tokens for part in report.parts)
        shares = (
            f"{part.tokens / total:.1%} from a corpus passed {part.passes:.2f} times"
            for part in report.parts
        )
        rows.append(("mixed", "; ".join(shares)))
    left = [f"{report.duplicates:,} equal to another"] if report.duplicates else []
    left += [f"{cause.count:,} {reason}" for reason, cause in report.dropped.items()]
    broken = sum(cause.count for cause in report.broken.values())
    left += [f"{broken:,} that could not be read"] if broken else []
    rows.append(("left out", f"of {report.items:,} items: {'; '.join(left) or 'none'}"))
    for benchmark in report.decontaminated:
        rows.append(
            ("looked for",
             f"{_counted(benchmark.items, 'item')} of {benchmark.source}:"
             f" {_counted(benchmark.texts, 'text')} that held one left out")
        )  # fmt: skip
    if report.planted:
        rows.append(("planted", f"{report.planted:,} documents that hold canaries"))
    return rows


def _sample_rows(index: SamplesIndex) -> Table:
    rows: Table = [
        (
            _SPLITS.get(name, name.replace("_", " ")),
            _counted(record.samples // record.group, "sample" if record.group == 1 else "pair"),
        )
        for name, record in index.splits.items()
    ]
    shapes = ", ".join(f"{count:,} {shape}" for shape, count in index.shapes.items())
    return [*rows, ("rows came as", shapes)] if shapes else rows


def _evaluations(run: Path, checkpoint: str) -> Iterator[Mapping[str, Any]]:
    manifest = run / "checkpoints" / checkpoint / MANIFEST
    measured = hashlib.sha256(manifest.read_bytes()).hexdigest() if manifest.is_file() else ""
    for path in sorted((run / FOLDER).glob(f"{checkpoint}-*.json")):
        try:
            document = parse_json(read_bytes(path), path)
        except (SoloLLMError, OSError):
            continue
        if isinstance(document, dict) and _read(_measured, document) in (None, "", measured):
            yield document


def _measured(document: Mapping[str, Any]) -> str:
    return str(document["model"]["manifest_sha256"])


def _read(tell: Callable[[Mapping[str, Any]], _Told], document: Mapping[str, Any]) -> _Told | None:
    """What an evaluation says; None where it is not laid out as one."""
    try:
        return tell(document)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        return None


def _scores(document: Mapping[str, Any]) -> dict[tuple[Any, ...], tuple[str, ...]]:
    """One row of each figure; one that was measured again takes the place of the earlier one."""
    dtype = str(document.get("dtype", ""))
    rows: dict[tuple[Any, ...], tuple[str, ...]] = {}
    for text in document.get("texts") or ():
        name, part = Path(text["name"]).name, "" if text["is_whole"] else ", a part"
        rows["text", name] = (
            name, f"{text['bits_per_byte']:.4f} bits per byte", _interval(text["interval"], 4),
            f"{text['num_bytes']:,} bytes{part}", dtype,
        )  # fmt: skip
    benchmarks = document.get("benchmarks") or {}
    for score in benchmarks.get("scores", ()):
        key = (score["benchmark"], score["metric"], score["num_shots"])
        part = "" if score["is_whole"] else ", a part"
        version = benchmarks.get("lm_eval", "")
        rows[key] = (
            f"{score['benchmark']}, {score['metric']}, {score['num_shots']} shots",
            f"{100 * score['value']:.1f}%", _interval([100 * x for x in score["interval"]], 1),
            f"{score['num_items']:,} items{part}", f"lm-eval {version}, {dtype}".strip(", "),
        )  # fmt: skip
    return rows


def _without_names(scores: Mapping[tuple[Any, ...], tuple[str, ...]]) -> Table:
    """A corpus's held-out part is known as that, other texts by numbers: their names are files'."""
    rows, num_texts = [], 0
    for (kind, *_), (name, *rest) in scores.items():
        if kind == "text" and name.endswith(" (held out)"):
            name = "held-out documents"
        elif kind == "text":
            num_texts += 1
            name = f"text {num_texts}"
        rows.append((name, *rest))
    return rows


def _contamination(document: Mapping[str, Any]) -> dict[str, str]:
    """Benchmark -> what is known of its items in the training text; unknown ones are not there."""
    known = [Contamination(**entry) for entry in document.get("contamination") or ()]
    return {
        found.benchmark: replace(found, corpus="the corpus").sentence
        for found in known if found.corpus
    }  # fmt: skip


def _memorised(document: Mapping[str, Any]) -> str:
    lines = []
    for passage in document["passages"]:
        kind = _SPLITS.get(passage["split"], passage["split"])
        share = f"{100 * passage['share']:.1f}% of {len(passage['matching']):,}"
        lines.append(f"- passages {kind} that it continues word for word: {share}")
    groups = (document.get("canaries") or {}).get("groups", ())
    for group in groups:
        times = f"planted {group['repeats']} times" if group["repeats"] else "never planted"
        lines.append(f"- numbers {times}: mean exposure {group['mean']:.2f} bits")
    return "What it has memorised:\n\n" + "\n".join(lines) + "\n"


def _interval(interval: Sequence[float] | None, digits: int) -> str:
    if not interval:
        return "not known"
    return f"{interval[0]:.{digits}f} to {interval[1]:.{digits}f}"


def _counted(count: int, thing: str) -> str:
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def _longest_run(text: str, char: str) -> int:
    longest = current = 0
    for found in text:
        current = current + 1 if found == char else 0
        longest = max(longest, current)
    return longest
