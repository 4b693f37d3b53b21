"""What goes wrong while a run goes on, as whoever types the command sees it: one message, a non-zero exit, finished stages kept and reused."""
import json, os, signal, subprocess

import pytest

from tiny import HEAD, nobody_left, notebook, states, until, use_case


@pytest.fixture
def mine(project):
    "Two stages, dig and melt; melt does on demand what must not go unnoticed."
    use_case(project, {"dig": notebook("dig", "", "ore", "depth: int = 3  # metres", HEAD.format(stage="dig") + "stage.save('ore', {'kg': depth * 2})\nstage.done()"),
                       "melt": notebook("melt", "ore", "iron", "does: str = ''  # code to run before saving", HEAD.format(stage="melt") + "exec(does)", "stage.save('iron', stage.json('ore'))\nstage.done()")})
    return project


@pytest.mark.parametrize("does, words", [
    ("1 / 0", "melt, cell"), ("import os; os.kill(os.getpid(), 9)", "killed by SIGKILL"), ("stage.json('oar')", "did you mean 'ore'?"), ("stage.save('steel', {})", "not among the artifacts"),
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


def test_interrupted(mine):
    "Ctrl-C in the middle of a stage: exit 130, no process left, and the same command ends as if nothing had happened."
    slow = "melt.does=open('melting', 'w').close(); import time; time.sleep(600)"
    p = subprocess.Popen(mine.command("run", "params/mine.yaml", "-p", slow), cwd=mine.folder, env=mine.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                         preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))  # what a shell starts in the background ignores it
    assert until(lambda: (mine.folder / "melting").exists() or p.poll() is not None) and p.poll() is None
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=90)
    assert p.returncode == 130 and "interrupted" in err and "Traceback" not in err, err
    assert nobody_left(mine.folder) if os.path.isdir("/proc") else True
    record = json.loads(next(mine.folder.glob("runs/mine/*/run.json")).read_text())
    assert record["state"] == "interrupted"
    code, r = mine.run("params/mine.yaml")
    assert code == 0 and states(r) == {"dig": "reused", "melt": "made"}


def test_a_folder_that_cannot_be_written(mine):
    if os.geteuid() == 0: (mine.folder / "runs").write_text("a file where a folder should be")
    else: mine.folder.chmod(0o500)
    code, _, err = mine.slml("run", "params/mine.yaml")
    mine.folder.chmod(0o700)
    assert code == 1 and "Traceback" not in err and "runs" in err, err


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
