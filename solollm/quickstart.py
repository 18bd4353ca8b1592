"""The whole life of a small model on this machine, offline, in a few minutes.

Corpus, tokenizer, training, a kill in the middle, a resume that is proved bit by bit, and a model
to type to. It is built from the same functions and commands that a user calls afterwards; the two
training stages run as `solollm pretrain` and `solollm resume` in processes of their own, because a
process that kills itself cannot tell the end of the story.

What is shown goes through a `Narrator`; `solollm.commands.quickstart` is the one on the terminal.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from solollm.architecture import ModelConfig
from solollm.backend import EngineOptions, Request, SamplingParams
from solollm.checkpoint import latest_checkpoint, list_checkpoints
from solollm.config import RunConfig, dump_config, parse_config
from solollm.data.build import build_corpus
from solollm.data.report import Cause, CorpusReport
from solollm.data.sources import standard_library_sources
from solollm.data.stream import open_stream
from solollm.dial import from_depth
from solollm.durable import replace_file
from solollm.errors import ConfigError, DataError, IntegrityError, SoloLLMError, quoted
from solollm.generation import generate
from solollm.hardware import read_machine
from solollm.horizon import Shape, plain_steps, seconds_per_step
from solollm.quickstart_move import RoundTrip, move_and_back
from solollm.quickstart_tuning import Tuned, tune
from solollm.registry import Selected, select_backend
from solollm.runs import Run
from solollm.story import Narrator, start
from solollm.tokenizer import Tokenizer

VOCAB_SIZE = 2048
TRAINING_SECONDS = 120.0
_LEARNING_RATE = 6e-3  # peak at a width of 128; narrower models take more, wider ones less
_ROWS, _SEQ_LEN = 4, 256
_DEPTHS = (2, 3, 4, 6, 8, 12)
_TOKENS_PER_PARAMETER = 4  # at such budgets tokens decide, not size: docs/results/recipe.md
_SAVES = 12
_POLL_SECONDS = 0.2
PROMPTS = ("def read", "import ", 'class Queue:\n    """', "# Return the")


@dataclass(frozen=True)
class QuickstartResult:
    """Where everything is, and what was reached. `identical`: the resumed process remade the
    killed one's checkpoint bit for bit."""

    folder: Path
    run: Path
    bits_per_byte: float
    first_bits_per_byte: float
    steps: int
    num_parameters: int
    identical: bool
    seconds: float


class _Proof(NamedTuple):
    step: int
    tensors: int
    identical: bool


def quickstart(
    folder: Path,
    narrator: Narrator,
    *,
    sources: Sequence[str] = (),
    backend: str = "auto",
    training_seconds: float = TRAINING_SECONDS,
) -> QuickstartResult:
    """Run every stage into `folder`, which must be new or empty.

    `sources` are files or folders of text; none: the Python standard library's own source.

    Raises:
        ConfigError: the folder is in use.
        DataError: too little text to train on.
        IntegrityError: the resumed run is not the killed one's continuation.
        SoloLLMError: a stage failed; its own message stands above.
    """
    begun = time.monotonic()
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(
            f"{folder} is not empty",
            why="the quickstart writes a corpus and a run there",
            fix=f"choose another with --folder, or remove {folder}",
        )
    selected = _introduce(narrator, backend)
    report = _corpus(narrator, folder, sources)
    config, model = _size(narrator, folder, selected, training_seconds)
    steps = config.train.steps or 0
    run = folder / "run"
    _train_and_kill(narrator, folder, run, steps)
    proof = _resume(narrator, folder, run)
    measured = _held_out(run)
    trip = move_and_back(narrator, folder, run, selected.backend.name)
    _complete(narrator, run, selected)
    tuned = None if sources else tune(narrator, folder, run, selected.backend.name)
    result = QuickstartResult(
        folder, run, measured[-1], measured[0], steps, model.num_parameters(), proof.identical,
        time.monotonic() - begun,
    )  # fmt: skip
    _summarize(narrator, result, report, proof=proof, trip=trip, tuned=tuned)
    if not proof.identical:
        raise IntegrityError(
            f"the resumed run is not what the killed one was at step {proof.step}",
            why="a weight or optimizer tensor differs",
            fix="please report this: it is the one thing that must never happen",
        )
    return result


