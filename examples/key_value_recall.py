"""Key-value recall: a memory layer learns random facts that a feed-forward layer of the same cost cannot hold.

A fact maps a pair of key tokens to a value token. All tokens are drawn at random, so a model cannot generalise: it has
to store every fact. Both models are an embedding of the two tokens, one residual layer, and a linear map to the values.
The residual layer is a `pk.nn.MemoryLayer` in one model. In the other it is a feed-forward layer with as many hidden
units as make its FLOPs a query the same. Both models see the same batches.

    python examples/key_value_recall.py --plot recall.png
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Embedding, LayerNorm, Linear, Module, Sequential, SiLU

import pykernels as pk

RATES = dict(lr=5e-3, values_lr=5e-2)


class Recall(Module):
    """Scores [B, values] of each value for queries [B, 2], the first token below `tokens`, the second from there on."""

    def __init__(self, tokens: int, values: int, dim: int, layer: Module) -> None:
        super().__init__()
        self.embedding = Embedding(2 * tokens, dim)
        self.norm, self.layer = LayerNorm(dim), layer
        self.head = Sequential(LayerNorm(dim), Linear(dim, values))

    def forward(self, query: Tensor) -> Tensor:
        x = self.embedding(query).sum(1)
        return self.head(x + self.layer(self.norm(x)))


def memory_flops(layer: pk.nn.MemoryLayer) -> int:
    """FLOPs of one query: the projections, the scores of the two halves, and the weighted sum of rows."""
    projections = sum(linear.weight.numel() for linear in (layer.query, layer.gate, layer.output))
    return 2 * (projections + layer.keys.numel() + layer.heads * layer.k * layer.value_dim)


def feed_forward(dim: int, flops: int) -> tuple[Module, int]:
    """(the narrowest layer of at least these FLOPs a query, its FLOPs)."""
    hidden = -(-flops // (4 * dim))
    return Sequential(Linear(dim, hidden), SiLU(), Linear(hidden, dim)), 4 * dim * hidden


def draw_facts(facts: int, tokens: int, values: int) -> tuple[Tensor, Tensor]:
    """Queries [facts, 2], all different, and their answers [facts]."""
    pairs = torch.randperm(tokens * tokens)[:facts]
    return torch.stack((pairs // tokens, tokens + pairs % tokens), 1), torch.randint(values, (facts,))


@torch.no_grad()
def accuracy(model: Module, queries: Tensor, answers: Tensor) -> float:
    right = [model(q).argmax(1) == a for q, a in zip(queries.split(8192), answers.split(8192))]
    return torch.cat(right).float().mean().item()


def optimizers(model: Module) -> list[torch.optim.Optimizer]:
    """Adam for all parameters but the memory's table. SparseAdam updates the table's rows that a batch has read."""
    rest, tables = pk.nn.memory_parameter_groups(model, values_lr=RATES["values_lr"])
    chosen = [torch.optim.Adam([rest], lr=RATES["lr"])]
    if tables["params"]:
        chosen.append(torch.optim.SparseAdam(tables["params"], lr=tables["lr"]))
    return chosen


def run(
    *, facts=32768, tokens=256, values=128, dim=32, num_keys=192, k=8, heads=2, batch=2048, steps=500, points=25,
    seed=0, tick: Callable[[int, dict[str, float]], None] = lambda step, accuracies: None,
) -> dict:  # fmt: skip
    """Train both models; tick(step, the latest accuracies) is called after each step.

    Returns steps [points], and for each of "memory" and "dense" its flops, its parameters and its accuracy at these
    steps over all facts.
    """
    torch.manual_seed(seed)
    queries, answers = draw_facts(facts, tokens, values)
    memory = pk.nn.MemoryLayer(dim, num_keys, k, heads, sparse_grad=True)
    dense, dense_flops = feed_forward(dim, memory_flops(memory))
    models = {name: Recall(tokens, values, dim, layer) for name, layer in (("memory", memory), ("dense", dense))}
    training = {name: optimizers(model) for name, model in models.items()}
    results = {
        name: dict(flops=flops, parameters=sum(p.numel() for p in models[name].parameters()), accuracy=[])
        for name, flops in (("memory", memory_flops(memory)), ("dense", dense_flops))
    }
    measured, latest, order = [], {}, torch.empty(0, dtype=torch.int64)
    for step in range(1, steps + 1):
        if order.numel() < batch:
            order = torch.cat((order, torch.randperm(facts)))
        chosen, order = order[:batch], order[batch:]
        for name, model in models.items():
            loss = F.cross_entropy(model(queries[chosen]), answers[chosen])
            model.zero_grad()
            loss.backward()
            for optimizer in training[name]:
                optimizer.step()
        if step % max(steps // points, 1) == 0 or step == steps:
            measured.append(step)
            for name, model in models.items():
                latest[name] = accuracy(model, queries, answers)
                results[name]["accuracy"].append(latest[name])
        tick(step, latest)
    return dict(steps=measured, facts=facts, chance=1 / values, **results)


def plot(results: dict, path: str) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    style = {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": "#e4e4e4",
        "axes.titlelocation": "left",
        "axes.titlesize": 11,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(6.4, 3.8), layout="constrained")
        axes = figure.add_subplot()
        for name, label, colour in (("memory", "memory layer", "#0072B2"), ("dense", "feed-forward", "#E69F00")):
            heights = results[name]["accuracy"]
            axes.plot([0, *results["steps"]], [results["chance"], *heights], color=colour, linewidth=2)
            last = (results["steps"][-1], heights[-1])
            text = f"{label}\n{results[name]['flops'] / 1e3:.1f} kFLOP\n{results[name]['parameters']:,} parameters"
            below = heights[-1] > 0.5
            axes.annotate(
                text, last, (0, -8 if below else 8), textcoords="offset points", color=colour, size=9,
                ha="right", va="top" if below else "bottom",
            )  # fmt: skip
        axes.set(xlabel="step", ylabel="facts recalled", xlim=(0, results["steps"][-1]), ylim=(0, 1.02))
        axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
        axes.set_title(f"Recall of {results['facts']:,} random facts, at equal FLOPs a query", pad=12)
        figure.savefig(path, dpi=150)


def up_to(most: float) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not 1 <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"expected a number from 1 to {most}, got {text}")
        return int(text)

    return number


def image(path: str) -> str:
    """The path of a plot, checked before the training rather than after."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise argparse.ArgumentTypeError("it needs matplotlib: pip install matplotlib") from None
    folder, suffix = pathlib.Path(path).resolve().parent, pathlib.Path(path).suffix[1:]
    if not folder.is_dir():
        raise argparse.ArgumentTypeError(f"no folder {folder}")
    if suffix not in (formats := Figure().canvas.get_supported_filetypes()):
        raise argparse.ArgumentTypeError(f"expected a file name that ends in one of {', '.join(formats)}, got {path}")
    return path


