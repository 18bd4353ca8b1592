"""The dials: what one number sets."""

from __future__ import annotations

import pytest

from solollm.dial import PRESET_NAMES, from_depth, horizon, preset
from solollm.errors import ConfigError


def test_a_deeper_model_takes_more_of_everything_and_a_lower_rate() -> None:
    """A dial that turns back: a deeper model with fewer tokens or a higher learning rate."""
    dials = [horizon(from_depth(depth, 8192)) for depth in range(1, 33)]
    for name in ("tokens_per_step", "total_tokens"):
        values = [getattr(dial, name) for dial in dials]
        assert values == sorted(values)
    rates = [dial.lr for dial in dials]
    assert rates == sorted(rates, reverse=True)


def test_tokens_per_step_are_whole_rows_for_every_preset() -> None:
    """A batch that is no multiple of the row length would be rounded without a word."""
    for name in PRESET_NAMES:
        model = preset(name, 32_000)
        assert horizon(model).tokens_per_step % model.max_position_embeddings == 0


def test_the_horizon_is_the_stated_ratio() -> None:
    """The ratio in the docstring and the one in the code drift apart."""
    model = from_depth(4, 2048)
    assert horizon(model).total_tokens == round(10.5 * model.num_matrix_parameters())


@pytest.mark.parametrize("name", ["13b", "1.3", "350"])
def test_an_unknown_preset_names_the_nearest(name: str) -> None:
    """`unknown preset` alone leaves the user to guess."""
    with pytest.raises(ConfigError, match="did you mean"):
        preset(name, 32_000)


@pytest.mark.parametrize("depth", [0, 65])
def test_a_depth_outside_the_dial_is_refused(depth: int) -> None:
    """Depth 0 would be a model without layers."""
    with pytest.raises(ConfigError, match="outside 1 to 64"):
        from_depth(depth, 32_000)
