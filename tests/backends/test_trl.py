"""DPO and GRPO beside TRL: losses and gradients of its own trainers on the same inputs.

TRL's `loss_type="sigmoid"` for DPO; `loss_type` dapo, grpo and dr_grpo with `scale_rewards="group"`
for GRPO, `beta` above 0 and at 0, its `use_bias_correction_kl` on. Both backends,
float32, within 1e-5 of the largest gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("trl", reason="these tests compare with TRL")
torch = pytest.importorskip("torch", reason="TRL needs torch")
transformers = pytest.importorskip("transformers", reason="TRL needs transformers")

from solollm.architecture import ModelConfig, parameter_table  # noqa: E402
from solollm.backend import IGNORED, Backend, Batch, DictSource, Plan, SessionOptions  # noqa: E402
from solollm.config import OptimizerTable  # noqa: E402
from solollm.registry import find_backends  # noqa: E402
from solollm.testing.bench import lively_parameters  # noqa: E402

PAIRS, PROMPT, ANSWER, VOCAB = 3, 5, 7, 64
TOLERANCE = 1e-5
MODEL = ModelConfig(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
)  # fmt: skip
# TRL and its trainers warn about their own future.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning",
                                        "ignore::UserWarning")  # fmt: skip


@pytest.fixture(params=["torch", "mlx"])
def backend(request: pytest.FixtureRequest) -> Backend:
    found = {c.name: c for c in find_backends()}.get(request.param)
    if found is None or found.factory is None or not found.probe.available:
        pytest.skip(f"the {request.param} backend is not here")
    return found.factory()


def hf_model(seed: int) -> Any:
    """The same weights in transformers, eager attention and all."""
    config = transformers.LlamaConfig(**MODEL.to_hf())
    config._attn_implementation = "eager"
    model = transformers.LlamaForCausalLM(config)
    tensors = lively_parameters(MODEL, seed)
    state = {name: torch.from_numpy(t.data.copy()) for name, t in tensors.items()}
    model.load_state_dict(state, strict=True)
    return model


def tokenizer() -> Any:
    """A word per id: TRL's trainers want a tokenizer, the comparison needs none."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="w1", pad_token="w2", unk_token="w0"
    )


