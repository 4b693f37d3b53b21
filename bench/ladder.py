"""The ladder on three real tables: the error of every rung on the frozen test rows, and what it saves over the rule and over the weak baseline.

    python bench/ladder.py [SECONDS]      of AutoML's search; prints the tables

One run of the life cycle a table, all rungs asked for. The intervals (95 %) resample whole days, because the rides and flights of one day share its weather and its jams.
"""
import json, os, shutil, subprocess, sys, tempfile
from pathlib import Path

import numpy as np

root = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(root)]
SHARED = Path(os.environ.get("SLML_DATA", root.parent / "shared/data"))
RUNGS = {"rule": "rule", "linear": "weak: linear", "trees": "strong: boosted trees", "network": "network", "automl_best": "tuned: AutoML's best model", "automl": "ensemble: AutoML"}
LOSSES = {"MAE": (np.abs, lambda m: m), "RMSE": (np.square, np.sqrt), "MSE": (np.square, lambda m: m)}  # of an error, and what becomes of the mean
HEAD = "| rung | MAE | RMSE | MSE | less than the rule: MAE, RMSE, MSE | less than the weak baseline: MAE, RMSE, MSE |\n| --- | --- | --- | --- | --- | --- |"


def climb(params, seconds):
    "Run a parameter set up to AutoML, every rung; the folder of the run."
    parent = Path(tempfile.mkdtemp(prefix="slml_bench_"))
    (parent / "shared").mkdir()
    if SHARED.is_dir(): (parent / "shared/data").symlink_to(SHARED)
    place = parent / "project"
    shutil.copytree(root / "params", place / "params")
    (place / "params/ladder.yaml").write_text(f"extends: {params}.yaml\nproject: ladder\nclimb: on\ntrain: {{}}\nautoml: {{seconds: {seconds}}}\n")
    done = subprocess.run([Path(sys.executable).parent / "slml", "run", "params/ladder.yaml", "--to", "automl", "--json"], cwd=place, capture_output=True, text=True, env={**os.environ, "SLML_TRACKING": "off"})
    if done.returncode: sys.exit(f"the ladder of {params} ended with {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return parent, place / json.loads(done.stdout)["folder"]


def errors(run):
    "Days of the test rows, and {rung: what it said too much}."
    import duckdb
    from slml_nb.stage import artifact_path, made_in
    made = made_in(run)
    table = lambda name: f"read_parquet('{artifact_path(made[name])}')"
    said = " union all ".join(f"select row_id, candidate, prediction from {table(t)} where split = 'test'" for t in ("baseline_predictions", "network_predictions", "automl_predictions"))
    frame = duckdb.sql(f"select p.*, f.target, f.moment::date as day from ({said}) p join {table('features')} f using (row_id) where f.split = 'test' and f.target is not null order by row_id").df()
    found = {name: part for name, part in frame.groupby("candidate")}
    if lost := set(RUNGS) - set(found): sys.exit(f"no predictions of {', '.join(sorted(lost))}")
    if len({tuple(part["row_id"]) for part in found.values()}) > 1: sys.exit("the rungs have not answered the same rows")
    return found["rule"]["day"].astype(str).to_numpy(), {name: (found[name]["prediction"] - found[name]["target"]).to_numpy() for name in RUNGS}


def draws(days, wrong, loss, n=1000):
    "A loss as it is, and in n draws of whole days: {rung: (1 + n,)}."
    per, finish = LOSSES[loss]
    _, at = np.unique(days, return_inverse=True)
    rows = np.bincount(at).astype(float)
    weight = np.vstack([np.ones(len(rows)), np.random.default_rng(0).multinomial(len(rows), np.full(len(rows), 1 / len(rows)), n)])
    return {name: finish(weight @ np.bincount(at, per(e)) / (weight @ rows)) for name, e in wrong.items()}


def told(values, form):
    "A value with its interval."
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return f"{values[0]:{form}} ({low:{form}} to {high:{form}})"


def measure(tables=("flights", "green_taxi", "chicago_taxi"), seconds=60) -> dict[str, list[str]]:
    "For each table the lines of its ladder."
    out = {}
    for params in tables:
        parent, run = climb(params, seconds)
        days, wrong = errors(run)
        shutil.rmtree(parent, ignore_errors=True)
        by = {loss: draws(days, wrong, loss) for loss in LOSSES}
        saved = lambda name, over: ", ".join(told(100 * (1 - by[loss][name] / by[loss][over]), ".1f") + " %" for loss in LOSSES) if name != over else ""
        out[f"{params}: {len(days):,} test rows of {len(set(days))} days"] = [f"| {text} | {' | '.join(told(by[loss][name], '.4g') for loss in LOSSES)} | {saved(name, 'rule')} | {saved(name, 'linear') if name != 'rule' else ''} |" for name, text in RUNGS.items()]
    return out


if __name__ == "__main__":
    for title, lines in measure(seconds=float(sys.argv[1]) if len(sys.argv) > 1 else 60).items(): print(f"\n{title}\n\n{HEAD}\n" + "\n".join(lines))
