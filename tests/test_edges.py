"""Edges against autograd over the independent float64 oracle, with the way from one component to one reader cut out."""

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import oracle
import pytest
import tiny
import torch
from helpers import TOKENS, held, invoke
from readings import Expected, N, close
from safetensors.torch import load_file
from torch import Tensor

from ggjac.analysis.branches import attribute_branches
from ggjac.analysis.edges import Edges, Node, attribute_edges
from ggjac.config import heads_of
from ggjac.config.mixers import MIXERS
from ggjac.jacobian import Span, Tap
from ggjac.model import open_model
from ggjac.report import write_report

# Grouped and single key heads, biases, LayerNorm, post-norms, residual scales, parallel and sequential blocks, learned
# positions, sinks, clamps, soft caps; mixtures, one that reads the block's input; latent attention, recurrences,
# convolutions, two mixers in a block, a factor on the stream.
CASES = (
    *("gqa", "mqa", "biases", "gemma2", "olmo2", "granite", "phi2", "cohere2", "gptneox", "gpt2", "gpt_oss"),
    *("qwen2moe", "arctic", "grovemoe", "deepseek2", "qwen35", "lfm2", "mamba2", "falcon_h1", "gemma4_full_first"),
)
# Streams, passes over the same blocks, norms past branches, values of other blocks, inputs of a block's own, what is
# beside attention, a network that reads the position before.
OTHERS = (
    *("hy_v4", "glm5_next", "kimi_k3", "hrm_text", "talkie", "nanbeige", "minimax_01", "gemma4_small", "gemma4_shared"),
    *("gemma3n", "arwkv7", "rwkv6", "rwkv7", "deepseek4_yarn", "minicpm3", "deci_idle", "mamba"),
)


