"""The model file that saved progress came from: recorded with it, and compared before the progress is used again.

A run is identified by a fingerprint that samples the file, which an edit of a single tensor may escape. The record
therefore holds what the file system says of each shard (inode, size, time of the last write) and, once the run has
taken long enough to be worth it, the SHA-256 of the whole content: then the file may be moved or copied, and its
content is hashed again.
"""

import time
from typing import Any, NamedTuple

from ggjac.gguf import GGUFFile

# Content is hashed where this takes a blink of an eye, or when the run has lasted some 20 times as long as hashing.
QUICKLY_HASHED = 1 << 28
BYTES_PER_SECOND = 50e6


class OriginError(ValueError):
    """Saved progress that came from another model file; the message says how they differ."""


class _Record(NamedTuple):
    """Plain data of every shard, and their hashes if they were computed."""

    files: list[dict[str, Any]]
    sha256: list[str] | None


class Origin:
    """Where progress comes from: an open model file."""

    def __init__(self, model: GGUFFile):
        self.model = model
        self._files = [dict(stamp._asdict()) for stamp in model.stamps]
        self._hashes: list[str] | None = None
        self._begun = time.monotonic()

    def record(self) -> dict[str, Any]:
        """Return what is to be saved with progress, as plain JSON; once it has hashes it stays the same.

        Raises:
            GGUFError: the file has changed since it was opened, so that no progress must be saved.
        """
        self.model.check_unchanged()
        nbytes, lasted = self.model.nbytes, time.monotonic() - self._begun
        if self._hashes is None and (nbytes <= QUICKLY_HASHED or lasted > nbytes / BYTES_PER_SECOND):
            self._hashes = self.model.sha256()
        return _Record(self._files, self._hashes)._asdict()

    def compare(self, record: Any) -> None:
        """Check that progress with a record came from this file, wherever it was then; the fingerprints are equal.

        Raises:
            OriginError: it came from another one, or from one of which too little is known.
        """
        if self.model.fingerprint_is_whole:
            return
        try:
            then = _Record([dict(file) for file in record["files"]], record["sha256"])
        except (LookupError, TypeError, ValueError):
            raise OriginError("it does not say from which model file it came") from None
        if then.files != self._files:
            if then.sha256 is None:
                raise OriginError(
                    f"the model file was written or replaced since ({_changes(then.files, self._files)}), and its "
                    "content was not hashed then"
                )
            if then.sha256 != self.model.sha256():
                raise OriginError("the model file holds other weights now (its SHA-256 differs)")
        self._hashes = then.sha256


def _changes(then: list[dict[str, Any]], now: list[dict[str, Any]]) -> str:
    """Return how the first shard that differs was recorded and is now."""
    for was, file in zip(then, now, strict=False):
        for key in file:
            if was.get(key) != file[key]:
                return f"{key} {str(was.get(key))[:40]}, now {file[key]}"
    return f"{len(then)} files, now {len(now)}"
