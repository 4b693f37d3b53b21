"""AutoML: what somebody would miss if it did not hold, on small tables and on bad ones."""
import json, sys
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pytest

from slml_nb.automl import Clock, automl, fold_rows, held_rows, run_automl
from slml_nb.core import SlmlError
from slml_nb.model import load_model

QUICK = dict(kinds=("linear", "trees"), seconds=60, tries=3, threads=1)


def table(n=120, seed=0):
    r = np.random.default_rng(seed)
    x, town = r.normal(size=n), r.choice(["Bonn", "Ulm", "Jena"], n)
    return pd.DataFrame({"x": x, "town": town, "y": 3 * x + (town == "Ulm") * 2 + 0.1 * r.normal(size=n)})


def answers(found, data):
    p = found.predict(data)
    assert len(p) == len(data)
    if found.task == "regression": assert np.isfinite(p.astype(float)).all()
    else: assert set(p) <= set(found.spec["classes"])
    return p


# ---- bad tables: an answer, or a clear word

def test_twelve_rows():
    data = table(12)
    found = automl(data, "y", **QUICK)
    answers(found, data)
    assert found.rows_test >= 1


def test_four_rows_are_too_few():
    with pytest.raises(SlmlError, match="too few"): automl(table(4), "y", **QUICK)


@pytest.mark.parametrize("target, word", [([7.0] * 40, "always 7"), (["yes"] * 40, "one class only"), ([None] * 40, "always missing"), ([f"n{i}" for i in range(40)] * 4, "too few|classes")])
def test_a_target_that_teaches_nothing(target, word):
    data = table(len(target)).assign(y=target)
    if "classes" in word: data = pd.concat([data.assign(y=[f"{v}-{i}" for v in target]) for i in range(3)])
    with pytest.raises(SlmlError, match=word): automl(data, "y", **QUICK)


def test_gaps_and_infinities_everywhere():
    data = table()
    data.loc[::3, "x"], data.loc[1::5, "x"], data.loc[::4, "town"] = np.nan, np.inf, None
    data["empty"], data["same"], data["mixed"] = np.nan, 1, [1, "a", None] * 40
    data.loc[::11, "y"] = np.nan
    data.loc[5, "y"] = np.inf
    found = automl(data, "y", **QUICK)
    assert any("12 rows without a target" in text for _, text in found.notes)
    answers(found, data)


def test_what_was_never_seen():
    found = automl(table(), "y", **QUICK)
    new = pd.DataFrame({"x": [1e300, -np.inf, None], "town": ["Paris", None, ""]})
    answers(found, new)
    answers(found, pd.DataFrame({"x": ["2.5", "many"], "town": [1, 2]}))      # of other types than in training
    with pytest.raises(SlmlError, match="town"): found.predict(pd.DataFrame({"x": [1.0]}))
    assert len(found.predict(new.head(0))) == 0


def test_a_thousand_columns():
    r = np.random.default_rng(0)
    data = pd.DataFrame(r.normal(size=(200, 1000)), columns=[f"c{i}" for i in range(1000)])
    data["y"] = data["c7"] * 5 + r.normal(size=200) * 0.1
    found = automl(data, "y", kinds=("linear", "trees"), seconds=10, tries=3, threads=1)
    answers(found, data)
    assert found.score < data["y"].abs().mean()


def test_too_wide_for_a_linear_model_is_said():
    wide = {f"c{i}": np.random.default_rng(i).normal(size=60) for i in range(1500)}
    y = wide["c0"] * 2
    spec = {"task": "regression", "metric": "mae", "target": "y", "classes": [], "kinds": dict.fromkeys(wide, "numeric"), "threads": 1}
    import tempfile
    _, job = run_automl(fold_rows({**wide, "target": y}, y, 2), spec, Path(tempfile.mkdtemp()), Clock(60), kinds=("linear", "trees"), tries=3)
    assert any("1,500 features are too many for a linear model" in t["state"] for t in job.tries)
    assert job.best()["kind"] == "trees"


def test_a_class_of_one_row():
    data = table(100).assign(y=["a"] * 60 + ["b"] * 39 + ["once"])
    found = automl(data, "y", **QUICK)
    assert found.spec["classes"] == ["a", "b", "once"]
    answers(found, data)
    assert np.allclose(found.raw(data).sum(1), 1)


