"""Every room that makes candidates on the tables that real life sends: nothing to learn, nearly no rows, far too many columns, a target among the features, values nobody has measured."""
import numpy as np
import pytest

from slml_nb.core import SlmlError
from slml_nb.model import load_model, metrics_of, read_split

FLEET = {"kind": "ridge", "min_rows": 5, "alpha": 1.0, "shrinkage": [], "max_categories": 20, "hidden": [8], "batch": 64, "epochs": 3, "patience": 2, "lr": 0.01, "seed": 0, "device": "cpu"}


def table(n, seed=0, columns=2):
    "Numbers, a town, and what depends on them."
    r = np.random.default_rng(seed)
    c = {f"x{i}": r.normal(size=n) for i in range(columns)} | {"town": np.array(["Bonn", "Ulm"], object)[np.arange(n) % 2]}
    return c, 2 * c["x0"] + (c["town"] == "Ulm") + 0.1 * r.normal(size=n)


def strange(columns):
    "Rows that training has never seen the like of."
    new = {k: np.array([np.nan, np.inf, -1e300, 1e300, 0.0]) for k in columns}
    return {**new, "town": np.array(["Paris", None, "", "Ulm", "x" * 10_000], object)}


def baselines(folder, recipe, metric, train, valid):
    from slml_nb.baseline import fit_baselines
    says, *_ = fit_baselines(folder, recipe, metric, *((({**c, "target": np.array(recipe["classes"], object)[y.astype(int)] if recipe["classes"] else y}), y) for c, y in (train, valid)), num_threads=1)
    return {name: lambda c, say=say: say({**c, "target": np.zeros(len(c["town"]))}) for name, say in says.items()}


def fleet(folder, recipe, metric, train, valid, **more):
    from slml_nb.fleet import fit_fleet
    say, _, _ = fit_fleet(folder / "fleet", recipe, metric, ["town"], train, valid, {**FLEET, **more})
    return {"fleet": say}


def networks(*args): return fleet(*args, kind="mlp", shrinkage=[0])


def automl(folder, recipe, metric, train, valid):
    from slml_nb.automl import Clock, held_rows, run_automl
    spec = {**{k: recipe[k] for k in ("task", "target", "classes")}, "metric": metric, "kinds": {f["name"]: f["kind"] for f in recipe["features"]}, "threads": 1}
    both = held_rows(*(({**c, "target": y}, y) for c, y in (train, valid)))
    says, job = run_automl(both, spec, folder, Clock(20), kinds=("linear", "trees"), tries=3)
    return says


ROOMS = {"baselines": baselines, "fleet": fleet, "networks": networks, "automl": automl}


def get_through(folder, room, train, valid, classes=(), metric=None):
    "Train on a table; what was saved says what was trained, on its rows and on strange ones, and every answer is a number."
    kinds = {k: "categorical" if k == "town" else "numeric" for k in train[0]}
    recipe = {"task": "classification" if classes else "regression", "target": "t", "classes": list(classes), "features": [{"name": k, "kind": v} for k, v in kinds.items()]}
    metric = metric or ("log_loss" if classes else "mae")
    says = ROOMS[room](folder, recipe, metric, train, valid)
    out = {}
    for name, say in says.items():
        for columns in (valid[0] if len(valid[1]) else train[0], strange(train[0])):
            p = np.asarray(say(columns))
            assert np.isfinite(p).all() and p.shape[0] == len(columns["town"]), name
            np.testing.assert_allclose(load_model(folder / name).predict(columns), p, rtol=1e-4, atol=1e-4 * (1 + np.abs(train[1]).max()), err_msg=name)
        if len(valid[1]): out[name] = metrics_of(recipe["task"], valid[1], np.asarray(say(valid[0])))[metric]
    return out


@pytest.mark.parametrize("room", ROOMS)
def test_a_target_that_never_varies(tmp_path, room):
    train, valid = table(60), table(30, 1)
    for metric in ("mae", "rmse"):
        errors = get_through(tmp_path, room, (train[0], np.full(60, 7.0)), (valid[0], np.full(30, 7.0)), metric=metric)
        assert max(errors.values()) < (0.5 if room == "networks" else 1e-3), errors  # networks begin anywhere and have three passes


@pytest.mark.parametrize("room", ROOMS)
def test_one_class(tmp_path, room):
    (c, _), (v, _) = table(60), table(30, 1)
    with pytest.raises(SlmlError, match="one class"): get_through(tmp_path, room, (c, np.zeros(60)), (v, np.zeros(30)), ["only"])


@pytest.mark.parametrize("room", ROOMS)
def test_a_class_that_training_lacks(tmp_path, room):
    (c, y), (v, vy) = table(60), table(30, 1)
    get_through(tmp_path, room, (c, (y > 0).astype(float)), (v, np.where(np.arange(30) == 0, 2.0, vy > 0)), ["no", "yes", "never"])


@pytest.mark.parametrize("room", ROOMS)
def test_twelve_rows(tmp_path, room):
    train, valid = table(12), table(3, 1)
    get_through(tmp_path / "r", room, train, valid)
    get_through(tmp_path / "c", room, (train[0], np.arange(12.0) % 2), (valid[0], np.array([0.0, 1, 1])), ["no", "yes"])


@pytest.mark.parametrize("room", ROOMS)
def test_the_target_among_the_features(tmp_path, room):
    (c, y), (v, vy) = table(200), table(60, 1)
    errors = get_through(tmp_path / "r", room, ({**c, "paid": y * 3 + 1}, y), ({**v, "paid": vy * 3 + 1}, vy))
    assert min(errors.values()) < (0.7 if room == "networks" else 0.2), errors
    get_through(tmp_path / "c", room, ({**c, "paid": (y > 0) * 1.0}, (y > 0) * 1.0), ({**v, "paid": (vy > 0) * 1.0}, (vy > 0) * 1.0), ["no", "yes"])


@pytest.mark.parametrize("room", ROOMS)
def test_gaps_infinities_and_enormous_numbers(tmp_path, room):
    (c, y), (v, vy) = table(90), table(30, 1)
    c["x0"][::3], c["x1"][1::4], c["town"][::5] = np.nan, np.inf, None
    c["x1"][2::4] *= 1e300
    c |= {"empty": np.full(90, np.nan), "same": np.ones(90), "endless": np.full(90, -np.inf)}
    v |= {"empty": np.zeros(30), "same": np.zeros(30), "endless": np.zeros(30)}
    get_through(tmp_path / "r", room, (c, y), (v, vy))
    get_through(tmp_path / "c", room, (c, (y > 0) * 1.0), (v, (vy > 0) * 1.0), ["no", "yes"])


@pytest.mark.slow
@pytest.mark.parametrize("room", ["baselines", "fleet", "networks", "automl"])
def test_ten_thousand_columns(tmp_path, room):
    train, valid = table(120, columns=10_000), table(40, 1, columns=10_000)
    if room != "fleet": return get_through(tmp_path, room, train, valid)
    with pytest.raises(SlmlError, match="drop features, .* or take kind: mlp"): get_through(tmp_path, room, train, valid)


def test_a_target_that_is_always_missing():
    import duckdb
    con = duckdb.connect()
    con.execute("create table features as select i as row_id, 'train' as split, null::timestamp as moment, null::double as target, i as x from range(9) t(i)")
    with pytest.raises(SlmlError, match="no row whose target is known"): read_split(con, "train", [], learn=True)