def rows(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(ids [2 PAIRS, PROMPT + ANSWER], answers' lengths [2 PAIRS]), all different."""
    noise = np.random.default_rng(seed)
    ids = noise.integers(3, VOCAB, (2 * PAIRS, PROMPT + ANSWER))
    return ids, noise.integers(2, ANSWER + 1, 2 * PAIRS)


def batch_of(ids: np.ndarray, lengths: np.ndarray) -> Batch:
    """The same rows as a session takes them; targets are the answers' tokens."""
    labels = ids[:, 1:].astype(np.int32).copy()
    for row, length in enumerate(lengths):
        labels[row, : PROMPT - 1] = IGNORED
        labels[row, PROMPT - 1 + length :] = IGNORED
    return Batch(ids[:, :-1].astype(np.int32), labels, float((labels != IGNORED).sum()))


def make_session(backend: Backend, seed: int, **objective: Any) -> Any:
    options = SessionOptions(OptimizerTable(name="adamw"), **objective)
    plan = Plan(4, False, "float32", PROMPT + ANSWER - 1, 2 * PAIRS)
    session = backend.train_session(MODEL, options, plan)
    session.import_parameters(DictSource(lively_parameters(MODEL, seed)))
    return session


def compare(session: Any, batch: Batch, loss: Any, model: Any) -> None:
    """Loss and every gradient."""
    loss.backward()
    found = session.probe_step(batch)
    np.testing.assert_allclose(found.loss, loss.item(), rtol=TOLERANCE, atol=TOLERANCE)
    gradients: Mapping[str, Any] = session.gradients(batch)
    theirs = dict(model.named_parameters())
    for spec in parameter_table(MODEL):
        expected = theirs[spec.name].grad.numpy()
        np.testing.assert_allclose(
            np.array(gradients[spec.name]), expected, rtol=0,
            atol=TOLERANCE * max(1.0, float(np.abs(expected).max())), err_msg=spec.name,
        )  # fmt: skip


@pytest.fixture
def dpo_trainer(tmp_path: Path) -> Any:
    import trl
    from datasets import Dataset

    row = {"prompt": "w3 w4", "chosen": " w5", "rejected": " w6"}
    args = trl.DPOConfig(
        str(tmp_path), beta=0.3, use_cpu=True, report_to=[], gradient_checkpointing=False,
        bf16=False,
    )  # fmt: skip
    return trl.DPOTrainer(
        hf_model(1), ref_model=hf_model(2), args=args, train_dataset=Dataset.from_list([row] * 2),
        processing_class=tokenizer(),
    )  # fmt: skip


def test_dpo_is_trls(backend: Backend, dpo_trainer: Any) -> None:
    """Guards against DPO under its own name: another sign, mean or reference."""
    ids, lengths = rows()
    batch = batch_of(ids, lengths)
    order = [*range(0, 2 * PAIRS, 2), *range(1, 2 * PAIRS, 2)]  # TRL: all chosen, then all rejected
    positions = np.arange(PROMPT + ANSWER)
    ends = PROMPT + lengths[order][:, None]
    inputs = {
        "input_ids": torch.from_numpy(ids[order]),
        "attention_mask": torch.from_numpy((positions < ends).astype(np.int64)),
        "completion_mask": torch.from_numpy(
            ((positions >= PROMPT) & (positions < ends)).astype(np.int64)
        ),
    }
    dpo_trainer.model.train()
    loss = dpo_trainer.compute_loss(dpo_trainer.model, inputs)
    reference = make_session(backend, 2).token_logprobs(batch)
    batch = replace(
        batch, reference_logprobs=reference, denominator=float(PAIRS),
        pair_ids=(np.arange(2 * PAIRS) // 2).astype(np.int32),
    )  # fmt: skip
    compare(make_session(backend, 1, objective="dpo", beta=0.3), batch, loss, dpo_trainer.model)


MakeTrainer = Callable[..., Any]


@pytest.fixture
def grpo_trainer(tmp_path: Path) -> MakeTrainer:
    def make(**settings: Any) -> Any:
        import trl
        from datasets import Dataset

        args = trl.GRPOConfig(
            str(tmp_path), use_cpu=True, report_to=[], num_generations=PAIRS, bf16=False,
            per_device_train_batch_size=2 * PAIRS, max_completion_length=ANSWER,
            gradient_checkpointing=False, scale_rewards="group", use_bias_correction_kl=True,
            **settings,
        )  # fmt: skip
        return trl.GRPOTrainer(
            hf_model(1), reward_funcs=lambda completions, **_: [0.0] * len(completions), args=args,
            train_dataset=Dataset.from_list([{"prompt": "w3 w4"}] * 4),
            processing_class=tokenizer(),
        )  # fmt: skip

    return make


@pytest.mark.parametrize(("loss_type", "beta"), [("dapo", 0.0), ("dapo", 0.2), ("grpo", 0.2),
                                                 ("dr_grpo", 0.0)])  # fmt: skip
def test_grpo_is_trls(
    backend: Backend, grpo_trainer: MakeTrainer, loss_type: str, beta: float
) -> None:
    """Guards against another estimator of the KL term, or another mean over tokens."""
    trainer = grpo_trainer(loss_type=loss_type, beta=0.0)  # above 0 it loads a reference by name
    trainer.beta = beta
    ids, lengths = rows(1)
    advantages = np.random.default_rng(2).standard_normal(2 * PAIRS)
    batch = batch_of(ids, lengths)
    mask = np.arange(ANSWER) < lengths[:, None]
    reference = make_session(backend, 2).token_logprobs(batch)
    inputs = {
        "prompt_ids": torch.from_numpy(ids[:, :PROMPT]),
        "prompt_mask": torch.ones((2 * PAIRS, PROMPT), dtype=torch.int64),
        "completion_ids": torch.from_numpy(ids[:, PROMPT:]),
        "completion_mask": torch.from_numpy(mask.astype(np.int64)),
        "advantages": torch.from_numpy(advantages.astype(np.float32)),
        "num_items_in_batch": torch.tensor(int(mask.sum())),
        "ref_per_token_logps": torch.from_numpy(reference[:, PROMPT - 1 :].copy()),
    }
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.compute_loss(trainer.model, inputs)
    session = make_session(backend, 1, objective="grpo", beta=beta)
    spread = np.broadcast_to(advantages[:, None], batch.labels.shape).astype(np.float32)
    batch = replace(batch, advantages=spread, reference_logprobs=reference)
    compare(session, averaged(batch, lengths, loss_type), loss, trainer.model)


def averaged(batch: Batch, lengths: np.ndarray, loss_type: str) -> Batch:
    """The batch with the weights and denominator of a `loss_type`."""
    if loss_type == "dapo":
        return batch
    if loss_type == "dr_grpo":
        return replace(batch, denominator=float(2 * PAIRS * ANSWER))
    weights = np.broadcast_to(1 / lengths[:, None], batch.labels.shape).astype(np.float32)
    return replace(batch, token_weights=weights, denominator=float(2 * PAIRS))
