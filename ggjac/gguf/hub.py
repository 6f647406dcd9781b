"""Models by name: the GGUF files that other programs have left on this disk, and the demo that ships with ggjac.

`hf:user/repo[:quant]` and `hf:user/repo/path/file.gguf` are looked up where Hugging Face's client, llama.cpp and LM
Studio keep their files, `ollama:name[:tag]` where Ollama does. Nothing here touches the network, except `resolve` with
`download=True` and the `hub` extra installed. `demo_path` is the path of the bundled model.

Names come from users, file names and manifests from strangers. Names must match the hubs' own rules before they become
paths, so that none leads out of its folder; of a manifest only digests of 64 hexadecimal digits become paths. Links are
followed, because the disk's owner made them (Hugging Face's cache consists of links).

Layouts: Hugging Face https://huggingface.co/docs/huggingface_hub/guides/manage-cache; llama.cpp common/hf-cache.cpp
(the same layout; LLAMA_CACHE replaces its place) and, until spring 2026, user_repo_file.gguf in a folder of its own;
LM Studio https://lmstudio.ai/docs/app/advanced/import-model; Ollama manifest/manifest.go and manifest/paths.go.
"""

import hashlib
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from ggjac.gguf.container import ShardName, shown

HF, OLLAMA = "hf:", "ollama:"
HF_FORMS = "hf:user/repo, hf:user/repo:Q4_K_M or hf:user/repo/path/file.gguf"
OLLAMA_FORMS = "ollama:name, ollama:name:tag or ollama:user/name:tag"
DEFAULT_QUANTS = ("Q4_K_M", "Q8_0")  # the defaults of llama.cpp's -hf (common/download.cpp)
MAX_NAME = 500  # characters
MAX_FILES = 20_000  # visited in one folder tree
MAX_SHARDS = 1000
MAX_DEPTH = 6  # folders between a repository's copy and a file in it
MAX_MANIFEST_BYTES = 1 << 20  # real ones are some kilobytes
MAX_SETTINGS_BYTES = 4096  # of the file with the path of LM Studio's folder
MAX_BUILDS = 16  # of one Ollama model; each may be a file of its own

_HF_PART = r"[A-Za-z0-9_]+(?:[.-][A-Za-z0-9_]+)*"  # llama.cpp's is_valid_repo_id
_HF_NAME = re.compile(rf"(?P<user>{_HF_PART})/(?P<repo>{_HF_PART})(?::(?P<quant>[A-Za-z0-9_.-]+)|/(?P<file>.+))?")
_REVISION = re.compile(r"[0-9a-f]{40}")
# GGUF files that are not models: projectors, calibration data, draft heads (gguf_filename_is_model upstream).
_NO_MODEL = ("mmproj", "imatrix", "mtp-", "eagle3-", "dflash-", "dspark-")

