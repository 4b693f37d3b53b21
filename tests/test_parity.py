"""Every kind of model, packaged, says of ten thousand requests what the training library says of the same rows, strange values among them."""
import json, random

import numpy as np
import pytest

from slml_nb.model import fit_encoding, load_model, read_columns, save_rule
from slml_nb.package import TOLERANCE, differences, write_package
from slml_nb.sql import columns_of as columns_of_sql

ROWS = 10_000
FIELDS = {"x": "DOUBLE", "n": "BIGINT", "town": "VARCHAR", "open": "BOOLEAN", "moment": "TIMESTAMP", "review": "VARCHAR"}
FEATURES = {"x": "x", "n": "CAST(n AS DOUBLE)", "half": "CASE WHEN isfinite(x / 2) THEN x / 2 END", "town": "town", "shout": "upper(town)", "open": "CAST(open AS DOUBLE)", "hour": "CAST(hour(moment) AS DOUBLE)", "review": "review"}
TEXTS = ("town", "shout", "review")
EDGES = {"x": [None, 0.0, -0.0, 1e300, -1e300, 5e-324, 1e-36, 0.1 + 0.2, 2.0**53, 9.5], "n": [None, 0, -1, 2**53, -(2**53), 2**62, 7], "town": [None, "", " ", "Oslo", "oslo", "Zürich", "ß", "İ", "😀", "NULL", "x" * 500],
         "open": [None, True, False], "moment": [None, "1970-01-01T00:00:00", "1969-12-31T23:59:59.999999", "2024-02-29T23:59:59", "2262-01-01T00:00:00"], "review": [None, "", "  ", "good " * 300, "\x00\ufffd", "ÀÉ ß İ", "的好"]}
PROBLEM, VERDICT = {"target": "y", "task": "regression"}, {"candidate": None, "best": "m", "sentence": "", "metric": "mae", "requirements": [], "candidates": [], "rows_test": 0}


def requests_of(rows, seed):
    "Requests: half of them ordinary, half with strange values, each field left out now and then."
    dice, towns, words = random.Random(seed), ["Oslo", "Rome", "Lima", "Bonn", "Graz"], "the box is good bad not unable very 12 !".split()
    out = []
    for i in range(rows):
        usual = {"x": dice.gauss(2, 5), "n": dice.randrange(50), "town": dice.choice(towns), "open": dice.random() < 0.5, "moment": f"2024-{1 + i % 12:02}-{1 + i % 28:02}T{i % 24:02}:30:00", "review": " ".join(dice.choices(words, k=6))}
        out.append({k: dice.choice(EDGES[k]) if i % 2 and dice.random() < 0.5 else v for k, v in usual.items()})
    return out


def columns_of(requests):
    "The features as DuckDB computes them, by the very SQL of the recipe."
    import duckdb, pandas as pd
    con = duckdb.connect(config={"threads": 1})
    table = pd.DataFrame({k: pd.Series([r[k] for r in requests], dtype=object) for k in FIELDS})
    for c in ("x", "n", "open"): table[c] = table[c].astype({"x": "Float64", "n": "Int64", "open": "boolean"}[c])
    con.register("given", table)
    con.execute(f"create table rows as select {', '.join(f'CAST({c} AS {t}) AS {c}' for c, t in FIELDS.items())} from given")
    return read_columns(con, f"select {', '.join(f'{sql} AS {name}' for name, sql in FEATURES.items())} from rows")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "Rows to learn from, rows to compare on, and a recipe."
    folder = tmp_path_factory.mktemp("world")
    inputs = [{"name": c, "type": t, "required": False, "missing": 0.1, "min": None, "max": None, "values": [], "example": None, "from": ""} for c, t in FIELDS.items()]
    features = [{"name": n, "kind": "categorical" if n in TEXTS else "numeric", "sql": s, "reads": columns_of_sql(s)} for n, s in FEATURES.items()]
    learn, ask = requests_of(1500, 1), requests_of(ROWS, 2)
    told = {"target": "y", "unit": "min", "time": "", "inputs": inputs, "features": features, "lookups": [], "examples": [learn[0]]}
    train, rows = columns_of(learn), columns_of(ask)
    known = lambda v: np.nan_to_num(np.clip(np.array(v, float), -10, 60), nan=3.0)
    y = known(train["x"]) + 2.0 * np.array([len(t or "") % 5 for t in train["town"]]) + known(train["hour"]) / 10 + np.array([("good" in (t or "")) - ("bad" in (t or "")) for t in train["review"]])
    return {"folder": folder, "recipe": told, "train": train, "y": y, "ask": ask, "rows": rows}


