"""Training against transformers: the optimizer on recorded gradients, and sixty real steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from solollm_torch.optim import Optimizer
from solollm_torch.session import TorchSession

from solollm.architecture import ModelConfig, initial_parameters, parameter_table
from solollm.backend import Batch
from solollm.config import OptimizerTable, ScheduleTable
from solollm.schedule import lr_at

STEPS, PEAK_LR, CLIP = 60, 3e-3, 1.0


def learning_rates() -> list[float]:
    table = ScheduleTable(name="cosine", warmup_fraction=0.1)
    return [lr_at(s, total_steps=STEPS, peak_lr=PEAK_LR, table=table) for s in range(STEPS)]


def reference_optimizer(config: ModelConfig, named: dict[str, torch.Tensor]) -> torch.optim.AdamW:
    """What transformers' Trainer uses, with our table's decay groups and values."""
    decays = {spec.name: spec.decay for spec in parameter_table(config)}
    groups = [
        {"params": [p for n, p in named.items() if decays[n] is decay], "weight_decay": value}
        for decay, value in ((True, 0.1), (False, 0.0))
    ]
    return torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.95), eps=1e-8)


def text_batches(vocab_size: int, rows: int, length: int) -> Iterator[Batch]:
    """Rows that a model can learn: noisy counting with a step of its own in each row."""
    rng = np.random.default_rng(0)
    while True:
        strides = rng.integers(1, 8, (rows, 1))
        noise = rng.integers(0, 2, (rows, length + 1))
        text = rng.integers(0, vocab_size, (rows, 1)) + strides * np.arange(length + 1) + noise
        text = (text % vocab_size).astype(np.int32)
        yield Batch(text[:, :-1].copy(), text[:, 1:].copy(), float(rows * length))


@pytest.fixture(scope="module")
def small_config() -> ModelConfig:
    return ModelConfig(
        vocab_size=256, hidden_size=64, intermediate_size=160, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=128,
        tie_word_embeddings=True,
    )  # fmt: skip


def test_sixty_recorded_gradients_give_the_weights_of_torch_adamw(
    small_config: ModelConfig, make_session: Callable[..., TorchSession]
) -> None:
    """Bias correction, decay groups and the place of eps, apart from the model's rounding."""
    session = make_session(small_config, micro_batch_size=8)
    initial = {n: torch.from_numpy(a) for n, a in initial_parameters(small_config, 0)}
    ours = {name: tensor.clone() for name, tensor in initial.items()}
    theirs = {name: tensor.clone().requires_grad_() for name, tensor in initial.items()}
    optimizer = Optimizer(ours, model=small_config, table=OptimizerTable(name="adamw"))
    reference = reference_optimizer(small_config, theirs)
    batches = text_batches(256, 4, 32)
    for step, lr in enumerate(learning_rates()):
        batch = next(batches)
        gradients = session.gradients(batch)
        session.train_step(batch, lr=lr).result()
        for name, parameter in theirs.items():
            parameter.grad = gradients[name].clone()
        for group in reference.param_groups:
            group["lr"] = lr
        reference.step()
        optimizer.step(gradients, lr=lr, updates=step)
    for name, weight in ours.items():
        np.testing.assert_allclose(weight, theirs[name].detach(), rtol=0, atol=1e-6, err_msg=name)


def train_transformers(config: ModelConfig, batches: Iterator[Batch]) -> list[float]:
    import transformers

    model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config.to_hf()))
    weights = {n: torch.from_numpy(a) for n, a in initial_parameters(config, 0)}
    model.load_state_dict(weights, strict=False)
    named = dict(model.named_parameters())
    optimizer, losses = reference_optimizer(config, named), []
    for lr, batch in zip(learning_rates(), batches, strict=False):
        logits = model(torch.from_numpy(batch.input_ids).long(), use_cache=False).logits
        labels = torch.from_numpy(batch.labels).long()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_sixty_steps_give_the_losses_of_transformers(
    small_config: ModelConfig, make_session: Callable[..., TorchSession]
) -> None:
    """The whole step: data order, loss, clipping, schedule and update, from the same weights."""
    expected = train_transformers(small_config, text_batches(256, 8, 64))
    session = make_session(small_config, micro_batch_size=4, clip_norm=CLIP)
    actual = [
        session.train_step(batch, lr=lr).result().loss
        for lr, batch in zip(learning_rates(), text_batches(256, 8, 64), strict=False)
    ]
    assert expected[-1] < 0.6 * expected[0], "the comparison must cover real learning"
    np.testing.assert_allclose(actual, expected, rtol=1e-4)
