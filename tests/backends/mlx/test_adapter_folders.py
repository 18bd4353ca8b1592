"""Adapters leave for mlx-lm and come back from it, and from it to PEFT: with their logits."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mlx.core", reason="these tests need mlx")
pytest.importorskip("mlx_lm", reason="these tests need mlx-lm")
import mlx.core as mx
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
from solollm_mlx import mlx_lm_adapter
from solollm_mlx.adapter import adapted_project, beside_base
from solollm_mlx.backend import MlxBackend
from solollm_mlx.engine import MlxEngine
from solollm_mlx.model import logits
from solollm_mlx.state import from_host

from solollm.adapted import AdapterFolder, MergedSource
from solollm.adapters import AdapterOptions, adapter_table
from solollm.backend import DictSource, EngineOptions, HostTensor, Plan, SessionOptions
from solollm.checkpoint import save_checkpoint
from solollm.cli import main
from solollm.config import OptimizerTable
from solollm.errors import ConfigError
from solollm.export import export_model
from solollm.frozen_base import BaseRecord, TrainedAdapter
from solollm.strictfile import encode_json
from solollm.tensorfile import open_weights
from solollm.testing.adapter_folders import write_base
from solollm.testing.bench import QUANTISABLE, lively_parameters
from solollm.testing.snapshots import TOKEN_IDS, TOKENIZER_FILES, state_at

MODEL = QUANTISABLE
IDS = np.random.default_rng(0).integers(0, 90, (2, 12)).astype(np.int32)
OPTIONS = AdapterOptions(
    rank=4, alpha=6, use_rslora=True, target_modules=("q_proj", "v_proj", "down_proj")
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"), MODEL)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that matters, saved as a run of MLX saves it."""
    noise = np.random.default_rng(3)
    session = MlxBackend().train_session(
        MODEL, SessionOptions(OptimizerTable(name="adamw"), adapter=OPTIONS),
        Plan(2, False, "float32", 24, 2),
    )  # fmt: skip
    factors = {
        spec.name: HostTensor.of(
            (noise.standard_normal(spec.shape) * spec.shape[1] ** -0.5).astype(np.float32)
        )
        for spec in adapter_table(MODEL, OPTIONS)
    }
    session.import_parameters(DictSource(factors))
    record = BaseRecord(content="a" * 64, config=MODEL.to_hf())
    return save_checkpoint(
        tmp_path_factory.mktemp("run"), model=MODEL, snapshot=session.snapshot(),
        state=state_at(3), tokenizer_files=TOKENIZER_FILES, token_ids=TOKEN_IDS,
        adapter=TrainedAdapter(OPTIONS, record),
    )  # fmt: skip


@pytest.mark.parametrize("codec", ["", "affine4", "nf4"])
def test_a_tuned_checkpoint_generates_and_merges_alike(
    checkpoint: Path, base: Path, tmp_path: Path, codec: str
) -> None:
    """Guards: an engine over the base alone, or over a base that was not quantised again; a merge
    into other values than the codes stand for."""
    folder = tmp_path / "tuned"
    shutil.copytree(checkpoint, folder)
    record = BaseRecord(content="a" * 64, config=MODEL.to_hf(), codec=codec)  # type: ignore[arg-type]
    (folder / "base.json").write_bytes(encode_json(record.model_dump(mode="json")))
    named = EngineOptions(adapters={"tuned": folder}, adapter="tuned")
    tuned = MlxBackend().engine(base, named)
    assert isinstance(tuned, MlxEngine)
    ours = np.array(tuned._modules["tuned"](mx.array(IDS)))
    weights = open_weights(base)
    merged = MergedSource(weights, AdapterFolder(folder, MODEL), MODEL)
    whole = {name: from_host(merged.read(name)) for name in merged.names()}
    weights.close()
    expected = np.array(logits(whole, mx.array(IDS), None, config=MODEL))
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-3 * float(np.abs(expected).max()))
    assert float(np.abs(ours - expected).max()) < 1e-4
    plain = MlxBackend().engine(base, EngineOptions())
    assert isinstance(plain, MlxEngine)
    assert float(np.abs(ours - np.array(plain._modules[None](mx.array(IDS)))).max()) > 0.1
    with pytest.raises(ConfigError, match=r"default adapter 'tunde'.*`tuned`"):
        MlxBackend().engine(base, replace(named, adapter="tunde"))


