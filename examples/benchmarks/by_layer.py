"""Shows which layers carry the loss of quantizing: perplexity with some of them dense again.

    python examples/benchmarks/by_layer.py DENSE PACKED --data 'pydoc[80%:]'

The share of a group is the part of the added log-perplexity that goes away with dense weights
there alone. Shares need not add up to 1.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections import defaultdict
from collections.abc import Sequence

from modulora_evaluate.evaluate import perplexity
from report import markdown
from torch import nn

from modulora_core.data import token_segments
from modulora_core.inference.opened import open_to_run
from modulora_core.layers import QuantLinear


def groups(names: list[str]) -> dict[str, list[str]]:
    """The packed layers by kind of layer, and by third of the depth."""
    found = defaultdict(list)
    for name in names:
        found[name.split(".")[-1]].append(name)
    numbers = {name: int(re.search(r"\d+", name).group()) for name in names}
    depth = 1 + max(numbers.values())
    for name, number in numbers.items():
        found[f"blocks of third {1 + 3 * number // depth}"].append(name)
    return dict(found)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("dense"), add("packed")
    add("--data", default="pydoc[80%:]", metavar="SOURCE")
    add("--seq-len", type=int, default=256)
    add("--segments", type=int, default=16)
    flags = parser.parse_args(words)
    opened = open_to_run(flags.packed)
    ids = token_segments(flags.data, opened.tokenizer, flags.seq_len, flags.segments)
    dense, model = open_to_run(flags.dense).load(), opened.load()
    layers = [path for path, module in model.named_modules() if isinstance(module, QuantLinear)]
    packed = {path: model.get_submodule(path) for path in layers}

    def nats(of: nn.Module) -> float:
        return math.log(perplexity(of, ids).perplexity)

    least, most = nats(dense), nats(model)
    rows = [["none", f"{math.exp(most):.2f}", "0 %"]]
    for group, names in groups(layers).items():
        for name in names:
            model.set_submodule(name, dense.get_submodule(name))
        found = nats(model)
        for name in names:
            model.set_submodule(name, packed[name])
        rows.append([group, f"{math.exp(found):.2f}", f"{(most - found) / (most - least):.0%}"])
        print(rows[-1], file=sys.stderr, flush=True)
    rows.append(["all", f"{math.exp(least):.2f}", "100 %"])
    print(markdown(["dense again", "perplexity", "share"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