def spec_of(world, classes, names):
    kinds = {n: "categorical" if n in TEXTS else "numeric" for n in names}
    encoding = fit_encoding({n: world["train"][n] for n in names}, kinds)
    return {"task": "classification" if classes else "regression", "target": "y", "classes": classes, "features": list(kinds), "encoding": encoding}, kinds


def make_linear(world, folder, classes, y, metric):
    from slml_nb.baseline import fit_linear
    spec, _ = spec_of(world, classes, [n for n in FEATURES if n != "review"])
    return fit_linear(folder, spec, ({**world["train"], "target": y}, y), metric)


def make_trees(world, folder, classes, y, metric):
    from slml_nb.baseline import fit_trees
    spec, _ = spec_of(world, classes, [n for n in FEATURES if n != "review"])
    say, _ = fit_trees(folder, spec, ({**world["train"], "target": y}, y), ({**world["train"], "target": y}, y), metric, rounds=30, num_threads=1, num_leaves=15, seed=0)
    return lambda c: say({**c, "target": np.zeros(len(c["x"]))})


def make_network(world, folder, classes, y, metric, **how):
    from slml_nb.train import train_network
    names = [n for n in FEATURES if n != "review"]
    recipe = {"task": "classification" if classes else "regression", "target": "y", "classes": classes, "features": [{"name": n, "kind": "categorical" if n in TEXTS else "numeric"} for n in names]}
    say, learnt = train_network(folder, recipe, metric, (world["train"], y), (world["train"], y), {"hidden": [16], "epochs": 2, "batch": 256, "seed": 0, **how})
    return lambda c: say({**c, "target": np.zeros(len(c["x"]))})


def make_quantiles(world, folder, classes, y, metric): return make_network(world, folder, classes, y, metric, loss="quantile")


def make_fleet(world, folder, classes, y, metric):
    from slml_nb.fleet import fit_fleet
    names = [n for n in FEATURES if n != "review"]
    recipe = {"task": "classification" if classes else "regression", "target": "y", "classes": classes, "features": [{"name": n, "kind": "categorical" if n in TEXTS else "numeric"} for n in names]}
    settings = {"kind": "ridge", "min_rows": 20, "max_categories": 100, "shrinkage": [10.0], "alpha": 1.0, "steps": 50, "device": "cpu"}
    return fit_fleet(folder, recipe, metric, ["town"], (world["train"], y), (world["train"], y), settings)[0]


def make_rule(world, folder, classes, y, metric):
    says = "CASE WHEN x > 3 THEN 'far' ELSE 'near' END" if classes else "x * 3 + coalesce(hour, 0) - length(town)"
    save_rule(folder, {k: v for k, v in spec_of(world, classes, ["x"])[0].items() if k in ("task", "target", "classes")}, says, world["train"], [classes[int(v)] for v in y] if classes else y)
    return load_model(folder).predict  # by DuckDB; the package has it compiled


def make_ensemble(world, folder, classes, y, metric):
    from slml_nb.automl import save_ensemble
    say = {n: make(world, folder.with_name(f"member {n}"), classes, y, metric) for n, make in (("linear", make_linear), ("trees", make_trees))}
    save_ensemble(folder, {"name": "ensemble", "task": "classification" if classes else "regression", "target": "y", "classes": classes}, [(0.25, folder.with_name("member linear")), (0.75, folder.with_name("member trees"))])
    return lambda c: 0.25 * say["linear"](c) + 0.75 * say["trees"](c)


