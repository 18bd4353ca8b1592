"""Ways in which MLX gives wrong numbers without a word; each was met, and each is shut here."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mlx.core", reason="these tests need mlx")
pytest.importorskip("mlx_lm", reason="these tests need mlx-lm")
import mlx.core as mx
import solollm_mlx
from solollm_mlx import attention
from solollm_mlx import model as mlx_model
from solollm_mlx.backend import MlxBackend
from solollm_mlx.optim import Optimizer, Step
from solollm_mlx.session import MlxSession
from solollm_mlx.state import from_host

from solollm.architecture import ModelConfig, parameter_table
from solollm.backend import Batch, DictSource, HostTensor
from solollm.config import OptimizerTable
from solollm.tensorfile import write_tensors
from solollm.testing.bench import Bench, lively_parameters, require_same_state, state_of
from solollm.testing.conformance_state import import_takes_effect_after_a_step

MakeBatch = Callable[..., Batch]
MakeSession = Callable[..., MlxSession]
IDS = np.random.default_rng(1).integers(0, 192, (2, 300)).astype(np.int32)
WEIGHTING = np.random.default_rng(2).standard_normal((2, 4, 300, 8)).astype(np.float32)


def write_model(folder: Path, model: ModelConfig, *, without: tuple[str, ...] = ()) -> None:
    weights = lively_parameters(model)
    raw = {key: value for key, value in model.to_hf().items() if key not in without}
    (folder / "config.json").write_text(json.dumps(raw))
    specs = [(name, host.dtype, host.shape) for name, host in weights.items()]
    write_tensors(folder / "model.safetensors", specs, weights.items(), {"format": "pt"})


def mlx_lm_logits(folder: Path) -> np.ndarray:
    """What mlx-lm itself makes of a model folder."""
    from mlx_lm.utils import load_model

    loaded, _ = load_model(folder, lazy=False, strict=False)
    return np.array(loaded(mx.array(IDS)))


def own_logits(model: ModelConfig) -> np.ndarray:
    weights = {name: from_host(host) for name, host in lively_parameters(model).items()}
    return np.array(mlx_model.logits(weights, mx.array(IDS), None, config=model))


def test_mlx_lm_reads_our_rope_and_our_head(variant: ModelConfig, tmp_path: Path) -> None:
    """Guards `to_hf`: mlx-lm falls back to theta 10000 and to a tied head where a key is absent."""
    write_model(tmp_path, variant)
    expected = own_logits(variant)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(mlx_lm_logits(tmp_path), expected, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize(
    ("variant", "missing"),
    [
        ("llama3-rope", ("rope_theta", "rope_scaling")),
        ("llama3-rope", ("rope_scaling",)),
        ("grouped", ("tie_word_embeddings",)),
    ],
    indirect=["variant"],
)
def test_the_keys_are_needed(
    variant: ModelConfig, missing: tuple[str, ...], tmp_path: Path
) -> None:
    """Guards the test above against one that could not fail, and tells when mlx-lm has mended its
    reading of `rope_parameters`: then this fails, and the double spelling may go."""
    write_model(tmp_path, variant, without=missing)
    expected = own_logits(variant)
    assert np.abs(mlx_lm_logits(tmp_path) - expected).max() > 0.01 * np.abs(expected).max()


def test_nothing_is_compiled_shapeless() -> None:
    """Guards against `mx.compile(shapeless=True)`: constants made from a shape stay those of the
    first shape that was met."""
    folder = Path(solollm_mlx.__file__).parent
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                assert "shapeless" not in {keyword.arg for keyword in node.keywords}, path.name


def test_a_compiled_session_takes_other_shapes(
    make_batch: MakeBatch, make_session: MakeSession
) -> None:
    """Guards what is compiled against constants of the first batch's shape."""
    compiled, eager = make_session(compile=True), make_session()
    for length in (24, 17):
        for packed in (False, True):
            batch = make_batch(3, length, packed=packed)
            assert compiled.probe_step(batch) == eager.probe_step(batch)
            assert compiled.eval_step(batch) == eager.eval_step(batch)


