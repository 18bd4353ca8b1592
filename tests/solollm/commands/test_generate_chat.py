"""`generate` and `chat`, from a folder on disk to characters on the terminal."""

from __future__ import annotations

import io
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from solollm.architecture import ModelConfig, initial_parameters
from solollm.backend import DType, HostTensor, SamplingParams, Snapshot
from solollm.checkpoint import DataPosition, Environment, TrainerState, save_checkpoint
from solollm.cli import main
from solollm.commands.chat import _stop_on_interrupt
from solollm.commands.generate import show
from solollm.completion import TextModel, generate_text, open_model
from solollm.dialogue import ChatSession
from solollm.errors import ConfigError
from solollm.tokenizer import Tokenizer

GREEDY = SamplingParams()


class WeightsOnly(Snapshot):
    """Initial weights without an optimizer; matrices that start at zero get those of the seed."""

    session_state = {"updates": 0}  # noqa: RUF012

    def __init__(self, model: ModelConfig, seed: int) -> None:
        self.weights = {}
        for name, value in initial_parameters(model, seed):
            shaped = value if value.any() else next(_noise(value.shape, seed))
            self.weights[name] = HostTensor.of(shaped)

    def parameters(self) -> Iterator[tuple[str, HostTensor]]:
        yield from self.weights.items()

    def optimizer(self) -> Iterator[tuple[str, HostTensor]]:
        yield from ()

    def parameter_specs(self) -> list[tuple[str, DType, tuple[int, ...]]]:
        return [(name, t.dtype, t.shape) for name, t in self.weights.items()]

    def optimizer_specs(self) -> list[tuple[str, DType, tuple[int, ...]]]:
        return []


def _noise(shape, seed):
    import numpy as np

    yield (np.random.default_rng(seed).standard_normal(shape) * 0.2).astype(np.float32)


