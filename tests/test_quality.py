"""Every class of defect, planted in clean rows: found by its name, counted right, and nothing found where nothing is."""
import importlib, importlib.util

import numpy as np
import pandas as pd
import pytest
import yaml

from slml_nb.dialect import check_portable
from slml_nb.quality import (bind_rules, count_rules, find_defects, judge_sql, pandera_check, pandera_failures, part_queries, read_rule, read_rules,
                             suggest_rules, tally, sum_up)
from slml_nb.sql import connect

N = 2000
WORDS = "red green blue small large heavy light round square metal wooden paper box lamp chair table wheel handle cover frame panel sheet".split()
CITIES = {"Zürich": "CH", "Genève": "CH", "München": "DE", "Köln": "DE", "Lyon": "FR", "Orléans": "FR", "Roma": "IT", "Milano": "IT"}


def clean(seed=0):
    "Two thousand parcels without a mistake, of every kind of column: numbers with and without a tail, codes, labels, free text, two times, a sum, a reference, an often empty column."
    r, i = np.random.default_rng(seed), np.arange(N)
    city = r.choice(list(CITIES), N)
    start = pd.Timestamp("2024-03-01") + pd.to_timedelta(i * 13, unit="min")
    price, tip = r.lognormal(3, .6, N).round(2), r.exponential(2, N).round(2)
    return pd.DataFrame({
        "row_id": i, "source": np.where(i < N / 2, "a.csv", "b.csv"), "parcel_id": i + 70000,
        "km": r.uniform(5, 45, N).round(3), "load": r.normal(500, 60, N).round(2), "score": r.integers(0, 101, N), "wait": r.exponential(12, N).round(3),
        "temp": r.normal(3, 9, N).round(4), "price": price, "tip": tip, "total": (price + tip).round(2),
        "lat": r.normal(47, .4, N).round(5), "lon": r.normal(8, .4, N).round(5),
        "code": [f"{a}{b}-{n}" for a, b, n in zip(r.choice(list("ABCDE"), N), r.choice(list("XYZ"), N), r.integers(1000, 9999, N))],
        "city": city, "country": [CITIES[c] for c in city], "payment": r.choice(["cash", "card", "voucher"], N, p=[.5, .4, .1]),
        "depot": r.integers(1, 40, N), "text": [" ".join(r.choice(WORDS, r.integers(2, 9))) for _ in i],
        "day": [str(d.date()) for d in start], "count_text": r.integers(1, 500, N).astype(str),
        "start": start, "stop": start + pd.to_timedelta(r.integers(2, 50, N), unit="min"),
        "note": np.where(r.random(N) < .6, None, r.choice(["late", "early"], N))})


def rows_for(k, seed=1): return np.sort(np.random.default_rng(seed).choice(np.arange(100, N - 100), k, replace=False))


def put(column, k, change):
    "A plan: change k values of a column."
    def plant(frame):
        at = rows_for(k)
        frame.loc[at, column] = [change(v) for v in frame.loc[at, column]]
        return k
    return plant


def copies(k, change=lambda f: f):
    def plant(frame):
        more = change(frame.loc[rows_for(k)].copy())
        more["row_id"] = N + np.arange(k)
        frame.loc[N:] = None
        for _, row in more.iterrows(): frame.loc[len(frame)] = row
        return k
    return plant


def swap(a, b, k):
    def plant(frame):
        at = rows_for(k)
        frame.loc[at, [a, b]] = frame.loc[at, [b, a]].to_numpy()
        return k
    return plant


def hang(frame):
    frame.loc[700:724, "temp"] = 4.4
    return 25


def cut(frame):
    at = frame["text"].str.len() > 30
    frame.loc[frame["text"].str.len() == 30, "text"] = "exactly thirty is now shorter"
    frame.loc[at, "text"] = frame.loc[at, "text"].str[:30]
    return int(at.sum())


