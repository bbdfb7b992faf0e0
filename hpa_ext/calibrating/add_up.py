"""Adding up the Grams of processes that each saw a part of the batches."""

from __future__ import annotations

import torch

from hpa_ext.gram import Gram, GramCollection
from hpa_ext.gram_collector import GramCollector
from hpa_ext.processes import Processes


def add_up(collector: GramCollector, device: torch.device, processes: Processes) -> GramCollection:
    """The Grams of all processes together, one all-reduce each.

    Args:
        collector: of this process, of the same modules in every process.
        device: of activations.
        processes: who takes part.

    Returns:
        The sums, in every process. Modules share a Gram where they did in the processes whose batches reached them.

    Raises:
        ValueError: two processes disagree about which modules share an input; in every process.
    """
    grams, leaders = collector.grams(), collector.leaders()
    if processes.count == 1:
        return grams
    agreed: dict[str, str] = {}
    for told in processes.gather(leaders):
        for name, leader in told.items():
            if leader is not None and agreed.setdefault(name, leader) != leader:
                raise ValueError(
                    f"{name}: shares its input with {agreed[name]} in the batches of one process, with {leader} in "
                    "those of another; calibrate these modules in separate calls"
                )
    total = GramCollection()
    for name, gram in grams.items():
        leader = agreed.get(name, name)
        if leader in total:
            total[name] = total[leader]
            continue
        reached = leaders[name] is not None
        total[name] = gram if reached else Gram(gram.in_features, device=device)
        total[name].all_reduce_()
    return total
