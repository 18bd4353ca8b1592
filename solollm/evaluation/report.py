"""`solollm eval` as a function: everything that was asked, measured, and written to one file.

The file stands in the run, `evaluations/<checkpoint>-<time>.json`, or beside a checkpoint that
belongs to no run. It says what was asked (tasks with versions, shots, seeds, limits), of which
model (digests of weights and tokenizer), where (backend, versions, machine), and what came out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

from solollm import __version__, durable
from solollm.adapters import ADAPTER_WEIGHTS
from solollm.backend import Backend, ComputeDType, EngineOptions
from solollm.bases import base_record, is_adapter
from solollm.completion import TextModel, find_checkpoint, open_model
from solollm.data.inspection import document_texts
from solollm.errors import ConfigError
from solollm.evaluation.contamination import Contamination, contamination
from solollm.evaluation.harness import Benchmark, HarnessOptions, HarnessResult, run_benchmarks
from solollm.evaluation.held_out_text import (
    DEFAULT_BYTES,
    TextScore,
    file_documents,
    run_corpus,
    score_text,
)
from solollm.evaluation.latency import Latency, measure_latency
from solollm.hardware import read_machine
from solollm.manifest import MANIFEST
from solollm.registry import select_backend
from solollm.runs import Run
from solollm.strictfile import encode_json
from solollm.tensorfile import TensorFile, Weights, open_weights

FORMAT, VERSION = "solollm-evaluation", 1
FOLDER = "evaluations"
Tell = Callable[[str, int, int], None]


@dataclass(frozen=True)
class EvalOptions:
    """What to measure. Without any of `texts`, `benchmarks` and `latency`: bits per byte on the
    held-out part of the run's corpus. `dtype` "auto": float32 on a processor, else what the
    backend prefers."""

    texts: tuple[Path, ...] = ()
    max_bytes: int = DEFAULT_BYTES
    benchmarks: tuple[Benchmark, ...] = ()
    harness: HarnessOptions = field(default_factory=HarnessOptions)
    latency: bool = False
    backend: str = "auto"
    batch_size: int = 8
    dtype: ComputeDType | Literal["auto"] = "auto"


@dataclass(frozen=True)
class Evaluation:
    """What was measured. `contamination`: of each benchmark. `samples`: each benchmark item's
    prompt, answer and metrics, as lm-eval logs them; they are not part of the file."""

    checkpoint: Path
    parameters: int
    texts: tuple[TextScore, ...]
    benchmarks: HarnessResult | None
    latency: Latency | None
    document: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    contamination: tuple[Contamination, ...] = ()
    samples: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)


def evaluate(
    path: Path,
    options: EvalOptions = EvalOptions(),
    *,
    tell: Tell = lambda kind, done, total: None,
) -> Evaluation:
    """Measure the model of a run (its newest intact checkpoint) or of a checkpoint folder.

    Raises:
        ConfigError: nothing to measure, a benchmark or a text that is not there, no lm-eval.
        DataError: a broken row or document.
        IntegrityError: damaged weights.
        BackendError: no backend can run here.
    """
    checkpoint, _ = find_checkpoint(path)
    texts = _texts(path, checkpoint, options)
    backend, reason = select_backend(options.backend)
    dtype = compute_dtype(backend, options.dtype)
    model = open_model(
        path, backend=options.backend,
        options=EngineOptions(max_batch_size=options.batch_size, compute_dtype=dtype),
    )  # fmt: skip
    scored = tuple(
        score_text(model, documents(), name=name, max_bytes=options.max_bytes, tell=tell)
        for name, documents in texts
    )
    harness = None
    if options.benchmarks:
        harness = run_benchmarks(model, options.benchmarks, options.harness, tell=tell)
    latency = None
    if options.latency:
        new = min(64, model.max_seq_len // 4)
        prompt = min(256, model.max_seq_len // 2)
        latency = measure_latency(
            model, backend, prompt_tokens=prompt, new_tokens=new, seed=options.harness.seed,
            tell=tell,
        )  # fmt: skip
    contaminated = contamination(path, checkpoint, harness.items) if harness else ()
    document = {
        **describe_setting(model, backend, batch_size=options.batch_size, dtype=dtype),
        "texts": [asdict(score) for score in scored],
        "benchmarks": _describe_harness(harness, options.harness),
        "contamination": [asdict(found) for found in contaminated],
        "latency": asdict(latency) if latency else None,
    }
    return Evaluation(
        checkpoint, document["model"]["parameters"], scored, harness, latency, document,
        (*model.notes[:-1], reason), contaminated, harness.samples if harness else {},
    )  # fmt: skip


def compute_dtype(backend: Backend, asked: ComputeDType | Literal["auto"]) -> ComputeDType:
    """What "auto" means here: float32 on a processor, else what the backend prefers."""
    if asked != "auto":
        return asked
    capabilities = backend.capabilities()
    return "float32" if capabilities.device == "cpu" else capabilities.preferred_dtype


def describe_setting(
    model: TextModel, backend: Backend, *, batch_size: int, dtype: ComputeDType
) -> dict[str, Any]:
    """What every evaluation's file begins with: when, with what, of which model, where."""
    return {
        "format": FORMAT, "version": VERSION,
        "time": datetime.now(UTC).isoformat(timespec="seconds"), "solollm": __version__,
        "model": describe_model(model), "backend": _describe_backend(backend),
        "machine": asdict(read_machine()), "batch_size": batch_size, "dtype": dtype,
    }  # fmt: skip


