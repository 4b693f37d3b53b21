"""The portable subset, executed: each function on the same awkward rows in DuckDB and in Spark, value by value; the Trino text through a Trino grammar."""
import datetime as dt, decimal, json, math, re, shutil, subprocess

import pytest

from slml_nb.core import SlmlError
from slml_nb.dialect import SUBSET, to_spark, to_trino
from slml_nb.sql import connect

pytestmark = pytest.mark.slow

# ------------------------------------------------------------------ rows that are awkward, each column in another rhythm
NAN, INF = float("nan"), float("inf")
COLUMNS = {
    "i": ("INTEGER", [None, 0, 1, -1, 7, -7, 2147483647, -2147483648, 12345, 3]),
    "j": ("INTEGER", [1, 2, None, -3, 5, -5, 10, 7]),
    "b": ("BIGINT", [None, 0, 1, -1, 9007199254740993, -9007199254740993, 4611686018427387904, 60]),
    "tiny": ("TINYINT", [None, 0, 5, -5, 127, -128, 20]),
    "x": ("DOUBLE", [None, 0.0, -0.0, 1.5, -1.5, 2.5, -2.5, 0.5, 1.005, 2.675, 1e300, -1e300, 1e-7, 123456789.123, 1e16, NAN, INF, -INF, 0.1, 100.0, 3.0, 0.49999999999999994, 1e22, 0.00012]),
    "y": ("DOUBLE", [1.0, 0.0, None, -2.0, NAN, INF, 3.0, 0.25, -0.5, 1e10]),
    "f": ("FLOAT", [None, 0.0, 1.5, -2.5, 0.1, NAN, INF, 3.25]),
    "m": ("DECIMAL(9,3)", [None, "0", "1.500", "-1.500", "2.500", "2.005", "-123456.789", "999999.999", "0.001", "12.345"]),
    "s": ("VARCHAR", [None, "", "a", "Abc", "añ😀z", "a-b-c", "it's", "50%_x", "back\\slash", "x" * 40, " padded ", "line\nbreak", "ABC", "a.b", "abcabc", "12ab34", "\u00a0hard\u2003"]),
    "u": ("VARCHAR", ["a", "b", "", None, "abc", "-", "ñ", "%", "c", "Ab"]),
    "d": ("DATE", [None, "2024-02-29", "1970-01-01", "1969-12-31", "2023-12-31", "2024-01-01", "2021-01-03", "1900-02-28", "2000-02-29", "2999-12-31", "2020-12-28", "0101-01-01"]),
    "e": ("DATE", ["2024-03-01", "1969-06-15", None, "2024-01-07", "2024-01-08", "1970-01-01", "2021-01-04"]),
    "t": ("TIMESTAMP", [None, "2024-02-29 23:59:59.999999", "1969-12-31 23:59:59.5", "1970-01-01 00:00:00", "2023-12-31 12:30:00.25", "2021-01-03 00:00:01", "1850-06-01 10:00:00", "2024-01-31 01:02:03"]),
    "r": ("TIMESTAMP", ["2024-03-01 00:00:00", "1969-12-31 22:10:00", None, "2024-01-01 00:59:59.9", "1970-01-01 01:00:00", "2024-02-29 23:00:00"]),
    "k": ("BOOLEAN", [None, True, False]),
    "l": ("BOOLEAN", [True, None, False, False]),
    "n": ("INTEGER", [0, 1, 2, 3, -1, -2, -10, 40, None, 4]),
    "z": ("INTEGER", [0, 1, 2, 5, None, -1, -3]),
    "num": ("VARCHAR", ["1", " 7 ", "2.5", "-2.5", "1e3", "abc", "", None, "1_000", "+5", "5.", ".5", "inf", "NaN", "-Infinity", "5d", "1,000", "1e400", "99999999999999999999", "nan ", "3.14", "1e", "- 5"]),
    "yes": ("VARCHAR", ["true", "T", "yes", "0", "no", "maybe", "", None, "Y", " true ", "on", "FALSE", "n", "2"]),
    "day": ("VARCHAR", ["2024-02-29", "2023-02-29", "2024-1-5", "2024/01/05", "20240105", "2024-01-05 10:11:12", " 2024-01-05 ", "2024", "2024-01", "x", "", None, "2024-01-05T10:00", "20-01-01", "2024-01/05", "2024-01-05 xx"]),
    "moment": ("VARCHAR", ["2024-02-29 10:11:12", "2024-02-29", "2024-2-9 1:2", "2024-01-05T10:00:00.5Z", "2024-01-05 10:00:00+02", "2024-01-05 10", "x", "", None, "2024-01-05 10:00:00.1234567", "2024-01-05 25:00", "2024-01-05 10:00:60"]),
}
COUNT = 120


