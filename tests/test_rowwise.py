"""Feature SQL compiled to Python against DuckDB: random typed expressions on random rows, errors included."""
import datetime as dt, math, os
from decimal import Decimal
from functools import lru_cache
import duckdb, pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from slml_nb.core import SlmlError
from slml_nb.dialect import typed_tree
from slml_nb.rowwise import RowError, RowFunction, lay_down
from slml_nb.sql import connect

COLUMNS = {"n": "BIGINT", "i": "INTEGER", "x": "DOUBLE", "y": "DOUBLE", "s": "VARCHAR", "u": "VARCHAR", "b": "BOOLEAN", "c": "BOOLEAN", "d": "DATE", "t": "TIMESTAMP", "e": "TIMESTAMP", "q": "DECIMAL(9,2)"}
maybe = lambda s: st.one_of(st.none(), s, s, s)
small, texts = st.integers(-12, 12), st.one_of(st.sampled_from(["", "a", "Ab", " x ", "card", "12", "-3.5", "1e3", "2024-02-29", "2024-02-29 10:30", "true", "straße", "ΑΣς", "日本", "a,b,c", "%_", "nan"]), st.text(max_size=6))
times = st.one_of(st.datetimes(dt.datetime(1900, 1, 1), dt.datetime(2100, 1, 1)), st.datetimes(), st.sampled_from([dt.datetime(2024, 2, 29), dt.datetime(1969, 12, 31, 23, 59, 59, 999999), dt.datetime(2000, 1, 31, 12)]))
VALUES = {"BIGINT": st.one_of(small, st.integers(-2**63, 2**63 - 1)), "INTEGER": st.one_of(small, st.integers(-2**31, 2**31 - 1)), "DOUBLE": st.one_of(st.integers(-4, 4).map(float), st.sampled_from([math.nan, math.inf, -math.inf, -0.0, 2.5]), st.floats(-1e6, 1e6), st.floats(allow_infinity=True)),
          "VARCHAR": texts, "BOOLEAN": st.booleans(), "DATE": times.map(lambda t: t.date()), "TIMESTAMP": times, "DECIMAL(9,2)": st.decimals(-9999999, 9999999, places=2)}
PARTS = ["year", "quarter", "month", "week", "day", "hour", "minute", "second"]
quoted = lambda v: "'" + v.replace("'", "''") + "'"
WORDS = st.sampled_from(["", "a", "A", " ", "12", "card", ",", "straße", "x%", "%a%", "_b", "Σ", "2024-05-06"]).map(quoted)


def leaf(kind):
    "A column or a constant of a type."
    columns = st.sampled_from([c for c, t in COLUMNS.items() if t == kind] or ["n"])
    constant = {"BIGINT": st.one_of(small, st.integers(-2**40, 2**40)).map(lambda v: f"({v})::BIGINT"), "INTEGER": small.map(lambda v: f"({v})"), "DOUBLE": st.sampled_from(["0.0::DOUBLE", "2.0::DOUBLE", "0.001::DOUBLE", "(-1.5)::DOUBLE", "1e300::DOUBLE", "60::DOUBLE"]),
                "VARCHAR": WORDS, "BOOLEAN": st.sampled_from(["true", "false"]), "DATE": st.sampled_from(["date '2024-02-29'", "date '1960-12-31'"]), "TIMESTAMP": st.sampled_from(["timestamp '2024-02-29 12:30:00'", "timestamp '1950-01-01'"]),
                "DECIMAL(9,2)": st.sampled_from(["1.25", "0.1", "(-3.50)", "100.005"])}[kind]
    return st.one_of(columns, columns, columns, constant)


