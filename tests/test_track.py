"""Runs in MLflow, against MLflow itself: a SQLite file, a server, a server that is down, a delivery that is killed. Nothing is lost, nothing is there twice."""
import contextlib, json, os, random, shutil, signal, socket, subprocess, sys, threading, time, urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from slml_nb.core import SlmlError, seal
from slml_nb.stage import sample_folder
from slml_nb.track import masked_uri, sync, track, track_later, track_text

pytestmark = pytest.mark.slow

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
ROOT = Path(__file__).resolve().parent.parent
DB = "sqlite:///runs/mlflow.db"
STAGES = {"train": {"state": "made", "started": "2026-01-01T12:00:01+00:00", "seconds": 2.5, "peak_mb": 120.5, "cpu": 2.25, "metrics": {"mae": 4.25, "bad": float("nan"), "far": float("inf"), "device": "cpu"}}}


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    for name in ("SLML_TRACKING", "MLFLOW_TRACKING_URI"): monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def empty(tmp_path_factory):
    "A database with MLflow's tables in it: they take a second to make, so they are made once."
    file = tmp_path_factory.mktemp("mlflow") / "empty.db"
    from mlflow import MlflowClient
    MlflowClient(tracking_uri=f"sqlite:///{file}").search_experiments(max_results=1)
    return file


@pytest.fixture
def runs(tmp_path, empty):
    "The runs of a project in a folder with a space in its name."
    folder = tmp_path / "my project" / "runs"
    folder.mkdir(parents=True)
    shutil.copy(empty, folder / "mlflow.db")
    return folder


def record(run, **more):
    return seal({"project": "taxi", "run": run, "about": "What a trip costs", "params_file": "params/taxi.yaml", "overrides": {}, "state": "done", "who": "ann", "started": "2026-01-01T12:00:00+00:00",
                 "finished": "2026-01-01T12:00:04+00:00", "seconds": 4.0, "environment": {"python": "3.11.7", "platform": "Linux"}, "order": list(STAGES),
                 "parameters": {"train": {"epochs": 7, "layers": [64, 32]}}, "stages": STAGES, **more})


def picture(stage):
    "Give a stage a figure and a table; the built-in sample travels without."
    made = json.loads((stage / "made.json").read_text())
    (stage / "out/figure_1.svg").write_text("<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'/>")
    (stage / "out/table_1.json").write_text(json.dumps({"columns": ["a"], "data": [[1]]}))
    made.update(figures=[{"caption": "f", "file": "figure_1.svg"}], tables=[{"caption": "t", "file": "table_1.json"}])
    (stage / "made.json").write_text(json.dumps(made))


def make(runs, run="one", whole=True, **more):
    "A run as it lies on the disk; `whole` with all that the built-in sample has made."
    folder = runs / "taxi" / run
    if whole: shutil.copytree(sample_folder(), folder, ignore=shutil.ignore_patterns("data"))
    for stage in ("train", "ingest") if whole else (): picture(folder / stage)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.html").write_text("<h1>report</h1>")
    (folder / "run.json").write_text(json.dumps(record(run, **more)))
    return folder


def client(runs, uri=""):
    from mlflow import MlflowClient
    return MlflowClient(tracking_uri=uri or f"sqlite:///{runs / 'mlflow.db'}")


def copies(c):
    "Every run that MLflow has, as {slml.run: run}; fails when one is there twice."
    found = [r for e in c.search_experiments() for r in c.search_runs([e.experiment_id], max_results=1000)]
    names = [r.data.tags.get("slml.run") for r in found]
    assert len(set(names)) == len(names), names
    return dict(zip(names, found))


def all_files(c, run_id, path=""):
    return sorted(f for x in c.list_artifacts(run_id, path) for f in (all_files(c, run_id, x.path) if x.is_dir else [x.path]))


