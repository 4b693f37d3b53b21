"""The stage fleet as a user runs it: segments that are features or not, that fail or are never seen; and many models in one folder."""
import json, os, random, subprocess, sys, textwrap
from pathlib import Path

import duckdb
import numpy as np
import pytest

from slml_nb.model import load_model, read_split
from slml_nb.stage import artifact_path, made_in

root = Path(__file__).resolve().parent.parent
PARAMS = """project: shops
about: What does a delivery cost?
frame: {{target: price, task: {task}, metric: {metric}, unit: EUR, time: ordered, known_later: [rating], at_most: {{{metric}: 10}}}}
ingest: {{sources: [deliveries.csv]}}
sample: {{by: hash, key: [id]}}
features: {{drop: [id, ordered{drop}]}}
fleet: {{segment: {segment}, min_rows: 20, {more}}}
"""


def deliveries(project, classes=False, rows=1500):
    "Six towns with a price per km of their own; one has few rows, one a fixed price."
    dice, lines = random.Random(3), ["id,ordered,town,night,km,weight,rating,price"]
    towns = ["Oslo"] * 40 + ["Rome"] * 30 + ["Lima"] * 15 + ["Bonn"] * 10 + ["Bern"] * 4 + ["Graz"]
    slope = {"Oslo": 3, "Rome": 1, "Lima": 2, "Bonn": 0.5, "Bern": 0, "Graz": 4}
    for i in range(rows):
        town, km = dice.choice(towns), dice.uniform(0.5, 9)
        price = 7.5 if town == "Bern" else 4 + slope[town] * km + dice.gauss(0, 1)
        said = ("dear" if price > 10 else "cheap") if classes else f"{price:.2f}"
        lines.append(f"{i},2024-{1 + i % 12:02}-{1 + i % 28:02} {i % 24:02}:00,{town},{i % 2},{km:.2f},{dice.uniform(1, 5):.1f},{dice.randrange(1, 6)},{said}")
    project.write("deliveries.csv", "\n".join(lines))


def run(project, segment="[town]", drop="", more="kind: ridge", classes=False):
    "Run up to the fleet: its record of what it made, and the artifacts of the run."
    how = {"task": "classification", "metric": "log_loss"} if classes else {"task": "regression", "metric": "mae"}
    project.write("params/shops.yaml", PARAMS.format(segment=segment, drop=drop, more=more, **how))
    code, record = project.run("params/shops.yaml", "--to", "fleet")
    folder = max((project.folder / "runs" / "shops").glob("*/fleet"), key=lambda p: p.stat().st_mtime_ns)
    made = json.loads((folder / "made.json").read_text()) if (folder / "made.json").exists() else None
    return code, record, made, made_in(folder.parent)


@pytest.mark.slow
@pytest.mark.parametrize("kind, classes", [("ridge", False), ("mlp", True)])
def test_each_town_gets_its_own_price_per_km(project, kind, classes):
    deliveries(project, classes)
    code, record, made, artifacts = run(project, more=f"kind: {kind}", classes=classes)
    assert code == 0, record
    said = " ".join(f["text"] for f in made["findings"])
    assert "keeps the pooled model (fewer than 20 rows): Graz" in said and (classes or "(a target that does not vary): Bern" in said)
    assert made["metrics"]["own"] >= 4 and made["metrics"]["own"] + made["metrics"]["pooled"] == 6
    metric = "valid_log_loss" if classes else "valid_mae"
    assert made["metrics"][metric] < made["metrics"][f"{metric}_pooled"] * (0.95 if kind == "ridge" else 1)
    model = load_model(artifact_path(artifacts["fleet_models"]) / "fleet")
    con = duckdb.connect()
    for name in ("features", "fleet_predictions"): con.execute(f"create view {name} as select * from read_parquet('{artifact_path(artifacts[name])}')")
    columns, _ = read_split(con, "test", json.loads((artifact_path(artifacts["recipe"]) / "recipe.json").read_text())["classes"])
    want = con.execute("select prediction, probabilities from fleet_predictions where split = 'test' order by row_id").fetchall()
    got = model.predict(columns)
    np.testing.assert_allclose(got[:, 1] if classes else got, [p[1] if classes else x for x, p in want], rtol=1e-6, atol=1e-7)
    stranger = {**{k: v[:1] for k, v in columns.items()}, "town": np.array(["Quito"], object)}
    assert np.isfinite(model.predict(stranger)).all()