@lru_cache(None)
def grow(kind, depth):
    "Expressions of a type."
    if depth == 0: return leaf(kind)
    g = lambda k: st.deferred(lambda: grow(k, depth - 1))
    f = lambda template, *kinds: st.tuples(*map(g, kinds)).map(lambda a: template.format(*a))
    some = st.sampled_from(["BIGINT", "INTEGER", "DOUBLE", "VARCHAR", "DATE", "TIMESTAMP", "DECIMAL(9,2)"])
    number = st.sampled_from(["BIGINT", "INTEGER", "DOUBLE", "DECIMAL(9,2)"])
    when = st.sampled_from(["DATE", "TIMESTAMP"])
    pairs = some.flatmap(lambda k: st.tuples(g(k), st.sampled_from(["=", "<>", "<", "<=", ">", ">=", "is distinct from", "is not distinct from"]), g(k)).map(lambda a: f"({a[0]} {a[1]} {a[2]})"))
    any_kind = [f("(case when {} then {} else {} end)", "BOOLEAN", kind, kind), f("(case when {} then {} when {} then {} end)", "BOOLEAN", kind, "BOOLEAN", kind), f("coalesce({}, {})", kind, kind), f("nullif({}, {})", kind, kind)]
    if kind not in ("BOOLEAN",): any_kind += [f("greatest({}, {})", kind, kind), f("least({}, {}, {})", kind, kind, kind)]
    own = {
        "BOOLEAN": [pairs, pairs, f("({} and {})", kind, kind), f("({} or {})", kind, kind), f("(not {})", kind), some.flatmap(lambda k: f("({} is null)", k)), some.flatmap(lambda k: f("({} in ({}, {}))", k, k, k)), number.flatmap(lambda k: f("({} between {} and {})", k, k, k)),
                    f("({} like {})", "VARCHAR", "VARCHAR"), f("({} ilike {})", "VARCHAR", "VARCHAR"), st.tuples(g("VARCHAR"), WORDS).map(lambda a: f"({a[0]} not like {a[1]})"), f("contains({}, {})", "VARCHAR", "VARCHAR"), f("starts_with({}, {})", "VARCHAR", "VARCHAR"), f("isnan({})", "DOUBLE"),
                    f("isfinite({})", "DOUBLE"), f("regexp_matches({}, '^[a-c]\\s*\\w')", "VARCHAR"), f("try_cast({} as BOOLEAN)", "VARCHAR"), f("cast({} as BOOLEAN)", "BIGINT"), number.flatmap(lambda k: number.flatmap(lambda j: f("({} < {})", k, j))), f("({} = {})", "DATE", "TIMESTAMP")],
        "BIGINT": [f(f"({{}} {o} {{}})", "BIGINT", k) for o in "+-*" for k in ("BIGINT", "INTEGER")] + [f("({} // {})", "BIGINT", "BIGINT"), f("({} % {})", "BIGINT", "BIGINT"), f("abs({})", "BIGINT"), f("(- {})", "INTEGER"), f("length({})", "VARCHAR"), f("strpos({}, {})", "VARCHAR", "VARCHAR"),
                   *[when.flatmap(lambda k, n=n: f(f"{n}({{}})", k)) for n in ("year", "quarter", "month", "week", "day", "dayofweek", "isodow", "dayofyear", "hour", "minute", "second")], f("cast({} as BIGINT)", "DOUBLE"), f("try_cast({} as BIGINT)", "DOUBLE"), f("try_cast({} as BIGINT)", "VARCHAR"),
                   f("cast({} as BIGINT)", "VARCHAR"), f("cast({} as BIGINT)", "DECIMAL(9,2)"), st.tuples(st.sampled_from(PARTS), when.flatmap(lambda k: st.tuples(g(k), g(k)))).map(lambda a: f"date_diff('{a[0]}', {a[1][0]}, {a[1][1]})"), f("({} - {})", "DATE", "DATE"), f("round({}, -1)", "BIGINT"), f("cast(sign({}) as BIGINT)", "DOUBLE")],
        "INTEGER": [f("({} + {})", "INTEGER", "INTEGER"), f("({} * {})", "INTEGER", "INTEGER"), f("cast({} as INTEGER)", "BIGINT"), f("try_cast({} as INTEGER)", "DOUBLE"), f("try_cast({} as SMALLINT)", "BIGINT"), f("cast({} as INTEGER)", "BOOLEAN"), f("({} // 7)", "INTEGER"), f("({} % 7)", "INTEGER")],
        "DOUBLE": [f(f"({{}} {o} {{}})", "DOUBLE", k) for o in "+-*/%" for k in ("DOUBLE", "BIGINT")] + [f("({} / {})", k, k) for k in ("BIGINT", "DECIMAL(9,2)")] + [f("({} // {})", "DOUBLE", "DOUBLE"), f("({} ** {})", "DOUBLE", "DOUBLE"), f("({} ** 2)", "DOUBLE"), f("(- {})", "DOUBLE"), f("round({}, 2)", "DOUBLE"),
                   *[f(f"{n}({{}})", "DOUBLE") for n in ("abs", "ceil", "floor", "round", "trunc", "sqrt", "exp", "ln", "log10", "log2", "sin", "cos", "tan", "asin", "acos", "atan", "radians", "degrees")], f("atan2({}, {})", "DOUBLE", "DOUBLE"), f("cast({} as DOUBLE)", "BIGINT"), f("cast({} as DOUBLE)", "DECIMAL(9,2)"),
                   f("try_cast({} as DOUBLE)", "VARCHAR"), f("cast({} as DOUBLE)", "BOOLEAN"), when.flatmap(lambda k: f("epoch({})", k)), f("ceil({})", "BIGINT"), f("cast(cast({} as FLOAT) * 1.1::FLOAT as DOUBLE)", "DOUBLE"), f("cast(cast({} as FLOAT) / cast({} as FLOAT) as DOUBLE)", "BIGINT", "INTEGER")],
        "DECIMAL(9,2)": [f("cast({} as DECIMAL(9,2))", k) for k in ("DOUBLE", "BIGINT", "VARCHAR", "BOOLEAN")] + [f("try_cast({} as DECIMAL(9,2))", k) for k in ("DOUBLE", "VARCHAR")] + [f(f"cast(({{}} {o} {{}}) as DECIMAL(9,2))", "DECIMAL(9,2)", k) for o in "+-*%" for k in ("DECIMAL(9,2)", "INTEGER")] +
                        [f(f"cast({n} as DECIMAL(9,2))", "DECIMAL(9,2)") for n in ("round({})", "round({}, 1)", "round({}, -1)", "ceil({})", "floor({})", "trunc({})", "abs({})", "(- {})")],
        "VARCHAR": [f(f"{n}({{}})", "VARCHAR") for n in ("lower", "upper", "trim", "ltrim", "rtrim", "md5")] + [f("({} || {})", "VARCHAR", "VARCHAR"), f("concat({}, {})", "VARCHAR", "VARCHAR"), f("substring({}, {}, {})", "VARCHAR", "INTEGER", "INTEGER"), f("left({}, {})", "VARCHAR", "INTEGER"), f("right({}, {})", "VARCHAR", "INTEGER"),
                    f("replace({}, {}, {})", "VARCHAR", "VARCHAR", "VARCHAR"), f("split_part({}, {}, {})", "VARCHAR", "VARCHAR", "INTEGER"), f("lpad({}, 5, {})", "VARCHAR", "VARCHAR"), f("rpad({}, {} % 9, {})", "VARCHAR", "INTEGER", "VARCHAR"), f("repeat({}, {} % 4)", "VARCHAR", "INTEGER"), f("trim({}, {})", "VARCHAR", "VARCHAR"),
                    f("regexp_replace({}, '[aeiou ]+', '-', 'g')", "VARCHAR"), f("regexp_replace({}, 'x*', '.', 'g')", "VARCHAR"), f("regexp_extract({}, '(\\d+)-?(\\d*)', 2)", "VARCHAR")] + [f("cast({} as VARCHAR)", k) for k in ("BIGINT", "DOUBLE", "BOOLEAN", "DATE", "TIMESTAMP", "DECIMAL(9,2)")] + [f("cast(cast({} as FLOAT) as VARCHAR)", "DOUBLE")],
        "DATE": [f("cast({} as DATE)", "TIMESTAMP"), f("last_day({})", "DATE"), f("({} + {} % 1000)", "DATE", "INTEGER"), f("try_cast({} as DATE)", "VARCHAR"), f("({} - 30)", "DATE"), f("make_date(2000 + {} % 20, 1 + abs({} % 12), 1 + abs({} % 31))", "INTEGER", "INTEGER", "INTEGER")],
        "TIMESTAMP": [f("cast({} as TIMESTAMP)", "DATE"), st.tuples(st.sampled_from(PARTS), when.flatmap(g)).map(lambda a: f"date_trunc('{a[0]}', {a[1]})"), f("try_cast({} as TIMESTAMP)", "VARCHAR"), f("({} + ({} % 100) * interval 1 month)", "TIMESTAMP", "INTEGER"), f("({} - interval '1 month 1 day 1 hour')", "TIMESTAMP"), f("({} + interval 45 day)", "DATE"),
                      f("({} + to_minutes({} % 100000))", "TIMESTAMP", "BIGINT"), f("({} - to_hours({} % 1000))", "DATE", "BIGINT"), f("({} + to_seconds({}))", "TIMESTAMP", "DOUBLE"), f("make_timestamp(2000 + {} % 20, 2, 28, abs({} % 24), 59, 59.5)", "INTEGER", "INTEGER")],
    }[kind]
    return st.one_of(leaf(kind), *own, *own, *any_kind)


