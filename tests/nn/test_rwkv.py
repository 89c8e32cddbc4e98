"""RWKV-4's layers: the paper's model, published checkpoints, transformers, a text that is learnt, errors."""

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from kit import agree, draw, equal, errors, tensors, values_and_gradients
from rwkv import naive

from pykernels.nn import RWKV4ChannelMix, RWKV4TimeMix
from pykernels.ops.wkv4 import EMPTY

# ------------------------------------------------------------------------------------------------ the paper's model


class Model(torch.nn.Module):
    """An RWKV-4 language model from our layers, with the parameters' names of the published checkpoints."""

    def __init__(self, vocabulary, C, n_layer=2, dim_att=None, dim_ffn=None):
        super().__init__()
        self.emb = torch.nn.Embedding(vocabulary, C)
        self.blocks = torch.nn.ModuleList()
        for i in range(n_layer):
            block = torch.nn.ModuleDict({f"ln{n}": torch.nn.LayerNorm(C) for n in range(int(i > 0), 3)})
            block["att"] = RWKV4TimeMix(C, n_layer, i, dim_att=dim_att)
            block["ffn"] = RWKV4ChannelMix(C, n_layer, i, dim_ffn=dim_ffn)
            self.blocks.append(block)
        self.ln_out = torch.nn.LayerNorm(C)
        self.head = torch.nn.Linear(C, vocabulary, bias=False)

    def forward(self, tokens, state=None):
        x, after = self.emb(tokens), []
        for block, (att, ffn) in zip(self.blocks, state or [(None, None)] * len(self.blocks)):
            if "ln0" in block:
                x = block["ln0"](x)
            mixed, att = block["att"](block["ln1"](x), att)
            x = x + mixed
            mixed, ffn = block["ffn"](block["ln2"](x), ffn)
            x = x + mixed
            after.append((att, ffn))
        return self.head(self.ln_out(x)), after