def literal_of(kind, value):
    if value is None: return f"NULL::{kind}"
    return f"'{str(value).replace(chr(39), chr(39) * 2)}'::{kind}"


@pytest.fixture(scope="module")
def con():
    con = connect(threads=1)
    rows = [", ".join(literal_of(kind, values[row % len(values)]) for kind, values in COLUMNS.values()) for row in range(COUNT)]
    con.execute("create table t as select * from (values " + ", ".join(f"({n}, {r})" for n, r in enumerate(rows)) + f") v(row_id, {', '.join(COLUMNS)})")
    con.execute("create table g as select row_id, row_id % 4 as grp, x, y, i, m, s, d, k, b from t where x is null or isfinite(x) and abs(x) < 1e6")
    con.execute("create table trips as select row_id as id, row_id % 5 as car, timestamp '2024-01-01' + row_id * interval 7 minute as at, x as fare from t")
    con.execute("create table fixes as select row_id as fix, row_id % 6 as car, timestamp '2024-01-01' + row_id * interval 11 minute as seen, s as place from t where row_id < 60")
    return con


@pytest.fixture(scope="module")
def spark(con, tmp_path_factory):
    from pyspark.sql import SparkSession
    folder = tmp_path_factory.mktemp("spark")
    conf = {"spark.ui.enabled": "false", "spark.sql.session.timeZone": "UTC", "spark.sql.shuffle.partitions": "2", "spark.sql.ansi.enabled": "true", "spark.driver.host": "127.0.0.1",
            "spark.driver.bindAddress": "127.0.0.1", "spark.sql.warehouse.dir": str(folder / "warehouse"), "spark.log.level": "OFF", "spark.sql.timestampType": "TIMESTAMP_NTZ"}
    build = SparkSession.builder.master("local[2]").appName("dialect")
    for key, value in conf.items(): build = build.config(key, value)
    session = build.getOrCreate()
    for table in ("t", "g", "trips", "fixes"):
        con.execute(f"copy {table} to '{folder}/{table}.parquet' (format parquet)")
        session.read.parquet(f"{folder}/{table}.parquet").createOrReplaceTempView(table)
    yield session
    session.stop()