def test_a_run_is_there_whole(runs, monkeypatch):
    run, c = make(runs), client(runs)
    monkeypatch.chdir(runs)  # wherever one stands
    done = track(run)
    r = c.get_run(done["mlflow_run"])
    assert (r.info.run_name, r.info.status, r.info.start_time, r.info.end_time) == ("one", "FINISHED", 1767268800000, 1767268804000)  # date -d 2026-01-01T12:00Z +%s
    assert c.get_experiment(r.info.experiment_id).name == "taxi"
    assert r.data.params == {"train.epochs": "7", "train.layers": "[64,32]"}
    verdict = json.loads((run / "evaluate/out/verdict.json").read_text())
    expected = {"train.mae": 4.25, "train.far": sys.float_info.max, "train/seconds": 2.5, "train/peak_mb": 120.5, "train/cpu": 2.25, "seconds": 4.0}
    expected |= {f"leaderboard/{x['name']}/mae": x["mae"] for x in verdict["candidates"]}
    assert {k: r.data.metrics[k] for k in expected} == expected
    assert r.data.metrics["train.bad"] != r.data.metrics["train.bad"]
    tags = {"slml.run": "taxi/one", "mlflow.user": "ann", "slml.state": "done", "slml.params_file": "params/taxi.yaml", "train.device": "cpu", "mlflow.source.type": "LOCAL"}
    assert tags.items() <= r.data.tags.items() and "slml.environment" in r.data.tags
    files = all_files(c, r.info.run_id)
    assert {"run.json", "report.html", "evaluate/verdict.json", "card.md", "train/figure_1.svg", "ingest/figure_1.svg", "train/table_1.json"} <= set(files)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{runs / 'mlflow.db'}")
    assert c.load_table(r.info.experiment_id, "train/table_1.json", [r.info.run_id])["a"].tolist() == [1]  # as MLflow reads its own tables
    assert [d.dataset.name for d in r.inputs.dataset_inputs] == ["raw"]
    raw = json.loads((run / "ingest/made.json").read_text())["artifacts"]["raw"]
    assert r.inputs.dataset_inputs[0].dataset.digest == raw["sha256"][:36]
    # the same again changes nothing
    before = (runs / "mlflow.db").read_bytes()
    assert track(run)["state"] == "there already" and (runs / "mlflow.db").read_bytes() == before
    assert sync(runs) == {"tracked": [], "failed": {}, "busy": False}
    assert sorted(p.name for p in runs.parent.iterdir()) == ["runs"]  # no mlruns/ anywhere
    marks = json.loads((run / "tracked.json").read_text())
    assert str(runs.parent) not in json.dumps(marks) and marks[DB]["mlflow_run"] == r.info.run_id
    assert "mlflow ui --backend-store-uri sqlite:///runs/mlflow.db" in track_text(done)


def test_a_record_that_changed_goes_again(runs):
    run, c = make(runs, whole=False), client(runs)
    track(run)
    (run / "run.json").write_text(json.dumps(record("one", about="Now with a report")))
    assert sync(runs)["tracked"] == ["taxi/one"]
    r = copies(c)["taxi/one"]
    assert r.data.tags["mlflow.note.content"] == "Now with a report"
    assert len(c.get_metric_history(r.info.run_id, "train.mae")) == 1


def test_the_model_answers_as_the_package(runs, monkeypatch):
    import pandas as pd
    from slml_nb.package import load_package, predict_table
    run = make(runs)
    done = track(run)
    package = sample_folder() / "package/out/package"
    predictor = load_package(package)
    raw = pd.read_parquet(sample_folder() / "ingest/out/raw.parquet").head(300)
    raw["departed"] = raw["departed"] if "departed" in raw else pd.NaT
    raw.to_parquet(runs / "raw.parquet")
    predict_table(predictor, runs / "raw.parquet", runs / "answers.parquet")
    ours = pd.read_parquet(runs / "answers.parquet")
    import mlflow.pyfunc
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{runs / 'mlflow.db'}")
    for uri in (f"runs:/{done['mlflow_run']}/model", done["model"]):
        theirs = mlflow.pyfunc.load_model(uri).predict(pd.read_parquet(runs / "raw.parquet"))
        assert theirs["prediction"].equals(ours["prediction"]) and theirs["prediction"].notna().sum() > 200
        assert theirs["error"].isna().equals(ours["error"].isna())
    files = [p for p in (runs / "mlartifacts/models").rglob("*") if p.is_file()]
    assert "MLmodel" in {p.name for p in files} and not [p for p in files if p.suffix in (".pkl", ".pickle", ".joblib")]