class Cut(Expected):
    """Edges of the oracle into the logit of `target` at `position`, frozen by a rule."""

    def __init__(self, file: Path, case: str, target: int, position: int, freeze: str):
        super().__init__(file, case)
        self.freeze = freeze
        self.added: dict[int, list[list[Tensor]]] = {}  # by the heads of each block
        x = self.states["x"].clone().requires_grad_()
        states = oracle.forward(self.known, self.ids, freeze=freeze, x=x)
        logit = self.uncapped(states["result_norm"][position])[target]
        ends = {f"{kind}_out-{i}": states[f"{kind}_out-{i}"] for i in range(self.layers) for kind in ("attn", "ffn")}
        ends = {name: state for name, state in ends.items() if state.requires_grad}
        # Of what each branch adds, and of the embeddings: through all that follows.
        ends["x"] = x
        found = torch.autograd.grad(logit, list(ends.values()), allow_unused=True)
        self.c = {name: 0 * ends[name] if c is None else c for name, c in zip(ends, found, strict=True)}
        self.reading = self.direction(position, target, None)[0]
        self.position = position

    def all_ways(self, node: Node) -> Tensor:
        """Return what the logit reads of what a node writes, through all that follows."""
        return self.c["x" if node.block is None else f"{'ffn' if node.kind == 'mlp' else 'attn'}_out-{node.block}"]

    def written(self, node: Node) -> Tensor:
        """Return what a node writes at all positions."""
        i = node.block
        if i is None:
            return self.states["x"]
        if node.kind == "mlp":
            return self.states[f"ffn_out-{i}"]
        heads = [part for parts in self._heads(i) for part in parts]
        if node.kind == "bias":
            return self.states[f"attn_out-{i}"] - sum(heads, start=torch.zeros_like(self.states["x"]))
        return heads[node.head]

    def _heads(self, i: int) -> list[list[Tensor]]:
        """Return what each head of each mixer adds: what a factor on its columns does, frozen."""
        if i in self.added:
            return self.added[i]
        added = self.added.setdefault(i, [])
        for factor, out in zip(*self.by_head(i, self._input(i), self.freeze), strict=True):
            v = torch.zeros_like(out).requires_grad_()
            (slope,) = torch.autograd.grad((v * out).sum(), factor, create_graph=True)
            added.append([torch.autograd.grad(part, v, retain_graph=True)[0].detach() for part in slope])
        return added

    def _input(self, i: int) -> Tensor:
        return (self.states[f"l_out-{i - 1}"] if i else self.states["x"]).detach().clone()

    def edges(self, reader: Node, stream: dict[int, Tensor]) -> Tensor:
        """Return the edges into a reader of what is written: of vectors by the block at whose input they arrive."""
        i = reader.block
        if i is None:
            return torch.stack([part[self.position] @ self.reading for part in stream[self.layers]])
        if reader.kind == "mlp":
            return self._into_mlp(i, stream)
        x = self._input(i).requires_grad_()
        number, edges = reader.head, list[Tensor]()
        for factor, out in zip(*self.by_head(i, x, self.freeze), strict=True):
            if number >= len(factor) or number < 0:
                number -= len(factor)
                continue
            (g,) = torch.autograd.grad((self.c[f"attn_out-{i}"] * out).sum(), x, create_graph=True)
            each = (torch.autograd.grad((g * part).sum(), factor, retain_graph=True)[0] for part in stream[i])
            edges = [edge[number] for edge in each]
            number = -1
        return torch.stack(edges)

    def _into_mlp(self, i: int, stream: dict[int, Tensor]) -> Tensor:
        """Return the edges into an MLP, which reads the stream after attention, or the block's input, or both."""
        leaves: list[Tensor] = []
        apply = oracle.feed_forward

        def apart(model: oracle.Oracle, b: str, x: Tensor, entry: Tensor, *rest: object, **how: object) -> Tensor:
            leaves.extend(part.detach().clone().requires_grad_() for part in (x, entry))
            return apply(model, b, *leaves, *rest, **how)

        oracle.feed_forward = apart
        try:
            out = oracle.block(self.known, i, self._input(i), freeze=self.freeze, states=self.states)[f"ffn_out-{i}"]
        finally:
            oracle.feed_forward = apply
        found = torch.autograd.grad((self.c[f"ffn_out-{i}"] * out).sum(), leaves, allow_unused=True)
        read, entry = (torch.zeros_like(leaves[0]) if g is None else g for g in found)
        facts = self.known.facts
        separate = facts.ffn_norm_optional and f"blk.{i}.ffn_norm.weight" in self.known.weights
        parallel = facts.parallel or (facts.ffn_norm_optional and not separate)
        parallel = parallel or (facts.parallel_key and self.known.metadata["use_parallel_residual"])
        middle = stream[i] if parallel else stream[i + 0.5]
        before = (torch.cat([stream[i], torch.zeros_like(middle[len(stream[i]) :])]) * entry).sum((1, 2))
        return (middle * read).sum((1, 2)) + before


def arriving(cut: Cut, nodes: list[Node]) -> dict[float, Tensor]:
    """Return what the nodes have written that arrives at each block's input, after its attention, and at the end."""
    found, parts = {}, [cut.written(nodes[0])]
    for i in range(cut.layers):
        found[i] = torch.stack(parts)
        own = [node for node in nodes if node.block == i]
        parts += [cut.written(node) for node in own if node.kind != "mlp"]
        found[i + 0.5] = torch.stack(parts)
        parts += [cut.written(node) for node in own if node.kind == "mlp"]
        scale = float(cut.known.weights.get(f"blk.{i}.layer_output_scale.weight", torch.ones(1)))
        parts = [part * scale for part in parts]
    found[cut.layers] = torch.stack(parts)
    return found


def edges_of(file: Path, case: str, rule: str = "up", position: int = 4, **options: object) -> Edges:
    jacobian = open_model(file, dtype="float64").trace(tiny.prompt(case, N), mlp_path=rule).jacobian(position)
    return attribute_edges(jacobian, 5, **options)


