"""The README.md of an exported model, and `solollm runs card`: what is known of a model, and
nothing else.

Every line comes from the checkpoint and its run's own record; what is not recorded has no line. No
path, no host and no name of a file that the corpus was made of is in it; a text that was measured
on stands there by its file's name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from solollm import __version__
from solollm.architecture import ModelConfig
from solollm.checkpoint import TrainerState
from solollm.config import RunConfig
from solollm.export.record import (
    Table,
    data_section,
    evaluation_sections,
    held_out_figure,
    sample_section,
    table,
)
from solollm.frozen_base import TrainedAdapter
from solollm.model_folder import Origin
from solollm.report.html import duration_text
from solollm.runs import Run

_LIBRARIES = {"hf": "transformers", "mlx": "mlx", "gguf": "llama.cpp", "peft": "peft"}
_USE = {
    "hf": """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype="auto")
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```
""",
    "peft": """\
```python
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("FOLDER")
```
""",
    "mlx": """\
```python
from mlx_lm import generate, load

model, tokenizer = load("FOLDER")
print(generate(model, tokenizer, prompt="Once upon a time", max_tokens=50))
```
""",
    "gguf": """\
In this folder, with llama.cpp or with Ollama:

```console
$ llama-server -m STEM.gguf
$ ollama create STEM -f Modelfile && ollama run STEM
```
""",
}
_LIMITS = """\
## Limits
The figures above are all that was measured. A model repeats what its text holds, errors and slants
included, and states untrue things in the same voice as true ones.
"""
_NO_LICENCE = """\
No licence is stated here: who publishes this model adds one that the text, and any model it began
from, allow.
"""


class Training(NamedTuple):
    """The record of a run up to one checkpoint. All but `state` is the run's, absent where the
    checkpoint stands alone; `held_out` is the last evaluation up to its step, `metrics` are the
    rows of its log."""

    state: TrainerState
    config: RunConfig | None = None
    held_out: Mapping[str, Any] | None = None
    lineage: Sequence[Mapping[str, Any]] = ()
    run: Path | None = None
    metrics: Sequence[Mapping[str, Any]] = ()
    plan: Mapping[str, Any] = {}


@dataclass(frozen=True)
class CardFacts:
    """What a card is made of. `weights`: their dtype or codes, in words; `checkpoint`: the name of
    its folder; `digest`: of weights and optimizer; `licence` and `languages` as the hub spells
    them."""

    name: str
    model: ModelConfig
    target: str
    weights: str
    training: Training | None = None
    origin: Origin | None = None
    checkpoint: str = ""
    digest: str = ""
    adapter: TrainedAdapter | None = None
    licence: str = ""
    languages: tuple[str, ...] = ()


def read_training(run: Path | None, state: TrainerState | None) -> Training | None:
    """The record that belongs to a checkpoint's state. Raises ConfigError or IntegrityError where
    the run's own files cannot be read: what they hold must not pass for never recorded."""
    if state is None:
        return None
    if run is None:
        return Training(state)
    opened = Run.open(run)
    metrics, plan = opened.read_metrics(), opened.read_plan()
    rows = [row for row in metrics if row.get("kind") == "eval"]
    lineage = opened.read_lineage()
    done = [row for row in rows if _number(row.get("step")) and row["step"] <= state.step]
    parts = [part for part in lineage if part["first_step"] < state.step]
    held_out = done[-1] if done else None
    return Training(state, opened.config, held_out, parts, run, metrics, plan)


def model_card(facts: CardFacts) -> str:
    """The text of README.md, with the head that the Hugging Face hub reads."""
    parts = [_head(facts), f"# {facts.name}\n{_introduction(facts)}\n"]
    parts.append(table(("", ""), _model_rows(facts)))
    if facts.training is not None:
        parts.append("## Training\n" + table(("", ""), _training_rows(facts.training)))
        parts += _of_the_run(facts.training, facts.checkpoint)
    use = _USE[facts.target].replace("FOLDER", facts.name).replace("STEM", file_stem(facts.name))
    limits = _LIMITS + ("" if facts.licence else _NO_LICENCE)
    return "\n".join([*parts, "## Use\n" + use, limits])


def _head(facts: CardFacts) -> str:
    lines = [f"library_name: {_LIBRARIES[facts.target]}", "pipeline_tag: text-generation"]
    if facts.licence:
        lines.append(f"license: {json.dumps(facts.licence)}")
    if facts.languages:
        lines += ["language:", *(f"- {json.dumps(language)}" for language in facts.languages)]
    base = facts.adapter.base.hub_id if facts.adapter is not None else ""
    if base:
        lines.append(f"base_model: {json.dumps(base)}")
    return "\n".join(["---", *lines, "tags:", "- solollm", "---", ""])


def _of_the_run(training: Training, checkpoint: str) -> Iterator[str]:
    """Data, figures and a sample: as far as there is a run that knows them."""
    run, config, state = training.run, training.config, training.state
    if run is None or config is None:
        yield "## Evaluation\n" + held_out_figure(training.held_out)
        return
    yield "## Data\n" + data_section(run, config, state)
    figures = evaluation_sections(run, checkpoint)
    objective = config.finetune.objective if config.finetune is not None else ""
    held_out = "## Evaluation\n" + held_out_figure(training.held_out, objective)
    yield "\n".join(filter(None, [held_out, figures]))
    sample = sample_section(training.metrics, state.step)
    if sample:
        yield "## A sample\n" + sample


def file_stem(name: str) -> str:
    """A model's name as one word that shells, llama.cpp and Ollama take."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "model"


def _introduction(facts: CardFacts) -> str:
    size = f"A language model of {facts.model.num_parameters():,} parameters"
    if facts.adapter is not None:
        return f"{_adapter_words(facts.adapter)}, trained with SoloLLM {__version__}."
    if facts.training is None:
        made = "converted" if facts.origin else "written"
    elif facts.training.config is None:
        made = "trained"
    elif facts.training.config.train.init_from:
        made = "trained further"
    else:
        made = "trained from scratch"
    return f"{size}, {made} with SoloLLM {__version__}."


def _adapter_words(adapter: TrainedAdapter) -> str:
    kind = "QLoRA" if adapter.options.base_bits else "LoRA"
    of = f" `{adapter.base.hub_id}`" if adapter.base.hub_id else " a base that has no name here"
    return f"A {kind} adapter of rank {adapter.options.rank} beside{of}"


def _model_rows(facts: CardFacts) -> Table:
    model = facts.model
    architecture = model.to_hf()["architectures"][0]
    rope = f"theta {model.rope_theta:g}"
    if model.rope_scaling is not None:
        rope += f", llama3 scaling by {model.rope_scaling.factor:g}"
    rows: Table = [
        ("architecture", f"`{architecture}`, {model.num_hidden_layers} layers,"
         f" {model.hidden_size} wide, {model.num_attention_heads} heads"
         f" ({model.num_key_value_heads} of keys and values) of {model.head_dim}"),
        ("vocabulary", f"{model.vocab_size:,} ids,"
         f" output head {'tied to the embedding' if model.tie_word_embeddings else 'of its own'}"),
        ("context", f"{model.max_position_embeddings:,} tokens; rotary {rope}"),
        ("weights", facts.weights),
    ]  # fmt: skip
    if facts.adapter is not None:
        rows.append(("base's content", f"`{facts.adapter.base.content}`"))
    if facts.digest:
        rows.append(("state's digest", f"`{facts.digest}` (weights and optimizer)"))
    if facts.origin is not None:
        revision = f", revision `{facts.origin.revision}`" if facts.origin.revision else ""
        rows.append(("imported from", f"`{facts.origin.name}`{revision}"))
    return rows


def _training_rows(training: Training) -> Table:
    state, config = training.state, training.config
    steps = f"{state.step:,}"
    if config is not None and config.train.steps:
        steps += f" of {config.train.steps:,} planned"
    rows: Table = [
        ("batches", f"fingerprint `{state.data.fingerprint}`, order by seed {state.data.seed}"),
        ("steps", steps),
        ("tokens trained on", f"{state.tokens_seen:,}"),
    ]
    if config is not None:
        lr = f", peak learning rate {config.optimizer.lr:g}" if config.optimizer.lr else ""
        rows.append(("optimizer", f"{config.optimizer.name}, {config.schedule.name}{lr}"))
        if config.finetune is not None:
            tuned = f"{config.finetune.objective} ({config.finetune.method})"
            rows.insert(0, ("fine-tuning", tuned))
        if config.train.batch_size and config.data.seq_len:
            rows.append(("a step", f"{config.train.batch_size:,} x {config.data.seq_len:,} tokens"))
        if config.train.init_from:
            rows.append(("began from", f"the weights of `{Path(config.train.init_from).name}`"))
    if state.elapsed_seconds >= 1:
        rows.append(("time", duration_text(state.elapsed_seconds)))
    rows += [*_energy(training.plan), *_machines(training)]
    return rows


def _energy(plan: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    expected = (plan.get("expected") or {}).get("kilowatt_hours")
    if isinstance(expected, int | float) and expected >= 0.001:
        yield "energy", f"{expected:.3f} kWh planned for the whole run; not measured"


def _machines(training: Training) -> Iterator[tuple[str, str]]:
    """What it was trained on: each environment with its first step, or the checkpoint's own."""
    parts = training.lineage
    if not parts:
        yield "trained on", _environment(training.state.environment.model_dump(mode="json"))
    for part in parts:
        since = "trained on" if len(parts) == 1 else f"from step {part['first_step'] + 1:,} on"
        yield since, _environment(part["environment"])


def _environment(environment: Mapping[str, Any]) -> str:
    versions = environment.get("versions") or {}
    listed = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    facts = f"{environment.get('backend')} on {environment.get('device')},"
    facts += f" {environment.get('compute_dtype')}"
    return f"{facts}; {listed}" if listed else facts


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
