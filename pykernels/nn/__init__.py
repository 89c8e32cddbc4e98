"""Modules over the ops, with the names, constructors and parameters of torch.nn's or of the published models."""

from .memory import LM2Memory, MemoryLayer, memory_parameter_groups
from .rnn import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
from .rwkv import RWKV4ChannelMix, RWKV4TimeMix

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "GRUCell",
    "LM2Memory",
    "LSTMCell",
    "MemoryLayer",
    "RNNCell",
    "RWKV4ChannelMix",
    "RWKV4TimeMix",
    "memory_parameter_groups",
]
