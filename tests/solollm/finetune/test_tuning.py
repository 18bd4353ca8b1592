"""`solollm finetune` end to end: runs like any other, of a base with an adapter or of all of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from solollm_torch.backend import TorchBackend

from solollm.backend import IGNORED, DictSource, Plan, SessionOptions
from solollm.checkpoint import latest_checkpoint, open_checkpoint
from solollm.cli import main
from solollm.config import OptimizerTable, RunConfig
from solollm.errors import IntegrityError
from solollm.finetune.packing import SampleStream
from solollm.finetune.samples import read_samples
from solollm.finetune.tuning import finetune, prepare_tuning
from solollm.horizon import adapter_options
from solollm.pretraining import resume
from solollm.runs import Run
from solollm.starting_weights import StartingWeights
from solollm.testing.bench import State, state_of

MakeConfig = Callable[..., RunConfig]
METHODS = ("full", "lora", "qlora")


@pytest.mark.parametrize("method", METHODS)
def test_a_stopped_tuning_goes_on_to_the_same_bits(
    tuning: MakeConfig, tmp_path: Path, method: str
) -> None:
    """Guards: anything that an adapter's checkpoint or a run's samples leave out."""
    config = tuning(f"finetune.method={method}", "checkpoint.every_steps=3")
    straight = finetune(config, tmp_path / "straight")
    assert straight.step == 6
    stopped = tmp_path / "stopped"
    finetune(config, stopped)
    for path in (stopped / "checkpoints").glob("*06"):
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    assert resume(stopped).start_step == 3
    ends = [
        latest_checkpoint(tmp_path / name / "checkpoints")[0] for name in ("straight", "stopped")
    ]
    assert ends[0] is not None
    assert ends[1] is not None
    assert ends[0].certificate.digest == ends[1].certificate.digest
    rows = [[r["loss"] for r in Run.open(tmp_path / n).read_metrics() if r["kind"] == "train"]
            for n in ("straight", "stopped")]  # fmt: skip
    assert rows[0] == rows[1]
    assert (ends[0].adapter is None) == (method == "full")


def test_a_run_needs_nothing_of_its_rows_afterwards(
    tuning: MakeConfig, base: Path, chats: Path, tmp_path: Path
) -> None:
    """Guards: a resume that reads the rows again; an absolute path in a run."""
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(chats.read_bytes())
    config = tuning(f"finetune.data={json.dumps([str(rows)])}", "checkpoint.every_steps=3")
    run = tmp_path / "run"
    finetune(config, run)
    rows.unlink()
    assert resume(run).step == 6
    assert str(tmp_path) not in (run / "run.toml").read_text()
    checkpoint, _ = latest_checkpoint(run / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.adapter is not None
    ends = json.loads((checkpoint.path / "generation_config.json").read_text())["eos_token_id"]
    assert set(ends) == prepare_tuning(tuning()).reading.tokenizer.stop_ids


def test_another_base_is_refused(
    tuning: MakeConfig, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: an adapter gone on with over weights that it was not made for."""
    run = tmp_path / "run"
    finetune(tuning("checkpoint.every_steps=3"), run)
    newest = run / "checkpoints" / "step-00000006"
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    original = StartingWeights.parameters

    def other(self: StartingWeights) -> DictSource:
        source = original(self)
        tensors = {name: source.read(name) for name in source.names()}
        tensors["model.norm.weight"].data[0] += 1
        return DictSource(tensors)

    monkeypatch.setattr(StartingWeights, "parameters", other)
    with pytest.raises(IntegrityError, match="is not the base that this adapter"):
        resume(run)


@pytest.mark.parametrize("method", METHODS)
def test_users_words_change_no_gradient(tuning: MakeConfig, method: str) -> None:
    """Guards: a loss that reaches what the user said: its labels are IGNORED, and other ids in
    their place as labels, weighted zero, change nothing either."""
    prepared = prepare_tuning(tuning(f"finetune.method={method}"))
    table = prepared.config.finetune
    assert table is not None
    weights = StartingWeights(prepared.base, open_checkpoint(prepared.base).model)
    stream = SampleStream(
        prepared.samples, "train", seq_len=128, batch_size=2, seed=0, packing=True
    )
    batch = stream.batch(0)
    assert (batch.labels == IGNORED).sum() > 20
    noise = np.random.default_rng(0)
    spoken = batch.labels == IGNORED
    labels = batch.labels.copy()
    labels[spoken] = noise.integers(0, 300, int(spoken.sum()))
    loud = replace(batch, labels=labels, token_weights=(~spoken).astype(np.float32))
    options = SessionOptions(OptimizerTable(name="adamw"), adapter=adapter_options(table, seed=0))
    states: list[State] = []
    for one in (batch, loud):
        session = TorchBackend().train_session(
            weights.model, options, Plan(2, False, "float32", 128, 2)
        )
        take = session.import_parameters if method == "full" else session.import_base
        take(weights.parameters())
        session.train_step(one, lr=1e-3).result()
        states.append(state_of(session))
    for name, tensor in states[0].optimizer.items():
        expected = states[1].optimizer[name].data
        np.testing.assert_allclose(tensor.data, expected, rtol=1e-4, atol=1e-9, err_msg=name)