def test_the_first_adamw_step_is_one_learning_rate(tiny_config: ModelConfig) -> None:
    """Guards bias correction, which MLX's own AdamW leaves out by default."""
    table = OptimizerTable(name="adamw", weight_decay=0.0)
    optimizer = Optimizer(parameter_table(tiny_config), table, compiled=False)
    specs = parameter_table(tiny_config)
    weights = {spec.name: mx.zeros(spec.shape) for spec in specs}
    gradients = {spec.name: mx.full(spec.shape, -0.3) for spec in specs}
    step = Step.of(1e-2, table, updates=mx.array(0))
    optimizer.step(weights, optimizer.initial_states(), gradients, step)
    for name, weight in weights.items():
        np.testing.assert_allclose(np.array(weight), 1e-2, rtol=1e-6, err_msg=name)


def gradients_by(
    function: Callable[..., Any], *inputs: Any, segments: Any
) -> tuple[np.ndarray, ...]:
    def total(*inputs: Any) -> Any:
        return (function(*inputs, segments) * mx.array(WEIGHTING)).sum()

    return tuple(np.array(g) for g in mx.grad(total, argnums=(0, 1, 2))(*inputs))


def test_blocked_attention_recomputes_its_own_block() -> None:
    """Guards a closure over the loop variable: `mx.checkpoint` runs the function again in backward,
    when the loop has ended, and would take every block for the last one."""
    rng = np.random.default_rng(3)
    q, k, v = (
        mx.array(rng.standard_normal((2, heads, 300, 8)).astype(np.float32)) for heads in (4, 2, 2)
    )
    segments = mx.array((rng.random((2, 300)) < 0.02).cumsum(1).astype(np.int32))
    assert q.shape[2] > 2 * attention.BLOCK, "the rows must be long enough to be cut"

    def plain(q: Any, k: Any, v: Any, segments: Any) -> Any:
        return attention.attend_block(q, k, v, segments=segments, start=0)

    for own in (None, segments):
        expected = gradients_by(plain, q, k, v, segments=own)
        for actual, of_plain in zip(
            gradients_by(attention.attend, q, k, v, segments=own), expected, strict=True
        ):
            np.testing.assert_allclose(actual, of_plain, rtol=0, atol=1e-5)


def test_recomputed_layers_are_their_own(
    tiny_config: ModelConfig, make_batch: MakeBatch, make_session: MakeSession
) -> None:
    """Guards the same closure in the loop over layers."""
    model = tiny_config.model_copy(update={"num_hidden_layers": 4})
    batch = make_batch(2, 20, packed=True)
    expected = make_session(model).gradients(batch)
    recomputed = make_session(model, activation_checkpointing=True).gradients(batch)
    for name, gradient in recomputed.items():
        np.testing.assert_allclose(
            np.array(gradient), np.array(expected[name]), rtol=0, atol=1e-5, err_msg=name
        )


def test_an_import_after_a_compiled_step_takes_effect() -> None:
    """Guards arrays that a compiled function holds as constants."""
    table = OptimizerTable(name="muon", state_bits=8, momentum_warmup_steps=4)
    model = ModelConfig(
        vocab_size=96, hidden_size=48, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=12, max_position_embeddings=64,
    )  # fmt: skip
    import_takes_effect_after_a_step(Bench(MlxBackend(), model, table, {"compile": True}))


def backwards(tensors: dict[str, HostTensor]) -> DictSource:
    return DictSource(dict(reversed(tensors.items())))


def test_the_order_of_a_file_changes_no_bit(
    make_batch: MakeBatch, make_session: MakeSession
) -> None:
    """Guards the order in which the gradient norm is summed: it must be the name table's, not that
    of the file, or a resumed run leaves the undisturbed one in the last bit."""
    undisturbed, resumed = make_session(), make_session(lively=False)
    undisturbed.train_step(make_batch(4, 24), lr=1e-2).result()
    state = state_of(undisturbed)
    resumed.import_parameters(backwards(dict(state.parameters)))
    resumed.import_optimizer(backwards(dict(state.optimizer)), state.session_state)
    for seed in (1, 2, 3):
        batch = replace(make_batch(4, 24, seed=seed), denominator=7.0)
        steps = [session.train_step(batch, lr=1e-2).result() for session in (undisturbed, resumed)]
        assert steps[0] == steps[1]
    require_same_state(state_of(resumed), state_of(undisturbed), "after a file in another order")