def shouted(frame):
    frame["city"] = " " + frame["city"].str.upper()
    frame["text"] = frame["text"].str.replace(" ", "  ").str.title()
    return frame


def garbled(v): return v.encode().decode("cp1252")


PLANTED = {  # name: (defect, columns, what is done)
    "missing": ("missing", ["km"], put("km", 31, lambda v: np.nan)),
    "missing, in words": ("missing", ["city"], put("city", 17, lambda v: "N/A")),
    "exact duplicates": ("duplicate", None, copies(23)),
    "near duplicates": ("near duplicate", None, copies(14, shouted)),
    "spelling": ("inconsistent spelling", ["payment"], put("payment", 19, lambda v: v.upper() + " ")),
    "spelling, often": ("inconsistent spelling", ["payment"], put("payment", 600, lambda v: v.capitalize())),
    "out of range, above": ("out of range", ["load"], put("load", 6, lambda v: v + 3000)),
    "out of range, far above in a tail": ("out of range", ["price"], put("price", 4, lambda v: 4e5 + v * 7000)),
    "out of range, a negative amount": ("out of range", ["price"], put("price", 5, lambda v: -v)),
    "out of range, the future": ("out of range", ["start"], put("start", 4, lambda v: v + pd.Timedelta("2000 days"))),
    "wrong type": ("wrong type", ["count_text"], put("count_text", 12, lambda v: "about " + v)),
    "wrong format": ("wrong format", ["code"], put("code", 13, lambda v: v.replace("-", "/"))),
    "broken reference": ("broken reference", ["depot"], put("depot", 11, lambda v: v + 100)),
    "inconsistent pair of times": ("inconsistent pair", ["start", "stop"], swap("start", "stop", 9)),
    "inconsistent total": ("inconsistent pair", ["total", "price", "tip"], put("total", 8, lambda v: v + 2)),
    "stale": ("stale", ["start"], put("start", 7, lambda v: v - pd.Timedelta("900 days"))),
    "swapped numbers": ("swapped columns", ["lat", "lon"], swap("lat", "lon", 10)),
    "swapped labels": ("swapped columns", ["city", "country"], swap("city", "country", 12)),
    "metres for kilometres": ("unit mix", ["km"], put("km", 21, lambda v: v * 1000)),
    "cents for dollars": ("unit mix", ["km"], put("km", 16, lambda v: v * 100)),
    "constant run": ("constant run", ["temp"], hang),
    "sentinel 999": ("sentinel value", ["score"], put("score", 15, lambda v: 999)),
    "sentinel -1": ("sentinel value", ["score"], put("score", 9, lambda v: -1)),
    "sentinel 1900-01-01": ("sentinel value", ["stop"], put("stop", 13, lambda v: pd.Timestamp("1900-01-01"))),
    "truncated": ("truncated text", ["text"], cut),
    "encoding": ("encoding", ["city"], lambda f: put("city", 18, garbled)(f) and int((f["city"].str.contains("Ã")).sum())),
    "impossible date": ("impossible date", ["day"], put("day", 14, lambda v: "2023-02-30")),
}


def table(frame):
    "The frame as a DuckDB table, with a table of depots beside it."
    con = connect(memory="500MB", threads=1)
    con.register("frame", frame.dropna(how="all"))
    con.execute("create table raw as select * from frame order by row_id")
    con.execute("create table depots as select range as id, 'depot ' || range as name from range(1, 41)")
    return con


def found(con): return find_defects(con, "raw", ["depots"], "start").found


@pytest.mark.parametrize("seed", range(3))
def test_clean_rows_raise_no_alarm(seed): assert found(table(clean(seed))) == []


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_defect_is_named_and_counted(name):
    defect, columns, plant = PLANTED[name]
    frame = clean()
    k = plant(frame)
    got = found(table(frame))
    here = [d for d in got if d["defect"] == defect and (columns is None or d["columns"] == columns)]
    assert here and here[0]["rows"] == k, [(d["defect"], d["columns"], d["rows"]) for d in got]
    others = [(d["defect"], d["columns"], d["rows"]) for d in got if d is not here[0]]
    assert all(set(o[1]) & set(columns or here[0]["columns"]) for o in others) and len(others) <= 2, others  # what else is said is about the same columns


