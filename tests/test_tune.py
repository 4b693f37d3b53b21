"""Tuning: a known optimum is found, budgets end it with the best so far, a killed study goes on, hopeless trials are pruned, the test split is never read."""
import json, os, signal, subprocess, sys, time
from collections import Counter
from pathlib import Path

import pytest
from tiny import HEAD, nobody_left, notebook, until, use_case

optuna = pytest.importorskip("optuna")
pytestmark = pytest.mark.slow

DRIVER = """
import json, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from slml_nb.core import SlmlError
from slml_nb.tune import tune
try: print(tune(sys.argv[1], json.loads(sys.argv[2]))['folder'])
except SlmlError as e: sys.exit(f'SlmlError: {e}')
except KeyboardInterrupt: sys.exit(130)
"""
COUNT = "import os\nwith open(os.environ['COUNTER'], 'a') as f: f.write('{0}\\n')\n"
SPACE = {"bowl.x": {"low": -10, "high": 10}, "bowl.fuel": ["coal", "wood"]}


class Bowl:
    "Two stages that count their executions; the error of the second is least, and 0, at x = 2 with wood."

    def __init__(self, project, before="", after=""):
        self.project, self.counter = project, project.folder / "counter.txt"
        use_case(project, {
            "dig": notebook("dig", "", "ore", "depth: int = 3", COUNT.format("dig") + HEAD.format(stage="dig") + "stage.save('ore', {'kg': depth})\nstage.done()"),
            "bowl": notebook("bowl", "ore", "iron", "x: float = 5.0\nfuel: str = 'coal'", COUNT.format("bowl") + HEAD.format(stage="bowl") + before,
                             "stage.save('iron', {'x': x})\nstage.metric(valid_error=(x - 2) ** 2 + (fuel == 'coal'), p50_ms=10 - x)\n" + after + "\nstage.done()")})

    def start(self, **given):
        given = {"space": SPACE, "metric": "bowl.valid_error", **given}
        return subprocess.Popen([sys.executable, "-c", DRIVER, "params/mine.yaml", json.dumps(given)], cwd=self.project.folder, env=self.project.environment(COUNTER=str(self.counter)),
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)

    def tune(self, **given):
        "A study in a process of its own: its folder and its record."
        out, err = (p := self.start(**given)).communicate(timeout=300)
        assert p.returncode == 0, err
        folder = Path(out.splitlines()[-1])
        return folder, json.loads((folder / "run.json").read_text())

    def fails(self, **given):
        "What it says when it does not go through."
        out, err = (p := self.start(**given)).communicate(timeout=300)
        assert p.returncode == 1, (p.returncode, out, err)
        return err

    def study(self):
        "The only study of the project, by Optuna's own functions."
        return optuna.load_study(study_name=None, storage=f"sqlite:///{self.project.folder / 'runs/tune.db'}")

    def ran(self): return Counter(self.counter.read_text().split()) if self.counter.exists() else Counter()


@pytest.fixture
def bowl(project): return Bowl(project)


def values(record): return [p["values"] for p in record["points"]]


def test_a_known_optimum(bowl):
    folder, record = bowl.tune(trials=40, workers=2)
    best = next(p for p in record["points"] if p["point"] == record["tune"]["best"][0])
    assert abs(best["values"]["bowl.x"] - 2) < 1 and best["values"]["bowl.fuel"] == "wood" and best["metrics"]["bowl.valid_error"] < 1
    assert bowl.ran()["dig"] == 1 and bowl.ran()["bowl"] == len({json.dumps(v) for v in values(record)})
    assert max(record["tune"]["importance"], key=record["tune"]["importance"].get) == "bowl.x"  # an error of up to 144 against one of 1
    study = bowl.study()  # what Optuna reads is what the record says
    assert len(study.trials) == 40 and study.best_value == best["metrics"]["bowl.valid_error"] and study.best_params == best["values"]
    # what is to be pasted is read as YAML, and makes the same trial
    import yaml
    assert yaml.safe_load((folder / "best.yaml").read_text()) == {"bowl": {k.split(".")[1]: v for k, v in best["values"].items()}}
    # a study is read like a sweep
    from slml_nb.cost import cost
    from slml_nb.report import write_report
    assert "Best of 40" in write_report(folder).read_text() and abs(cost(folder)["usd"] - record["tune"]["usd"]) < 1e-9 < record["tune"]["usd"]
    assert len((folder / "points.csv").read_text().splitlines()) == 41 and (folder / "tune_1.svg").read_text().startswith("<?xml")
    assert not bowl.project.left_behind() and nobody_left(bowl.project.folder)