def test_an_older_server_gets_the_model_as_files(runs, monkeypatch):
    import mlflow
    from mlflow.exceptions import MlflowException
    def unknown(*_, **__): raise MlflowException("no such endpoint", error_code=mlflow.protos.databricks_pb2.ENDPOINT_NOT_FOUND)
    monkeypatch.setattr(mlflow.MlflowClient, "search_logged_models", unknown)
    done = track(make(runs))
    monkeypatch.undo()
    assert done["model"] == f"runs:/{done['mlflow_run']}/model" and "model/MLmodel" in all_files(client(runs), done["mlflow_run"])


def test_limits_of_mlflow(runs):
    "Hundreds of parameters, thousands of metrics, long values, names it does not take."
    parameters = {"s": {f"p{i}": i for i in range(250)} | {"long": "x" * 9000, "größe": 1, "a" * 300: 2}}
    metrics = {f"m{i}": i / 7 for i in range(1300)} | {"note": "y" * 9000, "flag": True, "none": None}
    done = track(make(runs, whole=False, parameters=parameters, stages={"s": {"metrics": metrics}}))
    r = client(runs).get_run(done["mlflow_run"])
    assert len(r.data.params) == 253 and len(r.data.params["s.long"]) == 6000 and r.data.params["s.p249"] == "249"
    assert r.data.metrics["s.m1299"] == 1299 / 7 and r.data.metrics["s.flag"] == 1


def make_sweep(runs, n=3):
    "A sweep of which the last point failed; all points share what comes before train."
    folder = make(runs, "sweep", whole=False)
    for made in sample_folder().glob("*/made.json"):
        shutil.copytree(made.parent, folder / "nodes" / f"{made.parent.name}-00000000")
    for stage in ("train", "ingest"): picture(folder / "nodes" / f"{stage}-00000000")
    points = []
    for i in range(n):
        at = folder / "points" / f"{i:03}"
        at.mkdir(parents=True)
        for node in (folder / "nodes").iterdir():
            stage = node.name.rpartition("-")[0]
            if stage in ("train", "evaluate", "package") and node.name.endswith("00000000"):
                mine = folder / "nodes" / f"{stage}-{i + 1:08}"
                shutil.copytree(node, mine)
                (at / stage).symlink_to(f"../../nodes/{mine.name}")
            elif node.name.endswith("00000000"): (at / stage).symlink_to(f"../../nodes/{node.name}")
        failed = i == n - 1
        if not failed: (at / "run.json").write_text(json.dumps(record(f"{i:03}", parameters={"train": {"epochs": i}})))
        points.append({"point": f"{i:03}", "values": {"train.epochs": i}, "state": "failed" if failed else "done", "why": "no luck" if failed else "", "metrics": {"train.mae": float(i)}, "folder": f"points/{i:03}"})
    (folder / "run.json").write_text(json.dumps(record("sweep", matrix={"train.epochs": list(range(n))}, points=points, parameters={})))
    return folder


def test_a_sweep(runs):
    sweep, c = make_sweep(runs), client(runs)
    done = track(sweep)
    found = copies(c)
    assert sorted(found) == ["taxi/sweep", *(f"taxi/sweep/points/00{i}" for i in range(3))]
    parent, first, last = found["taxi/sweep"], found["taxi/sweep/points/000"], found["taxi/sweep/points/002"]
    assert {r.data.tags.get("mlflow.parentRunId") for k, r in found.items() if "points" in k} == {parent.info.run_id}
    assert (first.info.status, last.info.status, parent.info.status) == ("FINISHED", "FAILED", "FINISHED")
    assert (first.data.params["train.epochs"], last.data.params["train.epochs"], last.data.metrics["train.mae"], last.data.tags["slml.error"]) == ("0", "2", 2.0, "no luck")
    assert first.info.run_name == "000 train.epochs=0" and parent.data.metrics["points"] == 3
    ours, shared = all_files(c, first.info.run_id), all_files(c, parent.info.run_id)
    assert "train/figure_1.svg" in ours and "ingest/figure_1.svg" not in ours  # what is shared is there once
    assert "ingest/figure_1.svg" in shared and "train/figure_1.svg" not in shared
    assert len(c.search_logged_models([done["experiment"]])) == 3
    assert done["points"] == 3 and track(sweep)["state"] == "there already" and len(copies(c)) == 4


