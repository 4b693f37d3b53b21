"""Twenty million trips from CSV to Parquet: rules, calendar and haversine features and a sample by hash, here and by peers.

    python bench/trips.py JOB trips.csv out.parquet      one way, in a process of its own; prints the rows it left
"""
import subprocess, sys, time
from pathlib import Path

TYPES = dict(pickup="TIMESTAMP", seconds="INTEGER", vendor="INTEGER", pickup_lat="DOUBLE", pickup_lon="DOUBLE", dropoff_lat="DOUBLE", dropoff_lon="DOUBLE",
             miles="DOUBLE", fare="DOUBLE", paid="VARCHAR")
RULES = {"there was something to pay": "fare > 0", "the time is possible": "seconds between 60 and 10800", "the distance fits": "miles < 60"}
FEATURES = {"pickup_hour": "hour(pickup)", "weekday": "isodow(pickup)", "month": "month(pickup)", "hour_sin": "sin(2 * pi() * hour(pickup) / 24)",
            "hour_cos": "cos(2 * pi() * hour(pickup) / 24)", "km": "haversine_km(pickup_lat, pickup_lon, dropoff_lat, dropoff_lon)"}
KM = """2 * 6371.0088 * asin(least(1.0, sqrt(sin(radians(dropoff_lat - pickup_lat) / 2) * sin(radians(dropoff_lat - pickup_lat) / 2)
  + cos(radians(pickup_lat)) * cos(radians(dropoff_lat)) * sin(radians(dropoff_lon - pickup_lon) / 2) * sin(radians(dropoff_lon - pickup_lon) / 2))))"""
HALF = "8000000000000"  # hashes below it are half of all


def make(path: Path, rows: int):
    "The trips, the same ones every time; one in fifty has no distance, one in a hundred a negative fare."
    import duckdb
    con = duckdb.connect(config={"memory_limit": "2GB"})
    con.execute(f"""copy (select timestamp '2023-01-01' + to_seconds(i * 31536000 // {rows}) as pickup, (30 + hash(i + 5) % 3000)::int as seconds, (1 + hash(i) % 2)::int as vendor,
        round(40.5 + (hash(i + 1) % 400000) / 1e6, 4) as pickup_lat, round(-74.2 + (hash(i + 2) % 500000) / 1e6, 4) as pickup_lon,
        round(40.5 + (hash(i + 3) % 400000) / 1e6, 4) as dropoff_lat, round(-74.2 + (hash(i + 4) % 500000) / 1e6, 4) as dropoff_lon,
        case when hash(i + 6) % 50 > 0 then (hash(i + 6) % 3000) / 100.0 end as miles, round(case when hash(i + 7) % 100 = 0 then -5 else 3 + (hash(i + 7) % 6000) / 100.0 end, 2) as fare,
        ['card', 'cash', 'none'][1 + (hash(i + 8) % 3)::int] as paid from range({rows}) t(i)) to '{path}' (header)""")


def slml(source, out):
    from slml_nb.prepare import prepare
    from slml_nb.sql import connect
    return prepare(connect(memory="300MB"), [Path(source)], Path(out), RULES, FEATURES, key=["pickup"], fraction=0.5, types=TYPES, delimiter=",")["rows"]


def _csv(source): return f"read_csv('{source}', columns = {TYPES}, header = true, auto_detect = false)"


def typed_scan(source, out):
    import duckdb
    con = duckdb.connect(config={"memory_limit": "300MB"})
    return con.execute(f"select count(*), {', '.join(f'max({c})' for c in TYPES)} from {_csv(source)}").fetchall()[0][0]


def duckdb_(source, out):
    import duckdb
    con = duckdb.connect(config={"memory_limit": "300MB"})
    features = {**FEATURES, "km": KM}
    return con.execute(f"""copy (select *, {', '.join(f'{e} as {n}' for n, e in features.items())} from {_csv(source)} where fare > 0 and seconds between 60 and 10800
        and (miles is null or miles < 60) and substr(md5(chr(31) || pickup), 1, 13) < '{HALF}') to '{out}' (format parquet, compression zstd)""").fetchall()[0][0]


