"""Bytes a training session takes, counted from the shapes that `model` and `ops` keep.

`tests/backends/torch/test_memory.py` compares these with a measured session.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import torch

from solollm.adapters import AdapterOptions, adapter_table
from solollm.architecture import ModelConfig, parameter_table
from solollm.backend import ComputeDType, MemoryCosts, SessionOptions
from solollm.config import OptimizerTable
from solollm.state_bytes import optimizer_bytes, weight_bytes
from solollm_torch.gradients import DTYPES, gradient_dtype
from solollm_torch.kept_mappings import compiler
from solollm_torch.loss import chunk_rows
from solollm_torch.masters import master_option
from solollm_torch.optim import MUON_BATCH_ELEMENTS
from solollm_torch.products import OUTER_ELEMENTS, rule

CUDA_CONTEXT_BYTES = 600 * 2**20
# The interpreter and PyTorch's libraries, of which a build for cards brings more.
CPU_PROCESS_BYTES = (400 if torch.version.cuda is None else 510) * 2**20
CPU_FIRST_USE_BYTES = 60 * 2**20  # of those, what is not there before the first step
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # per weight: a code, its block's 8-bit magnitude
HEAP_LOSS = 0.08  # of the activations that blocks keep, in the C library's heap
MUON_SCRATCH_COPIES = 5  # of one batch of matrices: the iteration's products and their inputs


def memory_costs(
    model: ModelConfig, options: SessionOptions, compute_dtype: ComputeDType, device: torch.device
) -> MemoryCosts:
    """Coefficients of `solollm.backend.MemoryCosts` for a session on `device`."""
    item = 4 if compute_dtype == "float32" else 2
    kept, passing, ends = _bytes_per_token(model, item)
    compiled = _is_compiled(options, device)
    if compiled:
        kept += _rotated_bytes_per_token(model, item)
    residual = model.hidden_size * item
    fixed = CPU_PROCESS_BYTES if device.type == "cpu" else CUDA_CONTEXT_BYTES
    if options.optimizer.name == "muon":
        fixed += MUON_SCRATCH_COPIES * 4 * _scratch_elements(model, device)
    fixed += _outer_bytes(model, options, compute_dtype, device)
    head_bytes = 4 * model.vocab_size * model.hidden_size  # the embedding's gradient, for a moment
    chunk_bytes = chunk_rows(model.vocab_size, device) * model.vocab_size
    chunk_bytes *= 4 if compute_dtype == "float32" else 8  # bf16: widened, narrowed; compiled: less
    state = resident_bytes(model, options, compute_dtype)
    lost, lost_again = _lost_per_token(model, item, kept, device)
    return MemoryCosts(
        fixed_bytes=fixed,
        per_parameter_bytes=sum(state.values()) / model.num_parameters(),
        per_token_bytes=model.num_hidden_layers * kept + passing + ends,
        per_token_checkpointed_bytes=model.num_hidden_layers * residual + kept + passing + ends,
        loss_chunk_bytes=max(chunk_bytes, head_bytes),
        state_bytes=state,
        allocator_per_token_bytes=lost,
        allocator_per_token_checkpointed_bytes=lost_again,
        cast_bytes=_cast_bytes(model, options, compute_dtype) if compiled else 0,
        update_dtype=_update_dtype(options),
    )


def _scratch_elements(model: ModelConfig, device: torch.device) -> int:
    """Of one of Muon's scratch matrices, beside what lies there when activations are alive. A card,
    and the C library's heap, make the larger ones of what the activations have given back; kept
    mappings have sizes of their own."""
    if device.type != "cpu":
        return MUON_BATCH_ELEMENTS
    if compiler() is None:
        return 0
    of_shape: Counter[tuple[int, ...]] = Counter(
        spec.shape for spec in parameter_table(model) if spec.group == "matrix"
    )
    sizes = ((math.prod(shape), count) for shape, count in of_shape.items())
    return max(size * min(count, max(1, MUON_BATCH_ELEMENTS // size)) for size, count in sizes)


def _outer_bytes(
    model: ModelConfig, options: SessionOptions, compute_dtype: ComputeDType, device: torch.device
) -> int:
    """Of the weights' gradients where a product cannot add to them on the way (`products`). Kept
    mappings have sizes of their own."""
    if device.type != "cpu" or compute_dtype != "float32" or options.adapter is not None:
        return 0
    if not rule().outer:
        return 0
    heads = model.num_attention_heads + 2 * model.num_key_value_heads
    queries, inter = model.num_attention_heads * model.head_dim, model.intermediate_size
    rows = {heads * model.head_dim, queries, 2 * inter, inter, model.vocab_size}
    return sum(4 * min(OUTER_ELEMENTS, size * model.hidden_size) for size in rows)


def _is_compiled(options: SessionOptions, device: torch.device) -> bool:
    """As `compiling.should_compile` decides where a compiler is, which a plan for another machine
    takes for granted."""
    if options.adapter is not None:  # whose blocks never are
        return False
    setting = str(options.backend_options.get("compile", "auto")).lower()
    return setting == "true" or (setting == "auto" and device.type == "cuda")


def _rotated_bytes_per_token(model: ModelConfig, item: int) -> int:
    """Of a compiled block. Ours rotates queries and keys where the projection has put them; the
    compiler keeps them rotated elsewhere, and the projection for its values."""
    return item * (model.num_attention_heads + model.num_key_value_heads) * model.head_dim


def _cast_bytes(model: ModelConfig, options: SessionOptions, compute_dtype: ComputeDType) -> int:
    """The blocks' matrices once more, where masters are wider than the arithmetic (`narrowed`). Our
    own products narrow them when they need them, and again for the backward pass."""
    if compute_dtype == "float32":
        return 0
    if master_option(options.backend_options, "float32") != "float32":
        return 0
    return 2 * sum(math.prod(s.shape) for s in parameter_table(model) if s.group == "matrix")


def _update_dtype(options: SessionOptions) -> ComputeDType:
    asked = options.backend_options.get("newton_schulz")
    return "bfloat16" if asked == "bfloat16" else "float32"


def _lost_per_token(
    model: ModelConfig, item: int, kept: int, device: torch.device
) -> tuple[float, float]:
    """What a processor's allocator holds beside what is alive at the peak, without and with
    recomputing. Mappings are kept by size (`kept_mappings`): the gradient of the joint projection
    has a size of its own, and is not alive when SwiGLU's are. Without a C++ compiler there is the C
    library's heap, as fitted to its peaks: with recomputing a block's output lands in the hole that
    its temporaries leave, and the next block's largest one no longer fits there."""
    if device.type != "cpu":
        return 0.0, 0.0
    if compiler() is not None:
        heads = model.num_attention_heads + 2 * model.num_key_value_heads
        projection = float(heads * model.head_dim * item)
        return projection, projection
    layers, residual = model.num_hidden_layers, model.hidden_size * item
    largest = 2 * model.intermediate_size * item
    return HEAP_LOSS * layers * kept, max(0.0, (layers - 2.0) * (largest - residual))


