"""What stands for `python` in tests of small runs ends, answers and is signalled as `python` does."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from running import forked_python, train_environment

SCRIPT = """
import atexit, os, signal, sys, time
atexit.register(print, "at exit")
print(sys.argv[1:], os.getcwd(), os.environ["OF_THE_TEST"], os.environ.get("PYTHON_EXEC") != sys.executable, flush=True)
print("to stderr", file=sys.stderr)
if sys.argv[1] == "wait":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
    print("ready", flush=True)
    time.sleep(60)
elif sys.argv[1] == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit("error: wrong" if sys.argv[1] == "fail" else int(sys.argv[1]))
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    file = tmp_path / "script.py"
    file.write_text(SCRIPT)
    return file


def start(python: str, script: Path, argument: str) -> subprocess.Popen[str]:
    environment = train_environment() | forked_python()[1] | {"OF_THE_TEST": "yes"}
    return subprocess.Popen(
        [python, script, argument],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=script.parent,
    )  # fmt: skip


@pytest.mark.parametrize("argument", ["0", "3", "fail", "kill"])
def test_it_ends_and_prints_as_python_does(argument: str, script: Path) -> None:
    expected, found = ((*process.communicate(), process.returncode) for process in (
        start(python, script, argument) for python in (sys.executable, forked_python()[0])
    ))  # fmt: skip
    assert found == expected
    assert found[0].startswith(f"['{argument}'] {script.parent} yes")


def test_a_signal_reaches_it(script: Path) -> None:
    process = start(forked_python()[0], script, "wait")
    while process.stdout.readline() != "ready\n":
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 7
    assert process.stdout.read() == "at exit\n"


def test_it_runs_modules(script: Path) -> None:
    (script.parent / "module.py").write_text("import sys\nprint(__name__, sys.argv[1:])\n")
    python, server = forked_python()
    command = [python, "-u", "-m", "module", "argument"]
    result = subprocess.run(command, capture_output=True, text=True, env=train_environment() | server, cwd=script.parent)
    assert result.stdout == "__main__ ['argument']\n", result.stderr
