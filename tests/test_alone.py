"""A package answers on a machine that has Python, numpy and onnxruntime, and nothing that trained it."""
import json, subprocess, sys
from pathlib import Path
import pytest
from slml_nb.package import write_package
from slml_nb.stage import made_in, sample_folder

BLOCK = """import importlib.abc, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"duckdb", "pandas", "sklearn", "torch", "pyarrow", "scipy", "lightgbm", "matplotlib", "onnx", "polars", "boto3"}: raise ModuleNotFoundError(f"{name} is not here")
sys.meta_path.insert(0, Absent())
"""


def alone(code: str, *args) -> str:
    "What code prints where none of the training libraries can be imported."
    root = str(Path(__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", f"{BLOCK}sys.path.insert(0, {root!r})\n{code}", *map(str, args)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def made(name) -> Path:
    record = made_in(sample_folder())[name]
    return Path(record["root"]) / record["file"]


PREDICT = "import json; from slml_nb.package import load_package; p = load_package(sys.argv[1]); print(json.dumps(p.predict(json.loads(sys.argv[2]))))"


def test_the_sample_package_answers_its_own_example():
    sample = json.loads((made("package") / "sample.json").read_text())
    assert json.loads(alone(PREDICT, made("package"), json.dumps([sample["request"]])))[0]["prediction"] == pytest.approx(sample["response"]["prediction"], rel=1e-12)


@pytest.mark.parametrize("kind", ["rule", "linear", "trees", "network"])
def test_every_kind_of_model_answers(tmp_path, kind):
    folder = next((p for a in ("baselines", "network") for p in sorted(made(a).glob("*/model.json")) if json.loads(p.read_text())["kind"] == kind), None)
    if folder is None: pytest.skip(f"the sample has no {kind}")
    problem, verdict = json.loads(made("problem").read_text()), json.loads(made("verdict").read_text())
    package = write_package(tmp_path / "package", folder.parent, made("recipe"), problem, verdict)
    rows = package.function.recipe["examples"]
    theirs = json.loads(alone(PREDICT, package.folder, json.dumps(rows)))
    assert [a["prediction"] for a in theirs] == pytest.approx([a["prediction"] for a in package.predict(rows)], rel=1e-6)


def test_a_fleet_and_an_ensemble_answer(tmp_path):
    from slml_nb.automl import save_ensemble
    from slml_nb.fleet import save_fleet
    from slml_nb.model import fit_encoding
    field = lambda name, kind: {"name": name, "type": kind, "required": True, "missing": 0.0, "min": None, "max": None, "values": [], "example": None, "from": ""}
    recipe = {"target": "fare", "task": "regression", "unit": "", "classes": [], "time": "", "inputs": [field("km", "DOUBLE"), field("city", "VARCHAR")], "lookups": [], "examples": [{"km": 3.0, "city": "Oslo"}],
              "features": [{"name": "km", "kind": "numeric", "sql": "km", "reads": ["km"]}, {"name": "city", "kind": "categorical", "sql": "city", "reads": ["city"]}]}
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe/recipe.json").write_text(json.dumps(recipe))
    about = {"task": "regression", "target": "fare", "features": ["km", "city"], "encoding": fit_encoding({"km": [1.0, 3.0], "city": ["Rome", "Oslo"]}, {"km": "numeric", "city": "categorical"})}
    save_fleet(tmp_path / "fleet", {**about, "segment": ["city"]}, {"shapes": [(4, 1)], "centre": 10.0, "scale": 1.0, "pooled": [2.0, 0, 0, 0, 0], "segments": {"Oslo": [5.0, 0, 0, 0, 1.0]}})
    save_ensemble(tmp_path / "ensemble", {"name": "ensemble", "task": "regression", "target": "fare", "classes": []}, [(0.5, tmp_path / "fleet"), (0.5, tmp_path / "fleet")])
    verdict = {"candidate": None, "best": "m", "sentence": "", "metric": "mae", "requirements": [], "candidates": [], "rows_test": 0}
    for kind in ("fleet", "ensemble"):
        package = write_package(tmp_path / f"{kind} package", tmp_path / kind, tmp_path / "recipe", {"target": "fare"}, verdict)
        answers = json.loads(alone(PREDICT, package.folder, json.dumps([{"km": 3.0, "city": c} for c in ("Oslo", "Rome", "Lima")])))
        assert [a["prediction"] for a in answers] == [16.0, 12.0, 12.0]


def test_a_csv_is_predicted(tmp_path):
    rows = json.loads((made("package") / "recipe.json").read_text())["examples"]
    names = list(dict.fromkeys(k for r in rows for k in r))
    (tmp_path / "in.csv").write_text("\n".join([",".join(names), *(",".join(str(r.get(n, "")) for n in names) for r in rows)]) + "\n")
    code = "import json; from slml_nb.package import load_package, predict_table; print(json.dumps(predict_table(load_package(sys.argv[1]), sys.argv[2], sys.argv[3])))"
    assert json.loads(alone(code, made("package"), tmp_path / "in.csv", tmp_path / "out.csv")) == {"rows": len(rows), "errors": 0, "out": str(tmp_path / "out.csv")}
    assert (tmp_path / "out.csv").read_text().splitlines()[0] == ",".join([*names, "prediction", "error"])


def test_the_service_starts():
    code = "from slml_nb.serve import build_app, lambda_handler; import json; build_app(sys.argv[1]); print(json.dumps(lambda_handler(sys.argv[1])(json.loads(sys.argv[2]))))"
    sample = json.loads((made("package") / "sample.json").read_text())
    assert json.loads(alone(code, made("package"), json.dumps(sample["request"])))["prediction"] == pytest.approx(sample["response"]["prediction"], rel=1e-12)


def test_four_hundred_columns(tmp_path):
    from slml_nb.recipe import FeatureFunction, write_features
    inputs = [{"name": f"column {i}", "type": ("DOUBLE", "BIGINT", "VARCHAR", "TIMESTAMP")[i % 4], "required": i % 3 == 0, "missing": 0.0, "min": None, "max": None, "values": [], "example": None, "from": ""} for i in range(400)]
    sql = ('CASE WHEN isfinite("{0}" / 3) THEN "{0}" / 3 END', 'CAST("{0}" + 1 AS DOUBLE)', 'lower("{0}")', 'CAST(hour("{0}") AS DOUBLE)')
    features = [{"name": f"feature {i}", "kind": "categorical" if i % 4 == 2 else "numeric", "sql": sql[i % 4].format(f"column {i}"), "reads": [f"column {i}"]} for i in range(400)]
    write_features(tmp_path, {"target": "y", "task": "regression", "unit": "", "classes": [], "time": "", "inputs": inputs, "features": features, "lookups": [], "examples": []})
    values = (1.5, 7, "ABC", "2024-05-01T08:30:00")
    request = {f"column {i}": values[i % 4] for i in range(400)}
    code = "import json; from slml_nb.recipe import FeatureFunction; print(json.dumps(FeatureFunction(sys.argv[1]).rows([json.loads(sys.argv[2])])))"
    got = json.loads(alone(code, tmp_path, json.dumps(request)))
    assert [got[f"feature {i}"] for i in range(4)] == [[0.5], [8.0], ["abc"], [8.0]] and len(got) == 400
    assert got == FeatureFunction(tmp_path).rows([request])
