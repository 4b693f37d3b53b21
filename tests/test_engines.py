"""The SQL that stages ship, on two engines: splits, rules, features and joins give the same rows on Spark as on DuckDB."""
import json

import pytest

from slml_nb import quality, sample
from slml_nb.dialect import SPARK_CONF, to_spark
from slml_nb.features import Join, join_sql
from slml_nb.library import with_library
from slml_nb.recipe import features_sql
from slml_nb.sql import connect, ident, literal
from slml_nb.stage import artifact_path, made_in, sample_folder

pytestmark = pytest.mark.slow
ROWS = """select range as row_id, 'f.csv' as source, 'car ' || (range % 7) as car, range * 0.25e0 - 3 as fare, case when range % 11 > 0 then range % 5 end as grp, timestamp '2024-01-01' + range * interval 7 minute as seen,
    date '2024-01-01' + (range % 90)::int as "the day", range % 3 = 0 as paid, (range % 100 / 7)::decimal(9,2) as tip, case when range % 13 > 0 then range::varchar end as said, 40.5 + sin(range) as lat, -73.9 + cos(range) as lon
    from range(3000)"""


@pytest.fixture(scope="module")
def spark():
    from pyspark.sql import SparkSession
    builder = SparkSession.builder.master("local[2]").config("spark.ui.enabled", "false").config("spark.log.level", "OFF").config("spark.sql.shuffle.partitions", "2")
    for k, v in SPARK_CONF.items(): builder = builder.config(k, v)
    session = builder.getOrCreate()
    yield session
    session.stop()


@pytest.fixture(scope="module")
def con(): return connect(threads=1)


@pytest.fixture(scope="module")
def both(spark, con, tmp_path_factory):
    "Ask both engines; the tables are DuckDB's."
    folder, there = tmp_path_factory.mktemp("tables"), set()

    def table(name, sql):
        con.execute(f"create or replace table {ident(name)} as {sql}")
        con.execute(f"copy {ident(name)} to {literal(f'{folder}/{name}.parquet')} (format parquet)")
        spark.read.parquet(f"file://{folder}/{name}.parquet").createOrReplaceTempView(f"`{name}`")

    def ask(query):
        columns = ", ".join(ident(c[0]) for c in con.execute(f"describe {query}").fetchall())
        rows = lambda found: [tuple(round(v, 9) if isinstance(v, float) else v for v in map(plain, r)) for r in found]
        mine, theirs = rows(con.execute(f"select {columns} from ({query})").fetchall()), rows(map(tuple, spark.sql(to_spark(f"select {columns} from ({query})", con)).collect()))
        key = lambda r: [(v is None, str(v)) for v in r]
        assert len(mine) == len(theirs) and sorted(mine, key=key) == sorted(theirs, key=key), query
        return mine

    plain = lambda v: "nan" if isinstance(v, float) and v != v else v
    ask.table = table
    table("clean", ROWS), table("small", "select * from clean limit 40")
    return ask


PROBLEM = {"target": "fare", "time": "seen", "task": "regression"}
SPLITS = {"all columns": {}, "a key": {"key": ["car", "grp"]}, "another salt": {"key": ["row_id"], "salt": "b"}, "a fraction": {"key": ["row_id"], "fraction": .3}, "a number's mix": {"key": ["row_id"], "stratify": "fare"},
          "a label's mix": {"key": ["row_id"], "stratify": "car"}, "time": {"by": "time"}, "cuts": {"by": "time", "cuts": {"valid": "2024-01-05", "test": "2024-01-10 06:00"}}}


@pytest.mark.parametrize("how", SPLITS)
@pytest.mark.parametrize("table", ["clean", "small"])
def test_the_same_rows_are_trained_on(both, con, table, how):
    rows = both(sample.make_splits(con, table, PROBLEM, **SPLITS[how])[0])
    assert len({s for _, s in rows}) >= (3 if table == "clean" else 1)


RULES = [dict(name="fare", check="fare between 0 and 600 and fare is not null"), dict(complete=["grp", "said"], when="paid"), dict(unique=["car", "the day"], action="warn"), dict(order=["fare", "tip"], action="warn"),
         dict(column="tip", range=[0, 12]), {"column": "car", "in": ["car 1", "car 2", "car 3", "car 4", "car 5"]}, dict(column="said", matches="^[0-9]+$", action="warn"), dict(column="said", type="BIGINT", action="warn"),
         dict(name="speed", check="try_cast(said as DOUBLE) / nullif(fare, 0) < 100", action="warn"), dict(name="no tip", check="tip > 1 or not paid", repair={"tip": "greatest(tip, 1)"}), dict(column="tip", stuck=3, by="seen", action="warn")]


def test_the_same_rows_are_put_aside(both, con):
    rules = quality.read_rules(RULES, "fare", "DOUBLE")
    quality.bind_rules(con, rules, "clean")
    rows = both(quality.judge_sql(con, rules, "clean", "quarantine"))
    assert len(rows) == 3000 and 500 < sum(r[-1] is not None for r in rows) < 2500


def test_the_shipped_features_of_flights(both, con):
    made = made_in(sample_folder())
    folder = artifact_path(made["recipe"])
    recipe = json.loads((folder / "recipe.json").read_text())
    columns = ", ".join(f"{'null' if i['from'] else ident(i['name'])}::{i['type']} as {ident(i['name'])}" for i in recipe["inputs"])
    both.table("rows", f"select {columns} from read_parquet({literal(str(folder / 'requests.parquet'))})")
    rows = both(features_sql({f["name"]: f["sql"] for f in recipe["features"]}))
    assert len(rows) > 100 and len(rows[0]) == len(recipe["features"]) > 10


WRITTEN = ["haversine_km(lat, lon, 40.75, -73.98)", "bearing_degrees(lat, lon, 40.75, -73.98)", "coordinate_bin(lat, 0.01)", "hour_sin(seen)", "weekday_cos(seen)", "is_weekend(seen)", "is_holiday(seen, 'US')", "ratio(fare, tip)",
           "signed_log(fare)", "clip(fare, 0, 10)", "minutes_between(\"the day\", seen)", "text_length(car)", "word_count(car)", "digit_share(said)", "hour_fraction(seen)", "fare / nullif(tip, 0)"]


def test_the_library_of_features(both, con):
    both("select row_id, " + ", ".join(f"{with_library(w, (2024, 2024))} as f{i}" for i, w in enumerate(WRITTEN)) + " from clean")


def test_the_latest_row_before_the_moment(both, con):
    both.table("join 1", "select 'car ' || (range % 9) as k0, timestamp '2024-01-01' + range * interval 31 minute as since, case when range % 4 > 0 then range end as \"v level\" from range(600)")
    join = Join("levels", {"car": "car"}, {"seen": "since"}, {"level": "level"}, relation="join 1")
    rows = both(join_sql("select * from clean", join, "seen"))
    assert len(rows) == 3000 and sum(r[-1] is not None for r in rows) > 1000
