"""llama.cpp's process: what ends it is reported, what it says is passed on, and nothing of it stays behind."""

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from helpers import invoke

import ggjac
from ggjac import parity, tokenizer
from ggjac.cli import progress
from ggjac.llamacpp import Child, LlamaCppDied, LlamaCppError, missing, server
from ggjac.llamacpp import child as module
from ggjac.llamacpp.server import captured_log, import_llama_cpp, quoted_log
from ggjac.parity import NoRoomError, ParityError, rewrite_as_f32, run_llama_cpp
from ggjac.tokenizer import TokenizerError

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
llama = llama_cpp.llama_cpp


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch) -> Iterator[Path]:
    """Let temporary folders be made in an empty one, and find it empty afterwards."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setattr(parity.machine, "cpus", lambda: 1)
    yield folder
    assert list(folder.iterdir()) == []


def children() -> set[int]:
    """Return the running children of this process."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(os.getpid())], capture_output=True, text=True)
    return {pid for pid in map(int, found.stdout.split()) if Path(f"/proc/{pid}/exe").exists()}


def stand_in(monkeypatch, program: str) -> None:
    """Let another program be the child; it may read a request from stdin."""
    monkeypatch.setattr(module, "COMMAND", (sys.executable, "-c", f"import os, sys, time\n{program}"))


# -- a child that dies -------------------------------------------------------------------------------------------------


def test_a_file_that_llama_cpp_aborts_on(tmp_path, capfd):
    """A norm's weights in half precision: ggml multiplies no such vectors."""
    path = write_half_norms(tmp_path / "half\x1b[2J.gguf")
    with pytest.raises(ParityError) as error:
        run_llama_cpp(path, [1, 2, 3])
    message = str(error.value)
    assert "llama.cpp itself ended while it loaded" in message
    assert "evaluated 3 tokens" in message
    assert "(SIGABRT: " in message
    assert message.endswith("most likely because it does not support a tensor's type or size")
    assert "--no-verify" not in message
    assert "\n" not in message
    assert "\x1b" not in message
    assert not getattr(error.value, "will_not_fit", False)
    assert capfd.readouterr() == ("", "")


def write_half_norms(path: Path) -> Path:
    import gguf

    source = gguf.GGUFReader(tiny.write(path.with_suffix(".source"), vocab=64))
    writer = gguf.GGUFWriter(path, "llama")
    for key, field in source.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            writer.add_key_value(key, field.contents(), field.types[0])
    for t in source.tensors:
        half = "attn_norm" in t.name
        writer.add_tensor(t.name, t.data.astype(np.float16) if half else t.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    "when", ["", "sys.stdin.readline()\n", "sys.stdin.readline(); print('half a reply', end='')\n"]
)
def test_the_signal_and_the_last_words_are_told(tiny_file, tmp_path, monkeypatch, when):
    program = "print('/build/src/ggml.c:12: GGML_ASSERT(x) failed', file=sys.stderr, flush=True)\n"
    stand_in(monkeypatch, f"{when}{program}os.kill(os.getpid(), 11)")
    for call in (lambda: run_llama_cpp(tiny_file("gqa"), [1]), lambda: rewrite_as_f32(tiny_file("gqa"), tmp_path)):
        with pytest.raises(ParityError, match=r"\(SIGSEGV: ggml.c:12: GGML_ASSERT\(x\) failed\)"):
            call()


def test_killed_for_memory_is_a_lack_of_room(tiny_file, monkeypatch):
    stand_in(monkeypatch, "os.kill(os.getpid(), 9)")
    with pytest.raises(NoRoomError, match=r"\(SIGKILL: it gave no reason\), .* there is too little memory") as error:
        run_llama_cpp(tiny_file("gqa"), [1])
    assert error.value.will_not_fit
    # The same where only the vocabulary is read, at once and when it is asked again; and in a comparison of a text.
    model = ggjac.open_model()
    for _ in range(2):
        with pytest.raises(TokenizerError, match="too little memory") as failure:
            model.tokenize("a")
        assert failure.value.will_not_fit
    with pytest.raises(NoRoomError, match="too little memory"):
        ggjac.verify(model, [1], prompt="a")


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("os.kill(os.getpid(), 4)", r"\(SIGILL: .*\), .* build of llama-cpp-python is for another processor"),
        (f"print({module.LOADING!r}, file=sys.stderr, flush=True); os.kill(os.getpid(), 11)",
         r"\(SIGSEGV: it gave no reason\), most likely because its library cannot be loaded: reinstall"),
        (f"print({module.LOADING!r}, {module.LOADED!r}, 'last', sep='\\n', file=sys.stderr, flush=True); os.abort()",
         r"\(SIGABRT: last\), most likely because it does not support a tensor's type or size"),
    ],
)  # fmt: skip
def test_the_file_is_not_blamed_for_the_library(program, expected, tiny_file, monkeypatch):
    stand_in(monkeypatch, program)
    with pytest.raises(ParityError, match=expected):
        run_llama_cpp(tiny_file("gqa"), [1])


