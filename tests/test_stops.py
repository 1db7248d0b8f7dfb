"""A command that is asked to stop ends in one line and with the signal's exit code, wherever it is: above all while
onnxruntime-genai is imported and opens a bundle."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.command_line import ROOT, called, run
from tests.exports import Exports
from toolkit.apart import run_apart

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no such signals to one process")
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
# A runtime that is asked to stop at one moment. Importing goes as numpy's import from C does: what interrupts it is an
# ImportError afterwards. `Model` returns as native code does, which hears of a signal later.
RUNTIME = """
import importlib, os, time
AT, NUMBER = {at!r}, {number}

def here(at):
    if at == AT:
        os.kill(os.getpid(), NUMBER)

try:
    importlib.import_module("interrupted")
    here("import")
    sum(range(1000))
except BaseException as problem:
    raise ImportError("import numpy failed") from problem

class GeneratorParams:
    pass

class Model:
    def __init__(self, folder):
        here("Model")
        if AT == "import":
            time.sleep(10)

class Tokenizer:
    def __init__(self, model):
        here("Tokenizer")
        raise RuntimeError("went on")
"""


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is searched for modules before all others."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "interrupted.py").write_text("", encoding="utf-8")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{ROOT}")
    for name in ("onnxruntime_genai", "interrupted"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return folder / "onnxruntime_genai.py"


def _is_one_line(code: int, said: str, number: signal.Signals) -> bool:
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    stopped = errors and ("interrupted" if number == signal.SIGINT else "ended by a signal") in errors[0]
    return code == CODES[number] and len(errors) == 1 and bool(stopped) and said.splitlines()[-1] == errors[0]


@pytest.mark.parametrize("number", CODES)
@pytest.mark.parametrize("at", ["import", "Model", "Tokenizer"])
def test_while_a_bundle_is_opened(at: str, number: signal.Signals, runtime: Path, exports: Exports) -> None:
    runtime.write_text(RUNTIME.format(at=at, number=int(number)), encoding="utf-8")
    # A signal that waits for an import's end would reach who runs the tests if it came too late.
    done = (run if at == "import" else called)("generate", str(exports("cpu")), "--prompt", "x")
    sys.modules.pop("onnxruntime_genai", None)
    assert done.stdout == "" and _is_one_line(done.returncode, done.stderr, number), done
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("number", CODES)
def test_while_an_export_has_its_bundle_opened(
    number: signal.Signals, runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A child opens it, and its parent is asked to stop; the same command then goes on."""
    script = f"import os, time\nos.kill(os.getppid(), {int(number)})\ntime.sleep(60)\n"
    runtime.with_name("interrupted.py").write_text(script, encoding="utf-8")
    words = ["export", "tiny-r1-cpu", "--quality", "fast", "--out", str(tmp_path / "b"), "--no-validate"]
    with monkeypatch.context() as patched:
        patched.setattr("toolkit.evaluate.opens.run_apart", lambda _, job, **how: run_apart("interrupted", job, **how))
        begin = time.monotonic()
        done = called(*words)
    assert _is_one_line(done.returncode, done.stderr, number) and time.monotonic() - begin < 60, done
    assert "goes on from here" in done.stderr and not (tmp_path / "b").exists()
    done = called(*words)
    assert done.returncode == 0 and "\npack " not in done.stderr, done
    assert called("verify", str(tmp_path / "b")).returncode == 0


@pytest.mark.parametrize("number", CODES)
@pytest.mark.parametrize("where", ["import", "main", "after"])
def test_before_the_command_and_after_it(where: str, number: signal.Signals, tmp_path: Path) -> None:
    """An import that is under way ends first; what comes when all is done changes nothing any more."""
    kill = f"import os; os.kill(os.getpid(), {int(number)})\n"
    fake = tmp_path / "fake.py"
    fake.write_text((kill if where == "import" else "") + "imported = True\ndef main():\n", encoding="utf-8")
    with fake.open("a", encoding="utf-8") as file:
        file.write(f"    {kill if where == 'main' else ''}\n    import time; time.sleep({5 * (where == 'import')})\n")
        file.write("    raise SystemExit(1)\n")
    atexit = f"import atexit; atexit.register(lambda: __import__('os').kill(__import__('os').getpid(), {int(number)}))"
    script = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import toolkit.cli as cli, toolkit.__main__ as entry\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'toolkit.cli.commands':\n"
        f"            import importlib.util as u; return u.spec_from_file_location(name, {str(fake)!r})\n"
        "sys.meta_path.insert(0, Finder())\n"
        f"{atexit if where == 'after' else ''}\nentry.run()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=60)
    if where == "after":
        assert (done.returncode, done.stderr) == (1, "")
    else:
        assert (done.returncode, done.stderr) == (CODES[number], "error: stopped by a signal\n")


def test_what_is_turned_off_stays_off(tmp_path: Path) -> None:
    """As a shell starts what runs in the background."""
    script = (
        "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "from toolkit.cli.stops import heed_stops; heed_stops(); signal.raise_signal(signal.SIGINT); print('on')\n"
        "signal.raise_signal(signal.SIGTERM); print('never')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "on\n" and done.returncode == 1 and "Stopped" in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no such signals to one process")
@pytest.mark.parametrize("number", CODES)
@pytest.mark.parametrize("where", ["finalizer", "cleared"])
def test_a_stop_that_python_drops_is_sent_again(where: str, number: signal.Signals) -> None:
    """In a finalizer Python prints the exception and goes on; code in C that asks whether there is an attribute clears
    it without a word."""
    script = (
        "import ctypes, os, sys, time; import toolkit.cli.stops as stops; stops.heed_stops()\n"
        f"def stop(*_): os.kill(os.getpid(), {int(number)}); time.sleep(0)\n"
        "class Finalizer: __del__ = stop\n"
        "class Asked: __getattr__ = stop\n"
        "has = ctypes.pythonapi.PyObject_HasAttrString\n"
        "try:\n"
        f"    {'Finalizer()' if where == 'finalizer' else 'has(ctypes.py_object(Asked()), bytes([97]))'}\n"
        "    print('dropped', flush=True); time.sleep(20)\n"
        "except stops.Stopped as stop: stops.end_at_once(); time.sleep(0.1); print('heard'); sys.exit(stop.code)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (done.stdout, done.returncode) == ("dropped\nheard\n", CODES[number])
