"""Other training stacks on PyTorch, brought to one shape so that `bench train` can time them.

Each starts from the same weights, takes the same batches, and does what its users get: its own
forward, `torch.optim.AdamW` with the same settings, clipping by the global norm. Only what is
installed and can run on the device is offered. Nothing here is used in training.
"""

from __future__ import annotations

import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from solollm.architecture import ModelConfig, initial_parameters
from solollm.backend import Batch, Peer
from solollm.config import OptimizerTable
from solollm.errors import BackendError, nearest

# Plain before compiled: name, and the modules that it needs.
_PEERS = {
    "transformers": ("transformers",),
    "transformers+compile": ("transformers",),
    "transformers+liger": ("transformers", "liger_kernel"),
    "transformers+liger+compile": ("transformers", "liger_kernel"),
    "transformers Trainer": ("transformers", "accelerate"),
    "litgpt": ("litgpt", "lightning"),
    "litgpt+compile": ("litgpt", "lightning"),
}
_PACKAGES = {"liger_kernel": "liger-kernel"}  # where a module is not called as its package
A_CARD = "an NVIDIA card"  # Liger's kernels are written in Triton


def known_peers(device: torch.device) -> dict[str, str]:
    """See `Backend.peers`."""
    return {name: _lacks(name, modules, device) for name, modules in _PEERS.items()}


def _lacks(name: str, modules: tuple[str, ...], device: torch.device) -> str:
    if "liger" in name and device.type != "cuda":
        return A_CARD
    missing = (module for module in modules if find_spec(module) is None)
    return next((_PACKAGES.get(module, module) for module in missing), "")


def make_peer(
    name: str,
    model: ModelConfig,
    table: OptimizerTable,
    *,
    seed: int,
    device: torch.device,
    compute_dtype: torch.dtype,
) -> Peer:
    """The stack of this name over the core's initial weights of `seed`."""
    lacks = known_peers(device).get(name)
    if lacks is None:
        raise BackendError(f"there is no training stack {name!r} here", fix=nearest(name, _PEERS))
    if lacks:
        raise BackendError(
            f"{name} cannot be timed here: it needs {lacks}",
            fix="leave it out" if lacks == A_CARD else f"pip install {lacks}",
        )
    if name == "transformers Trainer":
        return _TrainerPeer(model, table, seed, compute_dtype)
    if "liger" in name:
        module, loss = with_liger(_transformers_model(model, seed)), liger_loss
    elif name.startswith("transformers"):
        module, loss = _transformers_model(model, seed), _transformers_loss
    else:
        module, loss = _litgpt_model(model, seed), _litgpt_loss
    compiled = name.endswith("+compile")
    return _LoopPeer(module.to(device), loss, table, dtype=compute_dtype, compiled=compiled)


def _transformers_model(model: ModelConfig, seed: int) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    raw = model.to_hf()
    config = AutoConfig.for_model(raw.pop("model_type"), **raw)
    config._attn_implementation = "sdpa"
    module: nn.Module = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    module.train()
    weights = {n: torch.from_numpy(a) for n, a in initial_parameters(model, seed)}
    missing, unexpected = module.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    return module


def _transformers_loss(module: nn.Module, input_ids: Tensor, labels: Tensor) -> Tensor:
    logits = module(input_ids=input_ids, use_cache=False).logits
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def with_liger(module: nn.Module) -> nn.Module:
    """Its norms, SwiGLUs and loss are Liger's; other models of this process stay as they are."""
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    definitions = vars(sys.modules[type(module).__module__])
    before = dict(definitions)
    _apply_liger_kernel_to_instance(model=module)  # transformers' own Trainer calls it, too
    definitions.update(before)
    return module


def liger_loss(module: nn.Module, input_ids: Tensor, labels: Tensor) -> Tensor:
    with _liger_rotation(module):
        loss: Tensor = module(
            input_ids=input_ids, labels=labels, shift_labels=labels, use_cache=False
        ).loss
    return loss


