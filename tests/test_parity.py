"""Every kind of model, packaged, says of ten thousand requests what the training library says of the same rows, strange values among them."""
import json, random

import numpy as np
import pytest

from slml_nb.model import fit_encoding, load_model, read_columns, save_rule
from slml_nb.package import PLAIN, TOLERANCE, differences, predict_table, write_package
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


def in_a_file(package, ask, fields, classes, want, allowed, folder):
    "The same rows as a typed Parquet file: nothing is lost, nothing changes places."
    import duckdb, pandas as pd
    rows = [{**r, "place": i} for i, r in enumerate(ask)]
    table = pd.DataFrame({k: pd.Series([r.get(k) for r in rows], dtype=object) for k in [*fields, "place"]})
    for c in set(fields) & {"x", "n", "open"}: table[c] = table[c].astype({"x": "Float64", "n": "Int64", "open": "boolean"}[c])
    con = duckdb.connect()
    con.register("given", table)
    con.execute(f"copy (select {', '.join(f'CAST({c} AS {FIELDS[c]}) AS {c}' for c in fields)}{', ' if fields else ''} CAST(place AS INTEGER) as place from given) to '{folder}/rows.parquet' (format parquet)")
    done = predict_table(package, folder / "rows.parquet", folder / "answers.parquet", chunk=1000)
    got = con.execute(f"select * from '{folder}/answers.parquet'").df()
    assert done["rows"] == len(got) == len(rows) and done["errors"] == 0 and got["place"].tolist() == list(range(len(rows)))
    ours = got[[f"probability of {c}" for c in classes]].to_numpy() if classes else got["prediction"].to_numpy()
    gaps = differences(ours.astype(float), want)
    assert gaps.max() <= allowed, rows[int(gaps.argmax())]
    if classes: assert (got["prediction"].to_numpy() == np.array(classes)[ours.argmax(1)]).all()


def alone(package, asked, answers, folder):
    "The code that travels, in a process that has nothing but Python: the same answers, digit by digit where the order of adding is the same."
    import subprocess, sys
    from slml_nb.deploy import write_edge
    write_edge(package.folder, folder / "edge")
    done = subprocess.run([sys.executable, "-I", "-S", folder / "edge/predict.pyz"], input="".join(json.dumps(r) + "\n" for r in asked), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    say = lambda a: list(a["probabilities"].values()) if "probabilities" in a else [a["prediction"]]
    assert differences([say(json.loads(l)) for l in done.stdout.splitlines()], [say(a) for a in answers]).max() <= 1e-9


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
    in_a_file(package, world["ask"][:3000], fields, classes, want[:3000], allowed, tmp_path)
    if kind in PLAIN: alone(package, asked[::5], answers[::5], tmp_path)
    if "interval" in answers[0]: assert all(a["interval"][0] <= a["prediction"] <= a["interval"][1] for a in answers) and package.predict([asked[3]])[0]["interval"] == pytest.approx(answers[3]["interval"], rel=1e-4)


@pytest.mark.slow
def test_a_file_of_any_size_needs_the_memory_of_a_few_blocks(world, tmp_path):
    "Two hundred thousand rows, then two million, every thousandth refused: each in its place, with its reason, and hardly more memory."
    import duckdb, subprocess, sys
    make_trees(world, tmp_path / "trees", [], world["y"], "mae")
    (tmp_path / "recipe").mkdir()
    told = {**world["recipe"], "inputs": [{**i, "required": i["name"] == "x"} for i in world["recipe"]["inputs"]], "task": "regression", "classes": []}
    (tmp_path / "recipe/recipe.json").write_text(json.dumps(told))
    package = write_package(tmp_path / "package", tmp_path / "trees", tmp_path / "recipe", PROBLEM, VERDICT)
    code = "import json, resource, sys; from slml_nb.package import load_package, predict_table; done = predict_table(load_package(sys.argv[1]), sys.argv[2], sys.argv[3]); print(json.dumps([done['rows'], done['errors'], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))"
    peaks = []
    for rows in (200_000, 2_000_000):
        sql = "select i::INTEGER as place, case when i % 1000 = 7 then null else (hash(i) % 1000)::DOUBLE / 30 end as x, i % 50 as n, ['Oslo', 'Rome', 'Lima'][i % 3 + 1] as town, i % 2 = 0 as open, TIMESTAMP '2024-01-01' + to_minutes(i % 100000) as moment"
        duckdb.connect().execute(f"copy ({sql} from range({rows}) t(i)) to '{tmp_path}/rows.parquet' (format parquet)")
        run = subprocess.run([sys.executable, "-c", code, package.folder, tmp_path / "rows.parquet", tmp_path / "answers.parquet"], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        *counted, peak = json.loads(run.stdout)
        peaks.append(peak)
        said = duckdb.sql(f"select count(*), count(distinct place), count(prediction), count(error), count(*) filter ((error is null) = (place % 1000 = 7)), any_value(error) from '{tmp_path}/answers.parquet'").fetchall()[0]
        assert counted == [rows, rows // 1000] and said == (rows, rows, rows - rows // 1000, rows // 1000, 0, "field 'x' is missing: send a number"), (counted, said)
    assert peaks[1] < peaks[0] + 150, peaks
    some = duckdb.sql(f"select place, x, n, town, open, strftime(moment, '%Y-%m-%dT%H:%M:%S') as moment, prediction from '{tmp_path}/answers.parquet' where place % 9973 = 1").fetchall()
    one = package.predict([dict(zip(("x", "n", "town", "open", "moment"), r[1:6])) for r in some])
    assert [r[6] for r in some] == pytest.approx([a["prediction"] for a in one], rel=1e-12)
