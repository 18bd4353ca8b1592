"""Foreign adapters: what PEFT and mlx-lm write comes in, what is none or lies is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from solollm.adapted import AdapterFolder
from solollm.adapters import ADAPTER_WEIGHTS, AdapterOptions, adapter_table, peft_config
from solollm.architecture import ModelConfig
from solollm.backend import HostTensor
from solollm.cli import main
from solollm.errors import ConfigError, IntegrityError, SoloLLMError
from solollm.importing import import_adapter
from solollm.strictfile import encode_json
from solollm.tensorfile import FOR_TRANSFORMERS, write_tensors

OPTIONS = AdapterOptions(rank=3, alpha=12, target_modules=("k_proj", "gate_proj"))


@pytest.fixture
def base(tiny_config: ModelConfig, tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_bytes(encode_json(tiny_config.to_hf()))
    return folder


def factors_of(model: ModelConfig) -> dict[str, np.ndarray]:
    noise = np.random.default_rng(1)
    return {
        spec.name: noise.standard_normal(spec.shape).astype(np.float32)
        for spec in adapter_table(model, OPTIONS)
    }


def save(folder: Path, config: dict[str, Any], file: str, factors: dict[str, np.ndarray]) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {name: HostTensor.of(factor) for name, factor in factors.items()}
    specs = [(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]
    write_tensors(folder / file, specs, tensors.items(), FOR_TRANSFORMERS)
    return folder


def as_mlx_lm(factors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """By the rules of mlx-lm, written out."""
    return {
        name.replace("base_model.model.", "")
        .replace("lora_A.weight", "lora_a")
        .replace("lora_B.weight", "lora_b"): np.ascontiguousarray(factor.T)
        for name, factor in factors.items()
    }


MLX_LM = {
    "fine_tune_type": "lora", "num_layers": 2, "model": "owner/name",
    "lora_parameters": {"rank": 3, "scale": 4.0, "dropout": 0.0},
}  # fmt: skip


def test_both_layouts_are_one_adapter(
    base: Path, tiny_config: ModelConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards: a factor transposed once too often; scale read as alpha."""
    factors = factors_of(tiny_config)
    peft = save(tmp_path / "peft", peft_config(OPTIONS), ADAPTER_WEIGHTS, factors)
    mlx = save(tmp_path / "mlx", MLX_LM, "adapters.safetensors", as_mlx_lm(factors))
    for source in (peft, mlx):
        out = tmp_path / f"{source.name}-in"
        arguments = ["import", str(source), "--base", str(base), "--out", str(out), "--json"]
        assert main(arguments) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["origin"] == ("peft" if source is peft else "mlx-lm")
        read = AdapterFolder(out, tiny_config)
        assert read.options == OPTIONS
        for name, factor in factors.items():
            assert np.array_equal(read.factors[name], factor), name
    config = json.loads((tmp_path / "mlx-in" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "owner/name"


def test_layers_that_were_left_alone_stay_as_they_are(
    base: Path, tiny_config: ModelConfig, tmp_path: Path
) -> None:
    """Guards mlx-lm's habit of adapting the last layers only."""
    last = {n: f for n, f in as_mlx_lm(factors_of(tiny_config)).items() if "layers.1." in n}
    source = save(tmp_path / "mlx", MLX_LM | {"num_layers": 1}, "adapters.safetensors", last)
    report = import_adapter(source, tmp_path / "out", base)
    assert report.notes[0].startswith("2 matrices had no factors")
    factors = AdapterFolder(tmp_path / "out", tiny_config).factors
    assert all(factor.any() == ("layers.1." in name) for name, factor in factors.items())


def _dora(config: dict[str, Any], factors: dict[str, np.ndarray]) -> None:
    config["fine_tune_type"] = "dora"


def _huge_scale(config: dict[str, Any], factors: dict[str, np.ndarray]) -> None:
    config["lora_parameters"] = {"rank": 3, "scale": 1e999}


def _no_rank(config: dict[str, Any], factors: dict[str, np.ndarray]) -> None:
    config["lora_parameters"] = {"scale": 1.0}


def _embedding(config: dict[str, Any], factors: dict[str, np.ndarray]) -> None:
    factors["model.embed_tokens.lora_a"] = np.ones((192, 3), np.float32)


def _other_rank(config: dict[str, Any], factors: dict[str, np.ndarray]) -> None:
    factors["model.layers.0.mlp.gate_proj.lora_a"] = np.ones((32, 5), np.float32)


def _half(config: dict[str, Any], factors: dict[str, np.ndarray]) -> None:
    del factors["model.layers.0.mlp.gate_proj.lora_a"]


def _third_layer(config: dict[str, Any], factors: dict[str, np.ndarray]) -> None:
    factors["model.layers.7.mlp.gate_proj.lora_a"] = np.ones((32, 3), np.float32)


def _not_a_number(config: dict[str, Any], factors: dict[str, np.ndarray]) -> None:
    factors["model.layers.0.mlp.gate_proj.lora_a"][1, 1] = np.nan


def _integers(config: dict[str, Any], factors: dict[str, np.ndarray]) -> None:
    factors["model.layers.0.mlp.gate_proj.lora_a"] = np.ones((32, 3), np.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_dora, "of the kind 'dora'"), (_huge_scale, "adapter_config.json"),
        (_no_rank, "describes no adapter"), (_embedding, "is no factor"),
        (_other_rank, "gate_proj.lora_A"), (_half, "is missing"), (_third_layer, "layers.7"),
        (_not_a_number, "NaN or infinity"), (_integers, "no matrix of floating values"),
    ],
)  # fmt: skip
def test_what_is_no_adapter_of_this_base_is_refused(
    base: Path, tiny_config: ModelConfig, tmp_path: Path, change: Any, message: str
) -> None:
    """Guards: an adapter that is loaded in part, or computes something else than it was made to."""
    config, factors = dict(MLX_LM), as_mlx_lm(factors_of(tiny_config))
    change(config, factors)
    source = save(tmp_path / "mlx", config, "adapters.safetensors", factors)
    with pytest.raises((ConfigError, IntegrityError), match=message) as caught:
        import_adapter(source, tmp_path / "out", base)
    assert isinstance(caught.value, SoloLLMError)
    assert not (tmp_path / "out").exists()


def test_an_adapter_needs_its_base_and_a_model_none(
    base: Path, tiny_config: ModelConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards: a message about a missing model.safetensors where an adapter was given."""
    factors = factors_of(tiny_config)
    source = save(tmp_path / "peft", peft_config(OPTIONS), ADAPTER_WEIGHTS, factors)
    assert main(["import", str(source), "--out", str(tmp_path / "out")]) != 0
    assert "--base" in capsys.readouterr().err
    (source / ADAPTER_WEIGHTS).rename(source / "adapter_model.bin")
    with pytest.raises(ConfigError, match=r"holds no adapter_model\.safetensors"):
        import_adapter(source, tmp_path / "out", base)
    assert main(["import", str(base), "--base", str(base), "--out", str(tmp_path / "out")]) != 0
    assert "is no adapter" in capsys.readouterr().err