def test_numbers_as_classes_and_dates(tmp_path):
    data = table(300).assign(y=lambda d: (d["x"] > 0).astype(int), when=pd.date_range("2024-01-01", periods=300, freq="h"))
    data.loc[3, "when"] = pd.NaT
    data.to_csv(tmp_path / "t.csv", index=False)
    found = automl(str(tmp_path / "t.csv"), "y", **QUICK)
    assert (found.task, found.spec["classes"]) == ("classification", ["0", "1"])
    assert np.mean(answers(found, data) == data["y"].astype(str)) > 0.95
    data.to_parquet(tmp_path / "t.parquet")
    later = automl(tmp_path / "t.parquet", "y", time="when", **QUICK)
    assert later.rows_test == 60 and len(later.job.rows.parts) == 1              # the last fifth, and no folds
    assert max(later.job.rows.columns["when: day"][later.job.rows.parts[0][0]]) <= min(later.job.rows.columns["when: day"][later.job.rows.parts[0][1]])


def test_an_unknown_kind_of_file(tmp_path):
    (tmp_path / "t.csv").write_bytes(b"\x00\x01\x02")
    with pytest.raises(SlmlError): automl(tmp_path / "t.csv", "y", **QUICK)
    with pytest.raises(SlmlError, match="no table"): automl(42, "y", **QUICK)


# ---- laws

def test_equal_seeds_give_equal_models(tmp_path):
    for name in ("a", "b"): automl(table(), "y", folder=str(tmp_path / name), **QUICK)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("weights.json"))
    assert files and all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)


def test_rows_put_aside_change_nothing_but_the_score(tmp_path):
    data, aside = table(), table(60, seed=9)
    one = automl(data, "y", test=aside, folder=str(tmp_path / "a"), **QUICK)
    two = automl(data, "y", test=aside.assign(y=-aside["y"]), folder=str(tmp_path / "b"), **QUICK)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("weights.json"))
    assert files and all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)
    assert two.score > 3 * one.score
    assert [t["score"] for t in one.job.tries] == [t["score"] for t in two.job.tries]


def test_an_answer_does_not_depend_on_how_many_are_asked():
    found, data = automl(table(), "y", **QUICK), table(20, seed=3)
    alone = [found.predict(data.iloc[[i]])[0] for i in range(20)]
    assert np.allclose(alone, found.predict(data), rtol=0, atol=1e-9)


@pytest.mark.slow
def test_the_same_bits_on_one_core_and_on_all(tmp_path):
    "Linear models, trees and a network by a validation split, the first two in folds, with tries that are counted and seconds enough."
    from test_fleet import on_one_core_and_on_all
    one, every = on_one_core_and_on_all(f"""
        import hashlib, shutil
        from pathlib import Path
        import numpy as np
        from slml_nb.automl import Clock, fold_rows, held_rows, run_automl
        def world(n, seed):
            r = np.random.default_rng(seed)
            c = {{f"x{{i}}": r.normal(size=n) for i in range(6)}} | {{"town": np.array(["Bonn", "Ulm"], object)[r.integers(0, 2, n)]}}
            y = np.sin(2 * c["x0"]) + np.where(c["town"] == "Ulm", c["x1"], -c["x1"]) + 0.2 * r.normal(size=n)
            return {{**c, "target": y}}, y
        (c, y), valid = world(3000, 0), world(800, 1)
        three = np.digitize(y[:600], [-0.5, 0.5])
        kinds = {{k: "categorical" if k == "town" else "numeric" for k in c if k != "target"}}
        spec = dict(task="regression", metric="mae", target="y", classes=[], kinds=kinds, threads=0)
        for name, rows, more in (("split", held_rows((c, y), valid), {{}}), ("folds", fold_rows({{k: v[:600] for k, v in c.items()}}, three, 2), dict(task="classification", metric="log_loss", classes=["a", "b", "c"]))):
            folder = Path({str(tmp_path)!r}) / name
            shutil.rmtree(folder, ignore_errors=True)
            says, job = run_automl(rows, {{**spec, **more}}, folder, Clock(600), kinds=("linear", "trees", "network")[:2 if more else 3], tries=6)
            assert more or any(t["kind"] == "network" and t["state"] == "scored" for t in job.tries), [t["state"] for t in job.tries]
            for p in sorted(folder.rglob("*.*")): print(p.relative_to(folder), hashlib.sha256(p.read_bytes()).hexdigest())
            for say in says.values(): print(hashlib.sha256(say(valid[0]).tobytes()).hexdigest())""")
    assert one == every and any("members" in line for line in one)


