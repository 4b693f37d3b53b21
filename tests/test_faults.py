"""What goes wrong while a run goes on: one message, a non-zero exit, finished stages kept and reused, no half-written file."""
import json, os, shutil, signal, subprocess, time

import pytest

HEAD = "from slml_nb.stage import Stage\nstage = Stage('{stage}', run)\n"


def notebook(stage, needs, makes, parameters, *cells):
    "A stage of one's own, as small as the contract allows."
    first = f"# {stage.title()}\n\n> A stage for a test.\n\n- stage: {stage}\n- needs: {needs}\n- makes: {makes}"
    code = [{"cell_type": "code", "id": f"c{i}", "metadata": {"tags": ["parameters"]} if i == 0 else {}, "source": s, "outputs": [], "execution_count": None}
            for i, s in enumerate([parameters + "\nrun: str = ''  # folder of the run", *cells])]
    return json.dumps({"cells": [{"cell_type": "markdown", "id": "m", "metadata": {}, "source": first}, *code], "metadata": {}, "nbformat": 4, "nbformat_minor": 5})


@pytest.fixture
def mine(project):
    "Two stages, dig and melt; melt does on demand what must not go unnoticed."
    from slml_nb.stage import shipped_notebooks
    project.write("params/dig.ipynb", notebook("dig", "", "ore", "depth: int = 3  # metres", HEAD.format(stage="dig") + "stage.save('ore', {'kg': depth * 2})\nstage.done()"))
    project.write("params/melt.ipynb", notebook("melt", "ore", "iron", "does: str = ''  # code to run before saving", HEAD.format(stage="melt") + "exec(does)",
                                                "stage.save('iron', stage.json('ore'))\nstage.done()"))
    project.write("params/mine.yaml", "project: mine\nstages:\n  dig: dig.ipynb\n  melt: melt.ipynb\n" + "".join(f"  {s}: false\n" for s in shipped_notebooks()))
    return project


def states(record): return {s: v["state"] for s, v in record["stages"].items()}


@pytest.mark.parametrize("does, words", [
    ("1 / 0", "melt, cell"), ("raise MemoryError('full')", "MemoryError"), ("import os; os.kill(os.getpid(), 9)", "kernel"), ("import os; os._exit(3)", "kernel"),
    ("stage.json('oar')", "did you mean 'ore'?"), ("stage.save('steel', {})", "not among the artifacts"), ("raise SystemExit(1)", "SystemExit"),
])
def test_a_stage_that_breaks(mine, does, words):
    code, out, err = mine.slml("run", "params/mine.yaml", "-p", f"melt.does={does}")
    assert code == 1 and "Traceback" not in err
    assert words in err and "the same command goes on" in err, err
    code, r = mine.run("params/mine.yaml")  # what is finished is kept
    assert code == 0 and states(r) == {"dig": "reused", "melt": "made"}
    assert not mine.left_behind()


