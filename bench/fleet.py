"""Many small models trained together, beside scikit-learn one by one. `measure()` returns seconds and quality; `python bench/fleet.py 50` prints them."""
import json, statistics, sys, time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

ROWS, INPUTS, UNITS, EPOCHS, BATCH = 1000, 10, 32, 20, 200  # per model; the batch is scikit-learn's own


def data(models, rows=ROWS, seed=0):
    "x (models, rows, inputs) and y (models, rows): a bend and an interaction that differ from model to model; the second half is for testing."
    r = np.random.default_rng(seed)
    x = r.normal(size=(models, 2 * rows, INPUTS))
    slope = r.normal(size=(models, 1, INPUTS))
    y = (x * slope).sum(2) + np.abs(x[..., 0]) * slope[..., 1] + x[..., 2] * x[..., 3] + 0.5 * r.normal(size=x.shape[:2])
    y = (y - y[:, :rows].mean(1, keepdims=True)) / y[:, :rows].std(1, keepdims=True)
    return x[:, :rows], y[:, :rows], x[:, rows:], y[:, rows:]


def r2(y, p): return float(np.mean(1 - ((y - p) ** 2).sum(1) / ((y - y.mean(1, keepdims=True)) ** 2).sum(1)))


def ridges_together(x, y, xt):
    "All weighted sums from stacked normal equations; the job's own function, with its rows in one table."
    from slml_nb.fleet import fit_lines
    s, n, d = x.shape
    beta = fit_lines(x.reshape(-1, d), np.zeros((s * n, 0), int), y.ravel(), list(np.arange(s * n).reshape(s, n)), [], d, np.zeros((d + 1, 1)), [0.0], 1.0, "squares", 1)[0, ..., 0]
    return beta[:, :1] + (xt @ beta[:, 1:, None])[..., 0]


def ridges_one_by_one(x, y, xt):
    from sklearn.linear_model import Ridge
    return np.array([Ridge(alpha=1.0).fit(a, b).predict(c) for a, b, c in zip(x, y, xt)])


def networks_together(x, y, xt, device="cpu", lr=0.05):
    "All networks as stacks, from random weights, without a pooled network to start from."
    import torch
    from slml_nb.fleet import first_weights, forward, layers_of, train_networks
    s, n, d = x.shape
    shapes = [(d, UNITS), (UNITS, 1)]
    how = {"shapes": shapes, "way": "squares", "batch": BATCH, "epochs": EPOCHS, "patience": 0, "lr": lr, "pull": 0.0, "seed": 0, "device": device}
    w, _ = train_networks((torch.tensor(x.reshape(-1, d), dtype=torch.float32), torch.tensor(y.ravel(), dtype=torch.float32), list(np.arange(s * n).reshape(s, n))), None, first_weights(shapes, 0), how)
    return forward(layers_of(torch.tensor(w), shapes), torch.tensor(xt, dtype=torch.float32))[-1][..., 0].numpy()


def networks_one_by_one(x, y, xt, lr=0.001):
    import warnings
    from sklearn.neural_network import MLPRegressor
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that 20 passes are few
        fit = lambda a, b: MLPRegressor(hidden_layer_sizes=(UNITS,), max_iter=EPOCHS, batch_size=BATCH, learning_rate_init=lr, random_state=0, n_iter_no_change=10**9).fit(a, b)
        return np.array([fit(a, b).predict(c) for a, b, c in zip(x, y, xt)])


def _timed(ways, x, y, xt, yt, rounds):
    "Each way in turn, so that a slow moment of the machine meets all of them: seconds (median, all) and R2 on new rows."
    took, found = {name: [] for name in ways}, {}
    for name, way in ways.items(): way(x[:2], y[:2], xt[:2])  # imports and first calls
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            found[name] = way(x, y, xt)
            took[name].append(time.perf_counter() - start)
    return {name: {"seconds": round(statistics.median(t), 4), "all": [round(v, 4) for v in t], "r2": round(r2(yt, found[name]), 4)} for name, t in took.items()}


def measure(models=200, rounds=3, curve=(5, 50, 500), device="cpu"):
    """Seconds of `models` ridges and networks, together and one by one, and the curve over the number of models.
    Predicting the test rows is inside the time of every way. scikit-learn's networks run twice: with its own learning rate, and with ours."""
    import torch
    x, y, xt, yt = data(models)
    ridges = {"together": ridges_together, "scikit-learn": ridges_one_by_one}
    networks = {"together": lambda *a: networks_together(*a, device), "scikit-learn": networks_one_by_one, "scikit-learn, our rate": lambda *a: networks_one_by_one(*a, lr=0.05)}
    few = data(models, 200)
    out = {"models": models, "rows": ROWS, "inputs": INPUTS, "units": UNITS, "epochs": EPOCHS, "threads": torch.get_num_threads(), "device": device,
           "ridge": _timed(ridges, x, y, xt, yt, 2 * rounds + 1), "ridge_200_rows": _timed(ridges, *few, 2 * rounds + 1), "mlp": _timed(networks, x, y, xt, yt, rounds), "curve": []}
    for kind in ("ridge", "ridge_200_rows", "mlp"): out[f"{kind}_times"] = round(out[kind]["scikit-learn"]["seconds"] / out[kind]["together"]["seconds"], 2)
    for n in curve:
        part = data(n)
        out["curve"].append({"models": n, **{f"{kind}, {name}": _timed({name: way}, *part, 1)[name]["seconds"] for kind, ways in (("ridge", ridges), ("mlp", networks)) for name, way in ways.items() if "our" not in name}})
    return out


if __name__ == "__main__": print(json.dumps(measure(int(sys.argv[1]) if len(sys.argv) > 1 else 200), indent=1))