@contextmanager
def _liger_rotation(module: nn.Module) -> Iterator[None]:
    """Liger's rotation is a function that transformers' layers look up at every call."""
    from liger_kernel.transformers.rope import liger_rotary_pos_emb

    known = getattr(module, "_orig_mod", module)  # under the compiler's wrapper
    definitions = vars(sys.modules[type(known).__module__])
    before = definitions["apply_rotary_pos_emb"]
    definitions["apply_rotary_pos_emb"] = liger_rotary_pos_emb
    try:
        yield
    finally:
        definitions["apply_rotary_pos_emb"] = before


def _litgpt_model(model: ModelConfig, seed: int) -> nn.Module:
    from litgpt import GPT, Config

    config = Config(
        block_size=model.max_position_embeddings, n_layer=model.num_hidden_layers,
        n_head=model.num_attention_heads, n_query_groups=model.num_key_value_heads,
        head_size=model.head_dim, n_embd=model.hidden_size, rotary_percentage=1.0,
        parallel_residual=False, bias=False, norm_class_name="RMSNorm", norm_eps=model.rms_norm_eps,
        mlp_class_name="LLaMAMLP", intermediate_size=model.intermediate_size,
        rope_base=int(model.rope_theta), vocab_size=model.vocab_size,
        padded_vocab_size=model.vocab_size,
    )  # fmt: skip
    module: Any = GPT(config)  # litgpt carries no types
    if model.tie_word_embeddings:
        module.lm_head.weight = module.transformer.wte.weight
    module.load_state_dict(dict(_litgpt_weights(model, seed)), strict=False)
    trained: nn.Module = module.train()
    return trained