# ------------------------------------------------------------------ what each function is asked; {name: expressions}
CASES = {
    "+": ["i::BIGINT + b", "x + y", "m + 1", "m + x", "tiny::INTEGER + 1000", "d + 5", "d + interval 1 month", "t + interval '1 year 2 days 3 hours'", "t + n * interval 90 minute", "t + to_minutes(n)",
          "case when d < date '2900-01-01' then d + n end", "5 + d - 3", "t + interval 1 month + interval 1 day", "f + 1", "f + x", "t + n * interval 1 month", "case when year(d) < 2900 then d + to_days(n) end"],
    "-": ["i::BIGINT - b", "x - y", "m - 0.001", "-x", "-m", "- i::BIGINT", "d - e", "d - 5", "t - interval 1 month", "r - to_seconds(1.5)", "x - -1.5", "case when year(d) > 100 then d - interval 1 year end"],
    "*": ["i::BIGINT * 3", "x * y", "m * 2", "m * m", "m * x", "f * 2", "n * 1.5"],
    "/": ["i / j", "x / y", "x / 60", "x / 60.0", "m / 4", "i / nullif(n, 0)", "x / 0", "n / 0", "f / 3", "1 / 3", "x / y / 2", "10 / (n + 1)", "f / f"],
    "//": ["i::BIGINT // j", "b // 7", "n // 2", "tiny // 3", "i // nullif(n, 0)"],
    "%": ["i::BIGINT % j", "b % 7", "x % y", "x % 7", "m % 2", "m % 0.5", "n % nullif(z, 0)", "mod(b, 60)"],
    "**": ["n ** 2", "x ** 2", "pow(y, 0.5)", "power(2, n)", "x ^ 3"],
    "=": ["x = y", "i = j", "s = u", "d = e", "d = '2024-02-29'", "i = 1.0", "x = 1", "m = 1.5", "t = '1970-01-01'", "d = t", "k = l", "f = 0.1", "x = 'NaN'::DOUBLE", "k = true", "b = 9007199254740993"],
    "<>": ["x <> y", "s <> ''", "i != j", "m <> x"],
    "<": ["x < y", "s < u", "d < e", "t < r", "x < 2", "m < 1.6", "k < l", "y < x", "2 < x"],
    "<=": ["x <= y", "i <= j", "x <= 1.5", "d <= t"],
    ">": ["x > y", "s > 'a'", "x > 0", "0 > x", "x > 'inf'::DOUBLE", "tiny > 100", "t > d"],
    ">=": ["x >= y", "x >= 1.5", "1.5 >= x", "d >= '2024-01-01'", "x between 0 and 2", "x not between y and 5", "d between '1970-01-01' and t"],
    "is distinct from": ["x is distinct from y", "s is distinct from u", "k is not true", "i is distinct from null"],
    "is not distinct from": ["x is not distinct from y", "k is not distinct from l", "k is true"],
    "is null": ["x is null", "s is null", "(x / y) is null"], "is not null": ["x is not null", "k is not null"],
    "and": ["k and l", "k and x > 0 and i = 1", "k and null"], "or": ["k or l", "k or x > 0", "l or null"], "not": ["not k", "not (x > 1)", "s not in ('a', '')"],
    "in": ["i in (1, 7, null)", "s in ('a', 'it''s')", "x in (1.5, 2.5)", "d in ('2024-02-29', date '1970-01-01')", "i in (j, 7)", "i not in (1, null)", "x in (y, 3)"],
    "like": ["s like 'a%'", "s like '%\\%'", "s like '_bc'", "s like '50%'", "s like u", "s like '%_'", "s like 'back\\%'", "s like ''", "s like '%''%'", "s like '%'"],
    "not like": ["s not like 'a%'", "s not like '%b%'"], "ilike": ["s ilike 'A%'", "s ilike 'aBC'"], "not ilike": ["s not ilike 'ab%'"],
    "||": ["s || u", "s || '!'", "s || i", "m || 'x'", "d || ' ' || k", "x || ''"],
    "case": ["case when x > 1 then 'big' when x <= 1 then 'small' else 'none' end", "case i when 1 then x when 7 then 2 end", "if(k, 1, 2.5)", "case when k then null else m end", "case when l then i else x end", "case s when 'a' then d end"],
    "cast": ["case when abs(x) < 1e9 then x::INTEGER end", "case when abs(x) < 1e9 then x::DECIMAL(18,2) end", "m::INTEGER", "m::DECIMAL(9,1)", "i::DOUBLE", "i::VARCHAR", "b::VARCHAR", "x::VARCHAR", "m::VARCHAR", "d::VARCHAR",
             "t::VARCHAR", "k::VARCHAR", "t::DATE", "d::TIMESTAMP", "k::INTEGER", "i::BOOLEAN", "b::DOUBLE", "case when abs(x) < 1e30 then x::FLOAT end", "try_cast(x as FLOAT)", "f::DOUBLE", "m::DOUBLE", "n::TINYINT", "i::DECIMAL(18,3)", "'2024-02-29'::DATE", "DATE '1969-12-31'", "s::VARCHAR",
             "case when abs(x) < 1e9 then x::BIGINT end", "x::BOOLEAN", "i::BIGINT", "null::INTEGER", "1e20::VARCHAR", "y::VARCHAR", "k::DOUBLE"],
    "try_cast": ["try_cast(num as INTEGER)", "try_cast(num as BIGINT)", "try_cast(num as DOUBLE)", "try_cast(num as DECIMAL(9,2))", "try_cast(num as TINYINT)", "try_cast(yes as BOOLEAN)", "try_cast(day as DATE)", "try_cast(moment as TIMESTAMP)",
                 "try_cast(day as TIMESTAMP)", "try_cast(moment as DATE)", "try_cast(x as INTEGER)", "try_cast(x as BIGINT)", "try_cast(x as TINYINT)", "try_cast(i as TINYINT)", "try_cast(m as TINYINT)", "try_cast(x as DECIMAL(9,2))",
                 "try_cast(b as INTEGER)", "try_cast(m as DECIMAL(4,1))", "try_cast(s as INTEGER)", "try_cast(num as FLOAT)", "try_cast(x as VARCHAR)", "try_cast(s as DATE)", "try_cast(d as VARCHAR)", "try_cast(num as SMALLINT)"],
    "coalesce": ["coalesce(i, j, 0)", "coalesce(x, 0)", "coalesce(s, u, 'none')", "ifnull(d, e)", "coalesce(i, 1.5)", "coalesce(m, x)"],
    "nullif": ["nullif(i, 7)", "nullif(x, 1.5)", "nullif(s, '')", "nullif(i, j)", "nullif(x, 0)", "nullif(i, 2.5)", "nullif(d, '2024-02-29')"],
    "greatest": ["greatest(x, y)", "greatest(i, j, 0)", "greatest(x, 0.1)", "greatest(d, e)", "greatest(s, u)", "greatest(i, 1.5)", "greatest(m, x)"],
    "least": ["least(x, y)", "least(i, j, 0)", "least(x, 0.1)", "least(t, r)", "least(k, l)"],
    "abs": ["abs(x)", "abs(i::BIGINT)", "abs(m)", "abs(f)"],
    "ceil": ["ceil(x)", "ceil(m)", "ceil(i)", "ceil(f)", "ceiling(y)"], "floor": ["floor(x)", "floor(m)", "floor(b)", "floor(f)"],
    "round": ["round(x)", "round(x, 2)", "round(x, 1)", "round(x, -1)", "round(m)", "round(m, 2)", "round(m, 0)", "round(n, -1)", "round(i::BIGINT)", "round(f)", "round(f, 1)", "round(y)", "round(x / 3, 3)", "round(m, -2)"],
    "trunc": ["trunc(x)", "trunc(m)", "trunc(i)", "trunc(f)"], "sign": ["sign(x)", "sign(m)", "sign(i)", "sign(f)"],
    "sqrt": ["sqrt(x)", "sqrt(i)"], "exp": ["exp(y)", "exp(x)"], "ln": ["ln(x)", "ln(i)", "ln(m)"], "log10": ["log10(x)", "log(x)"], "log2": ["log2(x)"],
    **{name: [f"{name}(case when abs(x) < 1e6 then x end)", f"{name}(n)"] for name in ("sin", "cos", "tan")}, "asin": ["asin(x)", "asin(y)"], "acos": ["acos(x)", "acos(y)"], "atan": ["atan(x)"], "atan2": ["atan2(nullif(x, 0), y)"],  # the sign of zero is not kept
       "radians": ["radians(x)"], "degrees": ["degrees(y)"], "pi": ["pi()", "pi() * x"], "isnan": ["isnan(x)", "isnan(f)"], "isinf": ["isinf(x)"], "isfinite": ["isfinite(x)", "isfinite(i)"],
    "length": ["length(s)", "len(u)"], "lower": ["lower(s)"], "upper": ["upper(s)"], "trim": ["trim(s)", "trim(s, 'a ')"], "ltrim": ["ltrim(s)", "ltrim(s, 'xa')"], "rtrim": ["rtrim(s)", "rtrim(s, 'cz')"],
    "substring": ["substring(s, 2)", "substring(s, 2, 3)", "substring(s, n)", "substring(s, n, z)", "substring(s, -3, 2)", "substring(s, 0, 2)", "s[2]", "s[n]", "substr(s, -2)", "substring(s from 2 for 1)", "substring(s, 2, -1)", "substring(s, -3)"],
    "left": ["left(s, 2)", "left(s, n)", "left(s, -1)", "left(s, 0)"], "right": ["right(s, 2)", "right(s, n)", "right(s, -1)", "right(s, 0)"],
    "replace": ["replace(s, 'a', 'ZZ')", "replace(s, u, '-')", "replace(s, '', 'x')"], "starts_with": ["starts_with(s, u)", "starts_with(s, 'a')", "s ^@ 'A'"], "ends_with": ["ends_with(s, u)", "suffix(s, 'c')"],
    "contains": ["contains(s, u)", "contains(s, '\\')"], "strpos": ["strpos(s, u)", "instr(s, 'b')", "position('c' in s)"],
    "split_part": ["split_part(s, '-', 2)", "split_part(s, '-', 1)", "split_part(s, '-', -1)", "split_part(s, '-', 0)", "split_part(s, '-', 9)", "split_part(s, 'b', n)", "split_part(s, '.', 2)"],
    "concat": ["concat(s, u)", "concat(s, i, k, m)", "concat(s)", "concat('a', null)", "concat(d, 'x', t)"], "concat_ws": ["concat_ws('-', s, u)", "concat_ws(chr(31), '', i, x, k, d)"], "chr": ["chr(31) || s", "chr(65)"], "reverse": ["reverse(s)"], "repeat": ["repeat(s, 2)", "repeat(s, n)"],
    "lpad": ["lpad(s, 5, 'xy')", "lpad(s, n, '-')"], "rpad": ["rpad(s, 5, 'xy')", "rpad(s, n, '-')"],
    "regexp_matches": ["regexp_matches(s, 'b')", "regexp_matches(s, '^a.*c$')", "regexp_matches(s, '\\d+')", "regexp_matches(s, '[^a-z]$')", "regexp_matches(s, 'break$')", "regexp_matches(s, 'a|b{2,}')", "s ~ '^\\s'", "regexp_matches(s, '(?i)abc')", "regexp_matches(s, '[$.]')", "regexp_matches(s, '\\\\')"],
    "regexp_replace": ["regexp_replace(s, 'b', 'X')", "regexp_replace(s, 'b', 'X', 'g')", "regexp_replace(s, '(a)(b)?', '[\\1]')", "regexp_replace(s, '([a-z])', '<\\1>', 'g')", "regexp_replace(s, '^', '$')", "regexp_replace(s, '\\s+', '', 'g')", "regexp_replace(s, 'B', '_', 'gi')", "regexp_replace(s, 'c$', 'END')"],
    "regexp_extract": ["regexp_extract(s, '[0-9]+')", "regexp_extract(s, '(\\d+)([a-z]+)', 2)", "regexp_extract(s, '(x)?b', 1)", "regexp_extract(s, 'none')"], "md5": ["md5(s)", "md5(b::VARCHAR)"],
    **{name: [f"{name}(d)", f"{name}(t)"] for name in ("year", "quarter", "month", "week", "day", "hour", "minute", "second", "dayofweek", "isodow", "dayofyear", "epoch", "last_day")},
    "date_trunc": [f"date_trunc('{p}', {c})" for p in ("year", "quarter", "month", "week", "day", "hour", "minute", "second") for c in "dt" if not (p in ("hour", "minute", "second") and c == "d")],
    "date_diff": [f"date_diff('{p}', {a}, {b})" for p in ("year", "quarter", "month", "week", "day", "hour", "minute", "second") for a, b in (("d", "e"), ("t", "r"), ("d", "r"))] + ["datediff('day', d, '2024-03-01')"],
    "make_date": ["make_date(2024, 2, 29)", "make_date(1900 + abs(n), 1, 2)"], "make_timestamp": ["make_timestamp(2024, 2, 29, 10, 5, 30.5)", "make_timestamp(1900 + abs(n), 1, 2, 3, 4, abs(n))"],
    **{f"to_{u}": [f"t + to_{u}(n)", f"case when year(d) between 1000 and 2900 then d - to_{u}(n) end"] for u in ("years", "months", "weeks", "days", "hours", "minutes")}, "to_seconds": ["t + to_seconds(n)", "t + to_seconds(2.25)", "t - to_seconds(n * 0.5)"],
}
AGGREGATES = {
    "count": ["count(*)", "count(x)", "count(distinct s)", "count(*) filter (where i > 0)", "count(i) filter (where k)"], "sum": ["sum(i)", "sum(x)", "sum(m)", "sum(b // 1000)", "sum(i) filter (where x > 0)", "sum(k)"],
    "avg": ["avg(i)", "avg(x)", "avg(m)", "avg(x) filter (where k)"], "min": ["min(x)", "min(s)", "min(d)", "min(k)"], "max": ["max(x)", "max(s)", "max(d)", "max(m)"],
    **{f: [f"{f}(x)", f"{f}(i)", f"{f}(m) filter (where i > 0)"] for f in ("stddev_samp", "stddev_pop", "var_samp", "var_pop")}, **{f: [f"{f}(row_id, x + 1e7 * row_id)", f"{f}(row_id, grp * 1.5 + row_id % 7) filter (where k)", f"{f}(row_id, 3)"] for f in ("corr", "covar_samp", "covar_pop")},
    "approx_quantile": ["approx_quantile(row_id, 0.5)"], "approx_count_distinct": ["approx_count_distinct(s)"], "arg_min": ["arg_min(s, row_id)", "arg_min(x, row_id)", "arg_min(row_id, -row_id)"], "arg_max": ["arg_max(s, row_id)", "arg_max(m, row_id)"],
    "any_value": ["any_value(grp)", "any_value(case when k then grp end)"], "bool_and": ["bool_and(k)", "bool_and(i > 0)"], "bool_or": ["bool_or(k)", "bool_or(x > 5)"], "count_if": ["count_if(k)", "count_if(x > 0)", "count_if(k) filter (where false)"],
}
WINDOWS = {
    "row_number": ["row_number() over (order by row_id)", "row_number() over (partition by grp order by x desc, row_id)"], "rank": ["rank() over (partition by grp order by x)", "rank() over (order by d nulls first)"],
    "dense_rank": ["dense_rank() over (order by m desc)"], "ntile": ["ntile(3) over (order by row_id)"], "lag": ["lag(x) over (order by row_id)", "lag(i, 2, 0) over (partition by grp order by row_id)", "lag(x, 1, -1) over (order by row_id)"],
    "lead": ["lead(s) over (order by row_id)", "lead(m, 3) over (order by row_id)"], "first_value": ["first_value(x) over (partition by grp order by row_id)"],
    "last_value": ["last_value(x) over (partition by grp order by row_id rows between unbounded preceding and unbounded following)", "last_value(i) over (order by row_id)"],
    "frames": ["sum(i) over (order by row_id rows between 2 preceding and current row)", "avg(m) over (partition by grp order by row_id rows between 3 preceding and 1 preceding)", "count(*) over (order by row_id range between 5 preceding and current row)",
               "sum(i) over (partition by grp)", "sum(i) over (partition by grp order by row_id)", "max(x) over (order by d range between interval 30 days preceding and current row)", "count(*) filter (where k) over (order by row_id)", "count_if(k) over (partition by grp)",
               "sum(m) over (order by row_id rows between 1 following and 3 following)", "arg_min(s, row_id) over (partition by grp)"],
}