@pytest.mark.parametrize("reply", ["noise", "[1]", '{"words": 1}', "{"])
def test_what_is_not_a_reply_is_told(reply, tiny_file, monkeypatch):
    stand_in(monkeypatch, f"print({reply!r}, flush=True); sys.stdin.read()")
    with pytest.raises(ParityError, match=r"llama.cpp's process answered b'.*', which is not a reply: reinstall"):
        run_llama_cpp(tiny_file("gqa"), [1])


def test_a_child_that_hangs_is_ended_and_one_that_works_is_not(tiny_file, monkeypatch):
    monkeypatch.setattr(module, "PATIENCE", 1.0)
    stand_in(monkeypatch, "time.sleep(1000)")
    with pytest.raises(ParityError, match=r"llama.cpp hangs: its process did nothing for 1 s, and was ended"):
        run_llama_cpp(tiny_file("gqa"), [1])
    busy = "end = time.time() + 4\nwhile time.time() < end: pass\n"
    stand_in(monkeypatch, f'{busy}print(\'{{"error": "done", "will_not_fit": false}}\', flush=True)')
    with pytest.raises(ParityError, match=r"^done$"):
        run_llama_cpp(tiny_file("gqa"), [1])
    assert not children()


def test_a_command_that_can_do_without_says_what_it_waits_for_and_goes_on(tiny_file, monkeypatch):
    monkeypatch.setattr(tokenizer, "PATIENCE", 1.0)
    monkeypatch.setattr(progress, "SILENT_SECONDS", 0.1)
    stand_in(monkeypatch, "time.sleep(1000)")
    waited = time.monotonic()
    result = invoke("predict", "-m", tiny_file("tokenizer"), "--tokens", "5,6", "-t", "1")
    assert result.stderr.startswith("waiting for llama.cpp's tokenizer: ")
    assert "Next token" in result.stdout
    text = invoke("predict", "-m", tiny_file("tokenizer"), "-p", "x", "-t", "1", "-q", code=1).stderr
    assert "llama.cpp hangs: its process did nothing for 1 s, and was ended; give token ids" in text
    assert time.monotonic() - waited < 60
    assert not children()


def test_an_exit_code_is_told(tiny_file, monkeypatch):
    stand_in(monkeypatch, "raise ImportError('no such thing')")
    with pytest.raises(ParityError, match="exit code 1: ImportError: no such thing"):
        run_llama_cpp(tiny_file("gqa"), [1])
    monkeypatch.setattr(module, "COMMAND", ("/nowhere/python",))
    with pytest.raises(ParityError, match="cannot be started"):
        run_llama_cpp(tiny_file("gqa"), [1])


def test_a_half_written_copy_is_removed(tiny_file, tmp_path, monkeypatch):
    target = tmp_path / "copy"
    target.mkdir()
    stand_in(monkeypatch, f"sys.stdin.readline(); open({str(target / 'f32.gguf')!r}, 'w').close(); os.abort()")
    with pytest.raises(ParityError, match=r"while it rewrote .* as F32.*SIGABRT"):
        rewrite_as_f32(tiny_file("gqa"), target)
    assert list(target.iterdir()) == []


# -- a child that answers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", [True, False])
def test_what_the_child_says_is_passed_on(tiny_file, monkeypatch, room):
    reply = f'{{"error": "too \\\\u001b[2J big", "will_not_fit": {str(room).lower()}}}'
    stand_in(monkeypatch, f"sys.stdin.readline(); print('{reply}', flush=True); sys.stdin.read()")
    with pytest.raises(ParityError) as error:
        run_llama_cpp(tiny_file("gqa"), [1])
    assert str(error.value) == r"too \x1b[2J big"
    assert isinstance(error.value, NoRoomError) == room
    assert getattr(error.value, "will_not_fit", False) == room