expressions = st.sampled_from(["BOOLEAN", "BIGINT", "INTEGER", "DOUBLE", "DOUBLE", "DECIMAL(9,2)", "VARCHAR", "DATE", "TIMESTAMP"]).flatmap(lambda k: st.integers(1, 3).flatmap(lambda depth: grow(k, depth)))
rows = st.fixed_dictionaries({c: maybe(VALUES[t]) for c, t in COLUMNS.items()})


def bits(v): return "nan" if isinstance(v, float) and v != v else v.hex() if isinstance(v, float) else str(v) if type(v).__name__ == "Decimal" else v


def database():
    con = connect(threads=1)
    con.execute(f"create table r ({', '.join(f'{c} {t}' for c, t in COLUMNS.items())}, key INTEGER)")
    fillers = [(None,) * len(COLUMNS), (-2**62, -2**31, -1e300, -1.0, "", "", False, False, dt.date(1, 1, 1), dt.datetime(1, 1, 1), dt.datetime(1, 1, 1), -9999999),
               (2**62, 2**31 - 1, 1e300, 1.0, "zz", "zz", True, True, dt.date(9999, 1, 1), dt.datetime(9999, 1, 1), dt.datetime(9999, 1, 1), 9999999)]
    con.executemany(f"insert into r values ({', '.join('?' * len(COLUMNS))}, 0)", fillers)  # else DuckDB knows that a column of one row is empty, and leaves out what might fail
    return con


