"""The registry under stress: two at once, a crash half way, a record that was touched, MLflow beside it and away."""
import json, multiprocessing, os, shutil

import pytest

from slml_nb.core import SlmlError
from slml_nb.evaluate import package_folder
from slml_nb.registry import mirror, move, production, read_registered, register, registered_names, registry_text, repair, rollback, sign
from slml_nb.stage import sample_folder


def versions(name, root): return [(v["version"], v["stage"]) for v in read_registered(name, root)["versions"]]


def _register(root, who, times):
    for _ in range(times): register(sample_folder(), "flights", who=who, root=root)


def test_many_at_once(tmp_path):
    "Four processes register five times each: twenty versions, each number once, one of them in production, and a history that leaves nobody out."
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_register, args=(tmp_path, f"worker {i}", 5)) for i in range(4)]
    for w in workers: w.start()
    for w in workers: w.join(120)
    assert [w.exitcode for w in workers] == [0] * 4
    record = read_registered("flights", tmp_path)
    assert [v["version"] for v in record["versions"]] == list(range(1, 21))
    assert [v["version"] for v in record["versions"] if v["stage"] == "production"] == [record["line"][-1]]
    said = [h["who"] for h in record["history"] if h["what"] == "registered"]
    assert all(said.count(f"worker {i}") == 5 for i in range(4))
    assert record["revision"] == 20 == len(list((tmp_path / "flights/log").glob("*.json")))
    assert not list((tmp_path / "flights").rglob(".part*"))


def _approve(root, version, done):
    try: done.put(sign("flights", version, f"person {version}", "go", root=root)["version"])
    except SlmlError as e: done.put(str(e))


def test_two_signatures_at_once_leave_one_in_production(tmp_path):
    for _ in range(2): register(sample_folder(), "flights", approval="person", root=tmp_path)
    context = multiprocessing.get_context("spawn")
    done = context.Queue()
    workers = [context.Process(target=_approve, args=(tmp_path, v, done)) for v in (1, 2)]
    for w in workers: w.start()
    for w in workers: w.join(60)
    assert sorted(done.get() for _ in workers) == [1, 2]
    record = read_registered("flights", tmp_path)
    assert sorted(v["stage"] for v in record["versions"]) == ["archived", "production"]
    assert sorted(record["line"]) == [1, 2]
    rollback("flights", root=tmp_path)
    assert production("flights", tmp_path)[1]["version"] == record["line"][0]


def test_rollback_walks_back_and_not_forth(tmp_path):
    for _ in range(3): register(sample_folder(), "m", root=tmp_path)
    assert rollback("m", root=tmp_path)["version"] == 2
    assert rollback("m", root=tmp_path)["version"] == 1
    with pytest.raises(SlmlError, match="no version before 1"): rollback("m", root=tmp_path)
    assert versions("m", tmp_path) == [(1, "production"), (2, "archived"), (3, "archived")]
    move("m", 1, "archived", root=tmp_path)
    with pytest.raises(SlmlError, match="no version is in production"): rollback("m", root=tmp_path)
    with pytest.raises(SlmlError, match="no version is in production"): package_folder("m", tmp_path)
    assert move("m", 3, "production", root=tmp_path)["stage"] == "production"


def test_rollback_passes_over_a_damaged_version(tmp_path):
    "Version 2 has other files than 1 and 3; when they are damaged, the way back from 3 leads to 1."
    other = tmp_path / "other"
    shutil.copytree(package_folder(sample_folder())[0], other)
    (other / "card.md").write_text("another card")
    from slml_nb.package import seal
    seal(other)
    root = tmp_path / "registry"
    for where in (sample_folder(), other, sample_folder()): register(where, "m", root=root)
    sign("m", 2, "Ann", "why not", root=root)
    move("m", 3, "production", root=root)
    v2 = read_registered("m", root)["versions"][1]
    (root / "m" / v2["package"] / "card.md").write_text("touched")
    assert rollback("m", root=root)["version"] == 1
    assert any(h["what"] == "passed over" and h["version"] == 2 for h in read_registered("m", root)["history"])
    with pytest.raises(SlmlError, match="the package is damaged"): move("m", 2, "production", root=root)


