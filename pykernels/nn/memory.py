"""Memory modules: product-key memory layers, and LM2's memory bank.

A memory layer holds what it learns in a table of values of which each token reads a few rows: parameters without FLOPs.
LM2's memory is a state, written by one call and read by the next.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor
from torch.nn import BatchNorm1d, Embedding, LayerNorm, Linear, Module, Parameter

from ..core.dtypes import is_autocast_on
from ..core.expect import (
    expect,
    expect_alike,
    expect_device,
    expect_integer,
    expect_shape,
    expect_size,
    expect_tensor,
    expect_type,
)
from ..ops.attention import MAX_HEAD_DIM, attention
from ..ops.product_key import product_key_memory
from ..ops.topk import topk_memory

_QUERY_NORMS = (None, "layer", "batch")


class MemoryLayer(Module):
    """A product-key memory with a silu gate: takes the place of, or stands beside, a feed-forward layer.

        q = norm(W_q x);  y = product_key_memory(q, keys, values, k);  out = W_o (y ∘ silu(W_g x))

    Args:
        dim: width of x and of the output.
        num_keys: sub-keys of each half, n; the table has n² rows.
        k: rows that each head reads, from 1 to num_keys.
        heads: lookups for each token, in one table; what they read is summed.
        key_dim: width of a head's query and of a product key, even; dim (or dim + 1) unless given.
        value_dim: width of the table's rows; dim, or that of `values`, unless given.
        query_norm: None; "layer", over each head's query, token by token; or "batch", over the tokens of a call for
            each of heads·key_dim channels, as in Lample et al., where it spreads the use of the keys.
        gate: with False, out = W_o y.
        values: a table to share instead of an own one: another MemoryLayer, a module with a `weight` of
            [num_keys², value_dim] (torch.nn.Embedding), or a Parameter. It stays where it is: parameters() and
            state_dict() of a model hold it once, under its owner, which has to be part of the model (and to be moved,
            initialised and loaded with it). Prefer a module to a Parameter, which load_state_dict(assign=True) and
            to_empty() replace in its owner alone.
        sparse_grad: the table's gradient is sparse, with only the rows that were used, as torch.optim.SparseAdam takes
            it; the outputs are the same, to the bit. All layers that share a table should agree. It works under
            DistributedDataParallel (where a shared table has to be a layer's or an Embedding's with sparse=True), not
            under FSDP. Not under torch.compile, and not twice differentiable.

    Parameters: query, gate, output (linear, without bias); keys [heads, 2, num_keys, key_dim/2]; values, an Embedding
    of weight [num_keys², value_dim], unless shared (`table` is the weight, whoever owns it); query_norm's own. State
    dictionaries that call the table `values` are loaded too. Keys and values start normal, with a
    standard deviation of (key_dim/2)^-0.5 and value_dim^-0.5. Values want a learning rate of their own:
    `memory_parameter_groups`.

    Inputs: x [..., dim], any leading dimensions, in the weights' dtype. Returns [..., dim].

    Under autocast the projections run in its dtype and the lookup in the weights' own: to cast the table would be to
    read all of it.

    Raises ValueError, TypeError: a size, shape, dtype or device other than these.

    Source: Berges et al., Memory Layers at Scale, 2412.09764 (there called Memory+; it normalises queries and keys for
    small models); Lample et al., Large Memory Layers with Product Keys, 1907.05242.
    """

    def __init__(
        self, dim: int, num_keys: int, k: int, heads: int, *, key_dim: int | None = None, value_dim: int | None = None,
        query_norm: str | None = "layer", gate: bool = True, values: Module | Parameter | None = None,
        sparse_grad: bool = False, device=None, dtype=None,
    ) -> None:  # fmt: skip
        super().__init__()
        dim, num_keys, heads = expect_size(dim, "dim"), expect_size(num_keys, "num_keys"), expect_size(heads, "heads")
        k = expect_integer(k, "k")
        expect(1 <= k <= num_keys, "k", "from 1 to num_keys, {num_keys}", k, num_keys=num_keys)
        key_dim = dim + dim % 2 if key_dim is None else expect_integer(key_dim, "key_dim")
        value_dim = None if value_dim is None else expect_size(value_dim, "value_dim")
        expect(key_dim >= 2 and key_dim % 2 == 0, "key_dim", "an even number, at least 2", key_dim)
        expect(query_norm in _QUERY_NORMS, "query_norm", "None, 'layer' or 'batch'", query_norm)
        self._shared = None if values is None else (values,)  # in a tuple, which is not registered
        if values is not None:
            known = isinstance(values, MemoryLayer | Parameter) or isinstance(getattr(values, "weight", None), Tensor)
            expect_type(known, "values", "a MemoryLayer, a module with a weight, or a Parameter", values)
            expect_tensor(self.table, "values", "[num_keys², value_dim]")
            rows, width = self.table.shape
            if rows != num_keys * num_keys or value_dim not in (None, width):
                wanted = "value_dim" if value_dim is None else value_dim
                expect(False, "values", f"[{num_keys * num_keys}, {wanted}]", self.table)
            value_dim = width
        value_dim = dim if value_dim is None else value_dim
        self.dim, self.num_keys, self.k, self.heads = dim, num_keys, k, heads
        self.key_dim, self.value_dim, self.sparse_grad = key_dim, value_dim, sparse_grad
        options = dict(device=device, dtype=dtype)
        self.query = Linear(dim, heads * key_dim, bias=False, **options)
        self.query_norm = None
        if query_norm == "layer":
            self.query_norm = LayerNorm(key_dim, **options)
        elif query_norm == "batch":
            self.query_norm = BatchNorm1d(heads * key_dim, **options)
        self.keys = Parameter(torch.empty(heads, 2, num_keys, key_dim // 2, **options))
        self.values = None
        if values is None:  # DistributedDataParallel expects sparse gradients of embeddings alone
            table = torch.empty(num_keys * num_keys, value_dim, **options)
            self.values = _Table(*table.shape, _weight=table, sparse=sparse_grad)
        self.register_load_state_dict_pre_hook(_rename_table)
        self.gate = Linear(dim, value_dim, bias=False, **options) if gate else None
        self.output = Linear(value_dim, dim, bias=False, **options)
        self.reset_parameters()

    @property
    def table(self) -> Parameter:
        """The values [num_keys², value_dim], whoever owns them."""
        if self._shared is None:
            return self.values.weight
        (owner,) = self._shared
        if isinstance(owner, MemoryLayer):
            return owner.table
        return owner if isinstance(owner, Parameter) else owner.weight

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """All but a shared table, which is its owner's to reset."""
        self.keys.normal_(std=self.keys.size(-1) ** -0.5)
        if self.values is not None:
            self.values.weight.normal_(std=self.value_dim**-0.5)
        for module in (self.query, self.query_norm, self.gate, self.output):
            if module is not None:
                module.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        _expect_tokens(x, self.keys, "[..., dim]")
        expect(x.dim() >= 1 and x.size(-1) == self.dim, "x", "[..., {dim}]", x, dim=self.dim)
        query = self.query(x)
        if isinstance(self.query_norm, BatchNorm1d):
            query = self.query_norm(query.reshape(-1, query.size(-1))).view(query.shape)
        query = query.unflatten(-1, (self.heads, self.key_dim))  # [..., heads, key_dim]
        if isinstance(self.query_norm, LayerNorm):
            query = self.query_norm(query)
        table = self.table
        if self.sparse_grad:
            plain = isinstance(table, Parameter) and not hasattr(table, "device_mesh")
            expect_type(plain, "sparse_grad", "False where the table is sharded, as under FSDP", table)
        on = is_autocast_on(x.device.type)
        with torch.autocast(x.device.type, enabled=False) if on else contextlib.nullcontext():
            y = product_key_memory(query.to(self.keys.dtype), self.keys, table, self.k, sparse_grad=self.sparse_grad)
        if self.gate is not None:
            y = y * torch.nn.functional.silu(self.gate(x))
        return self.output(y)

    def extra_repr(self) -> str:
        shared = "" if self._shared is None else ", shared values"
        sparse = ", sparse_grad=True" if self.sparse_grad else ""
        sizes = f"{self.dim}, num_keys={self.num_keys}, k={self.k}, heads={self.heads}"
        return f"{sizes}, key_dim={self.key_dim}, value_dim={self.value_dim}{shared}{sparse}"


