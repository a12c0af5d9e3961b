"""Number of parameters of configurations by part of the network; allocates nothing.

    python benchmarks/parameters.py configs/imagen.py:base_64 configs/imagen.py:sr_256

Prints one JSON line and a table.
"""

from __future__ import annotations

import collections
import json
import sys

import jax

from imagen_jax.config import overrides
from imagen_jax.interop import weights
from imagen_jax.parallel import partitioning
from imagen_jax.stages.network import init_params

PARTS = ("all", "residual blocks", "pixels' attention", "text's attention", "conditioning", "ends")


def part(path: str) -> str:
    """The part of the network to which a parameter belongs."""
    top, *inner = path.split("/")
    if "_attention_" in top:
        to_text = inner[0].startswith("text") or top.endswith("_cross")
        return "text's attention" if to_text else "pixels' attention"
    if top == "cond":
        return "conditioning"
    return "residual blocks" if top.startswith(("down", "middle", "up")) else "ends"


def count(spec: str) -> dict[str, int]:
    """Parameters of FILE:NAME by part."""
    config = overrides.load(spec)
    boxed = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    counts: dict[str, int] = collections.Counter()
    for path, leaf in weights.flatten(partitioning.unbox(boxed)).items():
        counts[part(path)] += leaf.size
        counts["all"] += leaf.size
    return {name: counts[name] for name in PARTS}


def main() -> None:
    """Prints the counts of the configurations in `sys.argv`."""
    rows = {spec: count(spec) for spec in sys.argv[1:]}
    print(json.dumps(rows))
    print("| millions |", " | ".join(PARTS), "|")
    print("|---|" + "---|" * len(PARTS))
    for spec, counts in rows.items():
        name = spec.rpartition(":")[2]
        print(f"| {name} |", " | ".join(f"{counts[p] / 1e6:,.1f}" for p in PARTS), "|")


if __name__ == "__main__":
    main()