def our_logits(folder: Path) -> np.ndarray:
    """Of the base with the adapter that a folder in PEFT's layout holds."""
    adapter = AdapterFolder(folder, MODEL)
    base = {name: from_host(host) for name, host in lively_parameters(MODEL).items()}
    factors = {name: mx.array(factor) for name, factor in adapter.factors.items()}

    def project(weights: Any, name: str, x: mx.array) -> mx.array:
        return adapted_project(weights, name, x, scale=adapter.options.scale)

    whole = base | beside_base(factors)
    return np.array(logits(whole, mx.array(IDS), None, config=MODEL, project=project))


def mlx_lm_model() -> Any:
    weights = {name: from_host(host) for name, host in lively_parameters(MODEL).items()}
    return mlx_lm_adapter.build_model(MODEL, weights)


def test_mlx_lm_loads_what_is_exported(checkpoint: Path, tmp_path: Path) -> None:
    """Guards: names or keys that mlx-lm passes over in silence, a factor the wrong way round, an
    alpha where it wants a scale."""
    out = tmp_path / "adapter"
    assert main(["export", str(checkpoint), "--to", "mlx", "--out", str(out)]) == 0
    model = load_adapters(mlx_lm_model(), str(out))
    model.eval()
    theirs, ours = np.array(model(mx.array(IDS))), our_logits(checkpoint)
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-4)
    assert float(np.abs(theirs - np.array(mlx_lm_model()(mx.array(IDS)))).max()) > 0.1
    with pytest.raises(ConfigError, match="factors stay float32"):
        export_model(checkpoint, tmp_path / "codes", target="mlx", bits=4)


def test_out_and_in_again_gives_the_same_bits(checkpoint: Path, base: Path, tmp_path: Path) -> None:
    """Guards: a way out that rounds or reorders what the way in cannot restore."""
    out, back = tmp_path / "out", tmp_path / "back"
    export_model(checkpoint, out, target="mlx")
    assert main(["import", str(out), "--base", str(base), "--out", str(back)]) == 0
    first, second = (AdapterFolder(folder, MODEL) for folder in (checkpoint, back))
    assert list(first.factors) == list(second.factors)
    for name, factor in first.factors.items():
        assert factor.tobytes() == second.factors[name].tobytes(), name
    assert second.options.scale == pytest.approx(first.options.scale, rel=1e-6)


# PEFT 0.21 asks transformers 5.2x for a property under its old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_an_adapter_of_mlx_lms_is_the_same_in_peft(base: Path, tmp_path: Path) -> None:
    """Guards: mlx-lm's habits: the last layers only, a scale of its own, no keys in the file."""
    peft = pytest.importorskip("peft", reason="this test needs peft")
    import torch
    from transformers import AutoModelForCausalLM

    model, source, out = mlx_lm_model(), tmp_path / "theirs", tmp_path / "ours"
    table = {"rank": 3, "scale": 20.0, "dropout": 0.0}
    linear_to_lora_layers(model, 1, {**table, "keys": ["self_attn.q_proj", "mlp.up_proj"]})
    mx.random.seed(4)
    factors = {
        name: mx.random.normal(array.shape) * 0.05
        for name, array in _flat(model.parameters()) if "lora_" in name
    }  # fmt: skip
    model.load_weights(list(factors.items()), strict=False)
    model.eval()
    source.mkdir()
    mx.save_safetensors(str(source / "adapters.safetensors"), factors)
    config = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": table}
    (source / "adapter_config.json").write_text(json.dumps(config))
    assert main(["import", str(source), "--base", str(base), "--out", str(out)]) == 0
    theirs = np.array(model(mx.array(IDS)))
    np.testing.assert_allclose(our_logits(out), theirs, rtol=0, atol=1e-4)
    whole = AutoModelForCausalLM.from_pretrained(base, attn_implementation="sdpa")
    with torch.no_grad():
        in_peft = peft.PeftModel.from_pretrained(whole, out)(torch.from_numpy(IDS).long()).logits
    np.testing.assert_allclose(in_peft.numpy(), theirs, rtol=0, atol=1e-4)


def _flat(tree: Any) -> list[tuple[str, mx.array]]:
    from mlx.utils import tree_flatten

    pairs: list[tuple[str, mx.array]] = tree_flatten(tree)
    return pairs