def randomise(module):
    """Every parameter of a size at which it matters."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            if "time_mix" in name:
                p.uniform_()
            elif p.dim() == 2:
                p.normal_(std=1.5 * p.size(1) ** -0.5)
            elif name.endswith("time_decay"):
                p.uniform_(-6, 2)
            else:
                p.add_(torch.randn_like(p) / 2)
    return module


def paper(p, tokens, n_layer):
    """The logits, by the equations of the paper, from parameters by name."""

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * p[name + ".weight"] + p[name + ".bias"]

    def project(x, name, mix):
        before = torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), 1)
        mu = p[f"{name.rpartition('.')[0]}.time_mix_{mix}"]
        return (mu * x + (1 - mu) * before) @ p[name + ".weight"].T

    x = norm(p["emb.weight"][tokens], "blocks.0.ln0")
    for i in range(n_layer):
        att, ffn = f"blocks.{i}.att", f"blocks.{i}.ffn"
        a = norm(x, f"blocks.{i}.ln1")
        r, k, v = (project(a, f"{att}.{n}", n[0]) for n in ("receptance", "key", "value"))
        y, _, _ = naive(-torch.exp(p[att + ".time_decay"]), p[att + ".time_first"], k, v)
        x = x + (1 / (1 + (-r).exp()) * y) @ p[att + ".output.weight"].T
        b = norm(x, f"blocks.{i}.ln2")
        r, k = (project(b, f"{ffn}.{n}", n[0]) for n in ("receptance", "key"))
        x = x + 1 / (1 + (-r).exp()) * (k.clamp(min=0) ** 2 @ p[ffn + ".value.weight"].T)
    return norm(x, "ln_out") @ p["head.weight"].T


def in_pieces(model, tokens, sizes):
    outputs, state = [], None
    for piece in tokens.split(sizes, 1):
        out, state = model(piece, state)
        outputs.append(out)
    return torch.cat(outputs, 1)


@pytest.mark.parametrize("sizes", [[41], [1] * 41, [0, 1, 32, 0, 7, 1], [8, 33, 0]], ids=str)
def test_model_is_the_papers(sizes):
    """In one call, token by token, and in pieces: logits and the gradient of every parameter."""
    model = randomise(Model(11, 6, dim_att=10, dim_ffn=9).double())
    tokens = torch.randint(11, (2, 41))
    p = dict(model.named_parameters())
    want = values_and_gradients(lambda: [paper(p, tokens, 2)], p)
    agree(values_and_gradients(lambda: [in_pieces(model, tokens, sizes)], p), want, rtol=1e-9, atol=1e-9)
    assert all(gradient.count_nonzero() for gradient in want)


# ------------------------------------------------------------------------------------------------ the layers


def layer(kind, C=6, width=10, **options):
    wide = dict(dim_att=width) if kind is RWKV4TimeMix else dict(dim_ffn=width)
    return kind(C, 3, 1, **wide, **options)


LAYERS = pytest.mark.parametrize("kind", [RWKV4TimeMix, RWKV4ChannelMix])


@LAYERS
def test_the_state_is_small(kind):
    """And nothing of a long input is kept alive by it."""
    module = layer(kind)
    for T in (1, 50):
        state = tensors(module(draw(2, T, 6, dtype=torch.float32))[1])
        assert [t.untyped_storage().nbytes() for t in state] == [2 * 6 * 4, 2 * 3 * 10 * 4][: len(state)]


def test_parameters_have_the_published_names_and_shapes():
    def shapes(module):
        return {name: tuple(p.shape) for name, p in module.named_parameters()}

    assert shapes(RWKV4TimeMix(6, dim_att=10)) == dict(
        time_decay=(10,), time_first=(10,), time_mix_k=(1, 1, 6), time_mix_v=(1, 1, 6), time_mix_r=(1, 1, 6)
    ) | {"key.weight": (10, 6), "value.weight": (10, 6), "receptance.weight": (10, 6), "output.weight": (6, 10)}
    assert shapes(RWKV4ChannelMix(6)) == dict(time_mix_k=(1, 1, 6), time_mix_r=(1, 1, 6)) | {
        "key.weight": (24, 6), "receptance.weight": (6, 6), "value.weight": (6, 24)
    }  # fmt: skip
    assert shapes(RWKV4TimeMix(6))["time_decay"] == (6,)
    assert shapes(RWKV4ChannelMix(6, dim_ffn=7))["key.weight"] == (7, 6)


def test_parameters_begin_as_published():
    """The numbers of the authors' formulas for C = 4 in layers 0 to 2 of 3."""
    decays = [[-5 + 8 * (h / 3) ** power for h in range(4)] for power in (0.7, 1.35, 2.0)]
    first = [math.log(0.3) + z for z in (0.0, 0.5, -0.5, 0.0)]
    for i, (decay, power, more) in enumerate(zip(decays, (1, 2 / 3, 1 / 3), (0, 0.15, 0.3))):
        att, ffn = RWKV4TimeMix(4, 3, i), RWKV4ChannelMix(4, 3, i)
        agree([att.time_decay, att.time_first], [torch.tensor(decay), torch.tensor(first)])
        mix = torch.tensor([0, 0.25, 0.5, 0.75]) ** power
        for got, want in (
            (att.time_mix_k, mix), (att.time_mix_v, mix + more), (att.time_mix_r, mix.sqrt()),
            (ffn.time_mix_k, mix), (ffn.time_mix_r, mix),
        ):  # fmt: skip
            agree([got], [want.view(1, 1, 4)])
        for zero in (att.key, att.receptance, att.output, ffn.receptance, ffn.value):
            assert zero.weight.count_nonzero() == 0
        for matrix, gain in ((att.value.weight, 1), (ffn.key.weight, 4)):
            agree([matrix.T @ matrix], [gain * torch.eye(4)], rtol=1e-5, atol=1e-5)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):  # one layer, one channel: nothing is divided by zero
        for module in (RWKV4TimeMix(1, dtype=dtype), RWKV4ChannelMix(1, dtype=dtype)):
            assert all(p.isfinite().all() and p.dtype == dtype for p in module.parameters())