def test_any_exception_in_the_child_is_passed_on():
    with Child() as child:
        with pytest.raises(LlamaCppError, match=r"TypeError: .*unexpected keyword"):
            child.ask("tokenize", nonsense=1)
        with pytest.raises(LlamaCppError, match=r"llama.cpp cannot rewrite /nowhere as F32 in /nowhere: "):
            child.ask("rewrite", source="/nowhere", target="/nowhere/x", threads=1)


def test_a_full_disk_while_results_are_written():
    refusal = server._refusal(OSError(28, "No space left on device"))
    assert refusal["will_not_fit"]
    assert "TMPDIR" in refusal["error"]
    assert server._refusal(MemoryError())["will_not_fit"]


def test_the_child_is_light_and_takes_nothing_from_the_current_folder(tiny_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder])
    for name in ("numpy", "llama_cpp", "json", "resource"):
        Path(f"{name}.py").write_text("raise SystemExit('taken from the current folder')")
    program = """
import atexit, os, runpy, sys
end = os._exit
os._exit = lambda code: (print(*sys.modules, file=open("modules", "w"), flush=True), end(code))
runpy.run_module("ggjac.llamacpp.server", run_name="__main__")
"""
    command = (sys.executable, "-P", "-c", program)
    monkeypatch.setattr(module, "COMMAND", command)
    run_llama_cpp(tiny_file("gqa"), [1, 2])
    modules = Path("modules").read_text().split()
    assert "llama_cpp.llama_cpp" in modules
    assert not {"torch", "gguf", "jinja2", "ggjac.parity", "ggjac.gguf"} & set(modules)


def test_the_child_prints_nothing_into_its_replies():
    with Child() as child:
        assert child.ask("__init__") is None  # any method will do
        assert not child.closed
    assert child.closed


# -- Ctrl-C ------------------------------------------------------------------------------------------------------------


def test_an_interrupt_ends_the_child_and_removes_the_folder(tiny_file, monkeypatch, temporary):
    before = children()
    stand_in(monkeypatch, "sys.stdin.readline(); time.sleep(60)")
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_llama_cpp(tiny_file("gqa"), [1])
    assert time.monotonic() - start < 10
    timer.join()
    assert children() <= before
    assert list(temporary.iterdir()) == []


def test_the_child_leaves_interrupts_to_us_and_ends_with_us():
    with Child() as child:
        assert child.ask("__init__") is None
        os.kill(child._process.pid, signal.SIGINT)
        time.sleep(0.05)
        assert child.ask("__init__") is None
        child._process.stdin.close()  # as when this process is killed
        assert child._process.wait(timeout=10) == 0


# -- the engine, in this process ---------------------------------------------------------------------------------------


def engine(path: Path, ids: list[int], names=parity.NAMES) -> dict[str, np.ndarray]:
    kept: dict[str, np.ndarray] = {}
    with captured_log(llama) as log:
        server.evaluate(
            llama, path, ids, log=log, keep=lambda name, values: kept.__setitem__(name, values.copy()),
            names=names, prompt=None, threads=1,
        )  # fmt: skip
    return kept


def test_results_arrive_as_they_were(tiny_file):
    here, there = engine(tiny_file("gqa"), [3, 1, 4]), run_llama_cpp(tiny_file("gqa"), [3, 1, 4])
    assert np.array_equal(here.pop("logits"), there.logits.numpy())
    assert list(here) == list(there.tensors)
    assert all(np.array_equal(here[name], there.tensors[name].numpy()) for name in here)


@pytest.mark.parametrize("case", [case for case in ("gqa", "qwen35", "lfm2", "mamba2") if case in tiny.CASES])
def test_a_prompt_knows_nothing_of_the_one_before(tiny_file, case):
    """A recurrent state, unlike keys and values, would pass on what was not dropped."""
    ids = tiny.prompt(case, 8)
    first = engine(tiny_file(case), ids)
    for others in (ids[::-1], ids[:3]):
        engine(tiny_file(case), others)
        again = engine(tiny_file(case), ids)
        assert all(np.array_equal(first[name], again[name]) for name in first)