def test_a_stage_that_forgets_done(mine):
    path = mine.folder / "params/melt.ipynb"
    path.write_text(path.read_text().replace("\\nstage.done()", ""))
    code, _, err = mine.slml("run", "params/mine.yaml")
    assert code == 1 and "stage.done()" in err


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(mine, sign):
    "Ctrl-C in the middle of a stage: exit 130, no process left, and the same command ends as if nothing had happened."
    slow = "melt.does=open('melting', 'w').close(); import time; time.sleep(600)"
    p = subprocess.Popen(mine.command("run", "params/mine.yaml", "-p", slow), cwd=mine.folder, env=mine.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.time() + 60
    while not (mine.folder / "melting").exists() and p.poll() is None and time.time() < end: time.sleep(0.05)
    p.send_signal(sign)
    out, err = p.communicate(timeout=30)
    assert p.returncode == 130 and "interrupted" in err and "Traceback" not in err, err
    assert not [d for d in os.listdir("/proc") if d.isdigit() and str(mine.folder) in _cwd(d)] if os.path.isdir("/proc") else True
    record = json.loads(next(mine.folder.glob("runs/mine/*/run.json")).read_text())
    assert record["state"] == "interrupted"
    code, r = mine.run("params/mine.yaml")
    assert code == 0 and states(r) == {"dig": "reused", "melt": "made"}


def _cwd(pid):
    try: return os.readlink(f"/proc/{pid}/cwd")
    except OSError: return ""


def test_killed_outright(mine):
    "SIGKILL leaves no time to tidy; what is finished is whole all the same."
    slow = "melt.does=open('melting', 'w').close(); import time; time.sleep(3)"
    p = subprocess.Popen(mine.command("run", "params/mine.yaml", "-p", slow), cwd=mine.folder, env=mine.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.time() + 60
    while not (mine.folder / "melting").exists() and time.time() < end: time.sleep(0.05)
    p.kill()
    p.wait()
    code, r = mine.run("params/mine.yaml")
    assert code == 0 and states(r) == {"dig": "reused", "melt": "made"}
    assert json.loads(mine.slml("runs", "--json")[1])


def test_full_disk(mine):
    "A real one, of 400 kB."
    if not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode: pytest.skip("no right to mount a small disk here")
    (mine.folder / "runs").mkdir()
    big = "melt.does=stage.save('iron', 'x' * 1_000_000)"
    script = 'mount -t tmpfs -o size=400k none runs && shift 0; "$@"; code=$?; find runs -name ".*.*" -type f | sed "s/^/LEFT /"; exit $code'
    r = subprocess.run(["unshare", "-rm", "sh", "-c", script, "sh", *mine.command("run", "params/mine.yaml", "-p", big)], cwd=mine.folder, env=mine.environment(), capture_output=True, text=True, timeout=120)
    assert r.returncode == 1 and "Traceback" not in r.stderr, r.stderr
    assert "disk is full" in r.stderr or "No space left" in r.stderr, r.stderr
    assert "LEFT" not in r.stdout


def test_a_folder_that_cannot_be_written(mine):
    if os.geteuid() == 0: (mine.folder / "runs").write_text("a file where a folder should be")
    else: mine.folder.chmod(0o500)
    code, _, err = mine.slml("run", "params/mine.yaml")
    mine.folder.chmod(0o700)
    assert code == 1 and "Traceback" not in err and "runs" in err, err


def test_a_damaged_artifact_is_made_again(mine):
    assert mine.run("params/mine.yaml")[0] == 0
    for f in mine.folder.glob("runs/.store/**/ore.json"): f.write_text('{"kg": 7}')
    code, r = mine.run("params/mine.yaml")
    assert code == 0 and states(r) == {"dig": "made", "melt": "reused"}


def test_two_at_once(mine):
    "Two runs of the same set, started together, both end well and in the same artifacts."
    ps = [subprocess.Popen(mine.command("run", "params/mine.yaml", "--json"), cwd=mine.folder, env=mine.environment(), stdout=subprocess.PIPE, text=True) for _ in range(2)]
    docs = [json.loads(p.communicate(timeout=120)[0]) for p in ps]
    assert [p.returncode for p in ps] == [0, 0] and len({d["run"] for d in docs}) == 2
    assert len(list(mine.folder.glob("runs/.store/**/iron.json"))) == 1


# ---- a stage of one's own beside the parameter set: one that replaces a shipped stage and one that is new

def test_stages_of_ones_own(project):
    project.write("trips.csv", "km,minutes\n" + "".join(f"{1 + i % 9},{3 * (1 + i % 9) + i % 2}\n" for i in range(120)))
    assert project.slml("new", "trips", "--data", "trips.csv", "--target", "minutes")[0] == 0
    project.write("params/my_quality.ipynb", notebook("quality", "raw", "clean, quarantine, rule_counts", "longest: float = 20.0  # minutes", HEAD.format(stage="quality") +
        "stage.save('clean', stage.sql(f'select * from raw where minutes <= {longest}'))\nstage.save('quarantine', stage.sql(f\"select *, 'too long' as rule from raw where minutes > {longest}\"))\n"
        "stage.save('rule_counts', stage.sql('select 1 as broken'))\nstage.done()"))
    project.write("params/postcard.ipynb", notebook("postcard", "clean", "postcard", "greeting: str = 'dear'  # first word", HEAD.format(stage="postcard") +
        "n, = stage.sql('select count(*) from clean').fetchall()[0]\nstage.save('postcard', f'{greeting} {n}')\nstage.done()"))
    text = (project.folder / "params/trips.yaml").read_text().replace("quality:\n", "stages: {quality: my_quality.ipynb, postcard: postcard.ipynb}\npostcard: {greeting: hello}\nquality:\n  longest: 15\n")
    project.write("params/trips.yaml", "\n".join(l for l in text.splitlines() if not l.startswith("  rules:")))
    code, r = project.run("params/trips.yaml", "--to", "postcard")
    assert code == 0, r.get("error")
    assert r["stages"]["postcard"]["state"] == "made" and r["stages"]["sample"]["state"] == "skipped"
    card, = project.folder.glob("runs/.store/**/postcard.txt")
    assert card.read_text() == "hello 62"  # of 120 rows: 55 of km 1 to 4, and 7 of the 13 of km 5
