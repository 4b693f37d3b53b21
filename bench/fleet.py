"""Many small models trained together, beside scikit-learn, joblib and torch one by one. `measure()` returns seconds and quality; `python bench/fleet.py 50` prints them."""
import json, os, statistics, sys, time, warnings
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


def fit_one(a, b, c, lr=0.001):
    "One network of scikit-learn: its answers for c."
    from sklearn.neural_network import MLPRegressor
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that 20 passes are few
        return MLPRegressor(hidden_layer_sizes=(UNITS,), max_iter=EPOCHS, batch_size=BATCH, learning_rate_init=lr, random_state=0, n_iter_no_change=10**9).fit(a, b).predict(c)


def networks_one_by_one(x, y, xt, lr=0.001): return np.array([fit_one(a, b, c, lr) for a, b, c in zip(x, y, xt)])


def networks_joblib(x, y, xt):
    from joblib import Parallel, delayed
    return np.array(Parallel(n_jobs=os.cpu_count())(delayed(fit_one)(a, b, c) for a, b, c in zip(x, y, xt)))


def networks_torch(x, y, xt, lr=0.05):
    "The same network as a module of its own for each model, one after the other."
    import torch
    out, tensor = [], lambda v: torch.tensor(v, dtype=torch.float32)
    for a, b, c in zip(x, y, xt):
        torch.manual_seed(0)
        net, (a, b, c) = torch.nn.Sequential(torch.nn.Linear(INPUTS, UNITS), torch.nn.ReLU(), torch.nn.Linear(UNITS, 1)), map(tensor, (a, b, c))
        step = torch.optim.Adam(net.parameters(), lr=lr)
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(a)).split(BATCH):
                loss = torch.nn.functional.mse_loss(net(a[rows])[:, 0], b[rows])
                step.zero_grad(set_to_none=True)
                loss.backward()
                step.step()
        with torch.no_grad(): out.append(net(c)[:, 0].numpy())
    return np.array(out)


def timed(ways, x, y, xt, yt, rounds):
    "Each way in turn, so that a slow moment of the machine meets all of them: seconds of every round, and R2 on new rows."
    took, found = {name: [] for name in ways}, {}
    for name, way in ways.items(): way(x[:2], y[:2], xt[:2])  # imports and first calls
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            found[name] = way(x, y, xt)
            took[name].append(time.perf_counter() - start)
    return {name: {"seconds": [round(v, 4) for v in t], "r2": round(r2(yt, found[name]), 4)} for name, t in took.items()}


def measure(models=200, rounds=5, curve=(5, 50, 500), device="cpu"):
    """Seconds of `models` ridges and networks, together and one by one, and the curve over the number of models.
    Predicting the test rows is inside the time of every way. scikit-learn's networks learn once more with our learning rate, for their quality alone."""
    import torch
    together = lambda *a: networks_together(*a, device)
    ridges, networks = {"together": ridges_together, "scikit-learn": ridges_one_by_one}, {"together": together, "scikit-learn": networks_one_by_one}
    x, y, xt, yt = data(models)
    out = {"models": models, "rows": ROWS, "inputs": INPUTS, "units": UNITS, "epochs": EPOCHS, "threads": torch.get_num_threads(), "device": device,
           "ridge": timed(ridges, x, y, xt, yt, 2 * rounds + 1), "ridge_200_rows": timed(ridges, *data(models, 200), 2 * rounds + 1),
           "mlp": timed({**networks, "joblib": networks_joblib, "torch": networks_torch}, x, y, xt, yt, rounds), "r2_our_rate": round(r2(yt, networks_one_by_one(x, y, xt, lr=0.05)), 4), "curve": {}}
    for n in curve:
        part = data(n)
        out["curve"][n] = {"ridge": timed(ridges, *part, rounds), "mlp": timed(networks, *part, rounds)}
    return out


def draw(curve, file):
    "Seconds over the number of models, together and one by one."
    from matplotlib.figure import Figure
    fig = Figure(figsize=(8, 3), layout="constrained")
    for ax, (kind, title) in zip(fig.subplots(1, 2), (("ridge", "Weighted sums"), ("mlp", f"Networks of {UNITS} units, {EPOCHS} passes"))):
        for way, colour in (("scikit-learn", "#9aa3ad"), ("together", "#2f6f9f")):
            seconds = [curve[n][kind][way]["seconds"] for n in curve]
            ax.fill_between(list(curve), [min(t) for t in seconds], [max(t) for t in seconds], color=colour, alpha=0.25, linewidth=0)
            ax.plot(list(curve), [statistics.median(t) for t in seconds], "o-", color=colour, label=f"{way}, one by one" if way != "together" else way, markersize=4)
        ax.set(xscale="log", yscale="log", xlabel="models", ylabel="seconds", title=title)
        ax.set_xticks(list(curve), [f"{n:,}" for n in curve])
        ax.minorticks_off()
        ax.grid(alpha=0.3)
        ax.legend(frameon=False)
    fig.savefig(file, metadata={"Date": None})


if __name__ == "__main__": print(json.dumps(measure(int(sys.argv[1]) if len(sys.argv) > 1 else 200), indent=1))