def main() -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Table

    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--steps", type=up_to(10**6), default=500)
    parser.add_argument("--facts", type=up_to(65536), default=32768, help="at most 65536")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=image, metavar="FILE", help="draw accuracy against steps (png, svg, pdf)")
    args = parser.parse_args()

    console = Console()
    columns = (
        TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[now]}"),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=args.steps, now="")

        def tick(step, latest):
            progress.update(task, completed=step, now="  ".join(f"{name} {a:.0%}" for name, a in latest.items()))

        results = run(steps=args.steps, facts=args.facts, seed=args.seed, tick=tick)

    table = Table(title=f"{results['facts']:,} facts, {args.steps} steps")
    for heading in ("layer", "FLOPs a query", "parameters", "facts recalled"):
        table.add_column(heading, justify="left" if heading == "layer" else "right")
    for name in ("memory", "dense"):
        r = results[name]
        table.add_row(name, f"{r['flops']:,}", f"{r['parameters']:,}", f"{r['accuracy'][-1]:.1%}")
    console.print(table)
    console.print(
        f"By guessing: {results['chance']:.1%}. FLOPs are those of the layer; the rest of both models is the same."
    )
    if args.plot:
        plot(results, args.plot)
        console.print(f"Plot: {args.plot}")


if __name__ == "__main__":
    main()