def test_killed_between_the_copy_and_the_record(tmp_path, monkeypatch):
    "The copy is there, the record is not: nothing is registered, and the next attempt goes through."
    from slml_nb.store import FolderStore
    def dies(*_): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(FolderStore, "put_if_absent", dies)
        with pytest.raises(KeyboardInterrupt): register(sample_folder(), "m", root=tmp_path)
    assert registered_names(tmp_path) == []
    assert register(sample_folder(), "m", root=tmp_path)["version"] == 1


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"name": "m"}', "edited"])
def test_a_damaged_record(tmp_path, damage):
    for _ in range(2): register(sample_folder(), "m", root=tmp_path)
    newest = tmp_path / "m/log/000002.json"
    newest.write_text(newest.read_text().replace('"line": [\n  1,', '"line": [\n  7,') if damage == "edited" else damage)
    for act in (lambda: read_registered("m", tmp_path), lambda: register(sample_folder(), "m", root=tmp_path), lambda: rollback("m", root=tmp_path), lambda: package_folder("m", tmp_path)):
        with pytest.raises(SlmlError, match="damaged.*slml registry m --repair"): act()
    assert repair("m", root=tmp_path) == [2]
    assert versions("m", tmp_path) == [(1, "production")]
    assert register(sample_folder(), "m", root=tmp_path)["version"] == 2
    assert (tmp_path / "m/log/000002.damaged").exists()


def test_nothing_intact_is_said(tmp_path):
    register(sample_folder(), "m", root=tmp_path)
    (tmp_path / "m/log/000001.json").write_text("x")
    with pytest.raises(SlmlError, match="no record of it is intact"): repair("m", root=tmp_path)


def test_other_question_other_name(tmp_path):
    register(sample_folder(), "m", root=tmp_path)
    other = tmp_path / "other"
    shutil.copytree(package_folder(sample_folder())[0], other)
    recipe = json.loads((other / "recipe.json").read_text())
    (other / "recipe.json").write_text(json.dumps({**recipe, "target": "tip"}))
    from slml_nb.package import seal
    seal(other)
    with pytest.raises(SlmlError, match="register it under another name"): register(other, "m", root=tmp_path)
    assert len(versions("m", tmp_path)) == 1


def test_a_registry_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("a file where a folder should be")
    with pytest.raises((SlmlError, OSError)): register(sample_folder(), "m", root=tmp_path / "file")


@pytest.mark.slow
def test_mlflow_has_a_copy(tmp_path, monkeypatch):
    "Versions, steps and aliases as ours; twice is once; and MLflow loads what answers."
    mlflow = pytest.importorskip("mlflow")
    from slml_nb.track import track
    run = tmp_path / "runs/taxi/20260101-120000-ab12"
    shutil.copytree(sample_folder(), run, ignore=shutil.ignore_patterns("data"))
    (run / "run.json").write_text(json.dumps({"project": "taxi", "run": run.name, "state": "done", "stages": {}, "parameters": {}}))
    root, uri = tmp_path / "runs/registry", f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert track(run, uri)["state"] == "tracked"
    client = mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
    first = register(run, "taxi", root=root)
    assert first["run"] == f"taxi/{run.name}" and first["stage"] == "production"
    assert mirror("taxi", client, root) == {"new": [1], "busy": False}
    assert mirror("taxi", client, root) == {"new": [], "busy": False}
    register(run, "taxi", approval="person", root=root)
    assert mirror("taxi", client, root)["new"] == [2]
    there = client.get_registered_model("taxi")
    assert {a: int(v) for a, v in there.aliases.items()} == {"production": 1, "staging": 2}
    sign("taxi", 2, "Ann", "looked at it", root=root)
    mirror("taxi", client, root)
    assert {a: int(v) for a, v in client.get_registered_model("taxi").aliases.items()} == {"production": 2}
    tags = {v.tags["slml.version"]: v.tags for v in client.search_model_versions("name = 'taxi'")}
    assert tags["1"]["slml.stage"] == "archived" and tags["2"]["slml.approved_by"] == "Ann"
    rollback("taxi", root=root)
    mirror("taxi", client, root)
    assert client.get_model_version_by_alias("taxi", "production").tags["slml.version"] == "1"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)  # not set_tracking_uri: it would hold for every test that follows
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", uri)
    import pandas as pd
    package, _ = production("taxi", root)
    requests = json.loads((package / "recipe.json").read_text())["examples"]
    assert mlflow.pyfunc.load_model("models:/taxi@production").predict(pd.DataFrame(requests))["prediction"].notna().all()


# ---- several machines, one bucket