@pytest.mark.parametrize(
    ("case", "rule"), [*((case, "up") for case in CASES), *((case, "gate") for case in ("gqa", "gemma2", "arctic"))]
)
def test_edges_are_those_of_the_oracle(case: str, rule: str, tiny_files: dict[str, Path]) -> None:
    found, cut = edges_of(tiny_files[case], case, rule), Cut(tiny_files[case], case, 5, 4, rule)
    stream = arriving(cut, found.nodes)
    order = [0] + [k for i in range(cut.layers) for k, node in enumerate(found.nodes) if node.block == i]
    assert order == [*range(len(found.nodes) - 1)]
    assert {node.kind for node in found.nodes} <= {"embedding", "head", "bias", "mlp", "logit"}
    for k, reader in enumerate(found.nodes):
        if reader.kind not in ("embedding", "bias"):
            expected = cut.edges(reader, stream)
            close(found.matrix[: len(expected), k], expected, 1e-9)
            assert not found.matrix[len(expected) :, k].any()
    # What goes through a node is what it wrote, as the logit reads it in all ways; the rest of that are its constants.
    data = found.data()["nodes"]
    for k, node in enumerate(found.nodes[:-1]):
        through = float((cut.written(node) * cut.all_ways(node)).sum())
        close(data[k]["through"], through, 1e-9)
        close(data[k]["constant"], through - float(found.matrix[:, k].sum()), 1e-9)
    _, logit, constant = cut.direction(4, 5, None)
    close([data[-1][name] for name in ("through", "into", "constant")], [logit, logit - constant, constant], 1e-9)


@pytest.mark.parametrize("case", [*CASES, *OTHERS])
def test_edges_sum_to_what_goes_through(case: str, tiny_files: dict[str, Path]) -> None:
    """Out of a node, what goes through it; into the head, direct logit attribution; the same in several passes."""
    model = open_model(tiny_files[case], dtype="float64")
    jacobian = model.trace(tiny.prompt(case, N), mlp_path="gate").jacobian(4)
    found, branches = attribute_edges(jacobian, 3, 17), attribute_branches(jacobian, 3, 17, by_head=True)
    close(found.matrix.sum(1)[:-1], found.through[:-1])
    heads = [head for layer in range(model.config.block_count) for head in heads_of(model.config, layer)]
    named = {node.name: (node.block, node.head) for node in found.nodes if node.kind == "head"}
    assert {head.name: head[:2] for head in heads if MIXERS[head.kind].has_heads}.items() <= named.items()
    into, at = found.matrix[:, -1], {kind: kind.split() for kind in ("head laurel", "mlp inputs", "bias")}
    close(into[0], branches.embedding[0])
    for i in range(model.config.block_count):
        own = {
            kind: [k for k, node in enumerate(found.nodes) if (node.block, node.kind in names) == (i, True)]
            for kind, names in at.items()
        }
        close(into[own["head laurel"]], branches.heads[0, i, : len(own["head laurel"])])
        close(into[own["mlp inputs"]].sum(), branches.mlp[0, i])
        close(into[own["bias"]].sum(), branches.attn_bias[0, i])
    jacobian.chunk_bytes = 1
    again = attribute_edges(jacobian, 3, 17)
    close(again.matrix, found.matrix, 1e-12)
    close(again.through, found.through, 1e-12)


def test_the_largest_edges_are_those_of_the_matrix(tiny_files: dict[str, Path]) -> None:
    found = edges_of(tiny_files["biases"], "biases", count=7)
    expected = found.matrix.flatten().abs().topk(7).values
    assert [abs(edge.value) for edge in found.largest] == pytest.approx(expected.tolist())
    for edge in found.largest:
        close(edge.value, found.matrix[edge.source, edge.reader])
        close(edge.by_position.sum(), edge.value, 1e-12)
        if edge.reader == len(found.nodes) - 1:  # the head reads the output's position alone
            close(edge.by_position[-1], edge.value, 1e-12)
    assert any(edge.reader == len(found.nodes) - 1 for edge in found.largest)
    assert found.left_out == pytest.approx(found.size - float(expected.sum()))
    data = found.data()
    assert [edge["value"] for edge in data["edges"]] == [edge.value for edge in found.largest]
    assert edges_of(tiny_files["biases"], "biases", count=0).largest == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_dtypes_and_a_prompt_of_one_token(dtype: str, tiny_files: dict[str, Path]) -> None:
    exact, narrow = (open_model(tiny_files["gemma2"], dtype=name) for name in ("float64", dtype))
    for ids in ([5], tiny.prompt("gemma2", N)):
        a, b = (attribute_edges(model.trace(ids).jacobian(), 3) for model in (exact, narrow))
        close(b.matrix, a.matrix, 60 * torch.finfo(getattr(torch, dtype)).eps)