# ------------------------------------------------------------------ equal?
def same(a, b, kind, close=1e-13):
    if a is None or b is None: return a is None and b is None
    if kind in ("DOUBLE", "FLOAT"):
        a, b, close = float(a), float(b), 1e-6 if kind == "FLOAT" else close
        return math.isnan(a) and math.isnan(b) or a == b or abs(a - b) <= close * max(abs(a), abs(b))
    if close > 0.01: return abs(a - b) <= close * max(abs(a), abs(b))
    if kind.startswith("DECIMAL") or kind in ("HUGEINT", "BIGINT"): return decimal.Decimal(a) == decimal.Decimal(b)
    return a == b and type(a) is type(b)


NAMES = {"int": "INTEGER", "bigint": "BIGINT", "smallint": "SMALLINT", "tinyint": "TINYINT", "double": "DOUBLE", "float": "FLOAT", "string": "VARCHAR", "boolean": "BOOLEAN", "date": "DATE", "timestamp_ntz": "TIMESTAMP"}


def compare(con, spark, query, translated=None, close=1e-13):
    "The same rows, values, names and types in both engines; what differs, in words."
    text = translated or to_spark(query, con)
    kinds = {r[0]: r[1] for r in con.execute("describe " + query).fetchall()}
    ours, frame = con.execute(query).fetchall(), spark.sql(text)
    theirs, wrong = [tuple(r) for r in frame.collect()], []
    for (name, kind), (other, other_kind) in zip(kinds.items(), frame.dtypes):
        expected = "BIGINT" if kind == "HUGEINT" else "INTEGER" if "NULL" in kind else kind
        if NAMES.get(other_kind, other_kind.upper()) != expected: wrong.append(f"{name}: type {kind}, in Spark {other_kind}")
    if len(ours) != len(theirs): return [f"{len(ours)} rows, in Spark {len(theirs)}"]
    for row, (mine, other) in enumerate(zip(ours, theirs)):
        for (name, kind), a, b in zip(kinds.items(), mine, other):
            if not same(a, b, kind, close): wrong.append(f"row {row}, {name}: {a!r}, in Spark {b!r}")
    return [*wrong[:12], text] if wrong else []