@LAYERS
def test_both_spellings_load(kind):
    """Inside a model too; and what is missing or too much is still found."""
    spelt = {"time_mix_k": "time_mix_key", "time_mix_v": "time_mix_value", "time_mix_r": "time_mix_receptance"}
    module, other = (torch.nn.ModuleDict({"att": randomise(layer(kind))}) for _ in range(2))
    ours = module.state_dict()
    theirs = {"att." + spelt.get(name[4:], name[4:]): p for name, p in ours.items()}
    assert len(theirs.keys() - ours.keys()) >= 2
    for published in (theirs, ours):
        randomise(other)
        assert other.load_state_dict(published) == torch.nn.modules.module._IncompatibleKeys([], [])
        equal(other.state_dict(), ours)
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "att.time_mix_key"'):
        other.load_state_dict(ours | theirs)
    del theirs["att.time_mix_key"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "att.time_mix_k"'):
        other.load_state_dict(theirs)


def test_the_decay_is_taken_in_fp32():
    """With keys of 0 the denominator is a geometric series, which a decay rounded to bf16 gives wrong by percents."""
    module = RWKV4TimeMix(6, dtype=torch.bfloat16)  # whose key.weight is 0
    with torch.no_grad():
        module.time_decay.uniform_(-4, -3)
    _, (_, wkv) = module(draw(2, 60, 6, dtype=torch.bfloat16))
    ratio = module.time_decay.double().exp().neg().exp()
    series = (1 - ratio**60) / (1 - ratio)
    agree([wkv[:, 1].double() * wkv[:, 2].double().exp()], [series.expand(2, 6)], rtol=1e-5, atol=0)


@LAYERS
def test_under_autocast_fp32_and_its_dtype_are_taken(kind):
    module, x = randomise(layer(kind)), draw(2, 5, 6, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(x.bfloat16())[0].dtype == torch.bfloat16
        for wrong in (x.double(), x.half(), x.long()):
            with pytest.raises(TypeError, match=f"x: expected torch.float32 or torch.bfloat16, got {wrong.dtype}"):
                module(wrong)
        assert layer(kind).double()(x.double())[0].dtype == torch.float64


@LAYERS
def test_parameters_are_initialised_on_their_device(kind):
    """Whatever the default; and again, where they had no data at first."""
    with torch.device("meta"):
        assert {p.device.type for p in layer(kind).parameters()} == {"meta"}
        made = layer(kind, device="cpu")
    again = layer(kind, device="meta").to_empty(device="cpu")
    again.reset_parameters()
    for other in (made, again):
        for name, p in other.named_parameters():
            if p.dim() != 2:
                equal(p, layer(kind).get_parameter(name))


X, S, Z = torch.zeros(2, 5, 6), torch.zeros(2, 6), torch.zeros(2, 3, 10)

ERRORS = [
    (lambda: RWKV4TimeMix(0), ValueError, "n_embd: expected at least 1, got 0"),
    (lambda: RWKV4TimeMix(6.0), TypeError, "n_embd: expected an integer, got float"),
    (lambda: RWKV4ChannelMix(6, 2, True), TypeError, "layer_id: expected an integer, got bool"),
    (lambda: RWKV4TimeMix(6, 0), ValueError, "n_layer: expected at least 1, got 0"),
    (lambda: RWKV4ChannelMix(6, 2, 2), ValueError, "layer_id: expected 0 to 1, got 2"),
    (lambda: RWKV4TimeMix(6, dim_att=0), ValueError, "dim_att: expected at least 1, got 0"),
    (lambda: RWKV4ChannelMix(6, dim_ffn=0), ValueError, "dim_ffn: expected at least 1, got 0"),
    (lambda: layer(RWKV4TimeMix)([1]), TypeError, r"x: expected a tensor \[B, T, C\], got list"),
    (lambda: layer(RWKV4TimeMix)(X[0]), ValueError, r"x: expected rank 3 \[B, T, C\], got \[5, 6\]"),
    (lambda: layer(RWKV4ChannelMix)(X[..., 1:]), ValueError, r"x: expected \[B, T, 6\], got \[2, 5, 5\]"),
    (
        lambda: layer(RWKV4ChannelMix)(X.double()),
        TypeError,
        "x: expected the weights' torch.float32, got torch.float64",
    ),
    (lambda: layer(RWKV4ChannelMix)(X.to("meta")), ValueError, "x: expected the module's device cpu, got meta"),
    (lambda: layer(RWKV4TimeMix)(X, S), TypeError, r"state: expected a tuple \(shift, wkv\), got torch.float32"),
    (lambda: layer(RWKV4TimeMix)(X, (S, S, S)), ValueError, r"state: expected two tensors \(shift, wkv\), got 3"),
    (lambda: layer(RWKV4TimeMix)(X, (S[:1], Z)), ValueError, r"state\[0\]: expected \[2, 6\] to match x, got \[1, 6\]"),
    (
        lambda: layer(RWKV4TimeMix)(X, (S, Z[..., 1:])),
        ValueError,
        r"state\[1\]: expected \[2, 3, 10\] .*got \[2, 3, 9\]",
    ),
    (
        lambda: layer(RWKV4TimeMix)(X, (S, Z.half())),
        TypeError,
        r"state\[1\]: expected torch.float32, got torch.float16",
    ),
    (lambda: layer(RWKV4TimeMix)(X, (S, Z.to("meta"))), ValueError, r"state\[1\]: expected x's device cpu, got meta"),
    (lambda: layer(RWKV4ChannelMix)(X, (S, Z)), TypeError, r"state: expected a tensor \[B, C\], got tuple"),
    (
        lambda: layer(RWKV4ChannelMix)(X, S.half()),
        TypeError,
        "state: expected x's dtype torch.float32, got torch.float16",
    ),
    (lambda: layer(RWKV4ChannelMix)(X, S.to("meta")), ValueError, "state: expected x's device cpu, got meta"),
]

test_errors_name_argument_expectation_and_value = errors(ERRORS)


# ------------------------------------------------------------------------------------------------ transformers


@pytest.fixture
def their_model():
    theirs = pytest.importorskip("transformers.models.rwkv.modeling_rwkv")
    sizes = dict(vocab_size=11, hidden_size=6, num_hidden_layers=2, attention_hidden_size=10, intermediate_size=9)
    config = theirs.RwkvConfig(context_length=64, **sizes)
    return randomise(theirs.RwkvForCausalLM(config)).eval()


def test_layers_take_transformers_weights(their_model):
    """Attention and feed-forward, from the first token and from a state: of one sequence, for of several theirs gives
    B × B outputs to one token."""
    for i, block in enumerate(their_model.rwkv.blocks):
        att, ffn = RWKV4TimeMix(6, 2, i, dim_att=10), RWKV4ChannelMix(6, 2, i, dim_ffn=9)
        att.load_state_dict(block.attention.state_dict())
        ffn.load_state_dict(block.feed_forward.state_dict())
        state = [torch.zeros(1, 6 if n < 2 else 10, 2) for n in range(5)]
        state[4] += EMPTY
        attended = fed = None
        with torch.no_grad():
            for T in (7, 1, 40):
                x = draw(1, T, 6, dtype=torch.float32)
                want, state = block.attention(x, state=state, use_cache=True)
                got, attended = att(x, attended)
                agree([got, attended[0]], [want, state[1][..., i]], rtol=1e-4, atol=1e-5)
                agree([*attended[1].unbind(1)], [s[..., i] for s in state[2:]], rtol=1e-4, atol=1e-5)
                want, state = block.feed_forward(x, state=state)
                got, fed = ffn(x, fed)
                agree([got, fed], [want, state[0][..., i]], rtol=1e-4, atol=1e-5)


def test_model_takes_transformers_weights(their_model):
    names = (
        ("rwkv.", ""), ("embeddings", "emb"), ("pre_ln", "ln0"), ("attention", "att"), ("feed_forward", "ffn"),
    )  # fmt: skip
    weights = {}
    for name, p in their_model.state_dict().items():
        for old, new in names:
            name = name.replace(old, new)
        weights[name] = p
    model = Model(11, 6, dim_att=10, dim_ffn=9)
    model.load_state_dict(weights)
    tokens = torch.randint(11, (2, 30))
    with torch.no_grad():
        agree([in_pieces(model, tokens, [21, 9])], [their_model(tokens, use_cache=False).logits], rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------------------------------------ learning


def corpus():
    """The docstrings of some modules of the standard library, some tens of thousands of characters."""
    import argparse
    import collections
    import logging
    import pathlib
    import random
    import statistics

    text = []
    for module in (argparse, collections, logging, pathlib, random, statistics):
        members = [member for _, member in sorted(vars(module).items()) if inspect.isclass(member)]
        for member in [module, *members, *(f for m in members for _, f in sorted(vars(m).items()))]:
            text.append(inspect.getdoc(member) or "")
    return "\n".join(dict.fromkeys(text)).encode("ascii", "ignore")


def test_a_model_learns_text_and_speaks_alike_in_both_forms():
    """Greedily, token by token with a state that stays as it is, and from the whole prefix again and again."""
    text = torch.frombuffer(bytearray(corpus()), dtype=torch.uint8).long()
    letters, text = text.unique(return_inverse=True)
    assert len(text) > 20_000
    model = Model(len(letters), 64)
    torch.nn.init.uniform_(model.emb.weight, -1e-4, 1e-4)  # as published
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    losses = []
    for _ in range(40):
        start = torch.randint(len(text) - 128, (8, 1))
        batch = text[start + torch.arange(129)]
        logits, _ = model(batch[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(losses)
    assert abs(losses[0] - math.log(len(letters))) < 0.5
    assert sum(losses[-5:]) / 5 < 2.8  # 2.2 to 2.4 in eight runs; the letters' frequencies alone give 3.24

    model.double()  # where no two logits tie
    with torch.no_grad():
        said = text[None, 1000:1040]
        logits, state = model(said)
        size = None
        for _ in range(40):
            again, _ = model(said)
            agree([logits[:, -1]], [again[:, -1]])
            assert torch.equal(logits[:, -1].argmax(-1), again[:, -1].argmax(-1))
            token = logits[:, -1:].argmax(-1)
            said = torch.cat((said, token), 1)
            logits, state = model(token, state)
            sizes = [t.untyped_storage().nbytes() for (shift, wkv), seen in state for t in (shift, wkv, seen)]
            assert size in (None, sum(sizes))
            size = sum(sizes)
    assert size == 2 * 64 * 5 * 8
