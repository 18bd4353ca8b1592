"""The adapter's name table, first values and PEFT's configuration."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from solollm.adapters import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    BASE,
    TARGET_MODULES,
    AdapterOptions,
    adapter_pairs,
    adapter_table,
    merged,
    peft_config,
    read_peft_config,
    trained_table,
)
from solollm.architecture import ModelConfig, initial_parameter, initial_parameters, parameter_table
from solollm.backend import HostTensor
from solollm.checkpoint import open_checkpoint, save_checkpoint
from solollm.errors import ConfigError, IntegrityError
from solollm.frozen_base import BaseRecord, BaseSource, TrainedAdapter, content_of
from solollm.tensorfile import WEIGHTS, open_weights, tensor_digest, write_tensors
from solollm.testing.snapshots import TOKEN_IDS, TOKENIZER_FILES, ArraySnapshot, state_at

OPTIONS = AdapterOptions(rank=3, alpha=6.0)


def test_every_target_has_two_factors_beside_its_weight(tiny_config: ModelConfig) -> None:
    """Guards: a factor of the wrong side or layer; a norm or the head adapted."""
    pairs = adapter_pairs(tiny_config, OPTIONS)
    assert len(pairs) == 7 * tiny_config.num_hidden_layers
    for base, a, b in pairs:
        stem = base.name.removesuffix(".weight")
        assert a.name == f"base_model.model.{stem}.lora_A.weight"
        assert b.name == f"base_model.model.{stem}.lora_B.weight"
        assert (b.shape[0], a.shape[1]) == base.shape
        assert a.shape[0] == b.shape[1] == 3
    assert adapter_table(tiny_config, OPTIONS)[:2] == list(pairs[0][1:])
    only = AdapterOptions(target_modules=("v_proj", "q_proj"))
    assert only.target_modules == ("q_proj", "v_proj")
    assert len(adapter_pairs(tiny_config, only)) == 2 * tiny_config.num_hidden_layers
    assert trained_table(tiny_config, None) == parameter_table(tiny_config)


def test_first_values_depend_on_seed_and_name_alone(tiny_config: ModelConfig) -> None:
    """Guards: `B A` that is not zero; factors that repeat from layer to layer."""
    values = {s.name: initial_parameter(s, 5) for s in adapter_table(tiny_config, OPTIONS)}
    firsts = [array for name, array in values.items() if "lora_A" in name]
    assert all(not array.any() for name, array in values.items() if "lora_B" in name)
    assert len({array.tobytes() for array in firsts}) == len(firsts)
    wide = np.concatenate([array.ravel() * (3 * array.shape[1]) ** 0.5 for array in firsts])
    assert abs(float(wide.std()) - 1) < 0.1


@pytest.mark.parametrize(("rslora", "scale"), [(False, 8.0), (True, 16.0)])
def test_scale_shrinks_with_the_rank_or_its_root(rslora: bool, scale: float) -> None:
    """Guards: rank-stabilised adapters trained with the plain scale."""
    options = AdapterOptions(rank=4, alpha=32.0, use_rslora=rslora)
    assert options.scale == scale
    a, b = np.full((4, 3), 0.5, np.float32), np.full((2, 4), 0.25, np.float32)
    np.testing.assert_array_equal(
        merged(np.ones((2, 3)), a, b, scale), np.full((2, 3), 1 + scale / 2)
    )


def test_pefts_configuration_comes_back(tmp_path: Path) -> None:
    """Guards: a key that PEFT reads under another name."""
    from peft import LoraConfig

    options = AdapterOptions(rank=5, alpha=7.5, use_rslora=True, target_modules=("k_proj",))
    raw = peft_config(options, base_name="owner/name")
    assert read_peft_config(raw) == options
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(raw), encoding="utf-8")
    loaded = LoraConfig.from_pretrained(str(tmp_path))
    assert (loaded.r, loaded.lora_alpha, loaded.use_rslora) == (5, 7.5, True)
    assert loaded.base_model_name_or_path == "owner/name"
    LoraConfig(r=3, target_modules=["q_proj", "v_proj"]).save_pretrained(tmp_path)
    foreign = json.loads((tmp_path / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    assert read_peft_config(foreign).target_modules == ("q_proj", "v_proj")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"r": 0}, "rank"),
        ({"r": 2**31}, "rank"),
        ({"lora_alpha": float("nan")}, "alpha"),
        ({"target_modules": "(a+)+$"}, "target_modules"),
        ({"target_modules": ["lm_head"]}, "target_modules"),
        ({"target_modules": []}, "target module"),
        ({"use_dora": True}, "use_dora"),
        ({"peft_type": "IA3"}, "peft_type"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"layers_to_transform": [0]}, "layers_to_transform"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ],
)
def test_what_is_not_computed_here_is_refused(change: dict[str, object], named: str) -> None:
    """Guards: a hostile or foreign file read as an adapter that it is not."""
    with pytest.raises(ConfigError, match=named):
        read_peft_config({**peft_config(OPTIONS), **change})


class _AdapterSnapshot(ArraySnapshot):
    def __init__(self, model: ModelConfig) -> None:
        super().__init__(model)
        self.weights = {
            spec.name: HostTensor.of(initial_parameter(spec, 1))
            for spec in adapter_table(model, OPTIONS)
        }


def _trained(model: ModelConfig, codec: str = "") -> TrainedAdapter:
    base = BaseRecord.model_validate(
        {"content": "a" * 64, "hub_id": "o/n", "codec": codec, "seed": 9, "config": model.to_hf()}
    )
    bits = 4 if codec else None
    return TrainedAdapter(OPTIONS.model_copy(update={"base_bits": bits, "seed": 9}), base)


def _save(parent: Path, model: ModelConfig, adapter: TrainedAdapter) -> Path:
    return save_checkpoint(
        parent, model=model, snapshot=_AdapterSnapshot(model), state=state_at(4),
        tokenizer_files=TOKENIZER_FILES, token_ids=TOKEN_IDS, adapter=adapter,
        generation={"eos_token_id": [1, 6]},
    )  # fmt: skip


@pytest.mark.parametrize("codec", ["", "nf4"])
def test_an_adapters_checkpoint_comes_back(
    tiny_config: ModelConfig, tmp_path: Path, codec: str
) -> None:
    """Guards: an option, the codec or the base's digest lost between save and open."""
    adapter = _trained(tiny_config, codec)
    path = _save(tmp_path, tiny_config, adapter)
    assert not (path / "config.json").exists()
    assert json.loads((path / "generation_config.json").read_text()) == {"eos_token_id": [1, 6]}
    checkpoint = open_checkpoint(path)
    assert checkpoint.adapter == adapter
    assert checkpoint.model == tiny_config
    expected = _AdapterSnapshot(tiny_config).weights
    for name, tensor in expected.items():
        assert checkpoint.parameters().read(name).data.tobytes() == tensor.data.tobytes()