def selected(expressions, table, rest=""):
    "One query for several expressions."
    return f"select {', '.join(f'{e} as c{n}' for n, e in enumerate(expressions))} from {table} {rest}"


def test_every_function_of_the_subset_has_cases():
    assert set(SUBSET) == {*CASES, *AGGREGATES, *WINDOWS} - {"frames"}


@pytest.mark.parametrize("name", [n for n in SUBSET if SUBSET[n].kind == "scalar"])
def test_scalar(con, spark, name):
    wrong = compare(con, spark, selected(["row_id", *CASES[name]], "t", "order by row_id"))
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", AGGREGATES)
def test_aggregate(con, spark, name):
    close = 0.2 if name.startswith("approx") else 1e-9
    wrong = compare(con, spark, selected(["grp", *AGGREGATES[name]], "g", "group by grp order by grp"), close=close)
    wrong += compare(con, spark, selected(AGGREGATES[name], "g"), close=close) + compare(con, spark, selected(AGGREGATES[name], "g", "where row_id < 0"))  # all rows, no rows
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", WINDOWS)
def test_window(con, spark, name):
    wrong = compare(con, spark, selected(["row_id", *WINDOWS[name]], "g", "order by row_id"), close=1e-9)
    assert not wrong, "\n".join(wrong)


