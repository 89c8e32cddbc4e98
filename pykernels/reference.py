"""The references: pure PyTorch, any floating dtype, differentiable, each under its op's own name and signature."""

from .core.declaration import reference_of
from .ops import attention as _attention
from .ops import product_key as _product_key
from .ops import rnn as _rnn
from .ops import topk as _topk
from .ops import weighted_gather as _weighted_gather
from .ops import wkv as _wkv
from .ops import wkv4 as _wkv4

attention = reference_of(_attention.attention)
decode_attention = reference_of(_attention.decode_attention)
gru = reference_of(_rnn.gru)
gru_step = reference_of(_rnn.gru_step)
lstm = reference_of(_rnn.lstm)
lstm_step = reference_of(_rnn.lstm_step)
product_key_memory = reference_of(_product_key.product_key_memory)
product_key_search = reference_of(_product_key.product_key_search)
rnn = reference_of(_rnn.rnn)
rnn_step = reference_of(_rnn.rnn_step)
scaled_dot_product_attention = reference_of(_attention.scaled_dot_product_attention)
topk_memory = reference_of(_topk.topk_memory)
topk_search = reference_of(_topk.topk_search)
varlen_attention = reference_of(_attention.varlen_attention)
weighted_gather = reference_of(_weighted_gather.weighted_gather)
wkv4 = reference_of(_wkv4.wkv4)
wkv6 = reference_of(_wkv.wkv6)
wkv7 = reference_of(_wkv.wkv7)

__all__ = [
    "attention",
    "decode_attention",
    "gru",
    "gru_step",
    "lstm",
    "lstm_step",
    "product_key_memory",
    "product_key_search",
    "rnn",
    "rnn_step",
    "scaled_dot_product_attention",
    "topk_memory",
    "topk_search",
    "varlen_attention",
    "weighted_gather",
    "wkv4",
    "wkv6",
    "wkv7",
]