@pytest.fixture(scope="module")
def run(tmp_path_factory, small_tokenizer: Tokenizer) -> Path:
    """A run folder with checkpoints of steps 1 and 2, whose weights differ."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    model = ModelConfig(
        vocab_size=small_tokenizer.padded_vocab_size, hidden_size=32, intermediate_size=64,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        max_position_embeddings=96,
    )  # fmt: skip
    for step in (1, 2):
        save_checkpoint(
            folder / "checkpoints", model=model, snapshot=WeightsOnly(model, seed=step),
            state=TrainerState(
                step=step, tokens_seen=step, session_state={"updates": 0},
                data=DataPosition(fingerprint="f", seed=0, step=step),
                environment=Environment(
                    backend="torch", device="cpu", micro_batch_size=1, compute_dtype="float32"
                ),
            ),
            tokenizer_files=small_tokenizer.files(), token_ids=small_tokenizer.token_ids,
        )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def base_model(run: Path) -> TextModel:
    return open_model(run)


@pytest.fixture
def chat_folder(run: Path, tmp_path: Path, small_tokenizer: Tokenizer) -> Path:
    """The same weights, marked as tuned to answer."""
    folder = tmp_path / "tuned"
    folder.mkdir()
    for file in (run / "checkpoints" / "step-00000002").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    ends = {"eos_token_id": [small_tokenizer.eos_id, small_tokenizer.end_id]}
    (folder / "generation_config.json").write_text(json.dumps(ends))
    return folder


def run_chat(monkeypatch: pytest.MonkeyPatch, lines: str, *arguments: str) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    return main(["chat", *arguments])


def test_a_prompt_that_is_too_long_is_not_repeated(run, capsys) -> None:
    """Guards: pages of one's own text above the one line that says what is wrong."""
    assert main(["generate", str(run), "word " * 500]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "is too long" in shown.err
    assert "max_seq_len" not in shown.err  # no option of this command


def test_generate_streams_the_prompt_and_its_continuation(run, base_model, capsys) -> None:
    """Guards the text: prompt, continuation, one newline; the same as the Python function's."""
    assert main(["generate", str(run), "def ", "--temperature", "0", "--max-new-tokens", "12"]) == 0
    done = generate_text(base_model, "def ", max_new_tokens=12, sampling=GREEDY)
    assert capsys.readouterr().out == "def " + done.text + "\n"
    assert done.text == base_model.tokenizer.decode(done.tokens.ids)


def test_generate_json_carries_what_is_needed_to_repeat_it(run, capsys) -> None:
    """Guards the drawn seed: giving it again gives the text again."""
    arguments = ["generate", str(run), "def number", "--max-new-tokens", "12", "--json"]
    assert main(arguments) == 0
    first = json.loads(capsys.readouterr().out)
    assert main([*arguments, "--seed", str(first["seed"])]) == 0
    second = json.loads(capsys.readouterr().out)
    assert first == second
    assert first["finish_reason"] in ("length", "stop")
    assert len(first["ids"]) == len(first["logprobs"]) > 0
    assert first["checkpoint"].endswith("step-00000002")


def test_a_damaged_newest_checkpoint_is_passed_over(run, tmp_path, capsys) -> None:
    """Guards generating from half a file, and the silence about it."""
    folder = tmp_path / "checkpoints"
    for file in run.rglob("*"):
        if file.is_file():
            target = folder / file.parent.name / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    weights = folder / "step-00000002" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert main(["generate", str(tmp_path), "def", "--max-new-tokens", "2", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["checkpoint"].endswith("step-00000001")
    assert "skipped step-00000002" in answer["notes"][0]


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_what_is_no_model_is_refused(command, run, tmp_path, capsys) -> None:
    """Guards the first mistakes: a wrong folder, a checkpoint without a tokenizer."""
    rest = ["x"] if command == "generate" else []
    assert main([command, str(tmp_path), *rest]) == 2
    assert "neither a run with a checkpoint nor a checkpoint" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{}")
    assert main([command, str(tmp_path), *rest]) == 2
    assert "holds no tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "message"),
    [([""], "the prompt is empty"), (["x", "--temperature", "-1"], "temperature"),
     (["x", "--top-p", "0"], "top_p"), (["x" * 500], "too long")],
)  # fmt: skip
def test_generate_refuses_what_cannot_be_continued(run, capsys, extra, message) -> None:
    """Guards exit code 2 and a message that names the setting."""
    assert main(["generate", str(run), *extra]) == 2
    assert message in capsys.readouterr().err


def test_a_base_model_says_so_and_continues(run, base_model, monkeypatch, capsys) -> None:
    """Guards the promise of a chat: a base model's lines are continued, and the user is told."""
    options = ["--temperature", "0", "--max-new-tokens", "8"]
    assert run_chat(monkeypatch, "def one\n\n/quit\nnever\n", str(run), *options) == 0
    out, err = capsys.readouterr()
    expected = generate_text(base_model, "def one", max_new_tokens=8, sampling=GREEDY).text
    assert out == expected + "\n"
    assert "base model: it continues your text" in err


def test_a_tuned_model_is_asked_in_its_template(chat_folder, monkeypatch, capsys) -> None:
    """Guards the mark of a chat model, and --completion against it."""
    model = open_model(chat_folder)
    assert model.is_chat
    options = ["--temperature", "0", "--max-new-tokens", "8"]
    assert run_chat(monkeypatch, "hello\n", str(chat_folder), *options) == 0
    out, err = capsys.readouterr()
    assert "base model" not in err
    session = ChatSession(model, sampling=GREEDY, max_new_tokens=8)
    assert session.mode == "chat"
    assert out == "".join(session.ask("hello")) + "\n"
    run_chat(monkeypatch, "", str(chat_folder), "--completion")
    assert "completion was asked for" in capsys.readouterr().err


def test_a_terminal_is_not_repainted_by_a_model(monkeypatch) -> None:
    """Guards escape sequences in generated text; a pipe gets every byte."""
    for is_terminal, expected in ((True, "a\ufffd[2J\n\té\ufffd"), (False, "a\x1b[2J\n\té\x9b")):
        out = io.StringIO()
        monkeypatch.setattr(out, "isatty", lambda is_terminal=is_terminal: is_terminal)
        monkeypatch.setattr("sys.stdout", out)
        show("a\x1b[2J\n\té\x9b")
        assert out.getvalue() == expected


def test_slash_commands(chat_folder, monkeypatch, capsys) -> None:
    """Guards each of them, and a misspelt one that must not reach the model."""
    lines = "/help\n/system Be short.\n/reset\n/sistem x\n/quit\n"
    assert run_chat(monkeypatch, lines, str(chat_folder)) == 0
    out, err = capsys.readouterr()
    assert out == ""
    for part in (
        "/system TEXT",
        "a new conversation begins",
        "forgotten",
        "did you mean `/system`",
    ):
        assert part in err


def test_a_turn_that_does_not_fit_leaves_the_conversation_alive(
    chat_folder, monkeypatch, capsys
) -> None:
    """Guards a chat that died of one long message."""
    lines = "x" * 400 + "\nhello\n"
    options = ["--temperature", "0", "--max-new-tokens", "4"]
    assert run_chat(monkeypatch, lines, str(chat_folder), *options) == 0
    out, err = capsys.readouterr()
    assert "shorten it" in err
    session = ChatSession(open_model(chat_folder), sampling=GREEDY, max_new_tokens=4)
    assert out == "".join(session.ask("hello")) + "\n"


def test_history_is_kept_and_the_oldest_turns_go_first(chat_folder) -> None:
    """Guards what the model sees: the turns so far, the system prompt always, within its room."""
    session = ChatSession(
        open_model(chat_folder), system="S", sampling=GREEDY, max_new_tokens=4
    )  # fmt: skip
    for turn in range(6):
        list(session.ask(f"turn {turn}"))
    roles = [message["role"] for message in session.messages]
    contents = [message["content"] for message in session.messages]
    assert roles == ["system"] + ["user", "assistant"] * ((len(roles) - 1) // 2)
    assert contents[0] == "S"
    assert contents[-2] == "turn 5"
    assert "turn 0" not in contents
    session.reset()
    assert session.messages == [{"role": "system", "content": "S"}]


def test_an_interrupted_answer_is_remembered_as_far_as_it_came(base_model) -> None:
    """Guards the turn after Ctrl-C: the decoder is free, the document holds what was shown."""
    session = ChatSession(base_model, sampling=SamplingParams(1.0, seed=1), max_new_tokens=40)
    answer = session.ask("def")
    first = next(answer)
    answer.close()
    assert session.text == "def" + first
    second = "".join(session.ask("x"))
    assert session.text == f"def{first}\nx{second}"


def test_a_document_longer_than_the_context_is_cut_from_the_left(base_model) -> None:
    """Guards an endless base-model conversation."""
    session = ChatSession(base_model, sampling=GREEDY, max_new_tokens=8)
    for _ in range(4):
        list(session.ask("some words to fill the context with " * 2))
    assert len(base_model.tokenizer.encode(session.text)) > base_model.max_seq_len


def test_what_a_session_refuses(base_model) -> None:
    """Guards silent misunderstandings."""
    session = ChatSession(base_model)
    for bad, message in (
        (lambda: session.ask(" "), "empty"),
        (lambda: session.set_system("x"), "system"),
    ):
        with pytest.raises(ConfigError, match=message):
            bad()
    with pytest.raises(ConfigError, match="max_new_tokens"):
        ChatSession(base_model, max_new_tokens=0)


def test_ctrl_c_stops_the_answer_and_a_second_one_the_program() -> None:
    """Guards a torn step of the engine, and a program that cannot be stopped."""
    previous = signal.getsignal(signal.SIGINT)
    with _stop_on_interrupt() as is_stopped:
        assert not is_stopped()
        os.kill(os.getpid(), signal.SIGINT)
        assert is_stopped()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is previous
