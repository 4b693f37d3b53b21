"""Small notebooks for tests of the runner, and the runner in a process of its own."""
import json, os, subprocess, sys, time
from pathlib import Path

root = Path(__file__).resolve().parent.parent
HEAD = "from slml_nb.stage import Stage\nstage = Stage('{stage}', run)\n"


def notebook(stage, needs, makes, parameters, *cells, **front):
    "A stage of one's own, as small as the contract allows."
    first = f"# {stage.title()}\n\n> A stage for a test.\n\n- stage: {stage}\n- needs: {needs}\n- makes: {makes}" + "".join(f"\n- {k}: {v}" for k, v in front.items())
    code = [{"cell_type": "code", "id": f"c{i}", "metadata": {"tags": ["parameters"]} if i == 0 else {}, "source": s, "outputs": [], "execution_count": None}
            for i, s in enumerate([parameters + "\nrun: str = ''  # folder of the run", *cells])]
    return json.dumps({"cells": [{"cell_type": "markdown", "id": "m", "metadata": {}, "source": first}, *code], "metadata": {}, "nbformat": 4, "nbformat_minor": 5})


def use_case(project, stages, name="mine", **settings):
    "A parameter set of one's own stages alone: {stage: its notebook, as text}; the path of the set."
    from slml_nb.stage import shipped_notebooks
    for stage, nb in stages.items(): project.write(f"params/{stage}.ipynb", nb)
    more = "".join(f"{k}: {v}\n" for k, v in settings.items())
    return project.write(f"params/{name}.yaml", f"project: {name}\n{more}stages:\n" + "".join(f"  {s}: {s}.ipynb\n" for s in stages) + "".join(f"  {s}: false\n" for s in shipped_notebooks()))


def states(record): return {s: v["state"] for s, v in record["stages"].items()}


# What a user's own program would do: `execute`, and the record of the run as its answer
PROGRAM = """
import json, os, re, signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
from slml_nb.core import SlmlError
from slml_nb.run import execute
if os.environ.get('SLML_TEST_BEAT'):
    from slml_nb.store import S3Store
    S3Store.beat = float(os.environ['SLML_TEST_BEAT'])  # of a claim: signs of life in quick succession
events = []
try: record = execute(sys.argv[1], on_event=events.append, **json.loads(sys.argv[2]))
except KeyboardInterrupt: sys.exit(130)
except SlmlError as e: sys.exit(str(e))
peak = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
print(json.dumps({**record, "events": events, "runner_mb": peak}, default=str))
"""


def program(params="params/mine.yaml", **options): return [sys.executable, "-c", PROGRAM, params, json.dumps(options)]


def start(project, params="params/mine.yaml", env=None, **options):
    "The program in a process of its own, not waited for."
    env = {k: v for k, v in project.environment(**(env or {})).items() if k != "PYTEST_CURRENT_TEST"}  # with it, ipykernel leaves to the terminal what child processes print
    return subprocess.Popen(program(params, **options), cwd=project.folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def answer(process, timeout=120):
    "What it says: the record of the run."
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == 0, err
    return json.loads(out)


def drive(project, params="params/mine.yaml", env=None, **options): return answer(start(project, params, env, **options))


def until(condition, seconds=60.0):
    "Wait for something; whether it came."
    end = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < end: time.sleep(0.02)
    return found


def processes(folder):
    "Living processes that work in a folder."
    found = []
    for p in os.listdir("/proc"):
        try:
            if p.isdigit() and os.readlink(f"/proc/{p}/cwd").startswith(str(folder)) and Path(f"/proc/{p}/stat").read_text().rpartition(")")[2].split()[0] != "Z": found.append(int(p))
        except OSError: pass
    return found


def nobody_left(folder, seconds=15): return until(lambda: not processes(folder), seconds)


def artifacts(project):
    "Every artifact in the store of a project: {file: bytes}; whole, under the hash that its record says."
    from slml_nb.core import sealed, sha256_file
    found = {}
    for file in sorted((project.folder / "runs/.store").glob("*/*/*/made.json")):
        made = json.loads(file.read_text())
        assert sealed(made), file
        for name, r in made["artifacts"].items():
            assert sha256_file(file.parent / r["file"]) == r["sha256"], (file, name)
            found[f"{made['stage']}/{name}"] = r["sha256"]
    return found


def made_by(record):
    "The artifacts of a run: {stage/name: hash}; what lies there has it."
    from slml_nb.core import sha256_file
    found = {}
    for file in sorted(Path(record["folder"]).glob("*/made.json")):
        made = json.loads(file.read_text())
        for name, r in made["artifacts"].items():
            assert sha256_file(file.parent / made["root"] / r["file"]) == r["sha256"], (file, name)
            found[f"{made['stage']}/{name}"] = r["sha256"]
    return found
