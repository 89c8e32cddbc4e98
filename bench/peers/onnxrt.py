"""onnxruntime's LSTM and GRU nodes, for inference in fp32 on the CPU, with as many threads as torch.

A session holds its weights, so it is made once for each set of them; inputs and outputs are shared, not copied.
"""

import functools
import importlib

import torch

NAME = "onnxruntime"


def missing() -> str | None:
    for name in ("onnxruntime", "onnx"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            return f"{name} cannot be imported ({error}): pip install onnx onnxruntime"
    return None


def lstm(input, hx, weight_ih, weight_hh, bias_ih=None, bias_hh=None, *, weight_hr=None, **options):
    if weight_hr is not None:
        raise NotImplementedError("an ONNX LSTM has no projection")
    output, *final = _run("LSTM", input, hx, (weight_ih, weight_hh, bias_ih, bias_hh), **options)
    return output, tuple(final)


def gru(input, hx, weight_ih, weight_hh, bias_ih=None, bias_hh=None, **options):
    return _run("GRU", input, hx if hx is None else (hx,), (weight_ih, weight_hh, bias_ih, bias_hh), **options)


def _run(kind, input, hx, weights, *, reverse=False, lengths=None, resets=None, batch_sizes=None):
    if resets is not None or batch_sizes is not None:
        raise NotImplementedError(f"an ONNX {kind} has no {'resets' if batch_sizes is None else 'packed sequences'}")
    tensors = [input, *(hx or ()), *weights]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise NotImplementedError("onnxruntime computes no gradients here")
    if input.dtype != torch.float32 or input.device.type != "cpu":
        raise NotImplementedError("its CPU kernels of these nodes are fp32 alone")
    if 0 in input.shape or (lengths is not None and int(lengths.min()) < 1):
        raise NotImplementedError("it takes no empty input, and returns zeros as the state of an empty sequence")
    H = weights[1].size(1)
    key = tuple(_Same(w) for w in weights)
    session = _session(kind, key, reverse, lengths is not None, torch.get_num_threads())
    feeds = {"X": input.detach().contiguous()}
    if lengths is not None:
        feeds["lengths"] = lengths.int()
    for name, place in (("h0", 0), ("c0", 1))[: 2 if kind == "LSTM" else 1]:
        feeds[name] = (input.new_zeros(input.size(1), H) if hx is None else hx[place].detach())[None].contiguous()
    output, *final = session.run(None, {name: value.numpy() for name, value in feeds.items()})
    return torch.from_numpy(output)[:, 0], *(torch.from_numpy(s)[0] for s in final)


class _Same:
    """A weight as a key: the same tensor, unchanged since."""

    def __init__(self, tensor):
        self.tensor, self.version = tensor, None if tensor is None else tensor._version

    def __hash__(self):
        return hash((id(self.tensor), self.version))

    def __eq__(self, other):
        return self.tensor is other.tensor and self.version == other.version


@functools.lru_cache(maxsize=4)
def _session(kind, weights, reverse, ragged, threads):
    import onnx
    import onnxruntime
    from onnx import helper, numpy_helper

    order = (0, 3, 1, 2) if kind == "LSTM" else (1, 0, 2)  # torch's i f g o to i o f c, r z n to z r h

    def reordered(w):
        chunks = w.detach().chunk(len(order))
        return torch.cat([chunks[place] for place in order])

    weight_ih, weight_hh, bias_ih, bias_hh = (None if w.tensor is None else reordered(w.tensor) for w in weights)
    values = {"W": weight_ih, "R": weight_hh}
    if bias_ih is not None:
        values["B"] = torch.cat([bias_ih, bias_hh])
    names = ["X", "W", "R", "B" if "B" in values else "", "lengths" if ragged else "", "h0"]
    results = ["Y", "h_n"]
    if kind == "LSTM":
        names, results = [*names, "c0"], [*results, "c_n"]
    options = dict(hidden_size=weight_hh.size(1), direction="reverse" if reverse else "forward")
    if kind == "GRU":
        options["linear_before_reset"] = 1
    node = helper.make_node(kind, names, results, **options)

    def declare(name):
        element = onnx.TensorProto.INT32 if name == "lengths" else onnx.TensorProto.FLOAT
        return helper.make_tensor_value_info(name, element, [None] * {"Y": 4, "lengths": 1}.get(name, 3))

    inputs = [name for name in names if name and name not in values]
    constants = [numpy_helper.from_array(value[None].numpy(), name) for name, value in values.items()]
    graph = helper.make_graph([node], kind, [*map(declare, inputs)], [*map(declare, results)], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads, settings.inter_op_num_threads = threads, 1
    # Else its threads go on spinning after a call, on the cores whose turn it is to serve another candidate.
    settings.add_session_config_entry("session.force_spinning_stop", "1")
    settings.log_severity_level = 3
    providers = ["CPUExecutionProvider"]
    return onnxruntime.InferenceSession(model.SerializeToString(), settings, providers=providers)
