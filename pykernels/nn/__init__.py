"""Modules over the ops, with the names, constructors and parameters of torch.nn's or of the published models."""

from .rnn import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
from .rwkv import RWKV4ChannelMix, RWKV4TimeMix

__all__ = ["GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "RNNCell", "RWKV4ChannelMix", "RWKV4TimeMix"]