def test_all_at_once():
    "Many kinds in one table: each is still there under its name, with the right count."
    frame, want = clean(), {}
    for name in ("missing, in words", "wrong format", "broken reference", "metres for kilometres", "constant run", "sentinel 999", "swapped numbers", "impossible date", "inconsistent total", "wrong type"):
        defect, columns, plant = PLANTED[name]
        want[defect, tuple(columns)] = plant(frame)
    got = {(d["defect"], tuple(d["columns"])): d["rows"] for d in found(table(frame))}
    assert {k: got.get(k) for k in want} == want


def suggested(con, table="raw"): return yaml.safe_load(suggest_rules(con, table, ["depots"], "start"))["quality"]["rules"]


def test_suggestions_hold_on_clean_rows_seen_and_unseen():
    con = table(clean())
    rules = suggested(con)
    text = suggest_rules(con, "raw", ["depots"], "start")
    assert text == suggest_rules(con, "raw", ["depots"], "start") and "left out" not in text
    kinds = {next(f for f in ("range", "in", "matches", "type", "order", "equals", "fresh", "unique", "complete") if f in r) for r in rules}
    assert kinds == {"range", "in", "matches", "type", "order", "equals", "fresh", "unique", "complete"}
    assert {"table": "depots", "column": "id"} in [r.get("in") for r in rules]
    for seed in range(3):
        other = table(clean(seed))
        read = read_rules(rules, "km", "DOUBLE")
        bind_rules(other, read, "raw")
        rows, counts = count_rules(other, read, "raw")
        assert sum(c["broken"] for c in counts) <= (0 if seed == 0 else 3), [c for c in counts if c["broken"]]


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in PLANTED if n not in ("exact duplicates", "near duplicates")])
def test_suggestions_catch_what_was_planted(name):
    "The pasted text breaks on the planted rows, whatever they are; it is portable and the books balance."
    frame = clean()
    k = PLANTED[name][2](frame)
    con = table(frame)
    rules = read_rules(suggested(con), "load", "DOUBLE")
    check_portable(judge_sql(con, rules, "raw", "quarantine"))
    rows, counts = count_rules(con, rules, "raw", "quarantine")
    parts = [con.execute(f"select count(*) from ({q})").fetchone()[0] for q in part_queries(con, rules, "raw", "quarantine")]
    assert rows == sum(parts) and sum(c["quarantined"] for c in counts) == parts[1]
    if name.startswith("swapped labels"): k = min(k, 1)
    assert max(c["broken"] for c in counts) >= k, counts


def test_score_falls_where_the_dirt_is():
    frame = clean()
    frame.loc[300:330, "load"] = -1000.0
    con = table(frame)
    rules = read_rules([{"column": "load", "range": [0, 1000]}], "km", "DOUBLE")
    parts = tally(con, rules, "raw", "keep", "cast(start as DATE)")
    assert sum_up(parts) == sum_up(tally(con, rules, "raw", "keep"))
    dirty = {str(p["period"]) for p in parts if p["counts"][1][0]}
    assert dirty == set(frame["start"].iloc[300:331].dt.strftime("%Y-%m-%d"))


