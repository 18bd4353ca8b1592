"""The name table, the counts and `config.json`: what every other part takes on trust."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from solollm.architecture import (
    ModelConfig,
    RopeScaling,
    initial_parameter,
    initial_parameters,
    parameter_table,
)
from solollm.dial import from_depth, preset
from solollm.errors import ConfigError


def test_the_name_table_is_transformers_own(tiny_config: ModelConfig) -> None:
    """A name or shape of our own making: no other program would load the checkpoint."""
    transformers = pytest.importorskip("transformers")
    for changes in ({}, {"tie_word_embeddings": True}, {"qk_norm": True}):
        config = tiny_config.model_copy(update=changes)
        raw = config.to_hf()
        theirs = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(raw.pop("model_type"), **raw)
        )
        expected = {name: tuple(p.shape) for name, p in theirs.named_parameters()}
        assert {spec.name: spec.shape for spec in parameter_table(config)} == expected


@pytest.mark.parametrize(("name", "millions"), [("7b", 6738.4), ("1.3b", 1345.4), ("15m", 15.2)])
def test_parameters_are_counted_as_published(name: str, millions: float) -> None:
    """Llama 2 7B has 6,738,415,616 parameters at a vocabulary of 32,000; a plan rests on it."""
    count = preset(name, 32_000).num_parameters()
    assert count / 1e6 == pytest.approx(millions, abs=0.1)
    if name == "7b":
        assert count == 6_738_415_616


def test_flops_are_the_products_that_a_step_makes(tiny_config: ModelConfig) -> None:
    """Counted by hand: 6 per weight that multiplies, and causal attention at half the square."""
    config, seq_len = tiny_config, 16
    weights = config.vocab_size * config.hidden_size + sum(
        math.prod(s.shape) for s in parameter_table(config) if s.group == "matrix"
    )
    per_token = 6 * weights
    # Two products (scores, values) of T^2/2 pairs, 2 FLOPs each, 3 times for the backward pass.
    width = config.num_attention_heads * config.head_dim
    attention = 2 * 2 * 3 * config.num_hidden_layers * width * seq_len**2 / 2
    assert config.flops_per_token(seq_len) == per_token + attention / seq_len


def test_initial_weights_depend_on_seed_and_name_alone(tiny_config: ModelConfig) -> None:
    """Drawn in sequence from one generator, a weight would depend on what was made before it."""
    first = dict(initial_parameters(tiny_config, 3))
    for spec in reversed(parameter_table(tiny_config)):
        np.testing.assert_array_equal(initial_parameter(spec, 3), first[spec.name])
    other = dict(initial_parameters(tiny_config, 4))
    name = "model.layers.1.mlp.up_proj.weight"
    assert not np.array_equal(first[name], other[name])
    assert not np.array_equal(first[name], first[name.replace("layers.1", "layers.0")])
    assert first[name].std() == pytest.approx(tiny_config.hidden_size**-0.5, rel=0.1)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_config_json_comes_back_equal(
    tiny_config: ModelConfig, scaled: bool, qk_norm: bool
) -> None:
    """A setting lost on the way to disk changes what the model computes without a word."""
    changes = {
        "rope_theta": 500_000.0,
        "rope_scaling": RopeScaling(factor=4.0) if scaled else None,
        "qk_norm": qk_norm,
        "tie_word_embeddings": True,
    }
    config = tiny_config.model_copy(update=changes)
    raw = json.loads(json.dumps(config.to_hf()))
    assert ModelConfig.from_hf(raw) == config
    # mlx-lm reads the old spelling alone, transformers 5 writes the new one alone.
    assert raw["rope_theta"] == raw["rope_parameters"]["rope_theta"] == 500_000.0
    for spelling in ("rope_parameters", "rope_scaling"):
        assert (raw[spelling] or {}).get("factor") == (4.0 if scaled else None)
    without_new = {key: value for key, value in raw.items() if key != "rope_parameters"}
    assert ModelConfig.from_hf(without_new) == config


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "mixtral"},
        {"attention_bias": True},
        {"hidden_act": "gelu"},
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}, "rope_parameters": None},
        {"num_hidden_layers": 10_000_000},
        {"hidden_size": 2**40},
        {"num_attention_heads": 0},
        {"rms_norm_eps": float("nan")},
        {"rope_theta": 0, "rope_parameters": None},
    ],
)
def test_a_config_that_is_not_computed_here_is_refused(
    tiny_config: ModelConfig, change: dict[str, object]
) -> None:
    """Read without a word, it would give a model that computes something else, or hang."""
    with pytest.raises(ConfigError):
        ModelConfig.from_hf({**tiny_config.to_hf(), **change})


def test_every_depth_of_the_dial_is_a_model() -> None:
    """A width that its heads do not divide, somewhere between the depths that were tried."""
    sizes = []
    for depth in range(1, 65):
        model = from_depth(depth, 32_000)
        assert model.num_attention_heads * model.head_dim == model.hidden_size
        sizes.append(model.num_matrix_parameters())
    assert sizes == sorted(sizes)