@pytest.mark.parametrize("name", [BASE, ADAPTER_CONFIG, ADAPTER_WEIGHTS])
def test_a_damaged_adapter_is_refused(tiny_config: ModelConfig, tmp_path: Path, name: str) -> None:
    """Guards: one flipped bit in any of an adapter's own files that passes unseen."""
    path = _save(tmp_path, tiny_config, _trained(tiny_config))
    content = bytearray((path / name).read_bytes())
    content[-3] ^= 1
    (path / name).write_bytes(content)
    with pytest.raises(IntegrityError, match=name):
        open_checkpoint(path)


def test_a_base_is_known_by_its_content(tiny_config: ModelConfig, tmp_path: Path) -> None:
    """Guards: an adapter put on another base of the same shape."""
    tensors = {n: HostTensor.of(a) for n, a in initial_parameters(tiny_config, 0)}
    specs = [(name, t.dtype, t.shape) for name, t in tensors.items()]
    write_tensors(tmp_path / WEIGHTS, specs, tensors.items())
    expected = content_of({name: tensor_digest(tensor) for name, tensor in tensors.items()})
    source = BaseSource(open_weights(tmp_path))
    source.read("model.norm.weight")
    source.require(expected, "models/x")
    with pytest.raises(IntegrityError, match="models/x"):
        source.require("0" * 64, "models/x")
    assert len(TARGET_MODULES) == 7
