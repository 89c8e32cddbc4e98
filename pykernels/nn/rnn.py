"""LSTM, GRU, RNN and their cells: torch.nn's, with the forward pass of pykernels.

Constructors, parameters, initialisation and state_dict are torch's own. The layers derive from RNNBase, not from
torch.nn.LSTM and so on, because torch.compile refuses whatever is an instance of those.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ..core.dtypes import is_autocast_on
from ..core.expect import can_read, expect, expect_type
from ..ops import rnn as ops

State = Tensor | tuple[Tensor, Tensor]


def _expect_dense(value, name: str) -> None:
    """A tensor whose dim() can be asked for: whatever else is wrong with it is found later, in torch's words."""
    expect_type(isinstance(value, Tensor), name, "a tensor", value)
    if value.is_nested or value.layout is not torch.strided:
        kind = "nested" if value.is_nested else value.layout
        raise TypeError(f"{name}: expected a dense tensor, got a {kind} one")


def _parts(hx, pair: bool) -> tuple[Tensor, ...]:
    """(h, c) of an LSTM, else (h,)."""
    if not pair:
        _expect_dense(hx, "hx")
        return (hx,)
    expect_type(isinstance(hx, tuple | list), "hx", "a tuple (h, c)", hx)
    if len(hx) != 2:
        count = len(hx)
        expect(False, "hx", "two tensors (h, c)", count)
    _expect_dense(hx[0], "hx[0]")
    _expect_dense(hx[1], "hx[1]")
    return tuple(hx)


class _Layers(torch.nn.RNNBase):
    """Layers and directions of a one-layer function, which a subclass gives as `_layer`."""

    def forward(self, input: Tensor | PackedSequence, hx: State | None = None):
        expect_type(isinstance(input, Tensor | PackedSequence), "input", "a tensor or a PackedSequence", input)
        packed, batched = isinstance(input, PackedSequence), True
        batch_sizes = sorted_indices = unsorted_indices = None
        if packed:
            input, batch_sizes, sorted_indices, unsorted_indices = input
            if batch_sizes.dtype != torch.int64:
                raise RuntimeError(
                    f"{type(self).__name__}: torch.export makes up what pack_padded_sequence returns: pack outside of "
                    "what is exported, or give lengths to pykernels.lstm, gru or rnn"
                )
        _expect_dense(input, "input")
        if not packed and input.dim() == 2:
            batched, input = False, input.unsqueeze(1)
        elif not packed and input.dim() != 3:
            raise ValueError(f"{type(self).__name__}: Expected input to be 2D or 3D, got {input.dim()}D instead")
        elif self.batch_first and not packed:
            input = input.transpose(0, 1)
        dtype = self.weight_ih_l0.dtype  # check_input, whose errors these are, may look at a parameter since replaced
        if input.dtype != dtype and not is_autocast_on(input.device.type):
            raise ValueError(f"RNN input dtype ({input.dtype}) does not match weight dtype ({dtype})")
        if (got := input.size(-1)) != self.input_size:
            raise RuntimeError(f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {got}")

        lstm, directions = self.mode == "LSTM", 2 if self.bidirectional else 1
        before, after, outputs = [None] * (self.num_layers * directions), [], []
        if hx is not None:
            states = self._check_state(hx, input, batch_sizes, batched)
            if not batched:
                states = [s.unsqueeze(1) for s in states]
            elif sorted_indices is not None:
                states = [s.index_select(1, sorted_indices) for s in states]
            before = list(zip(*states)) if lstm else list(states[0])
        for place, weights in enumerate(self.all_weights):
            if place and place % directions == 0:
                input, outputs = _join(outputs, self.dropout if self.training else 0.0), []
            options = dict(reverse=place % directions == 1, batch_sizes=batch_sizes)
            output, state = self._layer(input, before[place], *weights, **options)
            outputs.append(output)
            after.append(state)
        output, final = _join(outputs), [torch.stack(parts) for parts in (zip(*after) if lstm else (after,))]

        if packed:
            output = PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices)
            if unsorted_indices is not None:
                final = [s.index_select(1, unsorted_indices) for s in final]
        elif not batched:
            output, final = output.squeeze(1), [s.squeeze(1) for s in final]
        elif self.batch_first:
            output = output.transpose(0, 1)
        return output, tuple(final) if lstm else final[0]

    def _check_state(self, hx, input, batch_sizes, batched) -> tuple[Tensor, ...]:
        """(h, c) or (h,), of the shapes and with the errors of torch's check_hidden_size."""
        hx = _parts(hx, self.mode == "LSTM")
        kind, rank = ("batched", 3) if batched else ("unbatched", 2)
        if any(s.dim() != rank for s in hx):
            got = ", ".join(f"{s.dim()}-D" for s in hx)
            raise RuntimeError(f"For {kind} {rank}-D input, hx should also be {rank}-D but got {got} tensors")
        B = [input.size(1)] if batched else []
        if batch_sizes is not None:  # while tracing, their sum has to do
            B = [int(batch_sizes[0]) if can_read(batch_sizes) else hx[0].size(1)]
        for i, (s, width) in enumerate(zip(hx, (self.proj_size or self.hidden_size, self.hidden_size))):
            expected = (self.num_layers * (2 if self.bidirectional else 1), *B, width)
            if s.shape != expected:
                name = f"hidden[{i}]" if self.mode == "LSTM" else "hidden"
                raise RuntimeError(f"Expected {name} size {expected}, got {list(s.shape)}")
        return hx