def test_seconds_end_it_with_the_best_so_far(project):
    bowl = Bowl(project, before="import time; time.sleep(0.3 if x == 5 else 600 if x > 5 else 0.3)")
    begun = time.monotonic()
    folder, record = bowl.tune(trials=10_000, workers=2, seconds=8)
    assert time.monotonic() - begun < 90  # a trial would sleep for ten minutes
    assert record["tune"]["ended"] == "the 8 seconds are used up" and record["tune"]["best"] and record["state"] == "done"
    assert nobody_left(project.folder)
    # a used-up budget stays used up; a larger one goes on, and what was stopped is tried again
    before = bowl.ran()
    assert bowl.tune(trials=10_000, workers=2, seconds=8)[1]["tune"]["best"] and bowl.ran() == before
    folder, more = bowl.tune(trials=10_000, workers=2, seconds=12)
    assert more["tune"]["counted"] >= record["tune"]["counted"] and bowl.ran().total() > before.total()


def test_money_ends_it(bowl):
    # a stage takes some tenths of a second, of which a second costs about $0.00003
    folder, record = bowl.tune(trials=10_000, workers=2, usd=0.00004)
    assert record["tune"]["ended"] == "$0.000040 are used up" and record["tune"]["best"]
    from slml_nb.cost import cost
    assert 0.00002 < cost(folder)["usd"] < 0.001  # what had begun was finished, and a busy machine takes long


def test_a_failing_trial_stops_nobody(project):
    bowl = Bowl(project, after="if x > 0: raise RuntimeError('too hot')\nif x < -7: stage.metric(valid_error=float('nan'))")
    folder, record = bowl.tune(trials=12, workers=2)
    states = Counter(p["state"] for p in record["points"])
    bad = [not -7 <= v["bowl.x"] <= 0 for v in values(record)]
    assert states == {"failed": sum(bad), "done": 12 - sum(bad)} and 0 < sum(bad) < 12
    assert {p["why"] for p in record["points"] if p["state"] == "failed"} == {"bowl, cell 5: RuntimeError: too hot", "bowl.valid_error is nan, no number to compare"}
    from slml_nb.tune import tune_text
    assert f"{states['failed']} failed" in tune_text(folder)
    before = bowl.ran()
    assert values(bowl.tune(trials=12, workers=2)[1]) == values(record) and bowl.ran() == before  # a failure is not repeated


def test_what_no_trial_can_change_ends_it(project):
    bowl = Bowl(project)
    use_case(project, {"dig": notebook("dig", "", "ore", "depth: int = 3", "1 / 0"), "bowl": (project.folder / "params/bowl.ipynb").read_text()})
    assert "dig failed, which no trial can change" in bowl.fails(trials=50)
    assert len(list((project.folder / "runs/mine").glob("tune-*/points/*"))) <= 2


def test_a_metric_that_is_not_there(bowl):
    assert "bowl records no metric 'valid_eror': did you mean 'valid_error'?" in bowl.fails(metric={"bowl.valid_eror": "minimise"})
    assert bowl.ran()["bowl"] <= 2


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    "What a study tries that nobody stops."
    from conftest import Project
    return values(Bowl(Project(tmp_path_factory.mktemp("whole"))).tune(trials=14, workers=1)[1])