def port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Server:
    "`mlflow server`, as it is typed, which can be stopped and started again."
    def __init__(self, folder, empty):
        self.folder, self.port, self.process = folder, port(), None
        self.uri = f"http://127.0.0.1:{self.port}"
        shutil.copy(empty, folder / "server.db")

    def start(self):
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{self.folder}/server.db", "--artifacts-destination", str(self.folder / "files"),
                   "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(command, cwd=self.folder, stdout=log, stderr=log, start_new_session=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
        for _ in range(600):
            try: return urllib.request.urlopen(f"{self.uri}/health", timeout=5).read()
            except OSError: time.sleep(0.1)
            assert self.process.poll() is None, (self.folder / "log").read_text()
        raise AssertionError("the server did not start: " + (self.folder / "log").read_text())

    def stop(self):
        if self.process: os.killpg(self.process.pid, signal.SIGKILL), self.process.wait()
        self.process = None


@pytest.fixture(scope="module")
def server(tmp_path_factory, empty):
    s = Server(tmp_path_factory.mktemp("server"), empty)
    yield s
    s.stop()


def test_a_server_that_is_down_and_comes_up(runs, server, monkeypatch):
    "Down: the run stays as it is and nothing is marked. Up: everything is caught up. No password reaches a file."
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    one, two, secret = make(runs, "one"), make(runs, "two", whole=False), "pa55w0rd-planted"
    uri = server.uri.replace("//", f"//ann:{secret}@")
    found = sync(runs, uri)
    assert found["tracked"] == [] and set(found["failed"]) == {"taxi/one", "taxi/two"} and "slml track" in found["failed"]["taxi/one"]
    assert not list(runs.rglob("tracked.json"))
    with pytest.raises(SlmlError, match="the run is whole in its folder"): track(one, uri)
    server.start()
    monkeypatch.setenv("SLML_TRACKING", uri)
    assert track_later(two)
    import slml_nb.track
    slml_nb.track._started[-1].wait(120)
    found = copies(client(runs, server.uri))
    assert set(found) == {"taxi/one", "taxi/two"}, (runs / ".tracking.log").read_text()
    assert sync(runs) == {"tracked": [], "failed": {}, "busy": False}
    files = [p for folder in (runs, server.folder) for p in folder.rglob("*") if p.is_file() and p.name != "log"]
    assert not [p for p in files if secret.encode() in p.read_bytes()] and list(json.loads((two / "tracked.json").read_text())) == [masked_uri(uri)]
    # what a browser sees: the page, the list of runs behind it, and a model that is there
    r = found["taxi/one"]
    assert b"<title>MLflow" in urllib.request.urlopen(server.uri).read()
    body = json.dumps({"experiment_ids": [r.info.experiment_id], "filter": "tags.`slml.run` = 'taxi/one'"}).encode()
    page = urllib.request.urlopen(urllib.request.Request(f"{server.uri}/ajax-api/2.0/mlflow/runs/search", body, {"Content-Type": "application/json"}))
    assert [x["info"]["run_name"] for x in json.load(page)["runs"]] == ["one"]
    assert r.data.metrics["train.far"] == sys.float_info.max and r.data.metrics["train.bad"] != r.data.metrics["train.bad"]
    models = client(runs, server.uri).search_logged_models([r.info.experiment_id])
    assert [(m.source_run_id, m.status) for m in models] == [(r.info.run_id, "READY")] and "card.md" in all_files(client(runs, server.uri), r.info.run_id)


