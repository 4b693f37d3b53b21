"""Training as it meets the world: killed in mid-epoch, spread over processes, compiled, from its authors' TabM, started as a program."""
import json, math, os, signal, subprocess, sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

root = Path(__file__).resolve().parent.parent
FEATURES = [{"name": "x", "kind": "numeric"}, {"name": "z", "kind": "numeric"}, {"name": "side", "kind": "categorical"}]
SMALL = {"batch": 64, "epochs": 3, "hidden": [16, 8], "dropout": 0.0, "bins": 4, "lr": 0.02, "seed": 1}


def table(folder, n=700, classes=False):
    "features.parquet and recipe.json, as a stage or a training job finds them."
    r = np.random.default_rng(0)
    x, z, side = r.normal(size=n), r.normal(size=n), np.array(["left", "right", None], object)[r.integers(0, 3, n)]
    z[r.random(n) < 0.1] = np.nan
    y = np.abs(x) + np.nan_to_num(z) * (side == "left") + 0.1 * r.normal(size=n)
    target = np.where(y > 0.7, "high", "low") if classes else y
    split = np.where(np.arange(n) < n * 0.6, "train", np.where(np.arange(n) < n * 0.8, "valid", "test"))
    folder.mkdir(parents=True, exist_ok=True)
    pd.DataFrame({"row_id": np.arange(n), "split": split, "target": target, "x": x, "z": z, "side": side}).to_parquet(folder / "features.parquet", row_group_size=50)
    recipe = {"task": "classification" if classes else "regression", "target": "y", "classes": ["high", "low"] if classes else [], "features": FEATURES}
    (folder / "recipe.json").write_text(json.dumps(recipe))
    return folder