def _join(outputs: list[Tensor], dropout: float = 0.0) -> Tensor:
    """What comes after a layer reads of its directions' outputs."""
    output = torch.cat(outputs, -1) if len(outputs) > 1 else outputs[0]
    return torch.dropout(output, dropout, True) if dropout else output


class LSTM(_Layers):
    """Layers of a long short-term memory: torch.nn.LSTM, on `pykernels.lstm`.

    Args, parameters, inputs and results as torch.nn.LSTM's: input [T, B, I] ([B, T, I] with batch_first, [T, I]
    unbatched, or a PackedSequence), hx is (h_0, c_0) or None, returns (output, (h_n, c_n)).

    Differences: it compiles without a graph break, can be differentiated twice, and is not an instance of
    torch.nn.LSTM (of torch.nn.RNNBase it is). torch.export cannot trace pack_padded_sequence, so a module that packs
    within itself is exported with `pykernels.lstm` and lengths. Of packed input without hx the batch size is data:
    torch.compile traces that with fullgraph=True, and breaks its graph there without.
    """

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True, batch_first: bool = False,
        dropout: float = 0.0, bidirectional: bool = False, proj_size: int = 0, device=None, dtype=None,
    ) -> None:  # fmt: skip
        options = (num_layers, bias, batch_first, dropout, bidirectional, proj_size, device, dtype)
        super().__init__("LSTM", input_size, hidden_size, *options)

    def _layer(self, input, hx, *weights, **options):
        if self.proj_size:
            *weights, options["weight_hr"] = weights
        return ops.lstm(input, hx, *weights, **options)


class GRU(_Layers):
    """Layers of gated recurrent units: torch.nn.GRU, on `pykernels.gru`.

    Args, parameters, inputs and results as torch.nn.GRU's; hx is h_0 or None, returns (output, h_n).
    Differences: as `LSTM`.
    """

    _layer = staticmethod(ops.gru)

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True, batch_first: bool = False,
        dropout: float = 0.0, bidirectional: bool = False, device=None, dtype=None,
    ) -> None:  # fmt: skip
        options = (num_layers, bias, batch_first, dropout, bidirectional, 0, device, dtype)
        super().__init__("GRU", input_size, hidden_size, *options)


class RNN(_Layers):
    """Layers of an Elman RNN: torch.nn.RNN, on `pykernels.rnn`.

    Args, parameters, inputs and results as torch.nn.RNN's, nonlinearity "tanh" or "relu"; hx is h_0 or None,
    returns (output, h_n). Differences: as `LSTM`.
    """

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, nonlinearity: str = "tanh", bias: bool = True,
        batch_first: bool = False, dropout: float = 0.0, bidirectional: bool = False, device=None, dtype=None,
    ) -> None:  # fmt: skip
        expect(nonlinearity in ("tanh", "relu"), "nonlinearity", "'tanh' or 'relu'", nonlinearity)
        self.nonlinearity = nonlinearity
        options = (num_layers, bias, batch_first, dropout, bidirectional, 0, device, dtype)
        super().__init__(f"RNN_{nonlinearity.upper()}", input_size, hidden_size, *options)

    def _layer(self, input, hx, *weights, **options):
        return ops.rnn(input, hx, *weights, nonlinearity=self.nonlinearity, **options)


class _Cell:
    """The forward pass of torch.nn's cells on a step function, which a subclass gives as `_step`."""

    def forward(self, input: Tensor, hx: State | None = None) -> State:
        pair = isinstance(self, torch.nn.LSTMCell)
        _expect_dense(input, "input")
        if hx is None:
            zeros = input.new_zeros(*input.shape[:-1], self.hidden_size)
            hx = (zeros, zeros) if pair else zeros
        parts = _parts(hx, pair)
        for name, value in zip(("input", *(("hx[0]", "hx[1]") if pair else ("hidden",))), (input, *parts)):
            if value.dim() not in (1, 2):
                raise ValueError(f"{type(self).__name__}: Expected {name} to be 1D or 2D, got {value.dim()}D instead")
        if input.dim() == 2:
            return self._step(input, hx)
        state = self._step(input.unsqueeze(0), tuple(s.unsqueeze(0) for s in parts) if pair else hx.unsqueeze(0))
        return tuple(s.squeeze(0) for s in state) if pair else state.squeeze(0)


class LSTMCell(_Cell, torch.nn.LSTMCell):
    """A step of a long short-term memory: torch.nn.LSTMCell, on `pykernels.lstm_step`.

    Args, parameters and results as torch.nn.LSTMCell's: input [B, I] or [I], hx is (h, c) or None; returns (h', c').
    """

    def _step(self, input, hx):
        return ops.lstm_step(input, hx, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)


class GRUCell(_Cell, torch.nn.GRUCell):
    """A step of a gated recurrent unit: torch.nn.GRUCell, on `pykernels.gru_step`.

    Args, parameters, inputs and results as torch.nn.GRUCell's: input [B, I] or [I], hx is h or None, returns h'.
    """

    def _step(self, input, hx):
        return ops.gru_step(input, hx, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)


class RNNCell(_Cell, torch.nn.RNNCell):
    """A step of an Elman RNN: torch.nn.RNNCell, on `pykernels.rnn_step`.

    Args, parameters, inputs and results as torch.nn.RNNCell's, nonlinearity "tanh" or "relu"; input [B, I] or [I],
    hx is h or None, returns h'.
    """

    def _step(self, input, hx):
        weights = (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        return ops.rnn_step(input, hx, *weights, self.nonlinearity)