QUERIES = {
    "where": "select row_id, s from t where x > 0 and s is not null order by row_id limit 5 offset 2",
    "star": "select * from trips where car = 1 order by id",
    "exclude": "select * exclude (fare) replace (car + 1 as car) from trips order by id",
    "names": "select count(*), sum(i), i::BIGINT + 1 as \"odd name\" from g group by i order by \"odd name\", 1 + count(*)",
    "alias": "select x * 2 as double_x, double_x + 1 as more from g where double_x > 3 order by more",
    "having": "select grp, sum(i) as total from g group by grp having total > 0 order by total desc",
    "group by alias": "select row_id % 3 as third, count(*) as rows from t group by third order by third",
    "distinct": "select distinct grp, k from g order by grp, k",
    "order of nulls": "select d, row_id from t order by d desc, row_id",
    "order nulls first": "select x, row_id from t order by x nulls first, row_id",
    "inner": "select a.id, b.fix from trips a join fixes b on a.car = b.car and a.id = b.fix order by a.id",
    "left using": "select * from trips left join fixes using (car) where fix is null or fix < 3 order by id, fix",
    "right": "select a.id, b.fix from trips a right join fixes b on a.id = b.fix + 100 order by b.fix",
    "full": "select a.id, b.fix from trips a full join fixes b on a.id = b.fix + 100 order by a.id, b.fix",
    "cross": "select a.id, b.fix from trips a cross join fixes b where a.id < 3 and b.fix < 3 order by a.id, b.fix",
    "semi": "select id from trips a semi join fixes b on a.car = b.car and b.fix > 50 order by id",
    "anti": "select id from trips a anti join fixes b on a.id = b.fix order by id",
    "asof": "select a.id, b.fix, b.place from trips a asof left join fixes b on a.car = b.car and a.at >= b.seen order by a.id",
    "asof strict": "select a.id, b.fix from trips a asof left join fixes b on a.car = b.car and a.at > b.seen order by a.id",
    "asof next": "select a.id, b.fix from trips a asof join fixes b on a.car = b.car and a.at <= b.seen order by a.id",
    "asof star": "select a.*, b.place from trips a asof left join fixes b on a.at >= b.seen order by a.id",
    "cte": "with fast as (select * from trips where fare > 0), cars(c, n) as (select car, count(*) from fast group by car) select c, n from cars order by c",
    "union": "select car from trips union select car from fixes order by car",
    "union all": "select id, car from trips where id < 3 union all select fix, car from fixes where fix < 3 order by id, car",
    "except": "select id from trips except select fix from fixes order by id", "intersect": "select id from trips intersect select fix from fixes order by id",
    "nested": "select m, n from (select car as m, max(fare) as n from trips group by car) q where n is not null order by m",
    "values": "select v.a, v.b, t.id from (values (1, 'x'), (2, null)) v(a, b) join trips t on t.id = v.a order by v.a",
    "exists": "select id from trips where exists (select 1 from fixes where fixes.fix = trips.id and fixes.place like 'a%') order by id",
    "in": "select id from trips where id in (select fix from fixes where fix > 3) and car not in (select car from fixes where car > 3) order by id",
    "scalar": "select id, fare - (select avg(fare) from trips where isfinite(fare) and abs(fare) < 1e10) as above from trips where isfinite(fare) order by id",
    "qualify": "select car, id, fare from trips where isfinite(fare) qualify row_number() over (partition by car order by fare desc, id) <= 2 order by car, id",
    "qualify star": "select * from trips qualify rank() over (partition by car order by id) = 1 order by id",
    "window of a named window": "select row_id, sum(i) over w as s from g window w as (partition by grp order by row_id) order by row_id",
    "constant": "select 1 as one, 'x' as two, 1.50 as three, date '2024-02-29' as four, null as five",
}