# ---- with a network

@pytest.mark.slow
def test_networks_take_part(tmp_path):
    r = np.random.default_rng(0)
    def rows(n):
        c = {"a": r.uniform(-3, 3, n), "b": r.uniform(-3, 3, n)}
        return {**c, "target": (y := np.sin(c["a"] * 2) * np.cos(c["b"]))}, y
    spec = {"task": "regression", "metric": "mae", "target": "y", "classes": [], "kinds": {"a": "numeric", "b": "numeric"}, "threads": 1}
    says, job = run_automl(held_rows(rows(2000), rows(500), again=True), spec, tmp_path, Clock(120, reserve=0.4), tries=5)
    network = next(t for t in job.tries if t["kind"] == "network")
    assert network["state"].startswith("scored"), network["state"]
    assert network.get("weight", 0) > 0                                          # smooth: here a network is good
    columns, y = rows(300)
    model = load_model(tmp_path / "automl")
    assert np.allclose(model.predict(columns), says["automl"](columns), atol=1e-4)
    assert np.allclose(model.predict({k: v[:1] for k, v in columns.items()}), says["automl"](columns)[:1], atol=1e-4)


# ---- FLAML

def test_without_flaml_a_clear_word(monkeypatch):
    monkeypatch.setitem(sys.modules, "flaml", None)
    with pytest.raises(SlmlError, match=r"slml_nb\[automl\]"): automl(table(), "y", engine="flaml", kinds=("linear", "trees"), seconds=5)


@pytest.mark.slow
def test_with_flaml():
    pytest.importorskip("flaml")
    found = automl(table(400), "y", engine="flaml", kinds=("linear", "trees"), seconds=20, threads=1)
    flaml = [t for t in found.job.tries if t["name"].startswith("flaml")]
    assert flaml and all(t["state"].startswith("scored") for t in flaml), [t["state"] for t in found.job.tries]


# ---- the stage

def params(project, test_sign=1):
    r = np.random.default_rng(0)
    n = 600
    frame = pd.DataFrame({"id": np.arange(n), "when": pd.date_range("2024-01-01", periods=n, freq="h"), "x": r.normal(size=n).round(3), "town": r.choice(["Bonn", "Ulm"], n)})
    frame["y"] = (frame["x"].abs() * 3 + (frame["town"] == "Ulm") + 0.2 * r.normal(size=n)).round(3)
    frame.loc[frame.index >= 500, "y"] *= test_sign
    frame.to_csv(project.folder / "t.csv", index=False)
    project.write("params/t.yaml", """
project: t
frame: {decision: how many, target: y, task: regression, metric: mae, unit: pieces, time: when, known_later: [], ignore: [], at_most: {}, at_least: {}, rule_today: '', decisions_per_day: 0}
ingest: {sources: [t.csv]}
sample: {by: time, cuts: {valid: "2024-01-17", test: "2024-01-21 20:00:00"}}
automl: {seconds: 120, tries: 4, kinds: [linear, trees], threads: 1}
train: {epochs: 1, hidden: [4]}
evaluate: {n_boot: 20, requests: 10}
""")


@pytest.mark.slow
def test_the_stage_never_reads_the_test_targets(project):
    weights = []
    for sign in (1, -1):
        params(project, sign)
        code, record = project.run("params/t.yaml", "--to", "automl")
        assert code == 0, record
        made = Path(project.folder, record["folder"]) / "automl" / "made.json"
        out = (made.parent / json.loads(made.read_text())["root"]).resolve()
        weights.append({p.relative_to(out): p.read_bytes() for p in sorted(out.rglob("weights.json"))})
        said = duckdb.sql(f"select distinct candidate, split from '{out}/automl_predictions.parquet'").df()
        assert set(said["candidate"]) == {"automl", "automl_best"} and set(said["split"]) == {"valid", "test"}
        board = duckdb.sql(f"select kind, weight from '{out}/automl_leaderboard.parquet'").df()
        assert abs(board.loc[board["kind"] != "ensemble", "weight"].sum() - 1) < 1e-9
    assert weights[0] and weights[0] == weights[1]
