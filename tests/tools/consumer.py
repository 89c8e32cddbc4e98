"""Code of somebody who uses the package, for the type checker; nothing runs it. Every public function is called."""

import torch
from torch import Tensor

import pykernels as pk

x: Tensor = torch.empty(2, 3)
index: Tensor = torch.empty(2, 3, dtype=torch.int64)

names: list[str] = pk.list_ops()
reasons: dict[str, str | None] = pk.available_backends("attention")
pk.verify_on_first_use(False)

# Attention: a result with its log-sum-exp is a pair
attended: Tensor | tuple[Tensor, Tensor] = pk.attention(x, x, x, causal=True, window=(4, None), scale=0.5)
packed: Tensor | tuple[Tensor, Tensor] = pk.varlen_attention(x, x, x, index, causal=True, return_lse=True)
decoded: Tensor = pk.decode_attention(x, x, x, index, window=(4, None))
as_torch: Tensor = pk.scaled_dot_product_attention(x, x, x, is_causal=True, enable_gqa=True)

# Recurrent layers and their steps
gru: tuple[Tensor, Tensor] = pk.gru(x, None, x, x, x, x, reverse=True, lengths=index)
rnn: tuple[Tensor, Tensor] = pk.rnn(x, x, x, x, nonlinearity="relu", resets=index)
lstm: tuple[Tensor, tuple[Tensor, Tensor]] = pk.lstm(x, (x, x), x, x, weight_hr=x)
gru_step: Tensor = pk.gru_step(x, x, x, x)
rnn_step: Tensor = pk.rnn_step(x, x, x, x, nonlinearity="relu")
lstm_step: tuple[Tensor, Tensor] = pk.lstm_step(x, (x, x), x, x)

# RWKV
decay: Tensor = pk.log_decay(x, "exp")
wkv4: tuple[Tensor, Tensor] = pk.wkv4(w=x, u=x, k=x, v=x)
wkv6: tuple[Tensor, Tensor] = pk.wkv6(r=x, k=x, v=x, w=x, u=x, state=x, scale=0.5)
wkv7: tuple[Tensor, Tensor] = pk.wkv7(r=x, w=x, k=x, v=x, a=x, b=x)

# Memory: a result with its weights is a triple
found: tuple[Tensor, Tensor] = pk.topk_search(x, x, 4, scale=0.5)
looked_up: Tensor | tuple[Tensor, Tensor, Tensor] = pk.topk_memory(x, x, x, 4, return_weights=True)
product_found: tuple[Tensor, Tensor] = pk.product_key_search(x, x, 4)
product_read: Tensor | tuple[Tensor, Tensor, Tensor] = pk.product_key_memory(x, x, x, 4, sparse_grad=True)
gathered: Tensor = pk.weighted_gather(x, index, x, sparse_grad=True)

# References have the signatures of their ops
with pk.use_backend("reference"):
    same: tuple[Tensor, tuple[Tensor, Tensor]] = pk.reference.lstm(x, None, x, x)

# Modules
layers: list[torch.nn.Module] = [
    pk.nn.LSTM(4, 8, num_layers=2, proj_size=2),
    pk.nn.GRU(4, 8, bidirectional=True),
    pk.nn.RNN(4, 8, nonlinearity="relu"),
    pk.nn.LSTMCell(4, 8),
    pk.nn.GRUCell(4, 8),
    pk.nn.RNNCell(4, 8),
    pk.nn.RWKV4TimeMix(8),
    pk.nn.RWKV4ChannelMix(8, dim_ffn=16),
    pk.nn.MemoryLayer(8, 16, 4, 2, gate=False),
    pk.nn.LM2Memory(8, 4, topk=2),
]
