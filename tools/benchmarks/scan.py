"""Time one product with a recurrence: its whole pattern against chunks of several lengths.

    python tools/benchmarks/scan.py --heads 12 --size 128 --vectors 16

Keys and values have the same size; matrices are random. Decides `ggjac.sizes.scan_chunk`.
"""

import time
from collections.abc import Callable

import click
import torch

from ggjac.linop import LinearOperator, Mix, Scan


def seconds(product: Callable[[torch.Tensor], object], X: torch.Tensor, repeats: int) -> float:
    """Return the least time of a product, of one thread of the CPU."""
    spent = []
    for _ in range(repeats + 1):
        start = time.process_time()
        product(X)
        spent.append(time.process_time() - start)
    return min(spent)


def scan(n: int, heads: int, size: int, chunk: int) -> Scan:
    """Return a recurrence in chunks."""
    count = -(-n // chunk)
    shapes = ((chunk, chunk), (chunk, size), (size, chunk), (size, size))
    within, reading, writing, moving = (torch.randn(heads, count, *shape) / 30 for shape in shapes)
    return Scan(within, reading, writing, moving, n, value_size=size)


@click.command(help=__doc__.replace("\n    python", "\n\b\n    python"))
@click.option("--heads", default=12, show_default=True)
@click.option("--size", default=128, show_default=True, help="Elements of a key and of a value.")
@click.option("--vectors", default=16, show_default=True)
@click.option("--positions", default="64,128,256,512,1024,2048", show_default=True)
@click.option("--chunks", default="0.5,1,2,4", show_default=True, help="Lengths of chunks, in key sizes.")
@click.option("--repeats", default=3, show_default=True)
def main(heads: int, size: int, vectors: int, positions: str, chunks: str, repeats: int) -> None:
    lengths = [int(float(part) * size) for part in chunks.split(",")]
    torch.set_num_threads(1)
    columns = ["pattern", *(f"chunks of {length}" for length in lengths)]
    click.echo(f"{heads} heads of {size}, k={vectors}: ms of a product up and its transpose, and MiB of the tape")
    click.echo("positions " + "".join(f"{column:>24}" for column in columns))
    for n in map(int, positions.split(",")):
        X, line = torch.randn(vectors, n, heads * size), f"{n:9d} "
        for length in [n, *(length for length in lengths if length < n)]:
            whole = length == n
            operator: LinearOperator = scan(n, heads, size, length)
            floats = heads * -(-n // length) * (length + size) ** 2
            if whole:
                operator, floats = Mix(torch.randn(heads, n, n) / 30, heads, size), heads * n * n
            up, down = (seconds(product, X, repeats) for product in (operator.matmat, operator.rmatmat))
            line += f"{1000 * up:9.1f} {1000 * down:7.1f} {floats / 2**18:6.1f}"
        click.echo(line)


if __name__ == "__main__":
    main()
