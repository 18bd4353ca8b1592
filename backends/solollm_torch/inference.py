"""The forward pass of generating: weights laid out for reading, keys and values in a cache.

The same arithmetic as `model.Decoder`, without gradients and over a flat list of tokens: prompts
of different lengths are laid end to end and only attention tells them apart, so nothing is padded.
Who runs when is decided in `engine`; what is kept in `kv_cache`.

Shapes: N tokens in this call, C hidden size, H query heads, K key/value heads, G = H / K, D head
size, F intermediate size, V vocabulary, S cache capacity.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention

from solollm_torch import products
from solollm_torch.kv_cache import KVCache
from solollm_torch.live_adapters import LiveAdapters, Share
from solollm_torch.model import Block, Decoder

Product = Callable[[Tensor], Tensor]  # [N, in] -> [N, out]

_PACKED_FROM = 2**16  # elements; a smaller matrix costs less than oneDNN's call


class Chunk(NamedTuple):
    """Positions `start` to `stop` (exclusive) of the sequence in `slot`, computed in this call."""

    slot: int
    start: int
    stop: int


class Group(NamedTuple):
    """Decoding rows `first` to `last` (exclusive), which sit in neighbouring slots from `slot` on.

    `mask` float [rows, 1, 1, length], 0 or -inf, or None when all have `length` positions.
    """

    first: int
    last: int
    slot: int
    length: int
    mask: Tensor | None


class Rows(NamedTuple):
    """One new token for each of N sequences: positions int64 [N], where keys and values go (see
    `KVCache.write_rows`), the groups that attend together, and the rows' adapters."""

    positions: Tensor
    cache_rows: Tensor
    groups: tuple[Group, ...]
    shares: tuple[Share, ...] = ()


class _Layer(NamedTuple):
    input_norm: Tensor
    qkv_proj: Product
    q_norm: Tensor | None
    k_norm: Tensor | None
    o_proj: Product
    post_attention_norm: Tensor
    gate_up_proj: Product
    down_proj: Product