def polars_(source, out):
    import math, polars as pl
    from pathlib import Path
    c, rad = pl.col, math.pi / 180
    rows = pl.scan_csv(source, try_parse_dates=True).filter((c("fare") > 0) & c("seconds").is_between(60, 10800) & (c("miles").is_null() | (c("miles") < 60)) & (c("pickup").hash() < 2**63))
    dlat, dlon = (c("dropoff_lat") - c("pickup_lat")) * rad / 2, (c("dropoff_lon") - c("pickup_lon")) * rad / 2
    a, angle = dlat.sin() ** 2 + (c("pickup_lat") * rad).cos() * (c("dropoff_lat") * rad).cos() * dlon.sin() ** 2, c("pickup").dt.hour() * (2 * math.pi / 24)
    rows.with_columns(pickup_hour=c("pickup").dt.hour(), weekday=c("pickup").dt.weekday(), month=c("pickup").dt.month(), hour_sin=angle.sin(), hour_cos=angle.cos(),
                      km=2 * 6371.0088 * pl.min_horizontal(pl.lit(1.0), a.sqrt()).arcsin()).sink_parquet(out, engine="streaming")
    return pl.scan_parquet(out).select(pl.len()).collect().item()


def _pandas(frame, out):
    import numpy as np, pandas as pd
    f = frame
    f = f[(f.fare > 0) & f.seconds.between(60, 10800) & (f.miles.isna() | (f.miles < 60))]
    f = f[pd.util.hash_array(f.pickup.astype("int64").to_numpy()) < 2**63].copy()
    lat1, lon1, lat2, lon2 = (np.radians(f[c].to_numpy(dtype=float)) for c in ("pickup_lat", "pickup_lon", "dropoff_lat", "dropoff_lon"))
    f["pickup_hour"], f["weekday"], f["month"] = f.pickup.dt.hour, f.pickup.dt.dayofweek + 1, f.pickup.dt.month
    angle = f.pickup_hour.to_numpy(dtype=float) * (2 * np.pi / 24)
    f["hour_sin"], f["hour_cos"] = np.sin(angle), np.cos(angle)
    f["km"] = 2 * 6371.0088 * np.arcsin(np.minimum(1, np.sqrt(np.sin((lat2 - lat1) / 2) ** 2 + np.cos(lat1) * np.cos(lat2) * np.sin((lon2 - lon1) / 2) ** 2)))
    f.to_parquet(out, index=False)
    return len(f)


def pandas_arrow(source, out):
    import pandas as pd
    return _pandas(pd.read_csv(source, engine="pyarrow", dtype_backend="pyarrow"), out)


def pandas_c(source, out):
    import pandas as pd
    return _pandas(pd.read_csv(source, parse_dates=["pickup"]), out)


def pyspark_(source, out):
    from pyspark.sql import SparkSession
    s = (SparkSession.builder.master("local[2]").config("spark.ui.enabled", "false").config("spark.sql.session.timeZone", "UTC").config("spark.driver.memory", "6g")
         .config("spark.log.level", "ERROR").getOrCreate())
    schema = ", ".join(f"{c} {t.replace('VARCHAR', 'STRING').replace('INTEGER', 'INT')}" for c, t in TYPES.items())
    s.read.csv(source, header=True, schema=schema, timestampFormat="yyyy-MM-dd HH:mm:ss").createOrReplaceTempView("trips")
    s.sql(f"""select *, hour(pickup) as pickup_hour, weekday(pickup) + 1 as weekday, month(pickup) as month, sin(2 * pi() * hour(pickup) / 24) as hour_sin,
        cos(2 * pi() * hour(pickup) / 24) as hour_cos, {KM} as km from trips where fare > 0 and seconds between 60 and 10800 and (miles is null or miles < 60)
        and substr(md5(concat(char(31), cast(pickup as string))), 1, 13) < '{HALF}'""").write.mode("overwrite").parquet(out)
    return s.read.parquet(out).count()


JOBS = {f.__name__.strip("_"): f for f in (slml, typed_scan, duckdb_, polars_, pandas_arrow, pandas_c, pyspark_)}


def measure(job: str, source, out) -> tuple[float, float, int]:
    "Seconds, peak memory in MB (of the process and all below it together) and rows of one way, in a process of its own."
    start = time.perf_counter()
    p, peak = subprocess.Popen([sys.executable, __file__, job, str(source), str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True), 0
    while p.poll() is None:
        peak = max(peak, _resident(p.pid))
        time.sleep(0.02)
    seconds, (said, wrong) = time.perf_counter() - start, p.communicate()
    if p.returncode: sys.exit(f"{job}: {wrong[-3000:]}")
    return seconds, peak / 2**20, int(said.split()[-1])


def _resident(pid: int) -> int:
    "Bytes of a process and its children that are in memory."
    try:
        own = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096
        below = [int(c) for t in Path(f"/proc/{pid}/task").iterdir() for c in (t / "children").read_text().split()]
    except (OSError, ValueError, IndexError): return 0
    return own + sum(map(_resident, below))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    print(JOBS[sys.argv[1]](*sys.argv[2:]))
