"""The decoder in PyTorch: what it holds and how one block computes.

A Llama with grouped-query attention, rotary positions, SwiGLU and RMSNorm; QK-norm makes it a
Qwen3. The fused matrices (`qkv_proj`, `gate_up_proj`) are this file's own storage: everybody else
speaks of canonical Hugging Face names, which are row slices of them (`Decoder.canonical_views`).
The arithmetic of single operations, with hand-written gradients, is in `ops`; attention within
documents in `attention`; the loss in `loss`; decoding with a KV cache in `engine`.

Shapes: B rows, T positions, C hidden size, H query heads, K key/value heads, D head size,
F intermediate size, V vocabulary, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from solollm.architecture import ModelConfig
from solollm_torch.attention import Segments, attend, attend_fused
from solollm_torch.kernels import HEAD_MULTIPLE, Kernels
from solollm_torch.ops import (
    Rotary,
    by_hand,
    embedding,
    linear,
    rms_norm,
    rotary_table,
    split_heads,
    swiglu,
)


class Block(nn.Module):
    """One layer: attention and feed-forward, each behind an RMSNorm and beside the residual.

    Parameters, each with its shape: input_layernorm [C], qkv_proj [(H + 2 K) D, C],
    q_norm and k_norm [D] (QK-norm only, else None), o_proj [C, H D],
    post_attention_layernorm [C], gate_up_proj [2 F, C], down_proj [C, F].
    """

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        hidden, inter, dim = config.hidden_size, config.intermediate_size, config.head_dim
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.eps = config.rms_norm_eps
        self.kernels: Kernels | None = None
        self.fuses_attention = not config.qk_norm and dim % HEAD_MULTIPLE == 0
        self.num_heads, self.num_kv_heads, self.head_dim = heads, kv_heads, dim
        self.input_layernorm = empty(hidden)
        self.qkv_proj = empty((heads + 2 * kv_heads) * dim, hidden)
        self.q_norm = empty(dim) if config.qk_norm else None
        self.k_norm = empty(dim) if config.qk_norm else None
        self.o_proj = empty(hidden, heads * dim)
        self.post_attention_layernorm = empty(hidden)
        self.gate_up_proj = empty(2 * inter, hidden)
        self.down_proj = empty(hidden, inter)
        self.adapted: dict[str, Any] = {}  # stored name -> `adapter.AdaptedMatrix`
        self.product = linear  # or another of its kind
        self.recompute: frozenset[str] = frozenset()  # "attention", "feed_forward": in backward

    def project(self, x: Tensor, stored: str) -> Tensor:
        """x [..., in] by one of the stored matrices, or what an adapter has put in its place."""
        if stored in self.adapted:
            adapted: Tensor = self.adapted[stored](x)
            return adapted
        return self.product(x, getattr(self, stored))

    def heads(self, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        """From the residual stream [B, T, C] to q [B, H, T, D], k and v [B, K, T, D].

        q and k are normalised (QK-norm) and rotated. `rotary` holds cos and sin of the positions,
        each [T, D/2], or [B, T, D/2] where rows stand at different positions (decoding).
        """
        x = rms_norm(x, self.input_layernorm, self.eps, self.kernels)  # [B, T, C]
        qkv = self.project(x, "qkv_proj")  # [B, T, (H + 2 K) D]
        qkv = qkv.view(*x.shape[:-1], -1, self.head_dim)  # [B, T, H + 2 K, D]
        norms = None
        if self.q_norm is not None and self.k_norm is not None:
            norms = (self.q_norm, self.k_norm)
        return split_heads(qkv, self.num_heads, rotary, norms=norms, eps=self.eps)

    def merge(self, x: Tensor, attended: Tensor) -> Tensor:
        """Add the attention output [B, H, T, D] to the residual stream [B, T, C]."""
        attended = attended.transpose(1, 2).flatten(2)  # [B, T, H D], without a copy
        return x + self.project(attended, "o_proj")  # [B, T, C]

    def feed_forward(self, x: Tensor) -> Tensor:
        """Add the SwiGLU network's output to the residual stream [B, T, C]."""
        normed = rms_norm(x, self.post_attention_layernorm, self.eps, self.kernels)  # [B, T, C]
        gate_up = self.project(normed, "gate_up_proj")  # [B, T, 2 F]
        return x + self.project(swiglu(gate_up, self.kernels), "down_proj")  # [B, T, C]

    def canonical_views(self, of: Callable[[nn.Parameter], Tensor]) -> dict[str, Tensor]:
        """Name within the layer (`self_attn.q_proj`) -> view of what `of` gives; see `Decoder`."""
        queries, keys = (n * self.head_dim for n in (self.num_heads, self.num_kv_heads))
        q, k, v = torch.split(of(self.qkv_proj), [queries, keys, keys])
        gate, up = of(self.gate_up_proj).chunk(2)
        views = {"input_layernorm": of(self.input_layernorm)}
        views |= {"self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v}
        views["self_attn.o_proj"] = of(self.o_proj)
        if self.q_norm is not None and self.k_norm is not None:
            views |= {"self_attn.q_norm": of(self.q_norm), "self_attn.k_norm": of(self.k_norm)}
        views["post_attention_layernorm"] = of(self.post_attention_layernorm)
        return views | {
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": of(self.down_proj),
        }

    def forward(self, x: Tensor, rotary: Rotary, segments: Segments | None) -> Tensor:
        """[B, T, C] to [B, T, C]."""
        x = self._part("attention", partial(self.attention, rotary=rotary, segments=segments), x)
        return self._part("feed_forward", self.feed_forward, x)

    def attention(self, x: Tensor, *, rotary: Rotary, segments: Segments | None) -> Tensor:
        """Add what each position attends to to the residual stream [B, T, C]."""
        in_documents = segments is None or bool(segments.documents)
        if self.kernels is not None and self.fuses_attention and by_hand() and in_documents:
            normed = rms_norm(x, self.input_layernorm, self.eps, self.kernels)  # [B, T, C]
            qkv = self.project(normed, "qkv_proj").view(*x.shape[:2], -1, self.head_dim)
            attended = attend_fused(qkv, self.num_heads, rotary, segments, kernels=self.kernels)
            return self.merge(x, attended.transpose(1, 2))
        q, k, v = self.heads(x, rotary)
        return self.merge(x, attend(q, k, v, segments))

    def _part(self, name: str, compute: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if name not in self.recompute or not torch.is_grad_enabled():
            return compute(x)
        again: Tensor = checkpoint(compute, x, use_reentrant=False, preserve_rng_state=False)
        return again


class Decoder(nn.Module):
    """Token ids in, normalised hidden states out; the head is applied by whoever needs logits.

    Parameters are uninitialised until `load`. They may be fp32 masters while `compute_dtype` is
    bf16: every operation casts its weight to the dtype of its input.

    Attributes:
        embed_tokens [V, C]; layers: L `Block`s; norm [C]; lm_head [V, C], None when tied.
        compute_dtype: what the residual stream is held in.
        checkpointing: recompute each block in backward instead of keeping its activations.
        on_block_gradients: called in backward with a block's index once all its gradients are
            there; the weights of that block may then change.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        device = torch.device(device)
        matrix = (config.vocab_size, config.hidden_size)
        self.config = config
        self.compute_dtype = compute_dtype or dtype
        self.checkpointing = False
        self.on_block_gradients: Callable[[int], None] | None = None
        self.kernels: Kernels | None = None
        self.embed_tokens = nn.Parameter(torch.empty(matrix, device=device, dtype=dtype))
        blocks = (Block(config, device, dtype) for _ in range(config.num_hidden_layers))
        self.layers: list[Block] = nn.ModuleList(blocks)  # type: ignore[assignment]
        self.norm = nn.Parameter(torch.empty(config.hidden_size, device=device, dtype=dtype))
        self.lm_head: nn.Parameter | None = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Parameter(torch.empty(matrix, device=device, dtype=dtype))
        self._rotary: Rotary | None = None

    def use(self, kernels: Kernels | None) -> None:
        """Train with compiled loops (float32 on the CPU) in the place of PyTorch's operations."""
        self.kernels = kernels
        for block in self.layers:
            block.kernels = kernels

    @property
    def head_weight(self) -> nn.Parameter:
        """[V, C]: logits are `hidden @ head_weight.T`."""
        return self.embed_tokens if self.lm_head is None else self.lm_head

    def embed(self, input_ids: Tensor) -> Tensor:
        """int [B, T] to the residual stream [B, T, C] in the compute dtype."""
        return embedding(input_ids, self.embed_tokens, self.compute_dtype)

    def rotary(self, length: int) -> Rotary:
        """cos and sin [length, D/2] of positions 0 to length - 1; index them for others.

        The table is made when first needed and grows by doubling. It is no buffer: nothing of it is
        saved, and a model built on the meta device has none to lose.
        """
        device = self.embed_tokens.device
        if self._rotary is None or len(self._rotary.cos) < length or self._rotary.device != device:
            size = max(64, 1 << (length - 1).bit_length())
            with torch.inference_mode(False):  # training may save what an engine made first
                self._rotary = rotary_table(self.config, size, device)
        return Rotary(self._rotary.cos[:length], self._rotary.sin[:length])

    def final_norm(self, x: Tensor) -> Tensor:
        """The last RMSNorm, [B, T, C]."""
        return rms_norm(x, self.norm, self.config.rms_norm_eps, self.kernels)

    def forward(self, input_ids: Tensor, segments: Segments | None = None) -> Tensor:
        """int [B, T] to normalised hidden states [B, T, C]. `segments` None: plain causal."""
        rotary = self.rotary(input_ids.shape[1])
        x = self.embed(input_ids)  # [B, T, C]
        for index, block in enumerate(self.layers):
            self._announce(index, x)
            if self.checkpointing and torch.is_grad_enabled():
                # No random numbers are drawn in a block, so there is no state to keep for it.
                x = checkpoint(
                    block, x, rotary, segments, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x = block(x, rotary, segments)
        return self.final_norm(x)

    def _announce(self, index: int, x: Tensor) -> None:
        """The gradient of a block's input is complete after those of its weights."""
        if self.on_block_gradients is None or not x.requires_grad:
            return
        tell = self.on_block_gradients
        x.register_hook(lambda _: tell(index))  # type: ignore[no-untyped-call]

    def logits(self, input_ids: Tensor, segments: Segments | None = None) -> Tensor:
        """All logits [B, T, V]: for tests and small inputs; training never holds them."""
        return linear(self(input_ids, segments), self.head_weight)

    def canonical_views(self, of: Callable[[nn.Parameter], Tensor]) -> dict[str, Tensor]:
        """Canonical name -> view, in table order, of what `of` gives for each stored parameter.

        `of=lambda p: p.data` gives the weights, `of=lambda p: p.grad` their gradients. A slice of
        rows of a fused matrix is contiguous memory, so a view is as good as a tensor of its own.
        """
        views = {"model.embed_tokens.weight": of(self.embed_tokens)}
        for index, block in enumerate(self.layers):
            layer = block.canonical_views(of)
            views |= {f"model.layers.{index}.{name}.weight": view for name, view in layer.items()}
        views["model.norm.weight"] = of(self.norm)
        if self.lm_head is not None:
            views["lm_head.weight"] = of(self.lm_head)
        return views

    def masters(self) -> dict[str, Tensor]:
        """Canonical name -> the weight itself (a view: writing to it changes the model)."""
        return self.canonical_views(lambda parameter: parameter.data)

    @torch.no_grad()
    def load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Copy (canonical name, tensor) pairs into the weights, cast to their dtype."""
        masters = self.masters()
        for name, tensor in tensors:
            masters[name].copy_(tensor)