GRAMMAR = """
const { TrinoSQL } = require('dt-sql-parser');
const parser = new TrinoSQL(), texts = JSON.parse(require('fs').readFileSync(0, 'utf8'));
console.log(JSON.stringify(texts.map(t => parser.validate(t).map(e => e.message))));
"""


def test_trino_text_is_in_trinos_grammar(con, tmp_path_factory):
    "Every expression and query of this file, written for Trino, read by a parser made of Trino's own grammar."
    if not (shutil.which("npm") and shutil.which("node")): pytest.skip("npm and node are not here: the grammar of Trino comes from npm's dt-sql-parser")
    folder = tmp_path_factory.mktemp("grammar")
    made = subprocess.run(["npm", "install", "--silent", "--no-audit", "--no-fund", "dt-sql-parser@4.5.1", "esbuild@0.25.0"], cwd=folder, capture_output=True, text=True, timeout=300)
    if made.returncode: pytest.skip(f"dt-sql-parser cannot be installed: {made.stderr[-200:]}")
    queries = [selected([e], "t") for es in CASES.values() for e in es] + [selected([e], "g") for es in (*AGGREGATES.values(), *WINDOWS.values()) for e in es] + list(QUERIES.values())
    texts, refused = [], []
    for q in queries:
        try: texts.append(to_trino(q, con))
        except SlmlError as e: refused.append((q, str(e)))
    (folder / "check.js").write_text(GRAMMAR)
    subprocess.run(["node_modules/.bin/esbuild", "check.js", "--bundle", "--platform=node", "--outfile=bundle.cjs", "--log-level=error"], cwd=folder, check=True, timeout=120)
    out = subprocess.run(["node", "bundle.cjs"], cwd=folder, input=json.dumps(texts), capture_output=True, text=True, timeout=300)
    assert not out.returncode, out.stderr
    wrong = [(t, e) for t, e in zip(texts, json.loads(out.stdout)) if e]
    assert not wrong, wrong[:5]
    assert len(texts) > 400 and all("split_part from the end" in e for _, e in refused), refused  # Trino counts from the front only
    assert json.loads(subprocess.run(["node", "bundle.cjs"], cwd=folder, input='["select from where"]', capture_output=True, text=True).stdout)[0]  # it does find errors