def environment(): return {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def options(settings): return [a for k, v in settings.items() for a in (f"--{k}", json.dumps(v) if not isinstance(v, str) else v)]


def program(data, out, settings, before=()):
    "`python -m slml_nb.train`, and what it wrote down."
    command = [sys.executable, "-m", *before, *(["-m"] if before else []), "slml_nb.train", "--data", data, "--out", out, "--device", "cpu", *options(settings)]
    done = subprocess.run([str(c) for c in command], env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((Path(out) / "learnt.json").read_text()), done.stdout


def losses(learnt): return [(h["train"], h["valid"]) for h in learnt["history"]]


KILLED = """
import json, os, signal, sys
from pathlib import Path
from slml_nb.sql import connect, register
from slml_nb.train import train_table
data, out, settings, at = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]), int(sys.argv[4])
con, seen = connect(), []
register(con, "features", data / "features.parquet")
def step(training):
    seen.append(training.step)
    if len(seen) == at: os.kill(os.getpid(), signal.SIGKILL)
learnt = train_table(con, None, json.loads((data / "recipe.json").read_text()), "mae", settings, "cpu", out, checkpoint=out / "checkpoint.pt", after_step=step)[2]
print(json.dumps({"history": learnt["history"], "steps": len(seen)}))
"""


@pytest.mark.parametrize("stream", ["off", pytest.param("on", marks=pytest.mark.slow)])
def test_killed_in_mid_epoch_and_resumed_to_the_last_bit(tmp_path, stream):
    data = table(tmp_path / "data")
    settings = {**SMALL, "dropout": 0.2, "ema": 0.9, "stream": stream, "buffer": 150, "checkpoint_every": 2}
    def go(place, at):
        (tmp_path / place).mkdir(exist_ok=True)
        return subprocess.run([sys.executable, "-c", KILLED, str(data), str(tmp_path / place), json.dumps(settings), str(at)], env=environment(), capture_output=True, text=True, timeout=300)
    whole = go("whole", 0)                                       # 420 rows, 26 a step: 17 steps an epoch
    assert whole.returncode == 0, whole.stderr
    whole = json.loads(whole.stdout)
    assert whole["steps"] == 51
    assert go("killed", 22).returncode == -signal.SIGKILL        # step 5 of the second epoch; step 4 was saved
    resumed = json.loads(go("killed", 0).stdout)
    assert resumed["steps"] == 51 - 21                           # it went on after step 4, and not from the start of the epoch
    assert losses(resumed) == losses(whole)


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(tmp_path):
    data = table(tmp_path / "data", classes=True)
    settings = {**SMALL, "class_weights": {"high": 3.0}, "ema": 0.9}  # 420 rows, 26 a step: the last batch of an epoch has 4
    one, _ = program(data, tmp_path / "one", settings)
    launcher = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    two, said = program(data, tmp_path / "two", {**settings, "stream": "on", "buffer": 10_000}, launcher)
    np.testing.assert_allclose(losses(two), losses(one), rtol=2e-4)
    np.testing.assert_allclose(losses(two)[0][0], losses(one)[0][0], rtol=1e-5)
    from slml_nb.model import load_model
    rows = pd.read_parquet(data / "features.parquet").query("split == 'test'")
    columns = {f["name"]: rows[f["name"]].to_numpy() for f in FEATURES}
    np.testing.assert_allclose(load_model(tmp_path / "two").predict(columns), load_model(tmp_path / "one").predict(columns), atol=5e-3)
    assert said.count("epoch 1:") == 1                           # one of the two speaks


GRADIENTS = """
import sys, torch
import numpy as np
from slml_nb import train as t
import os
with t.gathered("cpu"):
    r = torch.Generator().manual_seed(0)
    data = torch.randn(37, 3, generator=r), torch.zeros(37, 0, dtype=torch.int64), torch.randn(37, generator=r)
    torch.manual_seed(0)
    net = t.build_network(3, [], 1, [8], 0.0, t.quantile_edges(data[0].numpy(), 2))
    s = {**t.DEFAULTS, "loss": "mse", "batch": 37, "epochs": 4, "classes": 0, "metric": "mse", "lr": 0.0}
    training = t.Training(net, t.InMemory(*data), data, s, t.shared(net))
    for batch in training.source.batches(0, 37, 0, 0, training.share): training.learn(*batch)
    if t.ranks()[0] == 0: torch.save([p.grad for p in net.parameters()] + [t.together(training.total)], sys.argv[1])
    else: t.together(training.total)
"""


@pytest.mark.slow
def test_gradients_of_two_processes(tmp_path):
    import torch
    (tmp_path / "g.py").write_text(GRADIENTS)
    for out, launcher in (("one.pt", []), ("two.pt", ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"])):
        done = subprocess.run([sys.executable, *launcher, str(tmp_path / "g.py"), str(tmp_path / out)], env=environment(), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    for a, b in zip(torch.load(tmp_path / "one.pt"), torch.load(tmp_path / "two.pt"), strict=True): torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_as_a_training_job_starts_it(tmp_path, monkeypatch):
    data = table(tmp_path / "data")
    monkeypatch.setenv("SM_CHANNEL_TRAIN", str(data)), monkeypatch.setenv("SM_MODEL_DIR", str(tmp_path / "model"))
    done = subprocess.run([sys.executable, "-m", "slml_nb.train", "--hidden", "[8]", "--epochs", "2", "--device", "cuda"], env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    model = json.loads((tmp_path / "model/model.json").read_text())
    assert model["interval"]["level"] == 0.9 and model["trained"]["loss"] == "mae" and (tmp_path / "model/model.onnx").exists()
    import torch
    if not torch.cuda.is_available():
        assert "torch sees no CUDA device here: trained on the CPU" in done.stdout
        stopped = subprocess.run([sys.executable, "-m", "slml_nb.train", "--device", "cuda", "--device_missing", "stop"], env=environment(), capture_output=True, text=True, timeout=300)
        assert stopped.returncode and "device_missing" in stopped.stderr


def test_losses_are_those_of_scikit_learn():
    import torch
    from sklearn.metrics import mean_pinball_loss
    from sklearn.utils.class_weight import compute_class_weight
    from slml_nb.train import row_losses, weigh_classes
    r = np.random.default_rng(0)
    y, p, k = r.normal(size=200), r.normal(size=(200, 2)), r.integers(0, 3, 100) * r.integers(0, 2, 100)
    mine = float(row_losses(torch.tensor(p), torch.tensor(y), "quantile", quantiles=torch.tensor([0.2, 0.9], dtype=torch.float64)).mean())
    assert math.isclose(mine, (mean_pinball_loss(y, p[:, 0], alpha=0.2) + mean_pinball_loss(y, p[:, 1], alpha=0.9)) / 2, rel_tol=1e-12)
    np.testing.assert_allclose(weigh_classes("balanced", ["a", "b", "c"], k), compute_class_weight("balanced", classes=np.arange(3), y=k), rtol=1e-6)


def connection(data):
    from slml_nb.sql import connect, register
    con = connect()
    register(con, "features", data / "features.parquet")
    return con, json.loads((data / "recipe.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("classes, more", [(False, {}), (True, {}), (False, {"loss": "quantile"})])
def test_tabm_of_its_authors_learns_and_becomes_onnx(tmp_path, classes, more):
    pytest.importorskip("tabm")
    from slml_nb.model import load_model, metrics_of
    from slml_nb.train import predict_split, train_table
    con, recipe = connection(table(tmp_path / "data", 3000, classes))
    settings = {**SMALL, "epochs": 12, "architecture": "tabm", "members": 8, "hidden": [32, 32], **more}
    encoder, network, learnt = train_table(con, tmp_path / "tabm", recipe, "log_loss" if classes else "mae", settings)
    test = predict_split(con, network, encoder, recipe, "test")
    scores = metrics_of(recipe["task"], test["y"], test["prediction"])
    assert scores["accuracy"] > 0.85 if classes else scores["mae"] < 0.25, scores
    rows = con.sql("select * from features where split = 'test' order by row_id").df()
    columns = {f["name"]: rows[f["name"]].to_numpy() for f in FEATURES}
    portable = load_model(tmp_path / "tabm")
    np.testing.assert_allclose(portable.predict(columns), test["prediction"], atol=2e-5)
    one = {k: v[:1] for k, v in columns.items()}
    np.testing.assert_allclose(portable.predict(one), test["prediction"][:1], atol=2e-5)
    assert portable.spec["trained"]["architecture"] == "tabm"


@pytest.mark.slow
def test_compiled_where_it_works_and_as_it_is_where_it_does_not(tmp_path, monkeypatch):
    import torch
    from slml_nb.train import train_table
    con, recipe = connection(table(tmp_path / "data"))
    plain = train_table(con, None, recipe, "mae", SMALL)[2]
    compiled = train_table(con, None, recipe, "mae", {**SMALL, "compile": True})[2]
    np.testing.assert_allclose(losses(compiled), losses(plain), rtol=1e-3)  # with or without a compiler here
    half = train_table(con, None, recipe, "mae", {**SMALL, "precision": "bf16"})[2]
    assert losses(half) != losses(plain) and abs(losses(half)[-1][1] / losses(plain)[-1][1] - 1) < 0.1
    def broken(*a, **k): raise RuntimeError("no C++ compiler\nat all")
    monkeypatch.setattr(torch, "compile", broken)
    learnt = train_table(con, None, recipe, "mae", {**SMALL, "compile": "on"})[2]
    assert learnt["said"] == ["torch.compile does not work here (no C++ compiler): trained without it"] and losses(learnt) == losses(plain)


@pytest.mark.slow
def test_conformal_coverage_over_many_splits(tmp_path):
    "The share of new truths inside, over many draws, is at least the level and at most 1/(n+1) more (Lei and others, 2018)."
    from slml_nb.train import coverage, fit_interval
    r = np.random.default_rng(0)
    for n, level in ((19, 0.9), (50, 0.8), (200, 0.95)):
        shares = []
        for _ in range(4000):
            y, new = r.gamma(2, size=n), r.gamma(2, size=100)
            shares.append(coverage(new, np.full((100, 1), 2.0), fit_interval(y, np.full((n, 1), 2.0), level))[0])
        assert level - 0.004 < np.mean(shares) < level + 1 / (n + 1) + 0.004, (n, np.mean(shares))


@pytest.mark.slow
def test_wild_tables_get_through(tmp_path):
    from slml_nb.train import predict_split, train_table
    from slml_nb.sql import connect
    r = np.random.default_rng(0)
    for n, columns in ((12, {"x": r.normal(size=12)}), (200, {"x": np.where(r.random(200) < 0.2, np.inf, r.normal(size=200) * 1e30), "c": [f"c{i}" for i in range(200)]}),
                       (60, {f"x{i}": r.normal(size=60) for i in range(400)}), (50, {"x": np.full(50, np.nan), "c": [None] * 50})):
        target = r.normal(size=n)
        target[:2] = np.nan, -np.inf
        frame = pd.DataFrame({"row_id": np.arange(n), "split": np.where(np.arange(n) < n // 2, "train", np.where(np.arange(n) < n * 3 // 4, "valid", "test")), "target": target, **columns})
        con = connect()
        con.register("features", frame)
        recipe = {"task": "regression", "target": "y", "classes": [], "features": [{"name": c, "kind": "categorical" if c == "c" else "numeric"} for c in columns]}
        encoder, network, learnt = train_table(con, None, recipe, "mae", {**SMALL, "epochs": 2})
        assert all(math.isfinite(h["valid"]) for h in learnt["history"]) and learnt["rows"] == n // 2 - 2
        assert np.isfinite(predict_split(con, network, encoder, recipe, "test")["prediction"]).all()
