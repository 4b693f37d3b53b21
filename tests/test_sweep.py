"""Sweeps: what points share runs once, a failing point stops nobody, a killed sweep goes on, five hundred points are routine."""
import csv, json, os, signal, subprocess, sys, time
from collections import Counter
from pathlib import Path

import pytest

from slml_nb.core import sealed
from slml_nb.report import write_report
from slml_nb.stage import artifact_path, made_in, shipped_notebooks
from slml_nb.sweep import sweep_table
from tiny import nobody_left

DRIVER = "import json, sys; from slml_nb.sweep import sweep; r = sweep(sys.argv[1], **json.loads(sys.argv[2])); print(r['folder'])"


class Works:
    "A project of three small stages that count their executions in a file."

    def __init__(self, project, melt=""):
        self.project, self.counter = project, project.folder / "counter.txt"
        said = "import os\nfrom slml_nb.stage import Stage\nwith open(os.environ['COUNTER'], 'a') as f: f.write('{0}\\n')\ns = Stage('{0}', run)\n"
        self.notebook("dig", "", "ore", "depth: int = 3", said.format("dig") + "s.save('ore', {'kg': depth * 2})\ns.done()")
        self.notebook("wash", "ore", "clean", "", said.format("wash") + "s.save('clean', s.json('ore'))\ns.done()")
        self.notebook("melt", "clean", "iron", "heat: float = 1.0\nfuel: str = 'coal'", said.format("melt") + melt,
                      "s.save('iron', {'kg': s.json('clean')['kg'], 'heat': heat})\ns.metric(valid_mae=abs(heat - 3) + (fuel == 'coal'), bars=s.json('clean')['kg'])\ns.done()")
        self.notebook("sell", "iron", "money", "", said.format("sell") + "s.save('money', s.json('iron'))\ns.done()")

    def notebook(self, stage, needs, makes, parameters, *cells):
        first = {"cell_type": "markdown", "metadata": {}, "source": f"# {stage}\n> s\n\n- stage: {stage}\n- needs: {needs}\n- makes: {makes}"}
        code = [{"cell_type": "code", "metadata": {"tags": ["parameters"]} if i == 0 else {}, "source": s, "outputs": [], "execution_count": None} for i, s in enumerate([(parameters or '# nothing to set') + "\nrun: str = ''", *cells])]
        cells = [{"id": f"{stage}{i}", **c} for i, c in enumerate([first, *code])]
        self.project.write(f"params/{stage}.ipynb", json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))

    def set(self, matrix, stages=("dig", "wash", "melt", "sell")):
        "A parameter set with this matrix."
        own = {**{s: False for s in shipped_notebooks()}, **{s: f"{s}.ipynb" for s in stages}}
        return self.project.write("params/p.yaml", json.dumps({"project": "works", "stages": own, "matrix": matrix}, indent=1))

    def start(self, **how):
        return subprocess.Popen([sys.executable, "-c", DRIVER, "params/p.yaml", json.dumps(how)], cwd=self.project.folder, env=self.project.environment(COUNTER=str(self.counter)),
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def sweep(self, matrix=None, **how):
        "Run a sweep in a process of its own: its folder and its record."
        if matrix: self.set(matrix)
        out, err = (p := self.start(**how)).communicate(timeout=300)
        assert p.returncode == 0, err
        folder = Path(out.splitlines()[-1])
        return folder, json.loads((folder / "run.json").read_text())

    def ran(self): return Counter(self.counter.read_text().split()) if self.counter.exists() else Counter()


@pytest.fixture
def works(project): return Works(project)


def test_what_points_share_runs_once(works):
    folder, record = works.sweep({"heat": [1, 2, 3, 4, 5, 6], "fuel": ["coal", "wood"]})
    assert works.ran() == {"dig": 1, "wash": 1, "melt": 12, "sell": 6}  # coal and wood make the same iron, which is sold once
    assert Counter(p["state"] for p in record["points"]) == {"done": 12} and record["state"] == "done"
    assert [r["point"] for r in sweep_table(folder) if r["best"]] == ["006"]  # heat 3 and wood: an error of 0
    rows = list(csv.DictReader((folder / "points.csv").open()))
    assert [(float(r["melt.heat"]), r["melt.fuel"], float(r["melt.valid_mae"])) for r in rows] == [(h, f, abs(h - 3) + (f == "coal")) for h in range(1, 7) for f in ("coal", "wood")]
    # a point is a run like any other
    made = made_in(folder / "points/008")
    assert set(made) == {"ore", "clean", "iron", "money"} and json.loads(artifact_path(made["iron"]).read_text()) == {"kg": 6, "heat": 4.0}
    assert json.loads((folder / "points/008/run.json").read_text())["parameters"]["melt"] == {"heat": 4.0, "fuel": "wood"}
    assert "Best of 12" in write_report(folder).read_text() and (folder / "points/006/report.html").is_file()
    # again: nothing is left to do
    folder, record = works.sweep()
    assert works.ran().total() == 20 and {n["state"] for n in record["nodes"].values()} == {"reused"}
    assert not works.project.left_behind()


def test_data_cuts_and_exclude(works):
    folder, record = works.sweep({"dig.depth": [1, 2], "heat": [1, 3], "zip": {"fuel": ["coal", "wood"]}, "exclude": [{"depth": 1, "heat": 3}], "include": [{"depth": 9}]})
    assert works.ran() == {"dig": 3, "wash": 3, "melt": 7, "sell": 4}
    assert [tuple(p["values"].values()) for p in record["points"]] == [(1, 1, "coal"), (1, 1, "wood"), (2, 1, "coal"), (2, 1, "wood"), (2, 3, "coal"), (2, 3, "wood"), (9, 1, "coal")]
    assert [p["metrics"]["melt.bars"] for p in record["points"]] == [2, 2, 4, 4, 4, 4, 18]


def test_a_failing_point_stops_nobody(project):
    works = Works(project, melt="if heat == 2: raise RuntimeError('too hot')\n")
    folder, record = works.sweep({"heat": [1, 2, 3]})
    assert [p["state"] for p in record["points"]] == ["done", "failed", "done"] and record["state"] == "done" and record["points_failed"] == 1
    assert record["points"][1]["why"] == "melt, cell 4: RuntimeError: too hot"
    assert works.ran() == {"dig": 1, "wash": 1, "melt": 3, "sell": 2}
    point = json.loads((folder / "points/002/run.json").read_text())
    assert {s: r["state"] for s, r in point["stages"].items()} == {"dig": "made", "wash": "made", "melt": "failed", "sell": "skipped"}
    assert (folder / "points/002/melt/notebook.ipynb").is_file()  # as it stopped
    assert "too hot" in write_report(folder).read_text()


def test_all_fail_and_still_there_is_a_report(project):
    works = Works(project, melt="raise RuntimeError('no fire')\n")
    folder, record = works.sweep({"heat": [1, 2]})
    assert record["state"] == "failed" and not record["points"][0]["metrics"]
    assert "All 2 points failed" in write_report(folder).read_text()
    assert (folder / "points.csv").read_text().count("no fire") == 2


def test_a_secret_can_be_varied_and_is_nowhere(works):
    works.set({})
    works.project.write("params/s.yaml", "extends: p.yaml\nmatrix:\n  fuel: [!env FIRST_FUEL, !env SECOND_FUEL]\n")
    p = subprocess.run([sys.executable, "-c", DRIVER, "params/s.yaml", "{}"], cwd=works.project.folder, capture_output=True, text=True, timeout=300,
                       env=works.project.environment(COUNTER=str(works.counter), FIRST_FUEL="s3cr3t-oak", SECOND_FUEL="s3cr3t-elm"))
    folder = Path(p.stdout.splitlines()[-1])
    write_report(folder)
    assert [r["values"] for r in sweep_table(folder)] == [{"melt.fuel": "***"}] * 2 and works.ran()["melt"] == 2
    files = [f for f in works.project.folder.rglob("*") if f.is_file()]
    assert not [f for f in files if b"s3cr3t" in f.read_bytes()] and len(files) > 40


def test_a_killed_sweep_goes_on(project):
    works = Works(project, melt="import time; time.sleep(0.1)\n")
    works.set({"heat": list(range(20))})
    first = works.start(workers=2)
    while works.ran()["sell"] < 4:
        assert first.poll() is None, first.communicate()
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert nobody_left(project.folder)  # kernels that lost their runner end
    kept = Counter(json.loads(p.read_text())["stage"] for p in (project.folder / "runs/.store").rglob("made.json"))
    before = works.ran()
    folder, record = works.sweep()
    assert {p["state"] for p in record["points"]} == {"done"}
    again = works.ran() - before
    assert kept["dig"] == 1 and kept["sell"] >= 2 and again == {s: n for s, n in {"wash": 1 - kept["wash"], "melt": 20 - kept["melt"], "sell": 20 - kept["sell"]}.items() if n}
    assert Counter(n["state"] for n in record["nodes"].values())["reused"] == kept.total()


def test_a_stopped_sweep_says_so(project):
    works = Works(project, melt="import time; time.sleep(0.1 if heat < 3 else 60)\n")
    works.set({"heat": [0, 1, 2, 3, 4]})
    running = works.start(workers=2)
    while works.ran()["melt"] < 5:
        assert running.poll() is None, running.communicate()
        time.sleep(0.02)
    running.send_signal(signal.SIGTERM)
    running.communicate(timeout=90)
    folder = next((project.folder / "runs/works").iterdir())
    record = json.loads((folder / "run.json").read_text())
    assert record["state"] == "interrupted" and sealed(record)
    assert [p["state"] for p in record["points"]][3:] == ["interrupted"] * 2 and record["points"][4]["why"] == "stopped before melt was over"
    assert "interrupted" in write_report(folder).read_text() and len(list(csv.DictReader((folder / "points.csv").open()))) == 5


@pytest.mark.slow
def test_five_hundred_points(project):
    works = Works(project)
    works.set({"heat": list(range(50)), "melt.fuel": [f"f{i}" for i in range(10)]}, stages=("dig", "wash", "melt"))
    folder, record = works.sweep()
    assert works.ran() == {"dig": 1, "wash": 1, "melt": 500}
    assert Counter(p["state"] for p in record["points"]) == {"done": 500} and [p["point"] for p in record["points"]][-1] == "500"
    assert "Best of 500" in write_report(folder).read_text()