@pytest.mark.slow
def test_a_segment_that_is_no_feature_and_one_that_must_not_be(project):
    deliveries(project)
    code, record, made, artifacts = run(project, segment="[town, night]", drop=", town")
    assert code == 0, record
    said = " ".join(f["text"] for f in made["findings"])
    assert "town is no feature" in said and made["metrics"]["segments"] >= 10
    model = load_model(artifact_path(artifacts["fleet_models"]) / "fleet")
    con = duckdb.connect()
    for name in ("features", "fleet_predictions"): con.execute(f"create view {name} as select * from read_parquet('{artifact_path(artifacts[name])}')")
    told = con.execute("select prediction from fleet_predictions where split = 'test' order by row_id").fetchnumpy()["prediction"]
    np.testing.assert_allclose(told, model.predict(read_split(con, "test", [])[0]), rtol=1e-9)  # what a request would be told
    code, record, made, _ = run(project, segment="[twon]")
    assert code != 0 and made is None and "did you mean 'town'" in json.dumps(record), record


def on_one_core_and_on_all(script):
    "The lines that a script prints where it may use one core and one thread, and where it may use whatever there is."
    if not hasattr(os, "sched_setaffinity"): pytest.skip("the cores of a process cannot be chosen here")
    free = {k: v for k, v in os.environ.items() if not k.endswith("_NUM_THREADS")}
    ways = [("import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n", {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}), ("", {})]
    done = [subprocess.run([sys.executable, "-c", before + textwrap.dedent(script)], capture_output=True, text=True, cwd=root, env={**free, **env, "PYTHONPATH": str(root)}) for before, env in ways]
    for d in done: assert d.returncode == 0, d.stderr[-3000:]
    return [d.stdout.splitlines() for d in done]


@pytest.mark.slow
def test_the_same_bits_on_one_core_and_on_all(tmp_path):
    one, every = on_one_core_and_on_all(f"""
        import hashlib
        from pathlib import Path
        import numpy as np
        from slml_nb.fleet import fit_fleet
        def orders(n, width, seed):
            r = np.random.default_rng(seed)
            shop, x = (12 * r.random(n) ** 2).astype(int), r.normal(size=(n, width))
            y = 3 + (1 + 0.3 * shop) * x[:, 0] + 2 * x[:, 1] + 2 * r.normal(size=n)
            return {{**{{f"x{{i}}": v for i, v in enumerate(x.T)}}, "shop": np.array([f"shop {{i}}" for i in shop], object)}}, y
        how = dict(min_rows=30, alpha=1.0, shrinkage=[0, 300], max_categories=20, hidden=[32], epochs=4, patience=5, lr=0.005, seed=0, device="cpu")
        for kind, metric, rows, width in (("ridge", "rmse", 12_000, 200), ("ridge", "log_loss", 3000, 12), ("mlp", "mae", 20_000, 200)):
            (train, y), (valid, vy) = orders(rows, width, 0), orders(rows // 4, width, 1)
            classes = ["a", "b", "c"] if metric == "log_loss" else []
            if classes: y, vy = (np.digitize(v, [2.5, 4.5]).astype(float) for v in (y, vy))
            recipe = dict(task="classification" if classes else "regression", target="y", classes=classes, features=[dict(name=k, kind="categorical" if k == "shop" else "numeric") for k in train])
            folder = Path({str(tmp_path)!r}) / kind
            says = fit_fleet(folder, recipe, metric, ["shop"], (train, y), (valid, vy), dict(how, kind=kind, batch=4096 if kind == "mlp" else 256))
            for made in ((folder / "weights.json").read_bytes(), *(say(valid).tobytes() for say in says[:2])): print(kind, metric, hashlib.sha256(made).hexdigest())""")
    assert one == every and len(set(one)) == 9
