"""Three processes that share every tiny file, two of them and all three: a program for test_parallel.py.

    python parallel_program.py RANK STORE CASES RESULT

Each writes RESULT-RANK.json: by case and number of ranks, what it has read, computed and added up with the others. The
last process has the whole model to itself too, and writes how far the others' results are from its own.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from ggjac.analysis.attribute import attribute_positions
from ggjac.analysis.branches import attribute_branches
from ggjac.analysis.experts import attribute_experts
from ggjac.generation import Continuation, greedy
from ggjac.model import Model, open_model

RANKS = 3


Found = TypeVar("Found")


class Counts:
    """What passes over blocks take: bytes read, FLOP of products, and sums with other ranks: how many, and bytes."""

    def __init__(self, model: Model):
        self.model, self.found = model, dict[str, list[float]]()
        self.flop, self.sums, self.summed = (lambda: 0), 0, 0

    def of(self, name: str, work: Callable[[], Found]) -> Found:
        """Do some work and count it."""
        before = self._now()
        with patch.object(dist, "all_reduce", self._added_up):
            result = work()
        self.found[name] = [after - start for after, start in zip(self._now(), before, strict=True)]
        return result

    def _added_up(self, tensor: Tensor, *given: Any, true: Any = dist.all_reduce, **more: Any) -> None:
        self.sums, self.summed = self.sums + 1, self.summed + tensor.nbytes
        true(tensor, *given, **more)

    def _now(self) -> tuple[float, int, int, int]:
        store = self.model.weights
        inside = [name for name in store.reads if name.startswith(("blk.", "altup_proj."))]  # which block 0 reads
        rows = [(store.file.tensors[name], store.reads[name]) for name in inside]
        return sum(count * info.row_bytes for info, count in rows), self.flop(), self.sums, self.summed


def results(model: Model, ids: list[int], thorough: bool) -> tuple[dict[str, Tensor], dict[str, list[float]]]:
    """Return products up and down, biases included, and what the trace and both products took.

    If `thorough`, also a short generation, and the share of every head, expert and token: on two ranks, since what
    depends on their number is the division, which the products see.
    """
    counts = Counts(model)
    J = counts.of("trace", lambda: model.trace(ids)).jacobian()
    counts.flop = lambda: J.sweep.flop
    generator = torch.Generator().manual_seed(1)
    X, Y = (torch.randn(2, *shape, generator=generator, dtype=J.dtype) for shape in (J.in_shape, J.out_shape))
    found = {"output": J.output, "up": counts.of("up", lambda: J.matmat(X, X.new_tensor([0.0, 1.0])))}
    found["down"] = counts.of("down", lambda: J.rmatmat(Y))
    if thorough:
        tokens, found["logits"] = greedy(Continuation(model, len(ids) + 2), ids, 2)
        found["tokens"] = torch.tensor(tokens, dtype=J.dtype)
        heads = attribute_branches(J, by_head=True).heads
        assert heads is not None
        found |= {"heads": heads} if heads.numel() else {}
        if any(layer.routed for layer in model.config.layers):
            experts = attribute_experts(J)
            found |= {"experts": torch.cat([one.shares for one in experts.mixtures], 1), "mlp": experts.mlp}
            found["weights"] = torch.cat([one.weights for one in experts.mixtures], 1)
        found["without some"] = J.excluding("0,2").matmat(X, X.new_tensor([0.0, 1.0]))
        found["shares"] = attribute_positions(J, positions="0,-1").shares
    return found, counts.found


def compared(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Return relative distances, by name."""
    return {name: float((value - expected[name]).norm() / expected[name].norm()) for name, value in found.items()}


def main() -> None:
    """Run all cases."""
    rank, store, cases, result = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])
    torch.set_num_threads(1)
    Model.keeps_ready = False
    dist.init_process_group("gloo", store=dist.FileStore(store, RANKS), rank=rank, world_size=RANKS)
    two, last = dist.new_group([0, 1]), rank == RANKS - 1
    report = {}
    for case, (path, ids, thorough) in json.loads(cases.read_text()).items():
        model = open_model(path, dtype="float64", device="cpu", group=None if last else two)
        own, alone = results(model, ids, thorough)
        shared = open_model(path, dtype="float64", device="cpu", group=dist.group.WORLD)
        three, of_three = results(shared, ids, thorough=False)
        of_two = {name: value.clone().contiguous() for name, value in own.items()}
        for value in of_two.values():
            dist.broadcast(value, 0)
        assert shared.crew is not None
        report[case] = {"told": shared.crew.told({"rank": rank, "text": "ü"})}
        report[case] |= {"counts": {1 if last else 2: alone, 3: of_three}}
        if last:
            report[case] |= {"2": compared(of_two, own), "3": compared(three, own)}
    Path(f"{result}-{rank}.json").write_text(json.dumps(report))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