class _Table(Embedding):
    def __setattr__(self, name: str, value) -> None:
        if name == "weight" and hasattr(value, "device_mesh") and self.sparse:  # from fully_shard, to which it is news
            expect_type(False, "sparse_grad", "False where the table is sharded, as under FSDP", value)
        super().__setattr__(name, value)


def memory_parameter_groups(model: Module, *, values_lr: float) -> list[dict]:
    """[the parameters of model except its memory tables, the tables]: parameter groups for torch's optimizers.

        torch.optim.AdamW(memory_parameter_groups(model, values_lr=1e-3), lr=1e-4)

    Args:
        model: has MemoryLayers (or is one).
        values_lr: the tables' learning rate. A row is updated only by the few tokens that read it, so it wants a higher
            one than the rest; nor should rows decay that nothing reads: the tables' weight_decay is 0.

    Each table is there once however many layers share it, also one whose owner is not part of the model. With
    sparse_grad, give the second group to torch.optim.SparseAdam and the first to another optimizer.
    """
    tables = {id(layer.table): layer.table for layer in model.modules() if isinstance(layer, MemoryLayer)}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in tables]
    return [dict(params=rest), dict(params=list(tables.values()), lr=values_lr, weight_decay=0.0)]


class LM2Memory(Module):
    """LM2's memory: slots that tokens read by attention, and that gates write once a call.

        Q = x W_q, K = M W_k, V = M W_v;  E = softmax(Q Kᵀ / √d) V, by heads;  out = x + σ(W_out E) ∘ E
        M' = σ(W_in x̄) ∘ tanh(Ē) + σ(W_forget Ē) ∘ M,  x̄ and Ē: x and E as a row for each slot

    Args:
        dim: width D of tokens and slots.
        num_slots: S.
        num_heads: divides dim; d = dim / num_heads, at most 256 without topk.
        topk: each token and head reads the topk slots of the highest scores only, with the softmax over them.

    Parameters: query, key, value (linear, without bias); output_gate, input_gate, forget_gate (linear; the bias of
    forget_gate starts at 1, so that the memory lasts, the others' at 0).

    Inputs: x [B, N, D] in the weights' dtype: the output of the block's self-attention; memory [B, S, D] likewise, or
    None for the initial one: slot s is the unit vector s mod D (the identity, where S = D).

    Returns (out [B, N, D], memory [B, S, D]). Gradients flow through the memory; detach it to cut them.

    State: a call is one step of the memory. Its tokens all read the memory as it came in and write it once, so a
    sequence that is split into calls is another computation than one call (as its segments are in the paper). The
    memory as it came in must stem from earlier tokens: nothing else keeps later tokens from being seen. No tokens, no
    step: N = 0 returns the memory as it came in.

    Where the paper leaves it open, or its equations do not fit together:
        The slots, there [S, D, D], are rows of width D, in which alone Q Kᵀ makes sense; so in the authors' code.
        The gated read is σ(W_out E) ∘ E. The equation has ∘ M, which has a row for each token only where N = S.
        x is both what asks and what the read is added to, as in the authors' code; the paper asks with the block's
        input and adds to its self-attention.
        Between N tokens and S slots, row s is the mean of the tokens that share its place, from ⌊sN/S⌋ to before
        ⌈(s+1)N/S⌉ (token s, where N = S). The authors' code resamples the tokens to S likewise, then demands N = S.
        No causal mask: slot j is of the past. The authors mask it from tokens before j, since they hand a block's
        memory to the next block of the same pass, where it already knows the pass's later tokens.
        With topk, weights sum to 1; the authors' code drops the others' share.
    Dropout, normalisation and the two-layer network of the authors' code, which the paper does not have, are left out.

    Raises ValueError, TypeError: a size, shape, dtype or device other than these.

    Source: Kang et al., LM2: Large Memory Models, 2502.06049.
    """

    def __init__(
        self, dim: int, num_slots: int, num_heads: int = 1, *, topk: int | None = None, device=None, dtype=None
    ) -> None:
        super().__init__()
        dim, num_slots = expect_size(dim, "dim"), expect_size(num_slots, "num_slots")
        num_heads = expect_integer(num_heads, "num_heads")
        expect(num_heads >= 1 and dim % num_heads == 0, "num_heads", "a divisor of dim {dim}", num_heads, dim=dim)
        narrow = topk is not None or dim // num_heads <= MAX_HEAD_DIM
        expect(narrow, "num_heads", "heads of at most {widest} channels, or topk", num_heads, widest=MAX_HEAD_DIM)
        topk = None if topk is None else expect_integer(topk, "topk")
        inside = topk is None or 1 <= topk <= num_slots
        expect(inside, "topk", "None or from 1 to num_slots, {num_slots}", topk, num_slots=num_slots)
        self.dim, self.num_slots, self.num_heads, self.topk = dim, num_slots, num_heads, topk
        options = dict(device=device, dtype=dtype)
        self.query = Linear(dim, dim, bias=False, **options)
        self.key = Linear(dim, dim, bias=False, **options)
        self.value = Linear(dim, dim, bias=False, **options)
        self.output_gate = Linear(dim, dim, **options)
        self.input_gate = Linear(dim, dim, **options)
        self.forget_gate = Linear(dim, dim, **options)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for module in self.children():
            module.reset_parameters()
        for gate, bias in ((self.output_gate, 0), (self.input_gate, 0), (self.forget_gate, 1)):
            gate.bias.fill_(bias)

    def initial_memory(self, batch_size: int) -> Tensor:
        """[batch_size, S, D] in the weights' dtype, not to be written to."""
        weight = self.query.weight
        slot = torch.arange(self.num_slots, device=weight.device)
        channel = torch.arange(self.dim, device=weight.device)
        memory = (slot[:, None] % self.dim == channel).to(weight.dtype)
        return memory.expand(batch_size, -1, -1)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> tuple[Tensor, Tensor]:
        weight = self.query.weight
        _expect_tokens(x, weight, "[B, N, D]")
        expect_tensor(x, "x", "[B, N, D]")
        expect(x.size(2) == self.dim, "x", "[B, N, {dim}]", x, dim=self.dim)
        if memory is None:
            memory = self.initial_memory(x.size(0))
        else:
            expect_tensor(memory, "memory", "[B, S, D]")
            B = x.size(0)
            expect_shape(memory, "memory", (B, self.num_slots, self.dim), "x")
            expect_alike(memory, "memory", weight, "the weight")
        if x.size(1) == 0:
            return x.clone(), memory
        read = self._read(x, memory)  # [B, N, D]
        out = x + self.output_gate(read).sigmoid() * read
        x, read = _rows_for(x, self.num_slots), _rows_for(read, self.num_slots)  # [B, S, D]
        kept = self.forget_gate(read).sigmoid() * memory
        return out, self.input_gate(x).sigmoid() * read.tanh() + kept

    def _read(self, x: Tensor, memory: Tensor) -> Tensor:
        split = (self.num_heads, self.dim // self.num_heads)
        q, k, v = self.query(x), self.key(memory), self.value(memory)
        q, k, v = (rows.unflatten(2, split).transpose(1, 2) for rows in (q, k, v))  # [B, heads, N or S, d]
        if self.topk is None:
            read = attention(q, k, v)
        else:
            queries = q.flatten(0, 1).transpose(0, 1)  # [N, B·heads, d]
            scale = split[1] ** -0.5
            read = topk_memory(queries, k.flatten(0, 1), v.flatten(0, 1), self.topk, scale=scale)
            read = read.transpose(0, 1).unflatten(0, q.shape[:2])
        return read.transpose(1, 2).flatten(2)

    def extra_repr(self) -> str:
        topk = "" if self.topk is None else f", topk={self.topk}"
        return f"{self.dim}, num_slots={self.num_slots}, num_heads={self.num_heads}{topk}"


def _rows_for(tokens: Tensor, slots: int) -> Tensor:
    """The means of S stretches of N tokens [B, N, D] → [B, S, D], as torch's adaptive_avg_pool1d over N has them, whose
    gradient is not deterministic on a GPU."""
    N = tokens.size(1)
    if not torch.compiler.is_compiling() and slots == N:  # a trace would be of other lengths alone
        return tokens
    slot, token = torch.arange(slots, device=tokens.device), torch.arange(N, device=tokens.device)
    first, last = slot * N // slots, ((slot + 1) * N + slots - 1) // slots
    share = (first[:, None] <= token) & (token < last[:, None])
    return (share.to(tokens.dtype) / (last - first)[:, None]) @ tokens


def _expect_tokens(x: Tensor, weight: Tensor, layout: str) -> None:
    expect_type(isinstance(x, Tensor), "x", "a tensor {layout}", x, layout=layout)
    alike = x.dtype == weight.dtype or (x.is_floating_point() and is_autocast_on(x.device.type))
    expect_type(alike, "x", "the weights' {dtype}", x, dtype=weight.dtype)
    expect_device(x, "x", weight, "the weight")


def _rename_table(module, state_dict, prefix, *_) -> None:
    """The table was a parameter of the layer itself before it was an Embedding's."""
    if prefix + "values" in state_dict:
        state_dict.setdefault(prefix + "values.weight", state_dict.pop(prefix + "values"))
