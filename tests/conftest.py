"""What the tests share: a project folder of one's own, and the real command."""
import json, os, signal, subprocess, sys
from pathlib import Path

import pytest

root = Path(__file__).resolve().parent.parent
os.environ.setdefault("SLML_TRACKING", "off")  # the tests of tracking switch it on
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN: signal.signal(signal.SIGINT, signal.default_int_handler)  # as a shell starts what runs behind it: the commands under test would not hear Ctrl-C


class Project:
    "A folder with params/, in which `slml` is typed as a user types it."

    def __init__(self, folder):
        self.folder = Path(folder)
        (self.folder / "params").mkdir(exist_ok=True)

    def slml(self, *argv, timeout=600, **env):
        "Type a command; exit code, standard output, standard error."
        r = subprocess.run(self.command(*argv), cwd=self.folder, env=self.environment(**env), capture_output=True, text=True, timeout=timeout)
        return r.returncode, r.stdout, r.stderr

    def run(self, *argv, **env):
        "`slml run … --json`: exit code and the document."
        code, out, err = self.slml("run", *argv, "--json", **env)
        assert out, err
        return code, json.loads(out)

    def command(self, *argv): return [sys.executable, "-c", "import sys; from slml_nb.cli import main; sys.exit(main())", *argv]
    def environment(self, **env): return {**os.environ, "PYTHONPATH": str(root), "COLUMNS": "200", **env}

    def write(self, name, content):
        "A file in the project; its path as one would type it."
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return name

    def left_behind(self):
        "Files that are neither finished nor hidden in a store: there must be none."
        return [p for p in self.folder.rglob(".*.*") if p.is_file() and p.name not in (".gitignore",)]


@pytest.fixture
def project(tmp_path): return Project(tmp_path)


@pytest.fixture(scope="module")
def shop(tmp_path_factory): return Project(tmp_path_factory.mktemp("shop"))


def pytest_configure(config): config.addinivalue_line("markers", "slow: takes minutes; `make slow` runs these, `make test` does not")