def test_a_part_of_the_network_is_refused(tiny_files: dict[str, Path]) -> None:
    trace = open_model(tiny_files["gqa"]).trace(tiny.prompt("gqa", N))
    with pytest.raises(ValueError, match="this Jacobian is of a part of the network"):
        attribute_edges(trace.jacobian(span=Span(1, Tap("layer", 2))))
    with pytest.raises(ValueError, match="count -1 is out of range"):
        attribute_edges(trace.jacobian(), count=-1)


def test_the_command_saves_all_edges_and_shows_the_largest(tiny_files: dict[str, Path], tmp_path: Path) -> None:
    asked = ["attribute", "-m", tiny_files["gqa"], *TOKENS, "--by", "edge", "--count", 4, "-o", tmp_path / "e"]
    shown = invoke(*asked).stdout
    saved = load_file(tmp_path / "e")
    largest = float(saved["edges"].abs().max())
    assert f"{largest:.4f}" in shown
    assert "4 of " in shown
    rows = [*csv.DictReader(io.StringIO(invoke(*asked[:-2], "--format", "csv").stdout))]
    assert [abs(float(row["share"])) for row in rows] == pytest.approx(saved["edges"].abs().flatten().topk(4).values)
    assert saved["nodes"].shape == (len(saved["edges"]), 3)


def test_a_phone_has_room_for_the_names_in_a_row(tmp_path: Path) -> None:
    """Of 16 heads of one block every third is named there; of the other block's heads all are."""
    nodes: list[dict[str, Any]] = [{"name": "embedding", "kind": "embedding", "through": 1.0}]
    for block, count in ((0, 16), (1, 7)):
        known = {"kind": "head", "block": block, "through": 1.0}
        nodes += [known | {"name": f"L{block} H{i}", "head": i} for i in range(count)]
    edges = [{"source": i, "reader": 17 + i % 7, "value": 1.0, "parts": [1.0]} for i in range(1, 17)]
    whole = {"position": 0, "id": 5, "text": "a", "target": {"id": 7, "text": "b"}, "logit": 16.0, "size": 16.0}
    content: dict[str, Any] = {
        "schema_version": 2,
        "model": {"path": "m.gguf"},
        "tokens": [{"position": 0, "id": 5, "text": "a"}],
    }
    content["edges"] = whole | {"left_out": 0.0, "count": 16, "nodes": nodes, "edges": edges}
    source = tmp_path / "run.json"
    source.write_text(json.dumps(content), encoding="utf-8")
    page = write_report(source).read_text(encoding="utf-8")
    names = re.findall(r'<text class="mark-label(?: low)?( spare)?"[^>]*>(H\d+)<', page)
    assert [name for spare, name in names if not spare] == [f"H{i}" for i in (*range(0, 16, 3), *range(7))]
    assert len(names) == 16 + 7


def test_cotangents_of_many_readers_are_there_twice_at_most(tiny_file: Any) -> None:
    """As the plan counts them: a view of one row would keep all rows."""
    model, ids = open_model(tiny_file("gqa", layers=40)), tiny.prompt("gqa", 12) * 5
    J, planned = model.trace(ids).jacobian(), model.plan(ids, "attribute", by="edge").ram
    attribute_edges(J)  # what is kept from now on
    assert held(lambda: attribute_edges(J)) <= planned["edges"] + planned["vectors"] + planned["tile"]
