"""Models by name: fake caches of every layout, hostile ones too; nothing here has a network to touch."""

import builtins
import hashlib
import json
import os
import re
import shutil
import socket
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
from helpers import error, invoke, invoke_json

import ggjac
from ggjac import inventory
from ggjac.gguf import hub
from ggjac.gguf.types import FILE_TYPES

REVISION = "0123456789abcdef0123456789abcdef01234567"
OLDER = "f" * 40
VARIABLES = ("LLAMA_CACHE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "OLLAMA_MODELS")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give every test a home of its own, no variables and no network."""

    def no_network(*args: object, **options: object) -> None:
        raise AssertionError("the network was touched")

    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(socket, "socket", no_network)
    monkeypatch.setattr(socket, "create_connection", no_network)
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


@pytest.fixture
def cache(home: Path) -> Path:
    """Return Hugging Face's cache where no variable moves it."""
    return home / ".cache" / "huggingface" / "hub"


def put(folder: Path, *names: str) -> list[Path]:
    """Write small files; each holds its own path, so that one can be told from another."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(str(folder / name))
    return [folder / name for name in names]


def put_snapshot(cache: Path, repo: str, *names: str, revision: str = REVISION, main: bool = True) -> list[Path]:
    """Write a repository as huggingface_hub does: blobs, and a snapshot of links to them."""
    base = cache / ("models--" + repo.replace("/", "--"))
    links = []
    for name in names:
        blob = base / "blobs" / hashlib.sha256(f"{revision} {name}".encode()).hexdigest()
        put(blob.parent, blob.name)
        link = base / "snapshots" / revision / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
        links.append(link)
    if main:
        put(base, "refs/main")[0].write_text(revision)
    return links


def refused(name: str, *words: str, download: bool = False) -> str:
    """Expect a refusal of one harmless line that has these words; return it."""
    with pytest.raises(hub.HubError) as caught:
        hub.resolve(name, download=download)
    message = str(caught.value)
    assert message.isprintable(), message
    assert len(message) < 1500
    for word in words:
        assert word in message, message
    return message


# --- paths ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["model.gguf", "missing/model.gguf", "", ".", "HF:user/repo", "hf", "C:\\hf:x", "\0"])
def test_ordinary_paths_pass_through(path: str) -> None:
    assert hub.resolve(path) == Path(path)
    assert hub.resolve(Path(path)) == Path(path)


@pytest.mark.parametrize("name", ["hf:user/repo", "hf:x", "ollama:name", "hf:"])
def test_a_file_of_that_name_wins(name: str, cache: Path) -> None:
    put_snapshot(cache, "user/repo", "model.gguf")
    put(Path(), name)
    assert hub.resolve(name) == Path(name)


def test_a_path_object_is_never_a_name(cache: Path) -> None:
    put_snapshot(cache, "user/repo", "model.gguf")
    assert hub.resolve(Path("hf:user/repo")) == Path("hf:user/repo")


# --- where it looks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "value", "folder"),
    [
        ("HF_HUB_CACHE", "a", "a"),
        ("HUGGINGFACE_HUB_CACHE", "a", "a"),
        ("HF_HOME", "a", "a/hub"),
        ("HF_HOME", "~/a", "home/a/hub"),
        ("XDG_CACHE_HOME", "a", "a/huggingface/hub"),
        ("LLAMA_CACHE", "a", "a"),  # llama.cpp's, which took over Hugging Face's layout
        ("HF_HOME", "", "home/.cache/huggingface/hub"),
    ],
)
def test_hugging_face_cache(
    variable: str, value: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (link,) = put_snapshot(tmp_path / folder, "user/repo", "model.gguf")
    monkeypatch.setenv(variable, value if value.startswith("~") or not value else str(tmp_path / value))
    assert hub.resolve("hf:user/repo") == link


def test_variables_rank_as_huggingface_hub_ranks_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranked = [("HF_HUB_CACHE", "1", "1"), ("HF_HOME", "2", "2/hub"), ("XDG_CACHE_HOME", "3", "3/huggingface/hub")]
    for variable, value, folder in reversed(ranked):
        (link,) = put_snapshot(tmp_path / folder, "user/repo", "model.gguf")
        monkeypatch.setenv(variable, str(tmp_path / value))
        assert hub.resolve("hf:user/repo") == link


@pytest.mark.parametrize(
    ("variable", "folder", "platform"),
    [
        ("LLAMA_CACHE", "a", "linux"),
        ("XDG_CACHE_HOME", "a/llama.cpp", "linux"),
        (None, "home/.cache/llama.cpp", "linux"),
        (None, "home/Library/Caches/llama.cpp", "darwin"),
        ("LOCALAPPDATA", "a/llama.cpp", "win32"),
    ],
)
def test_llama_cpp_cache(
    variable: str | None, folder: str, platform: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = put(tmp_path / folder, "user_repo_model-Q4_K_M.gguf")
    put(tmp_path / folder, "user_repo_mmproj-model-f16.gguf", "manifest=user=repo=latest.json", "other_repo_x.gguf")
    monkeypatch.setattr(sys, "platform", platform)
    if variable:
        monkeypatch.setenv(variable, str(tmp_path / "a"))
    assert hub.resolve("hf:user/repo") == path
    assert hub.resolve("hf:user/repo:q4_k_m") == path
    assert hub.resolve("hf:user/repo/model-Q4_K_M.gguf") == path


def test_llama_cpp_wrote_underscores_for_slashes(home: Path) -> None:
    (path,) = put(home / ".cache/llama.cpp", "user_repo_sub_model-Q8_0.gguf")
    assert hub.resolve("hf:user/repo/sub/model-Q8_0.gguf") == path


def test_llama_cpp_manifests_tell_repositories_apart(home: Path) -> None:
    """`user/a` and `user/a_b` share a beginning; the manifest of the latter claims its files."""
    folder = home / ".cache/llama.cpp"
    mine, theirs = put(folder, "user_a_model.gguf", "user_a_b_model-Q4_K_M.gguf")
    put(folder, "manifest=user=a_b=latest.json")
    assert hub.resolve("hf:user/a") == mine
    assert hub.resolve("hf:user/a_b") == theirs


@pytest.mark.parametrize("folder", [".lmstudio/models", ".cache/lm-studio/models"])
def test_lm_studio(folder: str, home: Path) -> None:
    (path,) = put(home / folder, "user/repo/model-Q5_K_M.gguf")
    assert hub.resolve("hf:user/repo") == path
    assert hub.resolve("hf:User/REPO:q5_k_m") == path


def test_lm_studios_own_folders(home: Path, tmp_path: Path) -> None:
    """The folder of its settings, in its usual home or where a pointer says that this is."""
    for at, where in ((home / ".lmstudio", tmp_path / "lm"), (tmp_path / "moved", tmp_path / "other lm")):
        (path,) = put(where, f"u/{at.name.removeprefix('.')}/x-Q4_K_M.gguf")
        put(at, "settings.json")[0].write_text(json.dumps({"downloadsFolder": str(where)}))
        put(home, ".lmstudio-home-pointer")[0].write_text(f"{tmp_path / 'moved'}\n")
        assert hub.resolve(f"hf:u/{path.parent.name}") == path
    (usual,) = put(tmp_path / "moved" / "models", "u/usual/x-Q4_K_M.gguf")
    assert hub.resolve("hf:u/usual") == usual
    refused("hf:a/b", "lm,", "other lm")


SETTINGS: dict[str, Any] = {
    "no JSON": b"{",
    "no object": b"[1]",
    "another type": b'{"downloadsFolder": 5}',
    "a relative path": b'{"downloadsFolder": "models"}',
    "a NUL": b'{"downloadsFolder": "/\\u0000"}',
    "no Unicode": b'{"downloadsFolder": "/\\ud800"}',
    "a file": b'{"downloadsFolder": "/dev/null"}',
    "too long": b'{"downloadsFolder": "' + b"/" * (1 << 20) + b'"}',
    "too deep": b"[" * 100_000,
}


@pytest.mark.parametrize("name", SETTINGS)
def test_odd_settings_of_lm_studio(name: str, home: Path) -> None:
    put(home, ".lmstudio/settings.json")[0].write_bytes(SETTINGS[name])
    put(home, ".lmstudio-home-pointer")[0].write_bytes(b"\xff/x\0")
    put(home, "models/u/r/x.gguf")
    refused("hf:u/r", "not on this disk")
    put(home / ".lmstudio" / "models", "u/r/y.gguf")
    assert hub.resolve("hf:u/r").name == "y.gguf"


def test_the_snapshot_of_main_comes_first(cache: Path) -> None:
    put_snapshot(cache, "user/repo", "model.gguf", "old.gguf", revision=OLDER)
    (current,) = put_snapshot(cache, "user/repo", "model.gguf")
    os.utime(current.parent, (1, 1))  # so that its age does not decide
    assert hub.resolve("hf:user/repo/model.gguf") == current
    assert OLDER in str(hub.resolve("hf:user/repo/old.gguf")), "but what only an older one has is here too"


def test_without_main_the_newest_snapshot(cache: Path) -> None:
    (first,) = put_snapshot(cache, "user/repo", "model.gguf", revision=OLDER, main=False)
    (second,) = put_snapshot(cache, "user/repo", "model.gguf", main=False)
    for newer, older in ((first, second), (second, first)):
        os.utime(older.parent, (1, 1))
        os.utime(newer.parent, (2, 2))
        assert hub.resolve("hf:user/repo") == newer


@pytest.mark.parametrize("main", ["../../../elsewhere", "..", "", "main", REVISION[:-1], "é", "0" * 10**6])
def test_a_hostile_ref_leads_nowhere(main: str, cache: Path, home: Path) -> None:
    put(cache.parent / "elsewhere", "bad.gguf")
    put(cache / "models--user--repo/snapshots", "loose.gguf", "branch/bad.gguf")
    put(cache / "models--user--repo", "refs/main")[0].write_text(main)
    refused("hf:user/repo", "not on this disk")


# --- which file it takes ----------------------------------------------------------------------------------------------

SEVERAL = ["m-Q8_0.gguf", "m-Q4_K_M.gguf", "m-UD-Q4_K_M.gguf", "m-BF16.gguf", "m-IQ4_XS.gguf", "m-Q5_K_S.gguf"]


@pytest.mark.parametrize(
    ("quant", "expected"),
    [
        ("", "m-Q4_K_M.gguf"),
        (":Q4_K_M", "m-Q4_K_M.gguf"),
        (":q4_k_m", "m-Q4_K_M.gguf"),
        (":UD-Q4_K_M", "m-UD-Q4_K_M.gguf"),
        (":q8_0", "m-Q8_0.gguf"),
        (":bf16", "m-BF16.gguf"),
        ("/m-IQ4_XS.gguf", "m-IQ4_XS.gguf"),
        ("/M-iq4_xs.GGUF", "m-IQ4_XS.gguf"),
    ],
)
def test_choice(quant: str, expected: str, cache: Path) -> None:
    links = put_snapshot(cache, "user/repo", *SEVERAL, "mmproj-m-Q4_K_M.gguf", "m-imatrix-Q4_K_M.gguf", "mtp-Q8_0.gguf")
    assert hub.resolve(f"hf:user/repo{quant}") == links[SEVERAL.index(expected)]


@pytest.mark.parametrize("quant", ["F16", "Q4_XS", "Q4_K", "Q5", ".."])
def test_parts_of_words_do_not_match(quant: str, cache: Path) -> None:
    put_snapshot(cache, "user/repo", *SEVERAL)
    refused(f"hf:user/repo:{quant}", "not on this disk", "m-BF16.gguf", "and 1 more", "--download")


def test_default_is_q4_k_m_then_q8_0_then_the_only_file(cache: Path) -> None:
    (bf16,) = put_snapshot(cache, "user/repo", "m-BF16.gguf")
    assert hub.resolve("hf:user/repo") == bf16
    (q8,) = put_snapshot(cache, "user/repo", "m-Q8_0.gguf")
    assert hub.resolve("hf:user/repo") == q8
    (q4,) = put_snapshot(cache, "user/repo", "m-Q4_K_M.gguf")
    assert hub.resolve("hf:user/repo") == q4


def test_several_that_fit_are_listed(cache: Path) -> None:
    put_snapshot(cache, "user/repo", "m-Q5_K_M.gguf", "m-Q6_K.gguf")
    refused("hf:user/repo", "2 files match: m-Q5_K_M.gguf, m-Q6_K.gguf", "hf:user/repo/m-Q5_K_M.gguf")
    put_snapshot(cache, "user/two", "small-Q4_K_M.gguf", "large-Q4_K_M.gguf")
    refused("hf:user/two:Q4_K_M", "2 files match: large-Q4_K_M.gguf, small-Q4_K_M.gguf")


def test_the_same_file_in_two_places_is_one(cache: Path, home: Path) -> None:
    put(home / ".lmstudio/models", "user/repo/m-Q6_K.gguf")
    put(home / ".cache/llama.cpp", "user_repo_m-Q6_K.gguf")
    (link,) = put_snapshot(cache, "user/repo", "m-Q6_K.gguf")
    assert hub.resolve("hf:user/repo") == link


def test_a_folder_may_carry_the_quantization(cache: Path) -> None:
    links = put_snapshot(cache, "user/repo", "Q4_K_M/model.gguf", "Q8_0/model.gguf")
    assert hub.resolve("hf:user/repo") == links[0]
    assert hub.resolve("hf:user/repo:Q8_0") == links[1]


def shards(stem: str, count: int) -> list[str]:
    return [f"{stem}-{i:05}-of-{count:05}.gguf" for i in range(1, count + 1)]


@pytest.mark.parametrize(
    "name", ["", ":Q4_K_M", "/sub/m-Q4_K_M-00001-of-00003.gguf", "/sub/m-Q4_K_M-00003-of-00003.gguf"]
)
def test_the_first_of_all_shards(name: str, cache: Path) -> None:
    links = put_snapshot(cache, "user/repo", *shards("sub/m-Q4_K_M", 3))
    assert hub.resolve(f"hf:user/repo{name}") == links[0]


@pytest.mark.parametrize("gone", [0, 1, 2])
@pytest.mark.parametrize("dangling", [True, False])
def test_missing_shards_are_told(gone: int, dangling: bool, cache: Path) -> None:
    names = shards("m-Q4_K_M", 3)
    links = put_snapshot(cache, "user/repo", *names)
    links[gone].resolve().unlink()
    if not dangling:
        links[gone].unlink()
    refused("hf:user/repo", f"1 of 3 files missing, starting with {names[gone]}", "--download")


def test_a_link_whose_blob_is_gone_is_told(cache: Path) -> None:
    (link,) = put_snapshot(cache, "user/repo", "m-Q4_K_M.gguf")
    link.resolve().unlink()
    refused("hf:user/repo", "1 of 1 files missing", "m-Q4_K_M.gguf", "--download")


def test_a_whole_copy_is_preferred(cache: Path, home: Path) -> None:
    names = shards("m-Q4_K_M", 2)
    put_snapshot(cache, "user/repo", names[0])
    paths = put(home / ".lmstudio/models/user/repo", *names)
    assert hub.resolve("hf:user/repo") == paths[0]


def test_absurd_shard_counts_cost_nothing(cache: Path) -> None:
    put_snapshot(cache, "user/repo", *(f"m{i}-00001-of-99999.gguf" for i in range(50)), "x-00003-of-00002.gguf")
    refused("hf:user/repo", "51 files match", "and 46 more")


@pytest.mark.parametrize("name", ["m-00003-of-00002.gguf", "m-00000-of-00000.gguf", "m-1-of-2.gguf"])
def test_what_only_looks_like_a_shard(name: str, cache: Path) -> None:
    (link,) = put_snapshot(cache, "user/repo", name)
    assert hub.resolve("hf:user/repo") == link


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "hf:", "hf:repo", "hf:/repo", "hf:user/", "hf:user/repo:", "hf:user/repo/", "hf:../repo", "hf:user/..",
        "hf:user/../x.gguf", "hf:user/repo/../x.gguf", "hf:user/repo//x.gguf", "hf:user/repo/./x.gguf",
        "hf:user/repo/a/../../x.gguf", "hf:user/repo/..\\x.gguf", "hf:user/repo/C:x.gguf", "hf:user/repo/x.safetensors",
        "hf:user/re--po", "hf:us--er/repo", "hf:user/.repo", "hf:user/repo:Q4/../x", "hf:user/repo\n", "hf:u\0/repo",
        "hf:user/\x1b[31mrepo", "hf:user/répo", "hf:user/repo/\x1b.gguf\n", "hf:user/repo:Q4_K_M\u202e",
        "hf:" + "a/b" * 400,
    ],
)  # fmt: skip
def test_malformed_hf_names(name: str, cache: Path) -> None:
    put_snapshot(cache, "user/repo", "m-Q4_K_M.gguf")
    refused(name, "write hf:user/repo")


def test_not_here_tells_where_and_what(cache: Path, home: Path) -> None:
    put_snapshot(cache, "some/model", "m.gguf")
    put_snapshot(cache, "only/safetensors", "model.safetensors")
    put(home / ".lmstudio/models", "other/thing/x.gguf")
    message = refused("hf:user/repo:Q4_K_M", "hf:user/repo:Q4_K_M: not on this disk")
    assert "looked in ~/.cache/huggingface/hub, ~/.cache/llama.cpp (absent), ~/.lmstudio/models;" in message
    assert "found there: other/thing, some/model; add --download to fetch it" in message


def test_an_empty_disk(cache: Path) -> None:
    refused("hf:user/repo", "~/.cache/huggingface/hub (absent)", "found there: no GGUF", "--download")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read(cache: Path) -> None:
    cache.mkdir(parents=True)
    cache.chmod(0)
    try:
        refused("hf:user/repo", "~/.cache/huggingface/hub (no permission)")
    finally:
        cache.chmod(0o700)


def test_a_folder_without_permission_is_told(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", denied)
    refused("hf:user/repo", "~/.cache/huggingface/hub (no permission)")


def test_names_on_disk_cannot_steer_the_terminal(cache: Path, home: Path) -> None:
    put_snapshot(cache, "user/repo", "m\x1b[2J\n.gguf", "m\u202e.gguf")
    message = refused("hf:user/repo", "2 files match")
    assert "\\x1b[2J\\n" in message
    put(home / ".lmstudio/models", "evil\x1b[2J/re\npo/x.gguf")
    assert "evil\\x1b[2J/re\\npo" in refused("hf:a/b")


def test_not_files(cache: Path) -> None:
    """Folders and pipes with a model's name are no models, and nothing waits for a writer."""
    folder = cache / "models--user--repo" / "snapshots" / REVISION
    (folder / "m-Q4_K_M.gguf").mkdir(parents=True)
    os.mkfifo(folder / "m-Q8_0.gguf")
    (cache / "models--user--repo" / "refs").mkdir()
    os.mkfifo(cache / "models--user--repo" / "refs" / "main")
    refused("hf:user/repo", "m-Q8_0.gguf")


# --- download ---------------------------------------------------------------------------------------------------------


class FakeHub(types.ModuleType):
    """What `ggjac.gguf.hub` uses of huggingface_hub: a repository of files, and what was fetched of it."""

    def __init__(self, files: list[str]) -> None:
        super().__init__("huggingface_hub")
        self.files, self.fetched = files, []

    def HfApi(self) -> Any:
        return types.SimpleNamespace(list_repo_files=self.list_repo_files)

    def list_repo_files(self, repo_id: str) -> list[str]:
        assert repo_id == "user/repo"
        return self.files

    def hf_hub_download(self, repo_id: str, filename: str, *, cache_dir: Path) -> str:
        self.fetched.append(filename)
        return str(put_snapshot(cache_dir, repo_id, filename)[0])


@pytest.fixture
def remote(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeHub]:
    def offer(*files: str) -> FakeHub:
        module = FakeHub(list(files))
        monkeypatch.setitem(sys.modules, "huggingface_hub", module)
        return module

    return offer


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hf:user/repo", ["m-Q4_K_M.gguf"]),
        ("hf:user/repo:q8_0", shards("m-Q8_0", 2)),
        ("hf:user/repo/m-Q8_0-00002-of-00002.gguf", shards("m-Q8_0", 2)),
    ],
)
def test_download(name: str, expected: list[str], remote: Callable[..., FakeHub], cache: Path) -> None:
    there = remote("README.md", "mmproj-Q4_K_M.gguf", "m-Q4_K_M.gguf", *shards("m-Q8_0", 2), "../m-Q4_K_M.gguf")
    refused(name, "--download")
    assert there.fetched == []
    path = hub.resolve(name, download=True)
    assert there.fetched == expected
    assert path == cache / "models--user--repo/snapshots" / REVISION / expected[0]
    there.fetched.clear()
    assert hub.resolve(name, download=True) == hub.resolve(name) == path, "found without another download"
    assert there.fetched == []