def null_of_constants(program):
    "Is a part of it, made of constants alone, missing? Then DuckDB does not look at what stands beside it, and does not see that this cannot be computed; ours says so."
    steps, alone = program["steps"], []
    for op, _, args, _ in steps: alone.append(op != "column" and all(alone[a] for a in args))
    def missing(i):
        try: return RowFunction({**program, "features": {"f": i}})({})[0] is None
        except (RowError, SlmlError): return False
    return any(alone[i] and s[2] and missing(i) for i, s in enumerate(steps))


@lru_cache(4)
def compiled(con, expression):
    "An expression in Python, and its steps; the error as text, where it is refused. Once for all the rows that it is tried on."
    try: return RowFunction(program := lay_down({"f": typed_tree(con, expression, "r")})), program
    except SlmlError as e: return None, f"refused: {e}"


def compare(con, expression, row):
    "Both give the same value, or both an error. Python may refuse what lies outside its years, or a regular expression, but says so."
    function, program = compiled(con, expression)
    if not function: return program
    con.execute("delete from r where key = 1")
    con.execute(f"insert into r values ({', '.join('?' * len(COLUMNS))}, 1)", [row[c] for c in COLUMNS])
    try: theirs = con.execute(f"select {expression} from r where key = 1").fetchall()[0][0]
    except duckdb.Error as e: theirs = e
    try: ours = function(row)[0]
    except RowError as e: ours = e
    if isinstance(ours, RowError) and ("years" in str(ours) or ours.outside): return "outside"
    if isinstance(ours, RowError) and theirs is None and null_of_constants(program): return "outside"
    if isinstance(ours, RowError) or isinstance(theirs, duckdb.Error):
        assert isinstance(ours, RowError) and isinstance(theirs, duckdb.Error), f"{expression}\n{row}\nours {ours!r}\nDuckDB {theirs!r}\n{function.source}"
        return "both raise"
    assert bits(ours) == bits(theirs), f"{expression}\n{row}\nours {ours!r}\nDuckDB {theirs!r}\n{function.source}"
    return "equal"


