"""Options that take a number: "nan" and "inf" are none."""

from __future__ import annotations

from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner

from solollm.cli import command
from solollm.commands import Number
from solollm.config import parse_config
from solollm.errors import ConfigError

CHECKED_LATER = {"generate", "chat"}  # by `solollm.sampling.check_sampling`


def floats(group: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[str, click.Option]]:
    """Every option of every command that takes a float."""
    if isinstance(group, click.Group):
        context = click.Context(group)
        for name in group.list_commands(context):
            found = group.get_command(context, name)
            assert found is not None
            yield from floats(found, (*path, name))
        return
    for option in group.params:
        is_float = isinstance(option.type, click.types.FloatParamType)
        if isinstance(option, click.Option) and is_float:
            yield " ".join(path), option


def test_every_option_that_takes_a_float_refuses_what_is_none() -> None:
    """`plan --tokens nan` ended in a traceback, `--price nan` in a bill of nan, and
    `pretrain --hours inf` in a measurement without end."""
    found = [(path, option) for path, option in floats(command) if path not in CHECKED_LATER]
    assert len(found) >= 8
    for path, option in found:
        assert isinstance(option.type, Number), f"{path} {option.opts[0]}"


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_the_message_names_the_option(value: str) -> None:
    """Exit code 2, and which of the options it was."""
    done = CliRunner().invoke(command, ["plan", "--preset", "125m", "--tokens", value])
    assert done.exit_code == 2 or isinstance(done.exception, click.UsageError)
    with pytest.raises(click.BadParameter, match=r"no number to count with|not in the range"):
        Number(min=1).convert(value, None, None)


@pytest.mark.parametrize("key", ["train.hours", "optimizer.lr", "optimizer.weight_decay"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_settings_refuse_them_too(key: str, value: float) -> None:
    """TOML has nan and inf, and a learning rate of inf is a lost night."""
    table, name = key.split(".")
    with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
        parse_config({table: {name: value}})


def test_help_names_no_bound_that_is_none() -> None:
    """Guards help against click's `x<=None` for a number without bounds."""
    for path, option in floats(command):
        record = option.get_help_record(click.Context(command))
        assert record is None or "None" not in record[1], f"{path}: {record}"