def test_tensors_arrive_as_rows_of_their_contiguous_axis():
    """As what a delta net yields, [sequences, positions, width]: one sequence leaves [positions, width]."""
    data, kept = np.arange(6, dtype=np.float32), {}
    head = server._TensorHead(llama.GGML_TYPE_F32, None, (3, 2, 1, 1), (4, 12, 24, 24))
    capture = server._Capture(llama, ["model.layers.{}.out"], kept.__setitem__)
    capture._ggml = SimpleNamespace(
        ggml_nbytes=lambda _: 24,
        ggml_nelements=lambda _: 6,
        ggml_backend_tensor_get=lambda tensor, target, offset, size: ctypes.memmove(target, data.ctypes.data, size),
        ggml_get_name=lambda _: b"model.layers.{}.out-0",  # with these braces, as in LFM2's graph
    )
    assert capture._call(ctypes.addressof(head), False, None)
    assert kept["model.layers.{}.out-0"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_strides_are_honoured():
    """A view: 2 rows of 3 elements, 5 elements apart."""
    data, kept = np.arange(10, dtype=np.float32), {}
    head = server._TensorHead(llama.GGML_TYPE_F32, None, (3, 2, 1, 1), (4, 20, 40, 40))
    capture = server._Capture(llama, ["x"], kept.__setitem__)

    def get(tensor, target, offset, size):
        assert (offset, size) == (0, 32)
        ctypes.memmove(target, data.ctypes.data, size)

    capture._ggml = SimpleNamespace(
        ggml_nbytes=lambda _: 32,
        ggml_nelements=lambda _: 6,
        ggml_backend_tensor_get=get,
        ggml_get_name=lambda _: b"x-0",
    )
    assert capture._call(ctypes.addressof(head), False, None)
    assert kept["x-0"].tolist() == [[0, 1, 2], [5, 6, 7]]
    # A struct that is laid out otherwise is noticed.
    capture._ggml.ggml_nelements = lambda _: 7
    assert not capture._call(ctypes.addressof(head), False, None)
    assert "not laid out" in str(capture.error)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_what_goes_wrong_inside_the_callback_surfaces(tiny_file, monkeypatch, error):
    def fail(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(server._Capture, "_copy", fail)
        with pytest.raises(error):
            engine(tiny_file("gqa"), tiny.prompt("gqa"))
    assert len(engine(tiny_file("gqa"), tiny.prompt("gqa"))) > 1


def test_a_failed_rewrite_leaves_nothing(tiny_file, tmp_path, monkeypatch):
    def fail(source, target, params):
        Path(target.decode()).write_bytes(b"half")
        return 1

    monkeypatch.setattr(llama, "llama_model_quantize", fail)
    with pytest.raises(LlamaCppError, match=r"cannot rewrite .* it gave no reason"):
        server.rewrite(llama, tiny_file("q8_0"), tmp_path / "x.gguf", log=[], threads=1)
    assert not (tmp_path / "x.gguf").exists()


def test_an_old_llama_cpp_is_noticed(tiny_file, monkeypatch):
    class Old(ctypes.Structure):
        _fields_ = (("n_ctx", ctypes.c_uint32),)

    monkeypatch.setattr(llama, "llama_context_default_params", Old)
    with pytest.raises(LlamaCppError, match="has no parameter n_batch; update it"):
        engine(tiny_file("gqa"), [1])


def test_the_log_is_captured_and_its_callback_put_back(capfd):
    heard = []
    callback = llama.llama_log_callback(lambda level, text, _: heard.append(text))
    before, data = llama.llama_log_callback(), ctypes.c_void_p()
    llama.llama_log_get(ctypes.byref(before), ctypes.byref(data))
    llama.llama_log_set(callback, data)
    try:
        with captured_log(llama) as log:
            assert not llama.llama_model_load_from_file(b"/nowhere/x.gguf", llama.llama_model_default_params())
        assert "failed to open GGUF file" in quoted_log(log)
        assert "\n" not in quoted_log(log)
        assert heard == []
        llama.llama_model_load_from_file(b"nowhere", llama.llama_model_default_params())
        assert heard != []
    finally:
        llama.llama_log_set(before, data)
    assert capfd.readouterr() == ("", "")
    assert quoted_log([]) == "it gave no reason"
    assert quoted_log([(2, "last words\n"), (2, "...")]) == "last words"


def test_a_missing_or_broken_llama_cpp_is_named(monkeypatch):
    assert missing() is None
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "llama_cpp", None)
        assert "pip install" in (missing() or "")
        with pytest.raises(LlamaCppError, match="pip install llama-cpp-python"):
            import_llama_cpp()
    monkeypatch.setitem(sys.modules, "llama_cpp.llama_cpp", None)
    monkeypatch.delattr(sys.modules["llama_cpp"], "llama_cpp")
    with pytest.raises(LlamaCppError, match=r"cannot be loaded .*reinstall llama-cpp-python") as error:
        import_llama_cpp()
    assert "\n" not in str(error.value)
    assert issubclass(LlamaCppDied, LlamaCppError)