@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow), pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_stopped_study_goes_on(project, undisturbed, how):
    bowl = Bowl(project, before="import time; time.sleep(0.2)")
    first = bowl.start(trials=14, workers=1)
    while bowl.ran()["bowl"] < 6:
        assert first.poll() is None, first.communicate()
        time.sleep(0.02)
    os.killpg(first.pid, how) if how == signal.SIGKILL else first.send_signal(how)
    first.communicate(timeout=60)
    assert nobody_left(project.folder)
    over = [t for t in bowl.study().trials if "point" in t.user_attrs]
    before = bowl.ran()
    if how != signal.SIGKILL: assert json.loads(next((project.folder / "runs/mine").glob("tune-*/run.json")).read_text())["state"] == "interrupted"
    folder, record = bowl.tune(trials=14, workers=1)
    assert len(over) >= 4 and (bowl.ran() - before)["bowl"] == 14 - len(over) and bowl.ran()["dig"] == 1
    assert values(record) == undisturbed  # as if nothing had happened
    assert record["tune"]["counted"] == 14 and Counter(p["state"] for p in record["points"]) == {"done": 14}


def test_two_at_once(project):
    bowl = Bowl(project, before="import time; time.sleep(0.5)")
    first = bowl.start(trials=30)
    assert until(lambda: bowl.ran()["bowl"])
    assert "this study is at work already" in bowl.fails(trials=30)
    first.send_signal(signal.SIGINT)
    assert first.wait(60) == 130


LEARN = """
import json, time
for step in range(1, 13):
    with open(stage.place / 'progress.jsonl', 'a') as f: f.write(json.dumps({'step': step, 'valid_error': (x - 2) ** 2 + 20 / step}) + '\\n')
    time.sleep(0.15)
    with open(os.environ['COUNTER'], 'a') as f: f.write('step\\n')
"""


def test_hopeless_trials_are_pruned(project):
    bowl = Bowl(project, before=LEARN)
    folder, record = bowl.tune(trials=14, workers=1, space={"bowl.x": {"low": -10, "high": 10}}, sampler="random")
    pruned = [p for p in record["points"] if p["state"] == "pruned"]
    done = [(p["values"]["bowl.x"] - 2) ** 2 for p in record["points"] if p["state"] == "done"]
    assert pruned and all("behind the other trials" in p["why"] for p in pruned) and Counter(p["state"] for p in record["points"])["failed"] == 0
    assert bowl.ran()["step"] < 12 * 14  # time was saved
    assert min(done) <= min((p["values"]["bowl.x"] - 2) ** 2 for p in pruned)  # and not at the price of the best
    assert {t.state.name for t in bowl.study().trials} == {"COMPLETE", "PRUNED"} and len(record["points"]) == 14


def test_warm_start(bowl):
    folder, record = bowl.tune(trials=12, workers=1)
    first = record["tune"]["study"]
    assert f"warm_start: [{first}] would let its trials enter the sampler" in " ".join(bowl.tune(trials=1, seed=99)[1]["tune"]["notes"])
    for seed, source in enumerate((first, folder.name, str(folder)), 1):
        later = bowl.tune(trials=3, workers=1, seed=seed, warm_start=[source])[1]
        assert f"From {source}: 12 of 12 trials enter the sampler." in later["tune"]["notes"] and later["tune"]["counted"] == 3 and len(later["points"]) == 3
    assert f"did you mean '{first}'?" in bowl.fails(warm_start=[first[:-1]], seed=7)


def test_another_storage(bowl):
    at = bowl.project.folder / "elsewhere" / "x.db"
    bowl.tune(trials=3, storage=f"sqlite:///{at}")
    assert len(optuna.load_study(study_name=None, storage=f"sqlite:///{at}").trials) == 3 and not (bowl.project.folder / "runs/tune.db").exists()
    assert "the storage cannot be opened" in (said := bowl.fails(storage="nosuch://ann:s3cret@db/x")) and "s3cret" not in said


ROWS = "import csv\nrows = [{k: float(v) if k != 'split' else v for k, v in r.items()} for r in csv.DictReader(open(table))]"
FIT = """
def fit(rows):  # ridge through the origin, in closed form
    return sum(r['a'] * r['y'] for r in rows) / (sum(r['a'] ** 2 for r in rows) + alpha)
rows = stage.json('rows')
of = {s: [r for r in rows if r['split'] == s] for s in ('train', 'valid', 'test')}
weight = fit(of['train'])
stage.save('model', {'weight': weight, 'test': [weight * r['a'] for r in of['test']]})
stage.metric(valid_mse=sum((r['y'] - weight * r['a']) ** 2 for r in of['valid']) / len(of['valid']), weight=weight)
stage.done()"""