def _introduce(narrator: Narrator, backend: str) -> Selected:
    machine = read_machine()
    selected = select_backend(backend)
    narrator.stage("This machine", "what there is to work with")
    narrator.say(
        f"{machine.cpu}, {machine.cores} cores, {machine.available_bytes / 2**30:.0f} GiB free"
        f" of {machine.ram_bytes / 2**30:.0f}"
    )
    narrator.say(f"backend {selected.backend.name}: {selected.reason}")
    return selected


def _corpus(narrator: Narrator, folder: Path, sources: Sequence[str]) -> CorpusReport:
    what = "your text" if sources else "the Python standard library's own source, on this disk"
    narrator.stage("A corpus and a tokenizer", f"from {what}")
    report = build_corpus(
        list(sources) or standard_library_sources(), folder / "corpus", vocab_size=VOCAB_SIZE
    )
    train, held_out = report.splits["train"], report.splits["validation"]
    narrator.table(
        "corpus",
        [
            ("documents", f"{report.items:,} read, {report.kept:,} kept"),
            ("set aside", f"{report.duplicates:,} duplicates, {_count(report.dropped):,} too poor,"
             f" {_count(report.broken):,} broken"),
            ("text", f"{train.text_bytes / 1e6:.1f} MB to train on,"
             f" {held_out.text_bytes / 1e6:.2f} MB held out"),
            ("tokens", f"{train.tokens:,}, {train.text_bytes / train.tokens:.2f} bytes each"),
        ],
    )  # fmt: skip
    tokenizer = Tokenizer.load(folder / "corpus" / "tokenizer")
    sample = "def add(a, b):\n    return a + b  # 2 numbers"
    pieces = [tokenizer.decode([i]) for i in tokenizer.encode(sample)]
    narrator.say("how the new tokenizer cuts a line: " + "|".join(pieces).replace("\n", "⏎"))
    return report


def _count(causes: Mapping[str, Cause]) -> int:
    return sum(cause.count for cause in causes.values())


def _size(
    narrator: Narrator, folder: Path, selected: Selected, seconds: float
) -> tuple[RunConfig, ModelConfig]:
    """The largest model that sees enough tokens in the time, by a three-second measurement."""
    narrator.stage("How large a model", "three seconds of real training steps decide")
    corpus = folder / "corpus"
    tokenizer = Tokenizer.load(corpus / "tokenizer")
    stream = open_stream(corpus, split="train", seq_len=_SEQ_LEN, batch_size=_ROWS, seed=0)
    batch = stream.batch(0)
    probe = _shape(from_depth(4, tokenizer.padded_vocab_size))
    plain = RunConfig.model_validate({"data": {"corpus": str(corpus), "seq_len": _SEQ_LEN}})
    per_step = seconds_per_step(probe, plain, selected.backend, plain_steps(batch))
    rate = probe.flops_per_step / per_step
    narrator.say(
        f"{rate / 1e9:.3g} GFLOP/s in training, {batch.labels.size / per_step:,.0f} tokens/s"
    )
    shape, steps = probe, 1
    for depth in _DEPTHS:
        candidate = _shape(from_depth(depth, tokenizer.padded_vocab_size))
        affordable = int(seconds * rate / candidate.flops_per_step)
        enough = candidate.model.num_parameters() * _TOKENS_PER_PARAMETER
        if depth == _DEPTHS[0] or affordable * candidate.tokens_per_step >= enough:
            shape, steps = candidate, max(24, affordable)
    config = _config(folder, shape, steps)
    replace_file(folder / "quickstart.toml", dump_config(config).encode())
    model = shape.model
    narrator.say(
        f"{model.num_hidden_layers} layers, {model.hidden_size} wide:"
        f" {model.num_parameters() / 1e6:.2f} million parameters, {steps:,} steps of"
        f" {shape.tokens_per_step:,} tokens"
    )
    return config, model


