#!/usr/bin/env python
"""What the watchdogs say of trainings that were made before, from their logs.

    python scripts/replay_watchdogs.py RUN... --output docs/results/watchdogs.json

A log holds the smallest share of any expert of a layer, not which: it is replayed as if it were one
expert's, which starves as long or longer than any did. Entropies and router's gradients are those
of the log. Of the points it is known which experts starved, and which of them came back.
"""

import argparse
import json
import math
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from fairseq_sparsemixer.criterions import RoutingLossesConfig as Config  # noqa: E402
from fairseq_sparsemixer.files import write_json  # noqa: E402
from fairseq_sparsemixer.runs.points import FILE, read_points  # noqa: E402
from fairseq_sparsemixer.watchdogs import Layer, Watchdogs  # noqa: E402

SHARE, UPDATES = Config.watchdog_share, Config.watchdog_updates
_LINE = re.compile(r"\[train_inner\]\[INFO\] - (\{.*\})")
_SMALLEST = "min_expert_share/"


def lines(log):
    """The numbers of each line of the log, by their names."""
    found = _LINE.findall(log.read_text(encoding="utf-8", errors="replace"))
    return [
        {key: float(value) for key, value in json.loads(line).items() if value} for line in found
    ]


def layer_of(line, name, experts):
    """What a watchdog would have seen; the smallest share is the first expert's."""
    smallest = line[_SMALLEST + name]
    entropy = line.get(f"router_entropy/{name}") or None  # 0 of a router that learns nothing
    gradient = line.get(f"router_gradient/{name}")
    part = None if gradient is None else gradient / line["gnorm"]
    return Layer(
        [smallest, *[(1 - smallest) / (experts - 1)] * (experts - 1)], entropy, gradient, part
    )


def longest(seen):
    """(updates, since) of the longest time for which an expert starved at each line."""
    best, since = (0, None), None
    for updates, layer in seen:
        starves = layer.shares[0] * len(layer.shares) < SHARE
        since = (updates if since is None else since) if starves else None
        if since is not None and updates - since > best[0]:
            best = updates - since, since
    return best


def used(loads):
    """As many experts with even shares have loads of as large an entropy."""
    return math.exp(-sum(share * math.log(share) for share in loads if share))


def replay(run):
    """Of each layer of a run."""
    log = lines(run / "hydra_train.log")
    points = read_points(run / FILE)
    watchdogs = Watchdogs(SHARE, UPDATES)
    names = [key[len(_SMALLEST) :] for key in log[-1] if key.startswith(_SMALLEST)]
    for name in names:
        loads = [point["layers"][name]["load"] for point in points]
        experts = len(loads[0])
        seen = [
            (int(line["num_updates"]), layer_of(line, name, experts))
            for line in log
            if _SMALLEST + name in line
        ]
        warned = [w for updates, layer in seen for w in watchdogs.look(updates, {name: layer})]
        starved = [{n for n, share in enumerate(load) if share * experts < SHARE} for load in loads]
        updates, since = longest(seen)
        entropies = [layer.entropy for _, layer in seen if layer.entropy is not None]
        parts = [layer.part for _, layer in seen if layer.part is not None]
        yield {
            "run": run.name,
            "layer": name,
            "experts": experts,
            "updates": seen[-1][0],
            "longest": updates,
            "since": since,
            "starved_at_points": [len(each) for each in starved],
            "came_back": len(set().union(*(a - b for a, b in zip(starved, starved[1:])))),
            "used_at_end": round(used(loads[-1]), 1),
            "least_entropy": min(entropies, default=None),
            "least_gradient": min(parts, default=None),
            "warnings": [each.split(":")[0] for each in warned],
        }


def main():
    """See above."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.json")
    args = parser.parse_args()
    found = [layer for run in args.runs for layer in replay(run)]
    write_json(args.output, {"share": SHARE, "patience": UPDATES, "layers": found})
    for each in found:
        print(each)


if __name__ == "__main__":
    main()