# Trino's functions in DuckDB's words, to execute what is written for Trino where both mean the same by it
AS_TRINO = ["is_nan(x) as isnan(x)", "is_infinite(x) as isinf(x)", "is_finite(x) as isfinite(x)", "infinity() as 'inf'::DOUBLE", "nan() as 'nan'::DOUBLE", "regexp_like(a, b) as regexp_matches(a, b)", "to_utf8(x) as x",
            "to_hex(x) as x", "approx_distinct(x) as approx_count_distinct(x)", "arbitrary(x) as any_value(x)", "last_day_of_month(x) as last_day(x)", "to_unixtime(x) as epoch(x)", "day_of_week(x) as isodow(x)",
            "day_of_year(x) as dayofyear(x)", "truncate(x) as trunc(x)", "array_sort(x) as list_sort(x)", "element_at(l, i) as list_extract(l, i)",
            "date_add(u, n, t) as case u when 'millisecond' then t + to_milliseconds(n::BIGINT) when 'minute' then t + to_minutes(n::BIGINT) when 'hour' then t + to_hours(n::BIGINT) "
            "when 'day' then t + to_days(n::INTEGER) when 'month' then t + to_months(n::INTEGER) end"]
ONLY_TRINO = ("format('", "\\2", " / 7)", "approx_percentile")  # %s, a back-reference, / of integers


def test_trino_text_says_the_same(con):
    "What is written for Trino, executed by DuckDB."
    cursor, ran = con.cursor(), 0
    for macro in AS_TRINO: cursor.execute(f"create or replace temp macro {macro}")
    for name, expressions in {**CASES, **AGGREGATES, **WINDOWS}.items():
        for e in expressions if name not in ("//", "regexp_replace") else ():  # integer / and $1 are Trino's alone
            query = f"select {e} as c from " + ("g" if name in AGGREGATES else "t order by row_id" if name in CASES else "g order by row_id")
            try: text = to_trino(query, con)
            except SlmlError: continue
            if any(word in text for word in ONLY_TRINO): continue
            text = re.sub(r"DECIMAL '([^']*)'", r"'\1'", text).replace("TIMESTAMP(6)", "TIMESTAMP").replace("v -> v IS", "lambda v: v IS").replace("filter(ARRAY", "list_filter(ARRAY")
            kind = con.execute("describe " + query).fetchall()[0][1]
            for (a,), (b,) in zip(con.execute(query).fetchall(), cursor.execute(text).fetchall(), strict=True):
                if kind == "DATE" and isinstance(b, dt.datetime): b = b.date()
                assert same(a, b, "DOUBLE" if kind == "HUGEINT" else kind, 1e-9), (e, a, b, text)
            ran += 1
    assert ran > 480, ran


@pytest.mark.parametrize("name", QUERIES)
def test_query(con, spark, name):
    wrong = compare(con, spark, QUERIES[name])
    assert not wrong, "\n".join(wrong)