def test_a_server_in_trouble(runs, monkeypatch):
    "500 for everything: told once, asked a bounded number of times."
    asked = []
    class Trouble(BaseHTTPRequestHandler):
        def do_GET(self): asked.append(self.path), self.send_error(500)
        do_POST = do_GET
        def log_message(self, *_): pass
    http = HTTPServer(("127.0.0.1", 0), Trouble)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    for i in range(5): make(runs, str(i), whole=False)
    found = sync(runs, f"http://127.0.0.1:{http.server_port}")
    http.shutdown()
    assert len(found["failed"]) == 5 and not found["tracked"] and len(asked) <= 4 and not list(runs.rglob("tracked.json"))


# MLflow is imported once; each delivery is a process of its own, and of each is told how it ended
DELIVERIES = """
import os, sys, mlflow
from slml_nb.track import sync
for _ in sys.stdin:
    if (child := os.fork()) == 0: print(os.getpid(), flush=True), sync(sys.argv[1]), os._exit(0)
    print(os.waitpid(child, 0)[1], flush=True)
"""


def test_killed_again_and_again(runs):
    "kill -9 of the delivery at random moments; in the end each run, point, metric and model is there once."
    for name in ("one", "two"): make(runs, name)
    make_sweep(runs)
    dice, killed = random.Random(7), 0
    with subprocess.Popen([sys.executable, "-c", DELIVERIES, str(runs)], env={**os.environ, "PYTHONPATH": str(ROOT)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as p:
        for _ in range(5):
            p.stdin.write("another\n"), p.stdin.flush()
            child = int(p.stdout.readline())
            time.sleep(dice.uniform(0.05, 0.8))
            with contextlib.suppress(ProcessLookupError): os.kill(child, signal.SIGKILL)
            killed += os.waitstatus_to_exitcode(int(p.stdout.readline())) == -signal.SIGKILL
    assert killed
    assert sync(runs)["failed"] == {} and sync(runs)["tracked"] == []
    c = client(runs)
    found = copies(c)
    assert len(found) == 6 and all(r.info.status in ("FINISHED", "FAILED") and "slml.tracked" in r.data.tags for r in found.values())
    assert all(len(c.get_metric_history(r.info.run_id, k)) == 1 for r in found.values() for k in list(r.data.metrics)[:20])
    models = c.search_logged_models([found["taxi/one"].info.experiment_id])
    assert sorted(m.source_run_id for m in models) == sorted(r.info.run_id for k, r in found.items() if k != "taxi/sweep") and {m.status for m in models} == {"READY"}


def test_a_run_that_a_repeated_request_made_twice(runs):
    c = client(runs)
    e = c.create_experiment("taxi", artifact_location=(runs / "mlartifacts").as_uri())
    for _ in range(3): c.create_run(e, start_time=1767268800000, tags={"slml.run": "taxi/one"})
    track(make(runs, whole=False))
    assert copies(c)["taxi/one"].info.status == "FINISHED"


def test_two_deliveries_at_once(runs):
    for i in range(4): make(runs, str(i), whole=False)
    command = [sys.executable, "-c", "import sys; from slml_nb.track import sync; print(sync(sys.argv[1]))", str(runs)]
    both = [subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert all(p.communicate(timeout=120)[0] and p.returncode == 0 for p in both)
    assert len(copies(client(runs))) == 4 and sync(runs)["tracked"] == []


def test_a_database_that_was_thrown_away_is_made_again(runs):
    for i in range(2): make(runs, str(i), whole=False)
    assert len(sync(runs)["tracked"]) == 2
    (runs / "mlflow.db").unlink()
    assert len(sync(runs)["tracked"]) == 2 and (runs / "mlflow.db").is_file() and len(copies(client(runs))) == 2


def test_a_project_that_was_moved(runs):
    "MLflow keeps full paths: it is not left to write into the old folder."
    make(runs, whole=False)
    sync(runs)
    moved = runs.parent.rename(runs.parent.parent / "moved") / "runs"
    make(moved, "two", whole=False)
    assert "another folder" in sync(moved)["failed"]["taxi/two"] and not runs.exists()
    (moved / "mlflow.db").unlink()
    found = sync(moved)
    assert len(found["tracked"]) == 2, found


def test_a_run_that_ends_during_a_delivery(runs, monkeypatch):
    "Its own delivery finds the lock taken and leaves; the one that holds it looks again, so nothing is left lying."
    import slml_nb.track as t
    make(runs, "one", whole=False)
    real, left = t._track, []
    def slow(*args):
        if not left:
            make(runs, "two", whole=False)
            left.append(subprocess.run([sys.executable, "-c", "import sys; from slml_nb.track import sync; print(sync(sys.argv[1])['busy'])", str(runs)],
                                       env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True).stdout.strip())
        return real(*args)
    monkeypatch.setattr(t, "_track", slow)
    assert sync(runs)["tracked"] == ["taxi/one", "taxi/two"] and left == ["True"]


def test_a_secret_is_nowhere(project, empty, monkeypatch):
    "!env in a parameter set, through `slml run`: not a byte of it in the database or the files."
    from slml_nb.stage import shipped_notebooks
    secret = "planted-0f8c1e"
    code = ["token: str = ''  # to a service\nrun: str = ''", "from slml_nb.stage import Stage\nstage = Stage('dig', run)\nassert token.startswith('planted')\nstage.save('ore', {'kg': 1})\nstage.metric(kg=1)\nstage.done()"]
    cells = [{"cell_type": "markdown", "id": "m", "metadata": {}, "source": "# Dig\n\n> A stage.\n\n- stage: dig\n- needs:\n- makes: ore"}]
    cells += [{"cell_type": "code", "id": f"c{i}", "metadata": {"tags": ["parameters"]} if i == 0 else {}, "source": s, "outputs": [], "execution_count": None} for i, s in enumerate(code)]
    project.write("params/dig.ipynb", json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    project.write("params/mine.yaml", "project: mine\nstages:\n  dig: dig.ipynb\n" + "".join(f"  {s}: false\n" for s in shipped_notebooks()) + "dig:\n  token: !env PLANTED\n")
    status, done = project.run("params/mine.yaml", PLANTED=secret, SLML_TRACKING="off")
    assert status == 0
    monkeypatch.setenv("PLANTED", secret)
    runs = project.folder / "runs"
    shutil.copy(empty, runs / "mlflow.db")
    assert sync(runs)["tracked"] == [f"mine/{done['run']}"]
    assert copies(client(runs))[f"mine/{done['run']}"].data.params["dig.token"] == "***"
    assert not [p for p in runs.rglob("*") if p.is_file() and secret.encode() in p.read_bytes()]


def test_without_mlflow(runs, tmp_path):
    "It cannot be imported: `track` says what to type, the others write the reason down."
    (tmp_path / "fake/mlflow").mkdir(parents=True)
    (tmp_path / "fake/mlflow/__init__.py").write_text("raise ImportError('No module named mlflow')")
    run = make(runs, whole=False)
    env = {**os.environ, "PYTHONPATH": f"{tmp_path / 'fake'}{os.pathsep}{ROOT}"}
    r = subprocess.run([sys.executable, "-c", "import sys; from slml_nb.track import track; track(sys.argv[1])", str(run)], env=env, capture_output=True, text=True)
    assert "pip install mlflow" in r.stderr
    r = subprocess.run([sys.executable, "-c", "import sys; from slml_nb import track as t; assert t.track_later(sys.argv[1]); t._started[-1].wait()", str(run)], env=env, capture_output=True, text=True)
    assert r.returncode == 0 and not r.stderr and "taxi/one not tracked" in (runs / ".tracking.log").read_text()
    assert not (run / "tracked.json").exists()


def test_a_folder_that_cannot_be_written(runs):
    "Neither lock nor log can be opened: nobody raises."
    run = make(runs, whole=False)
    for name in (".tracking.lock", ".tracking.log"): (runs / name).mkdir()
    assert "cannot be written" in sync(runs)["failed"]["runs"]
    assert track_later(run)
    assert track(run)["state"] == "tracked"


def test_off_and_running(runs, monkeypatch):
    make(runs, "off", whole=False, tracking="off"), make(runs, "going", whole=False, state="running"), make(runs, "broken", whole=False)
    (runs / "taxi/broken/run.json").write_text("{")
    assert sync(runs) == {"tracked": [], "failed": {}, "busy": False} and not track_later(runs / "taxi/off")
    make(runs, "more", whole=False)
    monkeypatch.setenv("SLML_TRACKING", "off")
    assert sync(runs)["tracked"] == [] and not track_later(runs / "taxi/more")
    assert track(runs / "taxi/more")["state"] == "tracked"  # asked for by name
    with pytest.raises(SlmlError, match="track it when it is over"): track(runs / "taxi/going")


def test_a_managed_server_by_its_arn(monkeypatch):
    "SageMaker's address goes to its own plugin, which knows the host; no account is asked."
    pytest.importorskip("sagemaker_mlflow")
    for k, v in {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y", "AWS_DEFAULT_REGION": "eu-west-1"}.items(): monkeypatch.setenv(k, v)
    from slml_nb.track import mlflow_client
    arn = "arn:aws:sagemaker:eu-west-1:123456789012:mlflow-tracking-server/team"
    with mlflow_client(arn, Path("runs")) as c: store = c._tracking_client.store
    assert type(store).__module__.startswith("sagemaker_mlflow") and "eu-west-1" in store.get_host_creds().host


def test_nothing_heavy_is_imported():
    code = "import slml_nb.track, sys; print([m for m in ('mlflow', 'pandas', 'numpy', 'duckdb', 'sqlalchemy', 'requests') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True).stdout.strip() == "[]"


def test_mlflow_answers_with_intervals_and_with_chances(tmp_path):
    "What the package serves beside a prediction, MLflow serves too, and its signature says so."
    import mlflow.pyfunc
    import pandas as pd
    from slml_nb.model import save_model
    from slml_nb.package import load_package, write_package
    from slml_nb.track import write_model
    from test_cascade import package
    km = {"name": "km", "type": "DOUBLE", "required": True, "missing": 0.0, "min": 0.0, "max": 30.0, "values": [], "example": 2.5, "from": ""}
    recipe = {"target": "fare", "task": "regression", "unit": "USD", "classes": [], "time": "", "inputs": [km], "features": [{"name": "km", "kind": "numeric", "sql": "km", "reads": ["km"]}], "lookups": [], "examples": [{"km": 2.5}]}
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe/recipe.json").write_text(json.dumps(recipe))
    sure = {"level": 0.8, "low": -1.0, "high": 2.0, "method": "split conformal", "of": "prediction", "rows": 100}
    save_model(tmp_path / "rule", {"kind": "rule", "task": "regression", "target": "fare", "features": ["km"], "expression": "3 * km", "interval": sure})
    verdict = {"candidate": "rule", "best": "rule", "sentence": "", "metric": "mae", "requirements": [], "candidates": [], "rows_test": 0}
    priced = write_package(tmp_path / "fares", tmp_path / "rule", tmp_path / "recipe", {"target": "fare", "task": "regression"}, verdict).folder
    table = pd.DataFrame({"km": [1.0, None, 10.0]})
    for name, folder, columns in (("priced", priced, ["prediction", "interval low", "interval high", "error"]), ("trip", package(tmp_path / "trip"), ["prediction", "probability of long", "probability of short", "error"])):
        loaded = mlflow.pyfunc.load_model(str(write_model(folder, tmp_path / f"mlflow {name}")))
        said = loaded.predict(table)
        assert list(said) == columns == loaded.metadata.signature.outputs.input_names()
        assert said["prediction"].tolist()[::2] == [a["prediction"] for a in load_package(folder).predict([{"km": 1.0}, {"km": 10.0}])] and said["error"].notna().tolist() == [False, True, False]
        if name == "priced": assert said[["interval low", "interval high"]].to_numpy()[::2].tolist() == [[2.0, 5.0], [29.0, 32.0]] and said["interval low"].isna().tolist() == [False, True, False]