def test_check_shows_what_is_trained_and_the_command_trains_it(
    base: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards: a check that checks other data than the run; wrong exit codes."""
    words = ["finetune", str(base), "--data", str(chats)]
    assert main([*words, "--check"]) == 0
    shown = capsys.readouterr().out
    assert "»value = 1\nvalue = 1\n<|end|>«" in shown
    assert "60 prompt_completion" in shown
    assert main([*words, "--check", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    run = tmp_path / "run"
    settings = ["--set", "train.steps=2", "--set", "eval.sample_tokens=2", "--rank", "2"]
    assert main([*words, "--run", str(run), "--method", "qlora", *settings]) == 0
    assert "next     solollm chat" in capsys.readouterr().out
    # What --check says is trained is what one pass trains: nothing that is held out.
    assert found["num_held_out"] > 0
    assert found["num_targets"] == read_samples(run / "data").train.num_targets
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"question": "a", "answer": ""}\n', encoding="utf-8")
    assert main(["finetune", str(base), "--data", str(bad), "--check"]) == 5
    assert "bad.jsonl:1: message 2, the assistant's, is empty" in capsys.readouterr().out
    assert main(["finetune", str(base), "--data", str(bad), "--run", str(tmp_path / "no")]) == 5
    assert not (tmp_path / "no" / "run.toml").exists()


def test_check_says_what_is_wrong_once_and_lists_all_of_it_as_json(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards: a wall of one line; rows that no output names; an empty file called sound; pairs of
    which nobody sees which answer is preferred."""
    answer = {"prompt": "why?", "chosen": "so.", "rejected": "no."}
    rows = [answer, {**answer, "rejected": "so."}, *[{"question": "why?", "answer": "so."}] * 30]
    data, empty = tmp_path / "rows.jsonl", tmp_path / "empty.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    empty.write_text("\n", encoding="utf-8")
    words = ["finetune", str(base), "--set", "finetune.objective=dpo", "--check", "--data"]
    assert main([*words, str(data)]) == 5
    shown = capsys.readouterr().out
    assert shown.index("chosen:\n") < shown.index("so.") < shown.index("rejected:\n")
    assert "rows.jsonl:2: chosen and rejected are the same answer\n" in shown
    assert shown.count("DPO needs chosen and rejected") == 1
    assert "rows.jsonl:3: is of the shape prompt_completion" in shown
    assert "(29 more like it)" in shown
    assert main([*words, str(data), "--json"]) == 5
    places = [line.split(": ")[0] for line in json.loads(capsys.readouterr().out)["problems"]]
    assert places == [f"rows.jsonl:{number}" for number in range(2, 33)]
    assert main([*words, str(empty)]) == 5
    assert "there is no row to train on" in capsys.readouterr().out


def test_check_steers_no_terminal(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards the screen: rows of others may hold any character, in keys, too."""
    rows = [{"question": "why?", "answer": "\x1b[2J so."}, {"\x1b[31mkey": 1}]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert main(["finetune", str(base), "--data", str(data), "--check"]) == 5
    shown = capsys.readouterr()
    assert "[2J so." in shown.out
    assert "[31mkey" in shown.out
    assert "\x1b" not in shown.out + shown.err


def test_a_tuned_adapter_is_measured_and_told_from_its_base(
    base: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards: an evaluation that ends, once all is measured, because an adapter's checkpoint holds
    no model.safetensors; two adapters of one base with one digest."""
    text = tmp_path / "text.txt"
    text.write_text("value = 3\n" * 20, encoding="utf-8")
    seen = set()
    words = ["finetune", str(base), "--data", str(chats), "--set", "train.steps=1", "--rank", "2"]
    for seed in (1, 2):
        run = tmp_path / f"run-{seed}"
        assert main([*words, "--run", str(run), "--set", f"train.seed={seed}", "--json"]) == 0
    for model in (base, tmp_path / "run-1", tmp_path / "run-2"):
        capsys.readouterr()
        assert main(["eval", str(model), "--text", str(text), "--json", "--no-save"]) == 0
        seen.add(json.loads(capsys.readouterr().out)["model"]["weights_digest"])
    assert len(seen) == 3