@pytest.fixture
def bucket(monkeypatch, tmp_path):
    "A registry in a bucket, before a server whose conditions are atomic, as those of S3 are; each process has a cache of its own."
    import boto3, logging
    from moto.server import ThreadedMotoServer
    from test_store_faults import Proxy
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    proxy = Proxy(server.get_host_and_port())
    for k, v in {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1", "AWS_ENDPOINT_URL": proxy.url, "SLML_CACHE": str(tmp_path / "cache")}.items(): monkeypatch.setenv(k, v)
    boto3.client("s3").create_bucket(Bucket="models")
    yield "s3://models/registry"
    proxy.shutdown(), proxy.server_close(), server.stop()


def _machine(root, who, cache, times, done):
    "Register, sign and roll back, again and again; how often each went through, and what was refused."
    os.environ["SLML_CACHE"] = cache
    went, refused = {"registered": 0, "signed": 0, "rolled back": 0}, []
    for _ in range(times):
        v = register(sample_folder(), "flights", who=who, root=root)["version"]
        went["registered"] += 1
        for what, act in (("signed", lambda: sign("flights", v, who, "go", root=root)), ("rolled back", lambda: rollback("flights", who, root=root))):
            try: act()
            except SlmlError as e: refused.append(str(e))
            else: went[what] += 1
    done.put((who, went, refused))


@pytest.mark.slow
def test_two_machines_and_one_bucket(bucket, tmp_path):
    "Both change the same name at once: no number twice, no word of the history lost, one version answers, and what is fetched is what was registered."
    register(sample_folder(), "flights", approval="person", who="first", root=bucket)
    sign("flights", 1, "first", root=bucket)
    context = multiprocessing.get_context("spawn")
    done = context.Queue()
    workers = [context.Process(target=_machine, args=(bucket, f"machine {i}", str(tmp_path / f"cache {i}"), 3, done)) for i in range(2)]
    for w in workers: w.start()
    told = {who: (went, refused) for who, went, refused in (done.get(timeout=120) for _ in workers)}
    for w in workers: w.join(60)
    record = read_registered("flights", bucket)
    assert [v["version"] for v in record["versions"]] == list(range(1, 8))
    words = {"registered": "registered", "signed": "signed", "rolled back": "rolled back to"}
    for who, (went, refused) in told.items():
        assert {what: sum(h["who"] == who and h["what"] == word for h in record["history"]) for what, word in words.items()} == went
        assert all("no version" in text or "is in production" in text for text in refused), refused
    answering = [v["version"] for v in record["versions"] if v["stage"] == "production"]
    assert answering == record["line"][-1:] and record["revision"] == 2 + sum(sum(went.values()) for went, _ in told.values())
    folder, version = production("flights", bucket)
    assert version["version"] == answering[0] and json.loads((folder / "manifest.json").read_text())["hash"] == version["hash"]
    assert registered_names(bucket) == ["flights"]


@pytest.mark.slow
def test_what_is_damaged_in_a_bucket(bucket, monkeypatch):
    import boto3
    monkeypatch.setenv("SLML_REGISTRY", bucket)                                     # as on the command line
    for _ in range(2): register(sample_folder(), "m")
    s3, version = boto3.client("s3"), read_registered("m")["versions"][1]
    card = f"registry/m/{version['package']}/card.md"
    s3.put_object(Bucket="models", Key=card, Body=b"touched")
    shutil.rmtree(os.environ["SLML_CACHE"])
    with pytest.raises(SlmlError, match="hash"): production("m")
    register(sample_folder(), "m")                                                  # the same package: it is mended
    assert production("m")[1]["version"] == 3
    s3.put_object(Bucket="models", Key="registry/m/log/000003.json", Body=b"{")
    with pytest.raises(SlmlError, match="damaged.*slml registry m --repair"): rollback("m")
    assert repair("m") == [3] and production("m")[1]["version"] == 2
    assert s3.get_object(Bucket="models", Key="registry/m/log/000003.damaged")["Body"].read() == b"{"


def test_the_champion_lies_in_a_bucket(bucket):
    "A run on another machine compares its model with the one in production, by its name alone."
    register(sample_folder(), "flights", root=bucket)
    if not read_registered("flights", bucket)["line"]: sign("flights", 1, root=bucket)
    folder, called = package_folder("flights", bucket)
    assert called == "flights 1" and json.loads((folder / "manifest.json").read_text())["hash"] == read_registered("flights", bucket)["versions"][0]["hash"]
    with pytest.raises(SlmlError, match="did you mean 'flights'"): package_folder("flight", bucket)