def save_evaluation(evaluation: Evaluation) -> Path:
    """Write the file where it belongs; never over another one. Raises StorageError."""
    return save_document(evaluation.checkpoint, evaluation.document)


def save_document(checkpoint: Path, document: Mapping[str, Any], *, kind: str = "") -> Path:
    """The same for any evaluation's file; `kind` becomes part of its name."""
    checkpoint = checkpoint.absolute()
    run = checkpoint.parent.parent
    in_run = checkpoint.parent.name == "checkpoints" and (run / "run.toml").is_file()
    stamp = str(document["time"]).replace(":", "").replace("-", "")[:15] + "Z"
    stamp = f"{kind}-{stamp}" if kind else stamp
    name = f"{checkpoint.name}-{stamp}.json"
    folder = run / FOLDER if in_run else checkpoint.parent
    durable.make_directory(folder)
    path = folder / (name if in_run else f"{checkpoint.name}.evaluation-{stamp}.json")
    durable.replace_file(path, encode_json(dict(document)))
    return path


def headline(document: Mapping[str, Any]) -> dict[str, str]:
    """The scores that published tables have, as text: `mmlu` with 5 shots, `gsm8k_cot` with 8
    (exact match of the number after "The answer is"), marked where only a part was asked."""
    wanted = {"mmlu": ("acc", 5), "gsm8k_cot": ("exact_match,strict-match", 8)}
    found: dict[str, str] = {}
    for score in (document.get("benchmarks") or {}).get("scores", ()):
        if wanted.get(score["benchmark"]) == (score["metric"], score["num_shots"]):
            part = "" if score["is_whole"] else f" ({score['num_items']} items)"
            found[score["benchmark"]] = f"{100 * score['value']:.1f}{part}"
    if found and document.get("latency"):
        found["ms_per_token"] = f"{document['latency']['speeds'][0]['decode_ms_per_token']:.1f}"
    return found


def describe_model(model: TextModel) -> dict[str, Any]:
    """Which model this is: by digests, not by the name of a folder."""
    checkpoint, config = model.checkpoint, model.engine.model
    manifest = checkpoint / MANIFEST
    size = config.num_parameters()
    return {
        "name": checkpoint.name,
        "parameters": size,
        "max_seq_len": model.max_seq_len,
        "weights_digest": _weights_digest(checkpoint),
        "manifest_sha256": _sha256(manifest) if manifest.is_file() else "",
        "tokenizer_sha256": model.tokenizer.digest,
        "config": config.model_dump(mode="json"),
    }


def _weights_digest(checkpoint: Path) -> str:
    """SHA-256 over the names and bytes of every weight, in the order of names; of an adapter over
    its factors, after its base's content."""
    digest = hashlib.sha256()
    weights: TensorFile | Weights
    if is_adapter(checkpoint):
        digest.update(base_record(checkpoint).content.encode())
        weights = TensorFile(checkpoint / ADAPTER_WEIGHTS)
    else:
        weights = open_weights(checkpoint)
    try:
        for name in sorted(weights.names()):
            tensor = weights.read(name)
            digest.update(f"{name}\0{tensor.dtype}\0{tensor.shape}\0".encode())
            digest.update(tensor.data.tobytes())
    finally:
        weights.close()
    return digest.hexdigest()


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _texts(
    path: Path, checkpoint: Path, options: EvalOptions
) -> list[tuple[str, Callable[[], Any]]]:
    """(name, documents) of what bits per byte are to be measured on."""
    texts: list[tuple[str, Callable[[], Any]]] = []
    for text in options.texts:
        if not text.exists():
            raise ConfigError(f"{text} does not exist", fix="give a file or folder: --text FILE")
        texts.append((text.name, partial(file_documents, text)))
    if texts or options.benchmarks or options.latency:
        return texts
    run = next((p for p in (path, checkpoint.parent.parent) if (p / "run.toml").is_file()), None)
    corpus = run_corpus(Run.open(run)) if run else None
    if corpus is None:
        raise ConfigError(
            f"nothing to measure {path} on",
            why="it is no run whose corpus is here",
            fix="give a text (--text FILE), a benchmark (--mmlu, --gsm8k, --task), or --latency",
        )
    return [(f"{corpus.name} (held out)", partial(document_texts, corpus, "validation"))]


def _describe_backend(backend: Backend) -> dict[str, Any]:
    capabilities = backend.capabilities()
    return {
        "name": backend.name, "device": capabilities.device,
        "versions": dict(capabilities.versions),
    }  # fmt: skip


def _describe_harness(
    result: HarnessResult | None, options: HarnessOptions
) -> dict[str, Any] | None:
    if result is None:
        return None
    return {
        "lm_eval": result.lm_eval_version,
        "options": asdict(options),
        "scores": [asdict(score) for score in result.scores],
    }