def _shape(model: ModelConfig) -> Shape:
    return Shape(model, _SEQ_LEN, _ROWS, _LEARNING_RATE * (128 / model.hidden_size) ** 0.5)


def _config(folder: Path, shape: Shape, steps: int) -> RunConfig:
    every = max(2, steps // _SAVES)
    return parse_config(
        {
            "log": {"every_steps": 10 if steps >= 600 else 1},
            "model": {"config": shape.model.model_dump()},
            "data": {"corpus": str(folder / "corpus"), "seq_len": shape.seq_len},
            "optimizer": {"name": "muon", "lr": shape.lr},
            "train": {"steps": steps, "batch_size": shape.batch_size},
            "checkpoint": {"every_steps": every, "keep_latest": 3, "keep_best": False},
            "eval": {"every_steps": max(1, steps // 6), "batches": 12, "sample_tokens": 48,
                     "sample_prompts": ["def "]},
        }
    )  # fmt: skip


def _train_and_kill(narrator: Narrator, folder: Path, run: Path, steps: int) -> None:
    """Train in a process of its own and kill it, without warning, once it is half-way."""
    narrator.stage("Training, until the power fails", "half-way the process is killed (SIGKILL)")
    arguments = ["pretrain", "--config", str(folder / "quickstart.toml"), "--run", str(run)]
    narrator.command(arguments)
    # A supervisor would bring it back to life.
    child = start([*arguments, "--unsupervised"])
    half = max(1, steps // 2)
    try:
        while child.poll() is None and not _ready_to_die(run, half):
            time.sleep(_POLL_SECONDS)
        if child.poll() is not None:
            raise SoloLLMError(
                f"training ended by itself with exit code {child.returncode} before it was killed",
                why="its own message stands above",
                fix="`solollm doctor` looks at the machine",
            )
        os.kill(child.pid, signal.SIGKILL)
    finally:
        if child.poll() is None:
            child.kill()
        child.wait()
    # The killed process left the cursor inside its last line.
    narrator.say(f"\nkilled after step {_newest_step(run)} was saved")


def _ready_to_die(run: Path, half: int) -> bool:
    saved = [step for step, _ in list_checkpoints(run / "checkpoints")]
    return len(saved) >= 2 and saved[-1] >= half


def _newest_step(run: Path) -> int:
    return list_checkpoints(run / "checkpoints")[-1][0]


def _resume(narrator: Narrator, folder: Path, run: Path) -> _Proof:
    """Resume from the checkpoint before the newest, so that the newest is made twice."""
    narrator.stage(
        "The same run, in a new process",
        "its newest checkpoint is put aside as evidence; the resumed process must remake it",
    )
    step, newest = list_checkpoints(run / "checkpoints")[-1]
    evidence = folder / "evidence"
    evidence.mkdir()
    newest.rename(evidence / newest.name)
    arguments = ["resume", str(run)]
    narrator.command(arguments)
    child = start(arguments)
    remade: dict[str, Any] = {}
    while child.poll() is None:
        remade = remade or _certificate(newest)
        time.sleep(_POLL_SECONDS)
    if child.returncode != 0:
        raise SoloLLMError(
            f"the resumed training ended with exit code {child.returncode}",
            why="its own message stands above",
            fix=f"`solollm resume {quoted(run)}` tries again",
        )
    kept = _certificate(evidence / newest.name)
    tensors = {**kept["parameters"], **kept["optimizer"]}
    identical = bool(remade) and {**remade["parameters"], **remade["optimizer"]} == tensors
    verdict = "equal in every bit" if identical else "NOT EQUAL"
    narrator.say(f"step {step}, made twice: {len(tensors)} weight and optimizer tensors {verdict}")
    return _Proof(step, len(tensors), identical)


def _certificate(checkpoint: Path) -> dict[str, Any]:
    """The digests of a checkpoint; {} while it does not stand."""
    try:
        loaded: dict[str, Any] = json.loads((checkpoint / "certificate.json").read_text())
    except (OSError, ValueError):
        return {}
    return loaded


def _held_out(run: Path) -> list[float]:
    rows = [row for row in Run.open(run).read_metrics() if row.get("kind") == "eval"]
    measured = [float(row["bits_per_byte"]) for row in rows if row.get("bits_per_byte")]
    if not measured:
        raise DataError("no held-out text to measure on", fix="give more text with --data")
    return measured


def _complete(narrator: Narrator, run: Path, selected: Selected) -> None:
    narrator.stage("Typing to it", "the model continues what you begin")
    checkpoint, _ = latest_checkpoint(run / "checkpoints")
    assert checkpoint is not None, "the resumed run has saved its last step"
    tokenizer = Tokenizer.load(checkpoint.path)
    options = EngineOptions(vocab_size=tokenizer.vocab_size)
    engine = selected.backend.engine(checkpoint.path, options)
    checkpoint.close()
    sampling = SamplingParams(temperature=0.6, top_p=0.9, seed=1)
    requests = [
        Request([tokenizer.bos_id, *tokenizer.encode(prompt)], 40, sampling, tokenizer.stop_ids)
        for prompt in PROMPTS
    ]
    for prompt, done in zip(PROMPTS, generate(engine, requests), strict=True):
        narrator.text(prompt, tokenizer.decode(list(done.text_ids)))
    engine.close()


def _summarize(
    narrator: Narrator, result: QuickstartResult, report: CorpusReport, *, proof: _Proof,
    trip: RoundTrip | None, tuned: Tuned | None,
) -> None:  # fmt: skip
    narrator.stage("Done", "what was reached, what it is worth, what to type next")
    same = "yes, bit for bit" if proof.identical else "NO"
    moved = "left out: one backend here"
    if trip is not None:
        moved = f"{trip.home} -> {trip.abroad} -> {trip.home}, losses within {trip.deviation:.0e}"
    narrator.table(
        "summary",
        [
            ("model", f"{result.num_parameters / 1e6:.2f} million parameters"),
            (
                "trained",
                f"{result.steps:,} steps on a corpus of"
                f" {report.splits['train'].tokens / 1e6:.1f} million tokens",
            ),
            (
                "held-out bits per byte",
                f"{result.first_bits_per_byte:.2f} -> {result.bits_per_byte:.2f}",
            ),
            ("killed and resumed to the same state", same),
            ("moved", moved),
            ("taught to answer", "left out: your own text" if tuned is None else str(tuned)),
            ("time", f"{result.seconds / 60:.1f} minutes"),
            ("report", str(result.run / "report.html")),
        ],
    )
    narrator.say(
        "A model of this size has learnt the look of the text: indentation, keywords, common names,"
        " short idioms. It does not know what the words mean, and invents what it does not know"
        f"{': tuning taught it the form of an answer' if tuned else ''}. A useful model has a"
        " thousand times its size and its text; the steps to it are the same."
    )
    if shutil.which("solollm") is None:
        activate = os.path.relpath(Path(sys.prefix, "bin", "activate"))
        narrator.say("First, once in every new terminal:")
        narrator.command([activate], program="source")
    for arguments in (
        ["chat", str(result.folder / "tuned")] if tuned else ["chat", str(result.run)],
        ["generate", str(result.run), "def main("],
        ["runs", "show", str(result.run)],
        ["data", "build", "YOUR_FOLDER", "--out", "corpora/mine"],
        ["pretrain", "--corpus", "corpora/mine", "--run", "runs/mine", "--hours", "8"],
    ):
        narrator.command(arguments)
