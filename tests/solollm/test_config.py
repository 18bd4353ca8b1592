"""Settings: read, overridden, refused with the nearest name, written back."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from solollm.config import RunConfig, dump_config, load_config, parse_config
from solollm.errors import ConfigError


def test_a_config_written_and_read_again_is_equal(tiny_config: object) -> None:
    """run.toml is what a resume trains on: a value lost in writing changes the run."""
    config = parse_config(
        {
            "model": {"config": tiny_config},
            "optimizer": {"name": "adamw", "lr": 1e-3},
            "log": {"sinks": ["tensorboard"]},
            "backend_options": {"torch": {"compile": True, "threads": 2}},
        }
    )
    assert parse_config(tomllib.loads(dump_config(config))) == config
    assert parse_config(tomllib.loads(dump_config(RunConfig()))) == RunConfig()


@pytest.mark.parametrize("suffix", ["toml", "yaml"])
def test_overrides_win_over_the_file(tmp_path: Path, suffix: str) -> None:
    """--set is the last word; JSON values keep their type, anything else is text."""
    text = {"toml": "[train]\nsteps = 5\nseed = 1\n", "yaml": "train:\n  steps: 5\n  seed: 1\n"}
    path = tmp_path / f"run.{suffix}"
    path.write_text(text[suffix])
    config = load_config(
        path, ["train.steps=7", "data.corpus=corpora/a", "checkpoint.keep_best=false"]
    )
    assert (config.train.steps, config.train.seed) == (7, 1)
    assert config.data.corpus == "corpora/a"
    assert config.checkpoint.keep_best is False


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("optimizer.lrr=1", "did you mean `lr`"),
        ("optimiser.lr=1", "did you mean `optimizer`"),
        ("model.config.hiden_size=3", "did you mean `hidden_size`"),
    ],
)
def test_an_unknown_key_names_the_nearest(override: str, hint: str) -> None:
    """A typo that is swallowed trains fifty days with the default."""
    with pytest.raises(ConfigError, match=hint):
        load_config(None, [override])


@pytest.mark.parametrize(
    "override",
    ["optimizer.lr=-1", "checkpoint.keep_latest=1", "optimizer.state_bits=4", "train.steps=0",
     "optimizer.name=sgd", "optimizer.lr=fast", "lr", "train.steps.more=1"],
)  # fmt: skip
def test_a_value_that_cannot_be_is_refused(override: str) -> None:
    """keep_latest 1, say: the one checkpoint left may be the damaged one."""
    with pytest.raises(ConfigError):
        load_config(None, [override])


def test_two_dials_at_once_are_refused() -> None:
    """Which one wins would be a guess."""
    with pytest.raises(ConfigError, match="preset and depth"):
        load_config(None, ["model.preset=15m", "model.depth=4"])


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.toml", b"[train\n"), ("a.yaml", b"train: [1\n"), ("a.yaml", b"- 1\n"), ("a.json", b"{}"),
     ("a.toml", b"\xff\xfe"), ("missing.toml", None)],
)  # fmt: skip
def test_a_file_that_is_no_config_is_one_clear_error(
    tmp_path: Path, name: str, content: bytes | None
) -> None:
    """A parser's own traceback tells no user which file it was."""
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=name.replace(".", r"\.")):
        load_config(tmp_path / name)


def test_every_problem_is_told_at_once() -> None:
    """One error per attempt makes ten attempts."""
    with pytest.raises(ConfigError) as caught:
        load_config(None, ["optimizer.lr=-1", "train.steps=0", "train.stepps=1"])
    for part in ("optimizer.lr", "train.steps", "train.stepps"):
        assert f"`{part}`" in str(caught.value)
