"""The README.md of an exported model: what is known of it, and nothing else.

Every line comes from the checkpoint and its run's own record; what is not recorded has no line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from solollm import __version__
from solollm.architecture import ModelConfig
from solollm.checkpoint import TrainerState
from solollm.config import RunConfig
from solollm.errors import SoloLLMError
from solollm.model_folder import Origin
from solollm.runs import Run

_LIBRARIES = {"hf": "transformers", "mlx": "mlx", "gguf": "llama.cpp"}
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
included, and states untrue things in the same voice as true ones. No licence is stated here: who
publishes this model adds one that the text, and any model it began from, allow.
"""
_Rows = list[tuple[str, str]]


class Training(NamedTuple):
    """The record of a run up to one checkpoint. `config` and the rows are the run's, absent where
    the checkpoint stands alone; `held_out` is the last evaluation up to its step."""

    state: TrainerState
    config: RunConfig | None = None
    held_out: Mapping[str, Any] | None = None
    lineage: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class CardFacts:
    """What a card is made of. `weights`: their dtype or codes, in words."""

    name: str
    model: ModelConfig
    target: str
    weights: str
    training: Training | None = None
    origin: Origin | None = None


def read_training(run: Path | None, state: TrainerState | None) -> Training | None:
    """The record that belongs to a checkpoint's state; a damaged run leaves the state alone."""
    if state is None:
        return None
    if run is None:
        return Training(state)
    try:
        opened = Run.open(run)
        rows = [row for row in opened.read_metrics() if row.get("kind") == "eval"]
        lineage = opened.read_lineage()
    except SoloLLMError:
        return Training(state)
    done = [row for row in rows if _number(row.get("step")) and row["step"] <= state.step]
    parts = [part for part in lineage if part["first_step"] < state.step]
    return Training(state, opened.config, done[-1] if done else None, parts)


def model_card(facts: CardFacts) -> str:
    """The text of README.md, with the head that the Hugging Face hub reads."""
    library = _LIBRARIES[facts.target]
    head = f"---\nlibrary_name: {library}\npipeline_tag: text-generation\ntags:\n- solollm\n---\n"
    parts = [head, f"# {facts.name}\n{_introduction(facts)}\n", _table(_model_rows(facts))]
    if facts.training is not None:
        parts += [
            "## Training\n" + _table(_training_rows(facts.training)),
            "## Evaluation\n" + _evaluation(facts.training.held_out),
        ]
    use = _USE[facts.target].replace("FOLDER", facts.name).replace("STEM", file_stem(facts.name))
    return "\n".join([*parts, "## Use\n" + use, _LIMITS])


def file_stem(name: str) -> str:
    """A model's name as one word that shells, llama.cpp and Ollama take."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "model"


def _introduction(facts: CardFacts) -> str:
    size = f"A language model of {facts.model.num_parameters():,} parameters"
    if facts.training is None:
        made = "converted" if facts.origin else "written"
    elif facts.training.config is None:
        made = "trained"
    elif facts.training.config.train.init_from:
        made = "trained further"
    else:
        made = "trained from scratch"
    return f"{size}, {made} with SoloLLM {__version__}."


def _model_rows(facts: CardFacts) -> _Rows:
    model = facts.model
    architecture = model.to_hf()["architectures"][0]
    rope = f"theta {model.rope_theta:g}"
    if model.rope_scaling is not None:
        rope += f", llama3 scaling by {model.rope_scaling.factor:g}"
    rows = [
        ("architecture", f"`{architecture}`, {model.num_hidden_layers} layers,"
         f" {model.hidden_size} wide, {model.num_attention_heads} heads"
         f" ({model.num_key_value_heads} of keys and values) of {model.head_dim}"),
        ("vocabulary", f"{model.vocab_size:,} ids,"
         f" output head {'tied to the embedding' if model.tie_word_embeddings else 'of its own'}"),
        ("context", f"{model.max_position_embeddings:,} tokens; rotary {rope}"),
        ("weights", facts.weights),
    ]  # fmt: skip
    if facts.origin is not None:
        revision = f", revision `{facts.origin.revision}`" if facts.origin.revision else ""
        rows.append(("imported from", f"`{facts.origin.name}`{revision}"))
    return rows


def _training_rows(training: Training) -> _Rows:
    state, config = training.state, training.config
    steps = f"{state.step:,}"
    if config is not None and config.train.steps:
        steps += f" of {config.train.steps:,} planned"
    rows = [
        ("corpus", f"fingerprint `{state.data.fingerprint}`, order by seed {state.data.seed}"),
        ("steps", steps),
        ("tokens trained on", f"{state.tokens_seen:,}"),
    ]
    if config is not None:
        lr = f", peak learning rate {config.optimizer.lr:g}" if config.optimizer.lr else ""
        rows.append(("optimizer", f"{config.optimizer.name}, {config.schedule.name}{lr}"))
        if config.train.init_from:
            rows.append(("began from", f"the weights of `{Path(config.train.init_from).name}`"))
    if state.elapsed_seconds >= 1:
        rows.append(("time", f"{state.elapsed_seconds / 3600:.2f} hours"))
    rows += _machines(training)
    return rows


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


def _evaluation(row: Mapping[str, Any] | None) -> str:
    if row is None or not _number(row.get("loss")):
        return "None was recorded.\n"
    figure = f"**{row['loss']:.4f} nats per token**"
    if _number(row.get("bits_per_byte")):
        figure += f" ({row['bits_per_byte']:.4f} bits per byte)"
    targets = f" over {row['targets']:,} tokens" if _number(row.get("targets")) else ""
    return (
        f"Loss on documents held out of training: {figure}{targets}, measured at step"
        f" {row['step']:,} on the weights as they were trained.\n"
    )


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _table(rows: _Rows) -> str:
    return "".join(["| | |\n|---|---|\n", *(f"| {key} | {value} |\n" for key, value in rows)])