def sharded_costs(
    costs: MemoryCosts,
    model: ModelConfig,
    compute_dtype: ComputeDType,
    *,
    world_size: int,
    on_host: bool,
) -> MemoryCosts:
    """The costs of a resident session turned into those of one rank under FSDP2: its share of the
    state, in the host's memory beside a card if `on_host`, and what is put together at once."""
    item = 4 if compute_dtype == "float32" else 2
    block = sum(
        math.prod(spec.shape) for spec in parameter_table(model) if ".layers.0." in spec.name
    )
    root = model.num_parameters() - model.num_hidden_layers * block
    # The root's and two blocks' weights; their gradients, once more to be reduced, and the head's.
    together = (item + item + 4) * (root + 2 * block) + 4 * model.vocab_size * model.hidden_size
    share = {name: size // world_size for name, size in costs.state_bytes.items()}
    own = {} if on_host else share
    return replace(
        costs,
        per_parameter_bytes=sum(share.values()) / model.num_parameters(),
        state_bytes={**own, "put together": together},
        cast_bytes=0,  # they are put together narrow
        host_bytes=share if on_host else {},
    )


def resident_bytes(
    model: ModelConfig, options: SessionOptions, compute_dtype: ComputeDType
) -> dict[str, int]:
    """The tensors of a session that holds everything on its device: exact, by what they are."""
    if options.adapter is not None:
        return adapter_bytes(model, options.adapter, options.optimizer, DTYPES[compute_dtype])
    given, state = options.backend_options, {}
    master = master_option(given, "float32")
    state["weights"] = weight_bytes(model, 4 if master == "float32" else 2)
    if master == "split":
        state["residuals"] = weight_bytes(model, 2)
    gradients = gradient_dtype(given, master, DTYPES[compute_dtype])
    state["gradients"] = weight_bytes(model, gradients.itemsize)
    state["optimizer"] = optimizer_bytes(model, options.optimizer)
    return state


def adapter_bytes(
    model: ModelConfig, adapter: AdapterOptions, table: OptimizerTable, compute: torch.dtype
) -> dict[str, int]:
    """The same of an adapter session: a frozen base in the compute dtype or in NF4 codes; factors,
    their gradients and moments in fp32."""
    item = compute.itemsize
    sizes = {spec.name: math.prod(spec.shape) for spec in parameter_table(model)}
    matrices = sum(n for name, n in sizes.items() if name.endswith("_proj.weight"))
    others = sum(sizes.values()) - matrices
    base = item * matrices if adapter.base_bits is None else int(NF4_BYTES * matrices)
    factors = sum(math.prod(spec.shape) for spec in adapter_table(model, adapter))
    widest = model.hidden_size * max(2 * model.intermediate_size, model.hidden_size)
    decoded = item * widest if adapter.base_bits else 0  # of one stored matrix, while it is used
    return {
        "frozen base": base + item * others + decoded,
        "adapter": 4 * factors,
        "gradients": 4 * factors,
        "optimizer": optimizer_bytes(model, table, adapter),
    }


def _bytes_per_token(model: ModelConfig, item: int) -> tuple[int, int, int]:
    """Of a block kept for backward, passing through its backward, and outside of the blocks."""
    hidden, inter = model.hidden_size, model.intermediate_size
    queries = model.num_attention_heads * model.head_dim
    keys = model.num_key_value_heads * model.head_dim
    # Two residual streams and their normalised forms; q, k, v and the attention's output; gate, up
    # and their product; in fp32 each norm's scale and each head's log-sum.
    kept = item * (4 * hidden + 2 * queries + 2 * keys + 3 * inter)
    kept += 4 * (model.num_attention_heads + 2)
    if model.qk_norm:
        kept += item * (queries + keys)  # before and after the norm
    passing = item * (hidden + 3 * inter)  # gradients of the residual, of gate and up, one product
    ends = 3 * item * hidden + 32  # final norm, its output and gradient; ids and labels
    return kept, passing, ends