def make_tfidf(world, folder, classes, y, metric):
    from slml_nb.text import fit_tfidf
    spec, texts = {"task": "classification" if classes else "regression", "target": "y", "classes": classes, "features": ["review"]}, [t or "" for t in world["train"]["review"]]
    say, _ = fit_tfidf(folder, spec, (texts, y), (texts[:200], y[:200]), metric, alpha=10.0)
    return lambda c: say([t or "" for t in c["review"]])


def make_encoder(world, folder, classes, y, metric):
    "One number a piece of text, and their mean: numpy can say it as well."
    from onnx import TensorProto, helper, numpy_helper
    from slml_nb.text import WordPiece, save_encoder, said
    cut = WordPiece(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "the", "is", "##ing", "un", "##able", "!"], True, None, 40)
    value, node, number = np.arange(12) / 7, helper.make_node, lambda name, v: numpy_helper.from_array(v, name)
    nodes = [node("Gather", ["table", "ids"], ["looked"]), node("Cast", ["mask"], ["m"], to=TensorProto.FLOAT), node("Mul", ["looked", "m"], ["kept"]),
             node("ReduceSum", ["kept", "axis"], ["sum"], keepdims=0), node("ReduceSum", ["m", "axis"], ["length"], keepdims=0), node("Div", ["sum", "length"], ["prediction"])]
    ins = [helper.make_tensor_value_info(n, TensorProto.INT64, ["n", "l"]) for n in ("ids", "mask")]
    graph = helper.make_graph(nodes, "tiny", ins, [helper.make_tensor_value_info("prediction", TensorProto.FLOAT, ["n"])], [number("table", value.astype(np.float32)), number("axis", np.array([1]))])
    save_encoder(folder, {"task": "regression", "target": "y", "features": ["review"]}, cut, helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9).SerializeToString())
    return lambda c: np.array([value[cut(said(t))].mean() for t in c["review"]])


KINDS = {"rule": make_rule, "linear": make_linear, "trees": make_trees, "network": make_network, "quantiles": make_quantiles, "fleet": make_fleet, "ensemble": make_ensemble, "tfidf": make_tfidf, "encoder": make_encoder}
CASES = [(k, []) for k in KINDS] + [(k, ["far", "near"]) for k in KINDS if k not in ("quantiles", "encoder")]


@pytest.mark.slow
@pytest.mark.parametrize("kind,classes", CASES, ids=[f"{k}-{'classes' if c else 'number'}" for k, c in CASES])
def test_the_package_says_what_was_trained(world, tmp_path, kind, classes):
    y = (world["y"] < np.median(world["y"])).astype(float) if classes else world["y"]
    say = KINDS[kind](world, tmp_path / kind, classes, y, "log_loss" if classes else "mae")
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe/recipe.json").write_text(json.dumps({**world["recipe"], "task": "classification" if classes else "regression", "classes": classes}))
    package = write_package(tmp_path / "package", tmp_path / kind, tmp_path / "recipe", PROBLEM, VERDICT)
    fields = [i["name"] for i in package.function.inputs]
    asked = json.loads(json.dumps([{k: v for k, v in r.items() if k in fields} for r in world["ask"]]))
    want, answers = np.asarray(say(world["rows"]), float), package.predict(asked)
    ours = np.array([list(a["probabilities"].values()) if classes else a["prediction"] for a in answers], float)
    allowed = TOLERANCE.get(package.model.kind, 1e-6)
    assert len(answers) == ROWS and np.isfinite(ours).all()
    gaps = differences(ours, want)
    assert gaps.max() <= allowed, (asked[int(gaps.argmax())], ours[gaps.argmax()], want[gaps.argmax()])
    for i in range(0, ROWS, 97):  # one by one, as requests come
        one = package.predict([asked[i]])[0]
        assert differences([list(one["probabilities"].values()) if classes else one["prediction"]], want[i:i + 1]).max() <= allowed, asked[i]
    assert ("interval" in answers[0]) == (kind in ("network", "quantiles") and not classes)
    if "interval" in answers[0]: assert all(a["interval"][0] <= a["prediction"] <= a["interval"][1] for a in answers) and package.predict([asked[3]])[0]["interval"] == pytest.approx(answers[3]["interval"], rel=1e-4)
