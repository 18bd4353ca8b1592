"""`--supervised`: the commands that the children run, and when it is the default."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from solollm import supervisor
from solollm.cli import main
from solollm.commands import supervised

Seen = dict[str, Any]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """What a supervisor was made of; it ends with 75."""
    found: Seen = {}

    class Recording:
        def __init__(self, run: Path, first: list[str], again: Any, *, tell: Any) -> None:
            found.update(run=run, first=first[3:], again=lambda memory: again(memory)[3:])
            found["tell"] = tell

        def supervise(self) -> int:
            return 75

    monkeypatch.setattr(supervisor, "Supervisor", Recording)
    return found


def test_pretrain_hands_every_setting_to_its_child(seen: Seen, tmp_path: Path) -> None:
    """A flag that is lost on the way, so that the child trains something else."""
    config = tmp_path / "a.toml"
    config.write_text("[train]\nseed = 3\n")
    words = ["--corpus", "c d", "--depth", "2", "--config", str(config), "--set", "train.steps=5"]
    run = ["--run", "r", "--backend", "mlx", "--json"]
    assert main(["pretrain", *words, *run, "--supervised"]) == 75
    assert seen["run"] == Path("r")
    assert seen["first"] == [
        "pretrain", "--run", "r", "--config", str(config), "--set", 'data.corpus="c d"',
        "--set", "model.depth=2", "--set", "train.steps=5", "--backend", "mlx", "--json",
        "--unsupervised",
    ]  # fmt: skip
    assert seen["again"]({"micro_batch_size": 2}) == [
        "resume", "r", "--backend", "mlx", "--json", "--micro-batch-size", "2", "--unsupervised",
    ]  # fmt: skip


def test_resume_does_so_too(seen: Seen) -> None:
    """A run resumed without its corpus after a restart."""
    assert main(["resume", "r", "--corpus", "c", "--micro-batch-size", "4", "--supervised"]) == 75
    plain = ["resume", "r", "--backend", "auto", "--corpus", "c"]
    assert seen["first"] == [*plain, "--micro-batch-size", "4", "--unsupervised"]
    again = seen["again"]({"activation_checkpointing": True})
    assert again == [*plain, "--activation-checkpointing", "--unsupervised"]


def test_a_restart_is_told(seen: Seen, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that jumps back on the screen for no reason that one can read; broken JSON."""
    event = {"kind": "restarted", "cause": "memory", "ending": "exit code 1", "micro_batch_size": 2}
    main(["resume", "r", "--supervised"])
    seen["tell"](event)
    assert "(memory, exit code 1)" in (shown := capsys.readouterr().out)
    assert "micro-batches of 2" in shown
    main(["resume", "r", "--supervised", "--json"])
    seen["tell"](event)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == event


def test_apple_silicon_is_supervised_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Mac's GPU fault that ends the night; one rank of two that is started again alone."""
    for name in ("WORLD_SIZE", "MLX_RANK", "MLX_HOSTFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(supervised.sys, "platform", "darwin")
    monkeypatch.setattr(supervised.platform, "machine", lambda: "arm64")
    assert supervised.is_supervised(None)
    assert not supervised.is_supervised(False)
    monkeypatch.setenv("MLX_RANK", "0")
    assert not supervised.is_supervised(None)
    monkeypatch.setattr(supervised.sys, "platform", "linux")
    assert not supervised.is_supervised(None)
    assert supervised.is_supervised(True)