@pytest.mark.slow
def test_random_expressions_on_random_rows():
    con, steady, pool = database(), dict(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)), []

    @settings(max_examples=400, **steady)
    @given(rows)
    def drawn(row): pool.append(row)
    drawn()

    @settings(max_examples=int(os.environ.get("SLML_EXAMPLES", 3000)), **steady)
    @given(expressions, st.lists(st.sampled_from(pool), min_size=1, max_size=4))  # a row of a dozen values takes longer to draw than to compare, so the same rows meet many expressions
    def same(expression, some):
        for row in some: compare(con, expression, row)
    same()


def test_comparing_across_types():
    "x / nullif(y, 0) is how people write it: numbers of different types are compared as DuckDB compares them, or refused by name."
    con, numbers = database(), ["n", "i", "x", "q", "0", "0.0::DOUBLE", "-1", "1.25", "1.5::FLOAT", "'nan'::DOUBLE"]
    pairs = [(a, b) for a in ("n", "i", "x", "q", "b") for b in numbers] + [("d", "t"), ("t", "d")]
    values = {"n": [0, -1, 2**53 + 1, None], "i": [0, 2, -1, None], "x": [0.0, -0.0, math.nan, 2.0**53, 1.25, math.inf, None], "q": [*map(Decimal, ("0", "-1", "1.25")), None], "b": [True, False, None],
              "d": [dt.date(2024, 1, 1), None], "t": [dt.datetime(2024, 1, 1), dt.datetime(2024, 1, 1, 1), None]}
    outcomes = {}
    for a, b in pairs:
        some = [{c: None for c in COLUMNS} | {a: v, b: w} if b in COLUMNS else {c: None for c in COLUMNS} | {a: v} for v in values[a] for w in (values[b] if b in COLUMNS else [0])]
        for e in (f"nullif({a}, {b})", f"{a} in ({b}, {a})", f"{a} is distinct from {b}"): outcomes[e] = {compare(con, e, row).split(":")[0] for row in some}
    for e in ("nullif(x, 0)", "nullif(n, 0)", "nullif(i, 1.25)", "nullif(x, n)", "nullif(q, x)", "x in (0, x)", "n is distinct from x", "nullif(x, -1)"): assert outcomes[e] == {"equal"}, e
    refused = [e for e, v in outcomes.items() if "refused" in v]
    assert len(refused) < len(outcomes) / 5, refused


def test_a_null_of_constants_hides_what_cannot_be_computed():
    con, row = database(), {**dict.fromkeys(COLUMNS), "n": 2147483648, "i": 0}
    assert compare(con, "make_date(2000 + i % 20, 1 + abs(cast(n as INTEGER) % 12), 1 + abs(nullif((0), (0)) % 31))", row) == "outside"
    assert compare(con, "make_date(2000 + i % 20, 1 + abs(cast(n as INTEGER) % 12), 1 + abs(nullif((0), (1)) % 31))", row) == "both raise"