def test_download_completes_shards(remote: Callable[..., FakeHub], cache: Path) -> None:
    names = shards("m-Q4_K_M", 2)
    remote(*names)
    links = put_snapshot(cache, "user/repo", names[1])
    links[0].unlink()
    assert hub.resolve("hf:user/repo", download=True).name == names[0]


def test_download_refuses_what_is_not_there(remote: Callable[..., FakeHub]) -> None:
    there = remote("m-Q5_K_M.gguf", "m-Q6_K.gguf", "../../m-Q8_0.gguf", shards("m-Q4_K_M", 2)[1])
    refused("hf:user/repo:Q8_0", "m-Q5_K_M.gguf, m-Q6_K.gguf", download=True)
    refused("hf:user/repo", "2 files match", download=True)
    assert there.fetched == []


def test_download_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def without(name: str, *args: Any, **options: Any) -> Any:
        if name == "huggingface_hub":
            raise ModuleNotFoundError(name)
        return imported(name, *args, **options)

    monkeypatch.delitem(sys.modules, "huggingface_hub", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    refused("hf:user/repo", "pip install huggingface-hub", download=True)
    with pytest.raises(hub.DownloadError):
        hub.resolve("hf:user/repo", download=True)


@pytest.mark.parametrize("fails", ["list_repo_files", "hf_hub_download"])
def test_download_that_fails(fails: str, remote: Callable[..., FakeHub]) -> None:
    def fail(*args: object, **options: object) -> None:
        raise RuntimeError("401 Client\x1b Error\nsecond line")

    setattr(remote("m-Q4_K_M.gguf"), fails, fail)
    message = refused("hf:user/repo", "the download failed", "401 Client\\x1b Error", download=True)
    assert "second line" not in message


# --- Ollama -----------------------------------------------------------------------------------------------------------

MODEL_LAYER = "application/vnd.ollama.image.model"


def put_ollama(
    models: Path,
    name: str = "registry.ollama.ai/library/llama3.2/latest",
    *,
    content: bytes = b"GGUF",
    manifest: Any = None,
    manifests: str = "manifests",
) -> Path:
    """Write a model as Ollama does; return its blob."""
    digest = hashlib.sha256(content).hexdigest()
    (models / "blobs").mkdir(parents=True, exist_ok=True)
    blob = models / "blobs" / f"sha256-{digest}"
    blob.write_bytes(content)
    if manifest is None:
        manifest = {
            "schemaVersion": 2,
            "config": {"mediaType": "application/vnd.docker.container.image.v1+json", "digest": "sha256:" + "0" * 64},
            "layers": [
                {"mediaType": "application/vnd.ollama.image.projector", "digest": "sha256:" + "1" * 64, "size": 1},
                layer(content),
                {"mediaType": "application/vnd.ollama.image.license", "digest": "sha256:" + "2" * 64, "size": 1},
            ],
        }
    (path,) = put(models / manifests, name)
    path.write_bytes(manifest if isinstance(manifest, bytes) else json.dumps(manifest).encode())
    return blob


def layer(content: bytes = b"GGUF", **changes: Any) -> dict[str, Any]:
    digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
    return {"mediaType": MODEL_LAYER, "digest": digest, "size": len(content), **changes}


@pytest.fixture
def models(home: Path) -> Path:
    return home / ".ollama" / "models"


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("llama3.2", "registry.ollama.ai/library/llama3.2/latest"),
        ("LLAMA3.2:Latest", "registry.ollama.ai/library/llama3.2/latest"),
        ("llama3.2:1b-instruct-q4_K_M", "registry.ollama.ai/library/llama3.2/1b-instruct-q4_K_M"),
        ("user/name:7b", "registry.ollama.ai/user/name/7b"),
        ("hf.co/bartowski/X-GGUF:Q4_K_M", "hf.co/bartowski/X-GGUF/Q4_K_M"),
        ("localhost:5000/me/x", "localhost:5000/me/x/latest"),
        ("registry.ollama.ai/library/llama3.2", "registry.ollama.ai/library/llama3.2/latest"),
        ("x", "ollama.com/library/x/latest"),
    ],
)
def test_ollama(name: str, path: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blob = put_ollama(models, path)
    put_ollama(models, "registry.ollama.ai/library/other/latest", content=b"other")
    assert hub.resolve(f"ollama:{name}") == blob
    moved = tmp_path / "moved"
    shutil.move(models, moved)
    refused(f"ollama:{name}", "not on this disk", "~/.ollama/models (absent)", "/usr/share/ollama/.ollama/models")
    monkeypatch.setenv("OLLAMA_MODELS", str(moved))
    assert hub.resolve(f"ollama:{name}") == moved / "blobs" / blob.name


def test_ollama_not_here(models: Path) -> None:
    put_ollama(models)
    put_ollama(models, "registry.ollama.ai/library/llama3.2/1b")
    put_ollama(models, "hf.co/user/repo/Q8_0")
    refused("ollama:llama3.2:3b", "found there: llama3.2:1b, llama3.2:latest;", "ollama pull llama3.2:3b")
    refused("ollama:qwen", "found there: hf.co/user/repo:Q8_0, llama3.2:1b, llama3.2:latest;", "ollama pull qwen")
    assert "llama3.2" not in refused("ollama:hf.co/user/repo:Q4", "found there: hf.co/user/repo:Q8_0;")


def test_ollama_is_not_downloaded(models: Path, remote: Callable[..., FakeHub]) -> None:
    there = remote("m-Q4_K_M.gguf")
    refused("ollama:llama3.2", "no models", "ollama pull llama3.2", download=True)
    assert there.fetched == []


def test_new_manifests_are_links_to_blobs_and_come_first(models: Path) -> None:
    old, new = put_ollama(models, content=b"old"), put_ollama(models, content=b"new", manifests="manifests-v2")
    path = models / "manifests-v2/registry.ollama.ai/library/llama3.2/latest"
    target = models / "blobs" / f"sha256-{hashlib.sha256(path.read_bytes()).hexdigest()}"
    path.rename(target)
    path.symlink_to(os.path.relpath(target, path.parent))
    assert hub.resolve("ollama:llama3.2") == new != old


LIST = "application/vnd.ollama.manifest.list.v2+json"


def test_manifest_lists(models: Path) -> None:
    """One name, several builds: the one for Apple's MLX is no GGUF, the other may be written out or referred to."""
    mlx = {"runner": "mlx", "layers": [layer(b"mlx")]}
    blob = put_ollama(
        models, manifest={"mediaType": LIST, "manifests": [mlx, {"runner": "ollama", "layers": [layer()]}]}
    )
    assert hub.resolve("ollama:llama3.2") == blob
    child = json.dumps({"layers": [layer()]}).encode()
    put_ollama(models, "x/y/z/t", content=child)
    reference = {"runner": "ollama", "digest": f"sha256:{hashlib.sha256(child).hexdigest()}"}
    put_ollama(models, manifest={"mediaType": LIST, "manifests": [mlx, reference]})
    assert hub.resolve("ollama:llama3.2") == blob


def put_blob(models: Path, manifest: Any) -> dict[str, Any]:
    """Write a manifest as a blob; return a reference to it."""
    content = json.dumps(manifest).encode()
    digest = hashlib.sha256(content).hexdigest()
    put(models / "blobs", f"sha256-{digest}")[0].write_bytes(content)
    return {"runner": "ollama", "digest": f"sha256:{digest}"}


def test_manifest_lists_do_not_nest(models: Path) -> None:
    single = put_blob(models, {"layers": [layer()]})
    nested = put_blob(models, {"mediaType": LIST, "manifests": [single]})
    blob = put_ollama(models, manifest={"mediaType": LIST, "manifests": [single]})
    assert hub.resolve("ollama:llama3.2") == blob
    put_ollama(models, manifest={"mediaType": LIST, "manifests": [nested]})
    refused("ollama:llama3.2", "damaged")


def test_manifest_lists_are_read_up_to_a_cap(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    original = hub._json
    monkeypatch.setattr(hub, "_json", lambda path: read.append(path) or original(path))
    entries = [put_blob(models, {"layers": [layer()]})] * 5000
    blob = put_ollama(models, manifest={"mediaType": LIST, "manifests": entries})
    assert hub.resolve("ollama:llama3.2") == blob
    assert len(read) == 1 + hub.MAX_BUILDS


@pytest.mark.parametrize(
    ("manifest", "words"),
    [
        (b"", "damaged"),
        (b"not JSON", "damaged"),
        (b"\xff\xfe", "damaged"),
        (b"[" * 100_000, "damaged"),
        (b'{"layers": ' + b"9" * 10_000 + b"}", "damaged"),
        (b"[]", "damaged"),
        (b"null", "damaged"),
        ({}, "damaged"),
        ({"layers": {}}, "damaged"),
        ({"layers": []}, "names no GGUF files"),
        ({"layers": [1, None, "x", []]}, "names no GGUF files"),
        ({"layers": [{"mediaType": "application/vnd.ollama.image.tensor"}]}, "names no GGUF files"),
        ({"layers": [layer(), layer(b"x")]}, "names 2 GGUF files"),
        ({"layers": [layer(), layer(b"x", mediaType="application/vnd.ollama.image.adapter")]}, "LoRA adapter"),
        ({"layers": [layer(size=5)]}, "has 4 bytes, but its manifest says 5"),
        ({"layers": [layer(b"gone")]}, "is missing; fetch it again: ollama pull llama3.2"),
        ({"layers": [layer(digest="sha256:../../../secret")]}, "has the invalid digest"),
        ({"layers": [layer(digest="sha256:" + "../" * 21 + "x")]}, "has the invalid digest"),
        ({"layers": [layer(digest="sha256:" + "A" * 64)]}, "has the invalid digest"),
        ({"layers": [layer(digest=layer()["digest"] + "\n")]}, "has the invalid digest"),
        ({"layers": [layer(digest=layer()["digest"] + "/../x")]}, "has the invalid digest"),
        ({"layers": [layer(digest="sha512:" + "0" * 128)]}, "has the invalid digest"),
        ({"layers": [layer(digest="\x1b[2J")]}, "\\x1b[2J"),
        ({"layers": [layer(digest=7)]}, "has the invalid digest"),
        ({"layers": [{"mediaType": MODEL_LAYER}]}, "has the invalid digest"),
        ({"mediaType": LIST}, "names no GGUF files"),
        ({"mediaType": LIST, "manifests": [{"digest": "../../secret"}]}, "has the invalid digest"),
    ],
)
def test_hostile_manifests(manifest: Any, words: str, models: Path) -> None:
    put(models.parent, "secret", "x")
    put_ollama(models, manifest=manifest)
    refused("ollama:llama3.2", "ollama:llama3.2: ", words)


def test_a_manifest_is_read_up_to_its_cap(models: Path) -> None:
    manifest = json.dumps({"layers": [layer()]}).encode()
    blob = put_ollama(models, manifest=manifest + b" " * (hub.MAX_MANIFEST_BYTES - len(manifest)))
    assert hub.resolve("ollama:llama3.2") == blob
    put_ollama(models, manifest=manifest + b" " * (hub.MAX_MANIFEST_BYTES - len(manifest) + 1))
    refused("ollama:llama3.2", "larger than 1 MiB")


def test_a_manifest_that_is_no_file(models: Path) -> None:
    put_ollama(models, "registry.ollama.ai/library/other/latest")
    folder = models / "manifests/registry.ollama.ai/library/llama3.2"
    (folder / "latest").mkdir(parents=True)
    refused("ollama:llama3.2", "not on this disk")
    os.mkfifo(folder / "pipe")
    refused("ollama:llama3.2:pipe", "not on this disk")


@pytest.mark.parametrize(
    "name",
    [
        "", ":", "x:", ":x", "/x", "x/", "..", "../x", "x/..", "x:..", "a/../b", "x:../../y", ".", "x/./y", "a/b/c/d",
        "x..y", "x y", "x\n", "\x1b[2J", "x:\u202e", "x\\y", "C:\\x", "x\0", "a:b/c", "~/x", "$HOME", "x" * 600,
    ],
)  # fmt: skip
def test_malformed_ollama_names(name: str, models: Path) -> None:
    put_ollama(models)
    put(models, "secret", "y")
    refused(f"ollama:{name}", "write ollama:name")


def test_ollama_names_on_disk_cannot_steer_the_terminal(models: Path) -> None:
    put_ollama(models, "registry.ollama.ai/library/x\x1b[2J/la\ntest")
    assert "x\\x1b[2J:la\\ntest" in refused("ollama:y")


# --- the commands and the library -------------------------------------------------------------------------------------


@pytest.fixture
def real(tiny_file: Callable[..., Path], cache: Path, models: Path) -> Path:
    """Put a model that runs where Hugging Face's and Ollama's are."""
    path = tiny_file("plain")
    link = put_snapshot(cache, "user/repo", "tiny-Q4_K_M.gguf")[0]
    shutil.copy(path, link.resolve())
    put_ollama(models, content=path.read_bytes())
    return path


@pytest.mark.parametrize("name", ["hf:user/repo", "hf:user/repo:q4_k_m", "ollama:llama3.2", "ollama:llama3.2:latest"])
def test_commands_and_library_take_names(name: str, real: Path) -> None:
    content = json.loads(invoke("info", "-m", name, "--format", "json").stdout)
    expected = json.loads(invoke("info", "-m", str(real), "--format", "json").stdout)
    assert content["path"] == str(hub.resolve(name))
    assert content["fingerprint"] == expected["fingerprint"]
    invoke("predict", "-m", name, "--tokens", "1,2,3", "-t", "1")
    assert ggjac.open_model(name).path == hub.resolve(name)


@pytest.mark.parametrize("command", ["info", "predict", "svd"])
def test_errors_are_usage_errors(command: str, cache: Path) -> None:
    put_snapshot(cache, "user/repo", "m-Q4_K_M.gguf", "m\x1b[2J-Q8_0.gguf")
    assert "m\\x1b[2J-Q8_0.gguf" in error(command, "-m", "hf:user/repo:Q6_K", code=2)
    assert "write hf:user/repo" in error(command, "-m", "hf:\x1b[2J", code=2)
    assert "ollama pull x" in error(command, "-m", "ollama:x", code=2)
    assert "does not exist" in error(command, "-m", "missing.gguf", code=2)


@pytest.mark.parametrize("order", [["-m", "hf:user/repo", "--download"], ["--download", "-m", "hf:user/repo"]])
def test_download_flag(order: list[str], remote: Callable[..., FakeHub], real: Path, cache: Path) -> None:
    shutil.rmtree(cache)
    there = remote("m-Q4_K_M.gguf")
    error("info", "-m", "hf:user/repo", code=2)
    assert there.fetched == []
    error("info", *order, code=1)  # fetched, but what the fake fetches is no GGUF
    assert there.fetched == ["m-Q4_K_M.gguf"]


def test_a_failed_download_is_not_a_usage_error(remote: Callable[..., FakeHub]) -> None:
    remote().list_repo_files = None  # type: ignore[assignment]  # not callable
    assert "the download failed" in error("info", "-m", "hf:user/repo", "--download", code=1)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hf:user/repo", "tiny-Q4_K_M"),
        ("hf:user/repo:q4_k_m", "tiny-Q4_K_M"),
        ("ollama:llama3.2", "llama3.2"),
        ("ollama:llama3.2:latest", "llama3.2"),
        ("ollama:llama3.2:1b-q4", "llama3.2-1b-q4"),
        ("ollama:user/model:v1", "model-v1"),
        ("ollama:localhost:5000/space/model", "model"),
    ],
)
def test_runs_are_named_as_the_model_was_asked_for(
    name: str, expected: str, real: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name.startswith("ollama:") and "latest" not in name and name != "ollama:llama3.2":
        monkeypatch.setattr(hub, "_find_ollama", lambda _: next(models.glob("blobs/sha256-*")))
    monkeypatch.chdir(tmp_path)
    invoke("analyze", "-m", name, "--tokens", "1,2,3", "-t", "1", "-k", "1", "--no-verify")
    (folder,) = Path("ggjac-runs").iterdir()
    assert re.fullmatch(rf"{re.escape(expected)}-\d{{8}}-\d{{6}}", folder.name)
    model = json.loads((folder / "run.json").read_text())["model"]
    assert model["asked"] == name
    assert Path(model["path"]) == hub.resolve(name)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert name in page
    assert ggjac.open_model(name).asked == name
    assert " ".join(invoke("info", "-m", name).stdout.split()).startswith(f"{name} ({hub.resolve(name)}): GGUF version")
    assert invoke_json("info", "-m", name)["asked"] == name
    assert ggjac.open_model(name).title == expected


def test_a_hash_is_no_title(real: Path, cache: Path, models: Path) -> None:
    link = next(cache.rglob("tiny-Q4_K_M.gguf"))
    blob = next(models.glob("blobs/sha256-*"))
    assert link.is_symlink()
    assert ggjac.open_model(link.resolve()).title == "tiny-Q4_K_M", "that of the link to it"
    assert hub.title(blob, None, "Llama 3.2 / 1B\x1b[2J Instruct") == "Llama-3.2-1B-2J-Instruct"
    assert hub.title(blob, None, "../..") == hub.title(blob) == hub.title(blob, None, ["x"][:0]) == blob.name
    assert hub.title(Path("a/b-Q8_0.gguf")) == hub.title(Path("b-Q8_0.gguf"), "b-Q8_0.gguf") == "b-Q8_0"
    assert hub.title(Path("model-00001-of-00003.gguf")) == "model"
    assert hub.title(Path("v1.5")) == "v1.5"
    assert json.loads(invoke("predict", "--tokens", "1,2", "--format", "json").stdout)["model"]["asked"] is None


# --- all models -------------------------------------------------------------------------------------------------------


def listed() -> dict[str | None, inventory.LocalModel]:
    """Return the models on this disk by name; every name leads to its own path."""
    found = ggjac.local_models()
    for model in found:
        if model.path and not (model.unsupported_because or "").startswith(("1 of", "2 of")):
            assert hub.resolve(model.name or hub.demo_path()) == Path(model.path)
    by_name = {model.name: model for model in found}
    assert len(by_name) == len(found)
    return by_name


def test_the_demo_is_always_there() -> None:
    assert list(listed()) == [None]
    (demo,) = listed().values()
    assert (demo.store, demo.quantization, demo.architecture, demo.supported) == ("ggjac", "Q4_K_M", "llama", True)
    assert demo.bytes == hub.demo_path().stat().st_size


def test_models_of_every_store(
    tiny_file: Callable[..., Path], cache: Path, models: Path, home: Path, tmp_path: Path
) -> None:
    content = tiny_file("q8_0").read_bytes()
    links = put_snapshot(cache, "user/repo", "m-Q4_K_M.gguf", "sub/m-Q8_0.gguf", "mmproj-F16.gguf", "README.md")
    put_snapshot(cache, "user/repo", "m-Q4_K_M.gguf", revision=OLDER, main=False)
    put_snapshot(cache, "user/cut", *shards("m", 3))[1].resolve().unlink()
    put_snapshot(cache, "user/nothing", "config.json")
    old = home / ".cache" / "llama.cpp"
    flat = put(old, "me_mine_m-F16.gguf", "somebody_else.gguf", "manifest=me=mine=latest.json")
    studio = put(home / ".lmstudio" / "models", "u/r/x.gguf", "odd name/r/y.gguf")
    for path in [*links[:2], *flat[:2], *studio]:
        path.write_bytes(content)
    put_ollama(models, content=content)
    put_ollama(models, "registry.ollama.ai/library/gone/1b", content=b"x").unlink()
    found = listed()
    assert {(name, model.store) for name, model in found.items()} == {
        (None, "ggjac"),
        ("hf:user/repo/m-Q4_K_M.gguf", "Hugging Face"),
        ("hf:user/repo/sub/m-Q8_0.gguf", "Hugging Face"),
        ("hf:user/cut/m-00001-of-00003.gguf", "Hugging Face"),
        ("hf:me/mine/m-F16.gguf", "llama.cpp"),
        (str(flat[1]), "llama.cpp"),
        ("hf:u/r/x.gguf", "LM Studio"),
        (str(studio[1]), "LM Studio"),
        ("ollama:llama3.2:latest", "Ollama"),
        ("ollama:gone:1b", "Ollama"),
    }
    broken = {name for name, model in found.items() if not model.supported}
    assert broken == {"hf:user/cut/m-00001-of-00003.gguf", "ollama:gone:1b"}
    assert (found["hf:user/cut/m-00001-of-00003.gguf"].unsupported_because or "").startswith(
        "1 of 3 files missing: m-0"
    )
    assert "is missing; fetch it again" in (found["ollama:gone:1b"].unsupported_because or "")
    assert all(found[name].bytes == len(content) for name in found.keys() - broken - {None})
    assert all(found[name].quantization == "Q8_0" for name in found.keys() - broken - {None})


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "the file is empty"), (b"PK\x03\x04" + bytes(100), "zip archive"), (b"GGUF\3", "has 1 left")],
)
def test_a_broken_file_is_a_row(content: bytes, words: str, cache: Path) -> None:
    put_snapshot(cache, "user/repo", "m.gguf")[0].write_bytes(content)
    put_snapshot(cache, "user/pipe", "p.gguf")[0].resolve().unlink()
    found = listed()["hf:user/repo/m.gguf"]
    assert not found.supported
    assert found.bytes is found.architecture is found.quantization is None
    assert words in (found.unsupported_because or "")
    done = invoke("models").stdout
    assert "hf:user/repo/m.gguf: " in done
    assert found.path not in done.split("Looked in")[0], "the name says which file it is"
    assert words in " ".join(done.split())