def test_same_rows_fail_in_pandera():
    if not importlib.util.find_spec("pandera"): pytest.skip("pandera is not installed")
    frame = clean()
    for name in ("missing, in words", "wrong format", "broken reference", "metres for kilometres", "inconsistent pair of times", "out of range, a negative amount"): PLANTED[name][2](frame)
    con = table(frame)
    types = {r[0]: r[1] for r in con.execute("describe raw").fetchall()}
    rules = [r for r in suggested(con) if "repair" not in r]
    rules += [{"name": "dear and far", "check": "km > 10", "when": "price > 20"}, {"name": "paid", "column": "payment", "in": ["card", "cash"]}]
    can = [r for i, r in enumerate(rules) if pandera_check(read_rule(r, i), r, types)[1]]
    assert len(can) == len(rules)
    got = pandera_failures(rules, types, con.execute("select * from raw order by row_id").df(), {"depots": con.execute("select * from depots").df()})
    want = {}
    for r in rules:
        bad = con.execute(f'select row_id from ({judge_sql(con, [read_rule(r, 0)], "raw", "ignore")}) where "slml hit 0" order by 1').fetchall()
        if bad: want[r["name"]] = [b[0] for b in bad]
    assert got == want and len(want) >= 5


FORMS = [{"complete": ["code", "depot"]}, {"unique": "code"}, {"column": "km", "range": [10, 40]}, {"column": "code", "matches": "[A-C][XYZ]-[0-9]+"}, {"column": "day", "type": "DATE"},
         {"column": "payment", "in": ["card", "cash"]}, {"column": "depot", "in": {"table": "depots", "column": "id"}}, {"order": ["start", "stop"]}, {"column": "total", "equals": "price + tip", "within": 0.01},
         {"column": "note", "equals": {"table": "depots", "column": "name", "on": {"depot": "id"}}}, {"column": "start", "fresh": "10 days"}, {"column": "start", "fresh": "2 weeks", "of": "2024-03-20"},
         {"column": "temp", "stuck": 5, "by": "start"}, {"check": "load < 550 or price > 20", "when": "depot < 20"}, {"check": "payment <> 'voucher'", "name": "no vouchers", "repair": {"payment": "'card'"}}]


@pytest.mark.slow
def test_the_same_text_judges_the_same_on_spark():
    to_spark = getattr(importlib.import_module("slml_nb.dialect"), "to_spark", None)
    if not to_spark or not importlib.util.find_spec("pyspark"): pytest.skip("needs pyspark, and the dialect's translation")
    frame = clean().head(400)
    for name in ("missing, in words", "broken reference", "inconsistent pair of times"):
        full = clean()
        PLANTED[name][2](full)
        for c in PLANTED[name][1]: frame[c] = full[c].head(400)
    frame.loc[100:106, "temp"] = 4.4
    con = table(pd.concat([frame, frame.tail(5).assign(row_id=range(400, 405))]))
    rules = read_rules([r | {"action": "warn"} if "repair" not in r and i % 3 == 0 else r for i, r in enumerate(FORMS)], "km", "DOUBLE")
    bind_rules(con, rules, "raw")
    query = f"select * from ({judge_sql(con, rules, 'raw', 'quarantine')}) as judged order by row_id"
    want = con.execute(query).df()
    from pyspark.sql import SparkSession
    spark = SparkSession.builder.master("local[1]").config("spark.ui.enabled", "false").config("spark.sql.shuffle.partitions", "1").config("spark.sql.session.timeZone", "UTC").getOrCreate()
    try:
        import tempfile
        with tempfile.TemporaryDirectory() as folder:
            for t in ("raw", "depots"):
                con.execute(f"copy {t} to '{folder}/{t}.parquet' (format parquet)")
                spark.read.parquet(f"{folder}/{t}.parquet").createOrReplaceTempView(t)
            rows = spark.sql(to_spark(query, con)).collect()
    finally: spark.stop()
    flags = [c for c in want.columns if c.startswith("slml")] + ["payment"]
    assert len(rows) == len(want) == 405
    for c in flags:
        mine = [None if v != v else v for v in want[c].astype(object)]
        assert [r[c] for r in rows] == mine, c
    assert want["slml rule"].notna().sum() > 100