class InferenceModel:
    """A decoder's weights, ready to generate in `dtype`.

    With `pack`, matrices are copied into oneDNN's blocked layout (CPU, float32): measured 2 to 3
    times faster for 1 to 16 rows than the plain product, see docs/results/decode.md. Otherwise
    nothing is copied where the dtype is the decoder's own. `release` gives each of the decoder's
    blocks up once it has been read, so that a packed model needs its memory once.

    Attributes:
        adapters: what rows may have beside these weights; None: nothing.
    """

    adapters: LiveAdapters | None = None

    def __init__(
        self,
        decoder: Decoder,
        *,
        dtype: torch.dtype,
        max_seq_len: int,
        pack: bool,
        release: bool = False,
    ) -> None:
        self.config = config = decoder.config
        self.embed_tokens = decoder.embed_tokens.detach().to(dtype)
        self.device = self.embed_tokens.device
        self.norm = decoder.norm.detach().to(dtype)
        cos, sin = decoder.rotary(max_seq_len)
        self._cos = torch.cat((cos, cos), -1).to(dtype)[:, None]  # [max_seq_len, 1, D]
        self._sin = torch.cat((-sin, sin), -1).to(dtype)[:, None]  # signed: see `_rotate_`
        self._eps = config.rms_norm_eps
        self._heads, self._kv_heads = config.num_attention_heads, config.num_key_value_heads
        self._dim = config.head_dim
        self._head = _product(decoder.head_weight, dtype, pack)
        self._layers: list[_Layer] = []
        for block in decoder.layers:
            self._layers.append(_layer(block, dtype, pack))
            if release:
                block.to_empty(device="meta")

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 [N, V] of normalised hidden states [N, C]."""
        return self._head(hidden).float()

    def prefill(
        self,
        input_ids: Tensor,
        chunks: Sequence[Chunk],
        cache: KVCache,
        shares: tuple[Share, ...] = (),
    ) -> Tensor:
        """Normalised hidden states [N, C] of the chunks' tokens, laid end to end in `input_ids`
        int64 [N]. What precedes each chunk must be in the cache; its own part is written there.
        `shares`: the adapters of the N tokens."""
        spans = [torch.arange(c.start, c.stop, device=self.device) for c in chunks]
        masks = [_causal_mask(chunk, self.device) for chunk in chunks]

        def attend(index: int, qkv: Tensor) -> Tensor:
            return self._attend_chunks(qkv, cache.data[index], chunks, masks)

        return self._forward(input_ids, torch.cat(spans), attend, shares)

    def decode(self, input_ids: Tensor, rows: Rows, cache: KVCache) -> Tensor:
        """Normalised hidden states [N, C] of one new token per sequence, `input_ids` int64 [N]."""
        dim, heads, kv_heads = self._dim, self._heads, self._kv_heads

        def attend(index: int, qkv: Tensor) -> Tensor:
            layer = cache.data[index]  # [slots, 2 K, S, D]
            new = qkv[:, heads:].reshape(-1, dim)  # [N * 2 K, D]
            layer.view(-1, dim).index_copy_(0, rows.cache_rows, new)
            # The G heads that share keys stand as G queries of one head: no copy of the keys.
            q = qkv[:, :heads].view(len(qkv), kv_heads, -1, dim)  # [N, K, G, D]
            parts = []
            for first, last, slot, length, mask in rows.groups:
                kv = layer[slot : slot + last - first, :, :length]  # [n, 2 K, length, D]
                parts.append(
                    scaled_dot_product_attention(
                        q[first:last], kv[:, :kv_heads], kv[:, kv_heads:], attn_mask=mask
                    )
                )
            attended = parts[0] if len(parts) == 1 else torch.cat(parts)
            return attended.reshape(len(qkv), heads * dim)

        return self._forward(input_ids, rows.positions, attend, rows.shares)

    def _forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        attend: Callable[[int, Tensor], Tensor],
        shares: tuple[Share, ...],
    ) -> Tensor:
        def project(stored: str, x: Tensor) -> Tensor:
            out: Tensor = getattr(layer, stored)(x)
            for adapter, of_rows in shares:
                if (factors := adapter[index].get(stored)) is not None:
                    factors.add_to(out, x, of_rows)
            return out

        x = functional.embedding(input_ids, self.embed_tokens)  # [N, C]
        cos, sin = self._cos[positions], self._sin[positions]  # [N, 1, D]
        for index, layer in enumerate(self._layers):
            qkv = project("qkv_proj", _rms_norm(x, layer.input_norm, self._eps))
            qkv = qkv.view(len(x), -1, self._dim)  # [N, H + 2 K, D]
            self._rotate_(qkv, layer, cos, sin)
            x.add_(project("o_proj", attend(index, qkv)))
            gate_up = project("gate_up_proj", _rms_norm(x, layer.post_attention_norm, self._eps))
            gate, up = gate_up.chunk(2, dim=-1)  # [N, F] each
            x.add_(project("down_proj", functional.silu(gate).mul_(up)))
        return _rms_norm(x, self.norm, self._eps)

    def _rotate_(self, qkv: Tensor, layer: _Layer, cos: Tensor, sin: Tensor) -> None:
        """Normalise (QK-norm) and rotate the query and key heads of [N, H + 2 K, D] in place.

        Rolling by half a head swaps its halves, and the sign is in `sin`: three operations for
        queries and keys together.
        """
        rotated = qkv[:, : self._heads + self._kv_heads]  # [N, H + K, D]
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = rotated[:, : self._heads], rotated[:, self._heads :]
            q.copy_(functional.rms_norm(q, (self._dim,), layer.q_norm, self._eps))
            k.copy_(functional.rms_norm(k, (self._dim,), layer.k_norm, self._eps))
        swapped = rotated.roll(self._dim // 2, -1)
        rotated.mul_(cos).addcmul_(swapped, sin)

    def _attend_chunks(
        self, qkv: Tensor, layer: Tensor, chunks: Sequence[Chunk], masks: Sequence[Tensor | None]
    ) -> Tensor:
        kv_heads, grouped = self._kv_heads, self._heads != self._kv_heads
        out = qkv.new_empty(len(qkv), self._heads, self._dim)  # [N, H, D]
        first = 0
        for (slot, start, stop), mask in zip(chunks, masks, strict=True):
            part = qkv[first : first + stop - start].transpose(0, 1)  # [H + 2 K, T, D]
            layer[slot, :, start:stop] = part[self._heads :]
            kv = layer[slot, None, :, :stop]  # [1, 2 K, stop, D]
            attended = scaled_dot_product_attention(
                part[None, : self._heads], kv[:, :kv_heads], kv[:, kv_heads:],
                attn_mask=mask, is_causal=mask is None, enable_gqa=grouped,
            )  # fmt: skip
            out[first : first + stop - start] = attended[0].transpose(0, 1)
            first += stop - start
        return out.flatten(1)


def _layer(block: Block, dtype: torch.dtype, pack: bool) -> _Layer:
    def vector(weight: Tensor | None) -> Tensor | None:
        return None if weight is None else weight.detach().to(dtype)

    return _Layer(
        block.input_layernorm.detach().to(dtype),
        _projection(block, "qkv_proj", dtype, pack),
        vector(block.q_norm),
        vector(block.k_norm),
        _projection(block, "o_proj", dtype, pack),
        block.post_attention_layernorm.detach().to(dtype),
        _projection(block, "gate_up_proj", dtype, pack),
        _projection(block, "down_proj", dtype, pack),
    )


def _projection(block: Block, stored: str, dtype: torch.dtype, pack: bool) -> Product:
    """One of a block's stored matrices, with its adapter where it has one: that of a session, whose
    factors are read as they are at each call."""
    adapted = block.adapted.get(stored)
    if adapted is None:
        return _product(getattr(block, stored), dtype, pack)
    base = _product(adapted.base.weight(), dtype, pack)

    def product(x: Tensor) -> Tensor:
        out = base(x)
        adapted.add_to(out, x)
        return out

    return product


def _product(weight: Tensor, dtype: torch.dtype, pack: bool) -> Product:
    """x -> x weight^T."""
    weight = weight.detach().to(dtype)
    if not pack or weight.numel() < _PACKED_FROM:
        if weight.device.type == "cpu" and dtype == torch.float32:
            return lambda x: _few_rows(x, weight)
        return lambda x: functional.linear(x, weight)
    # What torch.compile's frozen CPU graphs call; eager torch has no public name for it.
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, 64)
    multiply = torch.ops.mkldnn._linear_pointwise.default

    def product(x: Tensor) -> Tensor:
        out: Tensor = multiply(x, packed, None, "none", [], "")
        return out

    return product


def _few_rows(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T; for 2 to 8 rows MKL is up to three times faster on the transposed product."""
    if 1 < len(x) <= 8:
        return torch.mm(weight, x.t()).t().contiguous()
    return products.product(x, weight)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`ops.rms_norm` of [N, C]; on a CPU in fewer kernels than torch's own composition."""
    if x.dtype != torch.float32 or x.device.type != "cpu":
        return functional.rms_norm(x, (x.shape[-1],), weight, eps)
    scale: Tensor = torch.linalg.vecdot(x, x).mul_(1 / x.shape[-1]).add_(eps).rsqrt_()
    return (x * scale[:, None]).mul_(weight)


def _causal_mask(chunk: Chunk, device: torch.device) -> Tensor | None:
    """bool [T, stop] for a chunk that has something before it; None means plain causal."""
    if chunk.start == 0:
        return None
    full = torch.ones(chunk.stop - chunk.start, chunk.stop, dtype=torch.bool, device=device)
    return full.tril(diagonal=chunk.start)