def _litgpt_weights(model: ModelConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    weights = {n: torch.from_numpy(a) for n, a in initial_parameters(model, seed)}
    yield "transformer.wte.weight", weights["model.embed_tokens.weight"]
    yield "transformer.ln_f.weight", weights["model.norm.weight"]
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    yield "lm_head.weight", head
    for layer in range(model.num_hidden_layers):
        ours, theirs = f"model.layers.{layer}.", f"transformer.h.{layer}."
        yield theirs + "norm_1.weight", weights[ours + "input_layernorm.weight"]
        yield theirs + "norm_2.weight", weights[ours + "post_attention_layernorm.weight"]
        qkv = [weights[f"{ours}self_attn.{part}_proj.weight"] for part in "qkv"]
        yield theirs + "attn.qkv.weight", torch.cat(qkv)
        yield theirs + "attn.proj.weight", weights[ours + "self_attn.o_proj.weight"]
        for mine, other in (("gate", "fc_1"), ("up", "fc_2"), ("down", "proj")):
            yield f"{theirs}mlp.{other}.weight", weights[f"{ours}mlp.{mine}_proj.weight"]


def _litgpt_loss(module: nn.Module, input_ids: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(module(input_ids).flatten(0, 1), labels.flatten())


def _adamw(module: nn.Module, table: OptimizerTable, lr: float) -> torch.optim.AdamW:
    """The fused AdamW, decaying matrices other than the embedding, as the core's table says."""
    spare = {
        id(p) for n, p in module.named_parameters() if "embed" in n or "wte" in n or "head" in n
    }
    decayed = [p for p in module.parameters() if p.ndim >= 2 and id(p) not in spare]
    marked = {id(p) for p in decayed}
    rest = [p for p in module.parameters() if id(p) not in marked]
    groups = [
        {"params": decayed, "weight_decay": table.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=lr, betas=(table.beta1, table.beta2), eps=table.eps, fused=True
    )


class _LoopPeer(Peer):
    """A plain training loop around a module of fp32 weights, under autocast where it computes in
    another dtype."""

    def __init__(
        self, module: nn.Module, loss: Any, table: OptimizerTable, *, dtype: torch.dtype,
        compiled: bool,
    ) -> None:  # fmt: skip  # loss: (module, input_ids, labels) -> scalar Tensor
        self._run = torch.compile(module) if compiled else module
        self._loss, self._module, self._clip = loss, module, table.clip_norm
        self._optimizer = _adamw(module, table, 1e-3)
        self._device = next(module.parameters()).device
        self._autocast = torch.autocast(
            self._device.type, dtype=dtype, enabled=dtype != torch.float32
        )

    def step(self, batch: Batch, lr: float) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        input_ids, labels = (ids.to(self._device) for ids in _tensors(batch))
        with self._autocast:
            loss = self._loss(self._run, input_ids, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._module.parameters(), self._clip)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    def close(self) -> None:
        self._optimizer.state.clear()


class _TrainerPeer(Peer):
    """The real `transformers.Trainer`, held between its steps.

    It trains in a thread of its own and asks for its next batch; the batch is handed over when a
    step is wanted, and the step has ended when it asks again.
    """

    def __init__(
        self, model: ModelConfig, table: OptimizerTable, seed: int, dtype: torch.dtype
    ) -> None:
        import transformers
        from transformers import Trainer, TrainingArguments

        transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        self._batches: list[Batch] = []
        self._wanted, self._ended = threading.Semaphore(0), threading.Semaphore(0)
        self._failure: BaseException | None = None
        self._losses: list[float] = []
        self._open = True
        self._folder = tempfile.TemporaryDirectory()
        module = _transformers_model(model, seed)
        optimizer = _adamw(module, table, 1e-3)
        arguments = TrainingArguments(
            output_dir=self._folder.name, max_steps=10**9, per_device_train_batch_size=1,
            max_grad_norm=table.clip_norm, report_to=[], save_strategy="no",
            logging_strategy="no", disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
            dataloader_pin_memory=False, bf16=dtype == torch.bfloat16,
        )  # fmt: skip
        constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
        losses = self._losses

        class Recording(Trainer):
            def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
                loss: Tensor = super().training_step(*args, **kwargs)
                losses.append(float(loss.detach()))
                return loss

            def get_train_dataloader(self) -> Any:
                return batches

        batches = _Handover(self)
        self._trainer = Recording(module, arguments, optimizers=(optimizer, constant))
        self._optimizer = optimizer
        self._thread = threading.Thread(target=self._train, daemon=True)
        self._thread.start()
        self._wait()

    def _train(self) -> None:
        try:
            self._trainer.train()
        except BaseException as error:
            self._failure = error
        self._ended.release()

    def _wait(self) -> None:
        self._ended.acquire()
        if self._failure is not None:
            raise self._failure

    def next_batch(self) -> Mapping[str, Tensor] | None:
        """What the trainer's thread gets for asking; None ends its training."""
        self._ended.release()
        self._wanted.acquire()
        if not self._open:
            return None
        input_ids, labels = _tensors(self._batches.pop())
        # `labels` are counted, `shift_labels` are what the loss takes as they are.
        return {"input_ids": input_ids, "labels": labels, "shift_labels": labels}

    def step(self, batch: Batch, lr: float) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._batches.append(batch)
        self._wanted.release()
        self._wait()
        return self._losses[-1]

    def close(self) -> None:
        self._open = False
        self._wanted.release()
        self._thread.join(timeout=30)
        self._folder.cleanup()


class _Handover:
    """A data loader that has as many batches as are handed over."""

    def __init__(self, peer: _TrainerPeer) -> None:
        self._peer = peer

    def __len__(self) -> int:
        return 10**9

    def __iter__(self) -> Iterator[Mapping[str, Tensor]]:
        while (batch := self._peer.next_batch()) is not None:
            yield batch


def _tensors(batch: Batch) -> tuple[Tensor, Tensor]:
    return (
        torch.from_numpy(batch.input_ids.astype(np.int64)),
        torch.from_numpy(batch.labels.astype(np.int64)),
    )