def test_the_books_balance_whatever_the_rules():
    "Random tables, random rules of every spelling and action: each row is in exactly one part, and the counts agree with the parts."
    from hypothesis import given, settings, strategies as st
    small, con = st.none() | st.integers(-1, 3), connect(memory="200MB", threads=1)
    con.execute("create table known as select * from (values (0, 'a'), (1, 'b')) t(id, name)")
    forms = [{"complete": ["a", "b"]}, {"unique": "a"}, {"unique": ["a", "b"], "when": "y > 0"}, {"column": "a", "range": [0, None]}, {"column": "b", "in": [1, 2]}, {"order": ["a", "b"]},
             {"column": "a", "in": {"table": "known", "column": "id"}}, {"column": "b", "stuck": 2}, {"column": "y", "equals": "a + b", "within": 1},
             {"column": "a", "equals": {"table": "known", "column": "id", "on": {"b": "id"}}}, {"check": "a <> 1", "repair": {"a": "a - b"}}]
    rule = st.tuples(st.integers(0, len(forms) - 1), st.sampled_from(["quarantine", "warn", "stop"]))

    @settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @given(st.lists(st.tuples(small, small, small), max_size=10), st.lists(rule, max_size=4, unique_by=lambda r: r[0]), st.sampled_from(["keep", "quarantine", "ignore"]))
    def law(rows, chosen, duplicates):
        con.execute("create or replace table t (row_id BIGINT, source VARCHAR, a INTEGER, b INTEGER, y INTEGER)")
        if rows: con.executemany("insert into t values (?, 's', ?, ?, ?)", [(i, *r) for i, r in enumerate(rows)])
        rules = read_rules([{**forms[i], **({} if "repair" in forms[i] else {"action": a})} for i, a in chosen], "y", "INTEGER")
        bind_rules(con, rules, "t")
        n, counts = count_rules(con, rules, "t", duplicates)
        good, bad = [con.execute(q).fetchall() for q in part_queries(con, rules, "t", duplicates)]
        assert n == len(rows) and sorted(r[0] for r in good + bad) == list(range(n))
        assert {c["rule"]: c["quarantined"] for c in counts if c["quarantined"]} == dict(pd.Series([r[-1] for r in bad], dtype=object).value_counts())
        assert all(c["quarantined"] + c["repaired"] <= c["broken"] for c in counts)

    law()


@pytest.mark.slow
def test_every_line_of_a_file_is_accounted_for(project):
    "Rows in = clean + quarantine + rejects, from the file to the tables; the suggested text runs when it is pasted."
    good = [f"{i},{i % 37 + 3}.5,{['red', 'blue'][i % 2]}" for i in range(400)]
    bad = ["7,8", "1,2,3,4,5"]
    project.write("rows.csv", "\n".join(["n,price,colour", *good[:200], *bad, "900,-5.5,green", *good[200:]]) + "\n")
    head = "project: books\nframe: {decision: d, target: price, task: regression, metric: mae, time: '', known_later: [], rule_today: '10'}\ningest: {sources: [rows.csv]}\n"
    project.write("params/books.yaml", head + "quality: {rules: [{column: price, range: [0, null]}]}\n")

    def part(name):
        code, record = project.run("params/books.yaml", "--to", "quality")
        assert code == 0, record
        (file,) = sorted((project.folder / "runs").glob("books/*/run.json"), key=lambda p: p.stat().st_mtime_ns)[-1:]
        from slml_nb.stage import artifact_path, made_in
        return {n: (r["rows"] if r["kind"] == "table" else artifact_path(r)) for n, r in made_in(file.parent).items() if n in name}

    got = part({"raw", "rejects", "clean", "quarantine", "suggested_rules"})
    assert (got["rejects"], got["raw"], got["clean"], got["quarantine"]) == (2, 401, 400, 1)
    project.write("params/books.yaml", head + got["suggested_rules"].read_text())
    again = part({"clean", "quarantine", "rejects"})
    assert again["clean"] + again["quarantine"] + again["rejects"] == 403