def test_names_on_disk_lead_nowhere_else(cache: Path, home: Path, tmp_path: Path) -> None:
    """What a stranger's download could be called: two dots, terminal codes."""
    put(tmp_path, "secret.gguf")
    put(home / ".lmstudio" / "models", "u/r/x.gguf")
    put_snapshot(cache, "../..", "a.gguf")
    put_snapshot(cache, "user/\x1b[2J", "b.gguf")
    put(home / ".cache" / "llama.cpp", "manifest=..=..=latest.json", "manifest=.=..=latest.json")
    paths = {model.path for model in ggjac.local_models()}
    assert not any("secret" in str(path) for path in paths)
    assert any("[2J" in str(path) for path in paths)
    assert "\x1b" not in invoke("models").stdout


def test_models_as_json(real: Path) -> None:
    content = invoke_json("models")
    assert content["schema_version"] == 1
    assert [model.data() for model in ggjac.local_models()] == content["models"]
    assert any(folder.startswith("~/.cache/huggingface/hub") for folder in content["folders"])


def test_the_names_of_mixtures_of_types_are_those_of_gguf() -> None:
    theirs = {int(kind): kind.name.removeprefix("MOSTLY_").removeprefix("ALL_") for kind in gguf.LlamaFileType}
    ours = FILE_TYPES.items()
    assert {id: name for id, name in theirs.items() if name != "GUESSED"}.items() == ours


def test_a_model_in_two_of_ollamas_folders_is_one(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_ollama(models)
    put_ollama(tmp_path)
    monkeypatch.setattr(hub, "_ollama_folders", lambda: [models, tmp_path])
    assert [model.name for model in hub.stored()] == [None, "ollama:llama3.2:latest"]


@pytest.mark.parametrize("name", ["hf:", "ollama:"])
def test_a_prefix_alone_is_no_name(name: str) -> None:
    with pytest.raises(hub.HubError, match=rf"^{name} is not a model name; write {name}"):
        hub.resolve(name)