def test_flipped_test_targets_change_nothing(project):
    import random
    draw = random.Random(0)
    rows = [(s, a := draw.gauss(0, 1), 3 * a + draw.gauss(0, 1)) for s in ["train"] * 12 + ["valid"] * 40 + ["test"] * 40]
    use_case(project, {
        "load": notebook("load", "", "rows", "table: str = 'rows.csv'", HEAD.format(stage="load") + ROWS, "stage.save('rows', rows)\nstage.done()", reads="table"),
        "fit": notebook("fit", "rows", "model", "alpha: float = 1.0", HEAD.format(stage="fit"), FIT),
        "judge": notebook("judge", "rows, model", "verdict", "strict: bool = False", HEAD.format(stage="judge"),
                          "truth = [r['y'] for r in stage.json('rows') if r['split'] == 'test']\nmse = sum((y - p) ** 2 for y, p in zip(truth, stage.json('model')['test'])) / len(truth)\n"
                          "stage.save('verdict', {'mse': mse})\nstage.metric(mse=mse)\nstage.done()")})
    from slml_nb.run import execute
    from slml_nb.tune import tune
    found, judged, here = [], [], os.getcwd()
    os.chdir(project.folder)
    try:
        for sign in (1, -1):
            project.write("rows.csv", "split,a,y\n" + "".join(f"{s},{a},{y * (sign if s == 'test' else 1)}\n" for s, a, y in rows))
            given = {"space": {"alpha": {"low": 0.01, "high": 1000, "log": True}}, "metric": "fit.valid_mse", "trials": 15, "workers": 1}
            found.append([(p["values"], p["metrics"]["fit.valid_mse"], p["metrics"]["fit.weight"]) for p in tune("params/mine.yaml", given)["points"]])
            judged.append(execute("params/mine.yaml")["stages"]["judge"]["metrics"]["mse"])
            for metric in ("judge.mse", "judge.r2"):
                with pytest.raises(Exception, match="judge reads the test split"): tune("params/mine.yaml", {**given, "metric": metric})
    finally: os.chdir(here)
    assert found[0] == found[1] and abs(judged[0] - judged[1]) > 1  # the targets were flipped, the judge has seen it, and the study has not


@pytest.mark.slow
def test_flipped_test_targets_change_nothing_in_the_lifecycle(project):
    "The shipped stages from raw rows to trees and network: a study does not depend on what the test rows say."
    import random
    from slml_nb.tune import tune
    draw = random.Random(0)
    days = [f"2024-{m:02}-{d:02}" for m in range(1, 13) for d in range(1, 29)]
    rows = [(i, day, a := draw.gauss(0, 1), k := draw.choice("pqrs"), 3 * abs(a) + "pqrs".index(k) + draw.gauss(0, 0.3)) for i, day in enumerate(days * 2)]
    project.write("params/flip.yaml", """
project: flip
frame: {decision: how many to send, target: y, task: regression, metric: mae, unit: lots, time: day, known_later: [], rule_today: "0"}
ingest: {sources: [rows.csv]}
sample: {by: time, cuts: {valid: "2024-08-01", test: "2024-10-01"}}
train: {hidden: [8], epochs: 4}
tune:
  space:
    baseline.num_leaves: {low: 4, high: 63, log: true}
    baseline.linear_alpha: {low: 0.01, high: 100, log: true}
    train.lr: {low: 0.001, high: 0.05, log: true}
  metric: [baseline.valid_mae_trees, baseline.valid_mae_linear, train.valid_mae]
  trials: 3
  workers: 1
""")
    found, here = [], os.getcwd()
    os.chdir(project.folder)
    try:
        for sign in (1, -1):
            project.write("rows.csv", "id,day,a,k,y\n" + "".join(f"{i},{day},{a},{k},{y * (sign if day >= '2024-10-01' else 1)}\n" for i, day, a, k, y in rows))
            record = tune("params/flip.yaml")
            assert Counter(p["state"] for p in record["points"]) == {"done": 3} and record["order"][-1] in ("baseline", "train")
            found.append([(p["values"], [p["metrics"][m] for m in record["tune"]["objectives"]]) for p in record["points"]])
    finally: os.chdir(here)
    assert found[0] == found[1]