_OLLAMA_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]|\.(?!\.))*"
_OLLAMA_NAME = re.compile(
    rf"(?:(?:(?P<host>{_OLLAMA_PART}(?::[0-9]{{1,5}})?)/)?(?P<space>{_OLLAMA_PART})/)?"
    rf"(?P<model>{_OLLAMA_PART})(?::(?P<tag>{_OLLAMA_PART}))?"
)
_OLLAMA_HOSTS = ("registry.ollama.ai", "ollama.com")  # two names of one registry; most disks have the first
_OLLAMA_MANIFESTS = ("manifests-v2", "manifests")  # the newer layout, links to blobs, comes first
# The names of files in the stores of Ollama and of Hugging Face's client.
_BLOB = re.compile(r"sha256-[0-9a-f]{64}|[0-9a-f]{64}|[0-9a-f]{40}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_LAYER = "application/vnd.ollama.image."
_MANIFEST_LIST = "application/vnd.ollama.manifest.list.v2+json"


class HubError(ValueError):
    """A name for which there is no model on this disk; the message is one line."""


class DownloadError(HubError):
    """A requested download that failed; the message is one line."""


def resolve(name: str | os.PathLike[str], *, download: bool = False) -> Path:
    """Return the path of a model by name; of a split one, that of its first shard.

    A name that does not begin with `hf:` or `ollama:`, or under which a file exists, is a path and returned unchanged.
    With `download`, an `hf:` model that is not on this disk is fetched with `huggingface_hub` into Hugging Face's
    cache.

    Raises:
        HubError: the name is malformed, or its model is not on this disk, incomplete, or one of several that match.
        DownloadError: the download failed.
    """
    if not isinstance(name, str) or not name.startswith((HF, OLLAMA)) or os.path.exists(name):
        return Path(name)
    if name.startswith(OLLAMA):
        return _find_ollama(name)
    return _find_hf(name, download)


def title(path: Path, asked: str | None = None, named: Any = None) -> str:
    """Return a short name for a model, fit for a folder's.

    It is the name under which Ollama has it, or the file's own; and where that is a hash, as in the stores of Ollama
    and Hugging Face, that of a link to it, or the name that the model gives itself.

    Args:
        path: of the file.
        asked: as `resolve` took it, if it was found by name.
        named: the file's `general.name`.
    """
    if asked and asked.startswith(OLLAMA) and (match := _OLLAMA_NAME.fullmatch(asked.removeprefix(OLLAMA))):
        tag = match["tag"] or "latest"
        return match["model"] if tag == "latest" else f"{match['model']}-{tag}"
    name = path.name
    if _BLOB.fullmatch(name):
        links = _tree(path.parent.parent / "snapshots").values() if path.parent.name == "blobs" else ()
        link = next((link for link in links if os.path.realpath(link) == os.path.realpath(path)), None)
        name = link.name if link else re.sub(r"[^A-Za-z0-9._-]+", "-", str(named or ""))[:60].strip("-.") or name
    shard = ShardName.parse(name)
    return shard.prefix if shard else name.removesuffix(Path(name).suffix if name.lower().endswith(".gguf") else "")


class Digest(NamedTuple):
    """What a store says of a file's content.

    Attributes:
        algorithm: `"sha256"`, or `"git"`: the SHA-1 that Git names a file by.
        value: in hexadecimal.
        source: where it stands.
    """

    algorithm: str
    value: str
    source: str


def expected_digest(path: Path) -> Digest | None:
    """Return the digest under which a store keeps a file; None for a file of no store.

    Ollama names its files by their SHA-256, Hugging Face's client those of its cache by SHA-256 (large ones) or Git's
    SHA-1; beside files in a folder of one's own it writes it to `.cache/huggingface/download/FILE.metadata`.
    """
    real = Path(os.path.realpath(path))
    if _BLOB.fullmatch(real.name):
        return _digest(real.name.removeprefix("sha256-"), "the file's name in its store")
    for folder in list(real.parents)[:MAX_DEPTH]:
        note = folder / ".cache" / "huggingface" / "download" / f"{real.relative_to(folder)}.metadata"
        lines = _read(note, 1000).decode("ascii", "replace").split("\n")  # commit, digest, time
        if len(lines) > 1 and _BLOB.fullmatch(lines[1]):
            return _digest(lines[1], str(note))
    return None


def _digest(value: str, source: str) -> Digest:
    return Digest("git" if len(value) == 40 else "sha256", value, source)


def git_digest(path: Path) -> str:
    """Return the SHA-1 by which Git names a file's content."""
    digest = hashlib.sha1(b"blob %d\0" % os.path.getsize(path), usedforsecurity=False)
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


# --- Hugging Face, llama.cpp, LM Studio -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _HfName:
    """A parsed `hf:` name; `asked` is the name as given, escaped for messages."""

    asked: str
    user: str
    repo: str
    quant: str | None
    file: str | None


@dataclass(frozen=True)
class _Model:
    """A model in a repository or in a copy of it: one file, or all shards of a split one.

    `file` is the path of the (first) file within the repository; `missing` are the paths of files that are not there.
    """

    file: str
    path: Path
    shards: tuple[str, ...]
    missing: tuple[str, ...]

    @property
    def key(self) -> str:
        """A key equal for the same file under every layout: llama.cpp used to write `_` for `/`."""
        return self.file.replace("/", "_").lower()


def _find_hf(asked: str, download: bool) -> Path:
    name = _parse_hf(asked)
    here = [model for folder, files in _copies(name) for model in _models(files, folder)]
    # Complete models first, so that an interrupted download of one quantization does not hide another.
    complete = [model for model in here if not model.missing]
    found = _choose(complete, name) or _choose(here, name)
    if found and not found.missing:
        return found.path
    if download:
        return _download(name)
    fetch = "add --download to fetch the rest" if found else "add --download to fetch it, or give a path"
    if found:
        first = shown(found.missing[0])
        raise HubError(
            f"{name.asked}: {len(found.missing)} of {len(found.shards)} files missing, starting with "
            f"{first}; looked in {shown(found.path.parent)}; {fetch}"
        )
    places = ", ".join(_described(folder) for folder in _hf_folders())
    if here:
        raise HubError(
            f"{name.asked}: not on this disk; looked in {places}; this repository has here "
            f"{_listed(sorted({model.file for model in here}))}; name one of these, or {fetch}"
        )
    others = _listed(sorted(set(islice(_repositories(), 50))))
    raise HubError(f"{name.asked}: not on this disk; looked in {places}; found there: {others or 'no GGUF'}; {fetch}")


def _parse_hf(asked: str) -> _HfName:
    match = _HF_NAME.fullmatch(asked.removeprefix(HF))
    if match is None or len(asked) > MAX_NAME:
        raise HubError(f"{shown(asked)} is not a model name; write {HF_FORMS}")
    file = match["file"]
    if file is not None and not (_is_inside(file) and file.lower().endswith(".gguf")):
        raise HubError(f"{shown(asked)}: {shown(file)} is not a GGUF file in a repository; write {HF_FORMS}")
    return _HfName(shown(asked), match["user"], match["repo"], match["quant"], file)


def _is_inside(file: str) -> bool:
    """Return whether a path stays inside its repository, on every system."""
    parts = file.split("/")
    return not {"", ".", ".."} & set(parts) and not any(character in file for character in "\\:\0")


def _hf_folders() -> list[Path]:
    """Return the folders that may hold repositories: LLAMA_CACHE, Hugging Face's, llama.cpp's old one, LM Studio's."""
    return list(dict.fromkeys([*_given("LLAMA_CACHE"), _hf_cache(), _llama_cache(), *_lm_studio()]))


def _hf_cache() -> Path:
    """Return Hugging Face's cache, chosen from the environment as huggingface_hub's constants.py and llama.cpp do."""
    for variable, below in (
        ("HF_HUB_CACHE", ""),
        ("HUGGINGFACE_HUB_CACHE", ""),
        ("HF_HOME", "hub"),
        ("XDG_CACHE_HOME", "huggingface/hub"),
    ):
        for folder in _given(variable):
            return folder / below
    return _home() / ".cache" / "huggingface" / "hub"


def _llama_cache() -> Path:
    """Return llama.cpp's own cache (fs_get_cache_directory in common/common.cpp)."""
    for folder in _given("LLAMA_CACHE"):
        return folder
    if sys.platform == "darwin":
        return _home() / "Library" / "Caches" / "llama.cpp"
    variable = "LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME"
    return (*_given(variable), _home() / ".cache")[0] / "llama.cpp"


def _lm_studio() -> list[Path]:
    """Return LM Studio's folders if they exist: that of its settings, the usual one, that of versions before 0.3."""
    pointed = _read(_home() / ".lmstudio-home-pointer", MAX_SETTINGS_BYTES).decode("utf-8", "replace").strip()
    homes = [*([Path(pointed)] if os.path.isabs(pointed) else []), _home() / ".lmstudio"]
    folders = []
    for home in homes:
        settings = _json(home / "settings.json")
        chosen = settings.get("downloadsFolder") if isinstance(settings, dict) else None
        folders += [Path(chosen)] if isinstance(chosen, str) and os.path.isabs(chosen) else []
        folders.append(home / "models")
    folders.append(_home() / ".cache" / "lm-studio" / "models")
    return [folder for folder in dict.fromkeys(folders) if os.path.isdir(folder)]


def _copies(name: _HfName) -> Iterator[tuple[Path, dict[str, Path]]]:
    """Yield each copy of a repository: its folder, and path in the repository -> path on disk."""
    for hub in dict.fromkeys([*_given("LLAMA_CACHE"), _hf_cache()]):
        repository = _child(hub, f"models--{name.user}--{name.repo}")
        for revision in _revisions(repository):
            yield repository / "snapshots" / revision, _tree(repository / "snapshots" / revision)
    yield _llama_cache(), _flat(_llama_cache(), name)
    for folder in _lm_studio():
        repository = _child(_child(folder, name.user), name.repo)
        yield repository, _tree(repository)


def _revisions(repository: Path) -> list[str]:
    """Return the snapshots of a repository: that of `main` first, then from new to old."""
    kept = [name for name in _entries(repository / "snapshots") if _REVISION.fullmatch(name)]
    kept.sort(key=lambda name: -_modified(repository / "snapshots" / name))
    main = _read(repository / "refs" / "main", 100).decode("ascii", "replace").strip()
    return [main] * (main in kept) + [name for name in kept if name != main]


def _tree(folder: Path) -> dict[str, Path]:
    """Return the GGUF files below a folder by their relative path, broken links included."""
    walk = (Path(at, name) for at, _, names in os.walk(folder) for name in names)
    found = [path for path in islice(walk, MAX_FILES) if path.name.lower().endswith(".gguf")]
    return {path.relative_to(folder).as_posix(): path for path in sorted(found)}


def _flat(folder: Path, name: _HfName) -> dict[str, Path]:
    """Return a repository's files in llama.cpp's old cache: `user_repo_path_file.gguf`.

    `a_b/c` and `a/b_c` look alike there. If a manifest (`manifest=user=repo=tag.json`) names a repository whose longer
    prefix begins with this one, files with that prefix belong to it.
    """
    names = list(islice(_entries(folder), MAX_FILES))
    prefix = f"{name.user}_{name.repo}_".lower()
    longer = [f"{user}_{repo}_".lower() for user, repo in _manifests(folder)]
    longer = [other for other in longer if other.startswith(prefix) and other != prefix]
    return {
        entry[len(prefix) :]: folder / entry
        for entry in names
        if entry.lower().startswith(prefix)
        and entry.lower().endswith(".gguf")
        and not entry.lower().startswith(tuple(longer))
    }


def _manifests(folder: Path) -> list[tuple[str, str]]:
    """Return user and repository of each manifest in llama.cpp's old cache."""
    names = (entry.split("=") for entry in islice(_entries(folder), MAX_FILES) if entry.startswith("manifest="))
    return [(parts[1], parts[2]) for parts in names if len(parts) == 4]


def _models(files: Mapping[str, Path], folder: Path) -> list[_Model]:
    """Return the models among files, with shards grouped; a broken link counts as missing."""
    found: dict[str, _Model] = {}
    present = {file for file, path in files.items() if os.path.isfile(path)}
    for file in files:
        if not file.lower().endswith(".gguf") or any(word in file.split("/")[-1].lower() for word in _NO_MODEL):
            continue
        shards = _shards(file)
        path = files.get(shards[0], files[file].with_name(shards[0].split("/")[-1]))
        missing = tuple(shard for shard in shards if shard not in present)
        found[shards[0]] = _Model(shards[0], path, shards, missing)
    return list(found.values())


def _shards(file: str) -> tuple[str, ...]:
    """Return the names of all shards of the model that a file belongs to; its own if it is not split."""
    named = ShardName.parse(file)
    if named is None or not 1 <= named.number <= named.total <= MAX_SHARDS:
        return (file,)
    return tuple(named.sibling(i) for i in range(1, named.total + 1))


def _choose(models: Sequence[_Model], name: _HfName) -> _Model | None:
    """Choose as llama.cpp's -hf does (find_best_model in common/download.cpp), but never silently among several.

    Raises:
        HubError: several different files match.
    """
    distinct = {model.key: model for model in reversed(models)}  # of duplicates, the first in search order
    if name.file:
        return distinct.get(_shards(name.file)[0].replace("/", "_").lower())
    for quant in [name.quant] if name.quant else DEFAULT_QUANTS:
        # Whole words only, unlike llama.cpp: BF16 is not F16. Plain ones before Unsloth's dynamic UD-Q4_K_M.
        for before in (r"(?<![A-Za-z0-9])(?<!UD-)", r"(?<![A-Za-z0-9])"):
            pattern = re.compile(rf"{before}{re.escape(quant)}[./-]", re.IGNORECASE)
            matching = [model for model in distinct.values() if pattern.search(model.file)]
            if matching:
                return _only(matching, name)
    return None if name.quant else _only(list(distinct.values()), name)


def _only(models: list[_Model], name: _HfName) -> _Model | None:
    if len(models) > 1:
        files = sorted(model.file for model in models)
        example = shown(f"{HF}{name.user}/{name.repo}/{files[0]}")
        raise HubError(f"{name.asked}: {len(files)} files match: {_listed(files)}; name one of them, as in {example}")
    return models[0] if models else None


def _repositories() -> Iterator[str]:
    """Yield the repositories on this disk that have GGUF files, as `user/repo`."""
    for hub in dict.fromkeys([*_given("LLAMA_CACHE"), _hf_cache()]):
        for entry in _entries(hub):
            _, _, name = entry.partition("models--")
            if name.count("--") and _tree(hub / entry / "snapshots"):
                yield "/".join(name.split("--", 1))
    for folder in _lm_studio():
        for user in _entries(folder):
            yield from (f"{user}/{repo}" for repo in _entries(folder / user) if _tree(folder / user / repo))


def _download(name: _HfName) -> Path:
    """Fetch a model with all its shards into Hugging Face's cache; return the path of the first."""
    try:
        import huggingface_hub
    except ImportError:
        raise DownloadError(
            f"{name.asked}: --download needs huggingface-hub, which is not installed; pip install huggingface-hub"
        ) from None
    repo_id = f"{name.user}/{name.repo}"
    try:
        files = [file for file in huggingface_hub.HfApi().list_repo_files(repo_id) if _is_inside(file)]
    except Exception as error:
        raise _failed(name, error) from error
    offered = {file: Path(file) for file in files}
    models = [_Model(m.file, m.path, m.shards, ()) for m in _models(offered, Path()) if set(m.shards) <= set(files)]
    chosen = _choose(models, name)
    if chosen is None:
        there = _listed(sorted(model.file for model in models)) or "no GGUF"
        raise DownloadError(f"{name.asked}: no such file in this repository, which has {there}; name one of its files")
    try:
        paths = [huggingface_hub.hf_hub_download(repo_id, file, cache_dir=_hf_cache()) for file in chosen.shards]
    except Exception as error:
        raise _failed(name, error) from error
    return Path(paths[0])


def _failed(name: _HfName, error: Exception) -> DownloadError:
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return DownloadError(
        f"{name.asked}: the download failed ({shown(reason)}); check the name, the network, and `hf auth login`"
    )


# --- Ollama -----------------------------------------------------------------------------------------------------------


def _find_ollama(asked: str) -> Path:
    name = asked.removeprefix(OLLAMA)
    match = _OLLAMA_NAME.fullmatch(name)
    if match is None or len(asked) > MAX_NAME:
        raise HubError(f"{shown(asked)} is not a model name; write {OLLAMA_FORMS}")
    host, space, model, tag = match["host"], match["space"] or "library", match["model"], match["tag"] or "latest"
    folders = _ollama_folders()
    for folder in folders:
        for manifests in _OLLAMA_MANIFESTS:
            for registry in [host] if host and host not in _OLLAMA_HOSTS else _OLLAMA_HOSTS:
                path = folder / manifests
                for part in (registry, space, model, tag):
                    path = _child(path, part)
                if os.path.isfile(path):
                    return _blob(asked, folder, path)
    places = ", ".join(_described(folder) for folder in folders)
    there = sorted({found for folder in folders for found in islice(_ollama_models(folder), MAX_FILES)})
    untagged = name[: -len(tag) - 1] if match["tag"] else name
    tags = [found for found in there if found.lower().startswith(f"{untagged.lower()}:")]
    raise HubError(
        f"{shown(asked)}: not on this disk; looked in {places}; found there: {_listed(tags or there) or 'no models'}; "
        f"to fetch it: ollama pull {name}"
    )


def _ollama_folders() -> list[Path]:
    """Return Ollama's model folders: OLLAMA_MODELS, or the user's and, on Linux, the service's."""
    folders = list(_given("OLLAMA_MODELS")) or [_home() / ".ollama" / "models"]
    if sys.platform == "linux" and not _given("OLLAMA_MODELS"):
        folders.append(Path("/usr/share/ollama/.ollama/models"))
    return folders


def _ollama_models(folder: Path) -> Iterator[str]:
    """Yield the models of a folder under the names that Ollama uses."""
    for manifests in _OLLAMA_MANIFESTS:
        root = folder / manifests
        for host in _entries(root):
            for space in _entries(root / host):
                for model in _entries(root / host / space):
                    for tag in _entries(root / host / space / model):
                        name = f"{host}/{space}/{model}:{tag}"
                        for registry in _OLLAMA_HOSTS:
                            name = name.removeprefix(f"{registry}/")
                        yield name.removeprefix("library/")


def _blob(asked: str, folder: Path, manifest: Path) -> Path:
    """Return the model file that a manifest names, after checking its digest and size.

    Raises:
        HubError: the manifest is damaged or does not name exactly one GGUF file, or that is missing or truncated.
    """
    again = f"fetch it again: ollama pull {asked.removeprefix(OLLAMA)}"

    def fail(message: str) -> HubError:
        return HubError(f"{shown(asked)}: {message}")

    def layers(path: Path, *, child: bool = False) -> list[dict[str, Any]]:
        content = _json(path)
        if not child and isinstance(content, dict) and content.get("mediaType") == _MANIFEST_LIST:
            return [layer for entry in _dicts(content.get("manifests"))[:MAX_BUILDS] for layer in build(entry)]
        found = content.get("layers") if isinstance(content, dict) else None
        if not isinstance(found, list):
            raise fail(f"its manifest {shown(path)} is damaged, or larger than {MAX_MANIFEST_BYTES >> 20} MiB; {again}")
        return _dicts(found)

    def build(entry: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the layers of one build, inline or by reference; none for Apple's MLX, whose builds are not GGUF."""
        if str(entry.get("runner")).lower() == "mlx":
            return []
        return _dicts(entry["layers"]) if "layers" in entry else layers(blob(entry.get("digest")), child=True)

    def blob(digest: Any) -> Path:
        if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            raise fail(f"its manifest {shown(manifest)} has the invalid digest {shown(str(digest))}; {again}")
        path = folder / "blobs" / digest.replace(":", "-")
        if not os.path.isfile(path):
            raise fail(f"its file {shown(path)} is missing; {again}")
        return path

    found = layers(manifest)
    kinds = [str(layer.get("mediaType")).removeprefix(_LAYER) for layer in found]
    if "adapter" in kinds:
        raise fail("it is a model with a LoRA adapter, which ggjac cannot apply; merge the two, or leave it out")
    models = [layer for layer, kind in zip(found, kinds, strict=True) if kind == "model"]
    digests = {str(layer.get("digest")) for layer in models}
    if len(digests) != 1:
        count = len(digests) or "no"
        raise fail(f"its manifest {shown(manifest)} names {count} GGUF files; ggjac needs exactly one; give a path")
    path, size = blob(models[0].get("digest")), models[0].get("size")
    if isinstance(size, int) and os.path.getsize(path) != size:
        raise fail(f"its file {shown(path)} has {os.path.getsize(path)} bytes, but its manifest says {size}; {again}")
    return path


# --- all of them ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """A model on this disk.

    Attributes:
        name: what `resolve` takes: a name, or else the path; None for the bundled demo, which is the default.
        store: the program whose folder holds it.
        path: the file, or the first shard; None if it is not known.
        flaw: why there is no whole file, or None.
    """

    name: str | None
    store: str
    path: Path | None
    flaw: str | None = None


def stored() -> Iterator[Stored]:
    """Yield the models that `resolve` finds on this disk, and the bundled demo; nothing is opened."""
    yield Stored(None, "ggjac", demo_path())
    names = dict.fromkeys([*_repositories(), *(f"{user}/{repo}" for user, repo in _manifests(_llama_cache()))])
    listed: set[Path] = set()
    for user, repo in (name.split("/", 1) for name in names if _is_inside(name)):
        asked = _HfName(f"{HF}{user}/{repo}", user, repo, None, None)
        here = [(model, folder) for folder, files in _copies(asked) for model in _models(files, folder)]
        listed.update(model.path for model, _ in here)
        here.sort(key=lambda found: bool(found[0].missing))  # whole ones first, as `resolve` prefers them
        for model, folder in {found[0].key: found for found in reversed(here)}.values():
            yield _stored_hf(f"{asked.asked}/{model.file}", model, _store_of(folder))
    cache = _llama_cache()
    flat = {name: cache / name for name in islice(_entries(cache), MAX_FILES) if name.lower().endswith(".gguf")}
    for model in _models(flat, cache):
        if model.path not in listed:
            yield _stored_hf(str(model.path), model, "llama.cpp")
    models = (islice(_ollama_models(folder), MAX_FILES) for folder in _ollama_folders())
    for name in dict.fromkeys(chain.from_iterable(models)):
        try:
            yield Stored(f"{OLLAMA}{name}", "Ollama", _find_ollama(f"{OLLAMA}{name}"))
        except HubError as error:
            yield Stored(f"{OLLAMA}{name}", "Ollama", None, str(error))


def places() -> list[str]:
    """Return the folders in which `resolve` and `stored` look, with a note where there is none."""
    return [_described(folder) for folder in [*_hf_folders(), *_ollama_folders()]]


def _stored_hf(name: str, model: _Model, store: str) -> Stored:
    found = _HF_NAME.fullmatch(name.removeprefix(HF))
    name = name if found and len(name) <= MAX_NAME else str(model.path)
    if not model.missing:
        return Stored(name, store, model.path)
    first = shown(model.missing[0])
    return Stored(name, store, model.path, f"{len(model.missing)} of {len(model.shards)} files missing: {first}")


def _store_of(folder: Path) -> str:
    """Return the program that keeps models in a folder, or in one around it."""
    around = {folder, *folder.parents}
    if not around.isdisjoint(_lm_studio()):
        return "LM Studio"
    return "llama.cpp" if _llama_cache() in around else "Hugging Face"


# --- the disk ---------------------------------------------------------------------------------------------------------


def _home() -> Path:
    return Path(os.path.expanduser("~"))  # unlike Path.home, does not raise for a user without a home


def _given(variable: str) -> tuple[Path, ...]:
    """Return the folder that an environment variable names, if it is set."""
    value = os.environ.get(variable)
    return (Path(os.path.expanduser(value)),) if value else ()


def _entries(folder: Path) -> list[str]:
    """Return the names in a folder, sorted; none if it is missing or cannot be read."""
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def _child(folder: Path, name: str) -> Path:
    """Return an entry of a folder, by its exact name, else one that differs only in case: hubs ignore case."""
    if os.path.lexists(folder / name):
        return folder / name
    return folder / next((entry for entry in _entries(folder) if entry.lower() == name.lower()), name)


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _read(path: Path, most: int) -> bytes:
    """Return a regular file's bytes; empty if it has more than `most` or cannot be read."""
    try:
        if not os.path.isfile(path):  # a pipe would block
            return b""
        with path.open("rb") as file:
            content = file.read(most + 1)
    except OSError:
        return b""
    return content if len(content) <= most else b""


def _json(path: Path) -> Any:
    """Return the content of a small JSON file; None if it is not one."""
    try:
        return json.loads(_read(path, MAX_MANIFEST_BYTES))
    except (ValueError, RecursionError):
        return None


def _dicts(values: Any) -> list[dict[str, Any]]:
    return [value for value in values if isinstance(value, dict)] if isinstance(values, list) else []


def _described(folder: Path) -> str:
    """Return a folder's name for a message, with a note if it is absent or cannot be read."""
    home, path = str(_home()), str(folder)
    name = shown(f"~{path[len(home) :]}" if path.startswith(home + os.sep) else path)
    try:
        os.scandir(folder).close()
    except PermissionError:
        return f"{name} (no permission)"
    except OSError:
        return f"{name} (absent)"
    return name


def _listed(names: Iterable[str], most: int = 5) -> str:
    names = list(names)
    return ", ".join(map(shown, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")


def demo_path() -> Path:
    """Return the path of the model that ships with the package; `tools/train_demo.py` made it."""
    return Path(str(resources.files("ggjac") / "data" / "demo.gguf"))
