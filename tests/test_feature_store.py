"""The feature store against plain loops, dying processes, a stubborn DynamoDB and many threads."""
import json, os, random, signal, subprocess, sys, tempfile, threading, time
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from slml_nb.core import SlmlError
from slml_nb.feature_store import (View, bind, definition, events_sql, historical_features, make_events, materialize, online_events, push, read_feature, read_views)
from slml_nb.online import SECOND, DynamoEvents, Event, OnlineStore, features_at
from slml_nb.sql import connect, to_parquet

HOUR = 3600 * SECOND
TEXTS = {"n": "count(*) over 5 hours", "e": "count(x) over 2 hours", "kinds": "count(distinct s) over 5 hours", "total": "sum(x) over 5 hours", "mean": "avg(x) over 5 hours", "low": "min(x) over 2 hours",
         "top": "max(s) over 5 hours", "spread": "stddev(x) over 5 hours", "whole": "sum(i) over 5 hours", "x0": "x", "k1": "s", "h": "last(i, 2)", "m": "last(x, 3)"}  # some are names that the SQL uses itself


@pytest.fixture(scope="module")
def con(): return connect("500MB", 2)


def view_of(con, rows, keys=None, **shape):
    "A view over rows (a, b, h, k, x, s, i)."
    con.execute("create or replace table things (a BIGINT, b VARCHAR, h BIGINT, k BIGINT, x DOUBLE, s VARCHAR, i BIGINT)")
    if rows: con.executemany("insert into things values (?, ?, ?, ?, ?, ?, ?)", [list(r) for r in rows])
    texts = shape.pop("texts", TEXTS)
    view = View("things", "thing", {"a": "a", "b": "b"}, {"a": "BIGINT", "b": "VARCHAR"}, "things", "make_timestamp(h)", [read_feature(n, t, "") for n, t in texts.items()], **shape)
    make_events(con, bind(con, view, "from things"), "from things")
    return view


def loop(view, rows, a, b, moment):
    "Every feature by a loop over everything, written without a look at the code under test."
    import statistics
    from fractions import Fraction
    if a is None or b is None or moment is None: return [None] * len(view.features)
    seen = []
    for ra, rb, h, k, x, s, i in rows:
        if (ra, rb) != (a, b) or h is None or (view.known and k is None): continue
        since = (max(h, k) if view.known else h) + (view.delay or 0)
        if since < moment or (view.inclusive and since == moment): seen.append(dict(h=h, since=since, x=x, s=s, i=i))
    reads = list(dict.fromkeys(f["expression"].strip('"') for f in view.features if f["expression"]))
    order = lambda e: (e["h"], e["since"], *((e[c] is None, e[c] if e[c] is not None else 0) for c in reads))
    latest = sorted(seen, key=order, reverse=True)
    out = []
    for f in view.features:
        c = f["expression"].strip('"')
        if not f["aggregate"]:
            e = latest[f["nth"] - 1] if len(latest) >= f["nth"] else None
            out.append(None if e is None or (view.ttl and moment - e["h"] > view.ttl) else e[c])
            continue
        inside = [e for e in seen if (moment - f["width"] < e["h"] <= moment if view.inclusive else moment - f["width"] <= e["h"] < moment)]
        v = [e[c] for e in inside if e[c] is not None] if c else inside
        exact = float(sum(map(Fraction, v))) if f["aggregate"] in ("sum", "avg") else None
        out.append({"count": lambda: len(v), "count_distinct": lambda: len(set(v)), "sum": lambda: exact if v else None, "avg": lambda: exact / len(v) if v else None, "min": lambda: min(v, default=None),
                    "max": lambda: max(v, default=None), "stddev": lambda: statistics.stdev(v) if len(v) > 1 else None}[f["aggregate"]]())
    return out


def alike(a, b): return a == b or (isinstance(a, float) and isinstance(b, float) and abs(a - b) <= 1e-9 * max(1, abs(a), abs(b)))
def all_alike(got, want): assert len(got) == len(want) and all(map(alike, got, want)), (got, want)


hours, maybe = st.integers(-3, 14), lambda s: st.none() | s
row = st.tuples(st.sampled_from([None, 0, 1, 1]), st.sampled_from(["u", "u", "é", None]), maybe(hours.map(lambda h: h * HOUR)), maybe(hours.map(lambda h: h * HOUR)),
                maybe(st.sampled_from([0.1, 0.2, -0.3, 1e-9, 12.35]) | st.floats(-1e6, 1e6)), maybe(st.sampled_from(["", "a", "b", "ü"])), maybe(st.integers(-2**40, 2**40)))
asked = st.tuples(st.sampled_from([None, 0, 1, 2]), st.sampled_from(["u", "é", None]), maybe(hours.map(lambda h: h * HOUR) | st.integers(-3 * HOUR, 14 * HOUR)))
shape = st.fixed_dictionaries({"known": st.sampled_from(["", "make_timestamp(k)"]), "delay": st.sampled_from([None, 0, HOUR]), "ttl": st.sampled_from([0, 3 * HOUR]), "inclusive": st.booleans()})


def rows_sql(questions):
    one = lambda a, b, m: f"select {'NULL' if a is None else a}::BIGINT as a, {'NULL' if b is None else repr(b)}::VARCHAR as b, make_timestamp({'NULL' if m is None else m}::BIGINT) as moment"
    return " union all ".join(one(*q) for q in questions)


def test_the_join_is_a_loop_over_the_past(con):
    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(st.lists(row, max_size=25), st.lists(asked, min_size=1, max_size=8), shape)
    def law(rows, questions, how):
        view = view_of(con, rows, **how)
        got = historical_features(con, rows_sql(questions), [view], "moment").fetchall()
        assert len(got) == len(questions)
        for g, q in zip(got, questions):
            assert (g[0], g[1]) == q[:2]  # the same rows, in their order
            all_alike(g[3:], loop(view, rows, *q))
    law()


def online_is_offline(con, fresh_store, examples):
    @settings(max_examples=examples, deadline=None, derandomize=True)
    @given(st.lists(row, max_size=20), hours, st.integers(0, 4), shape, st.randoms(use_true_random=False))
    def law(rows, until, later, how, chance):
        rows = [r for r in rows if None not in (r[0], r[1], r[2])]
        view, store = view_of(con, rows, **how), fresh_store()
        until, keys = until * HOUR, [(a, b) for a in (0, 1, 2) for b in ("u", "é")]
        def compare(moment):
            offline = historical_features(con, rows_sql([(*k, moment) for k in keys]), [view], "moment").fetchall()
            online = store.online_features([dict(zip("ab", k)) for k in keys], moment=moment)
            for a, b in zip(online, offline): all_alike(list(a.values()), list(b[3:]))
        materialize(con, store, [view], until)
        compare(until)
        before = {json.dumps(k): store.events.read(definition(view), json.dumps(list(k), ensure_ascii=False, separators=(",", ":")), until) for k in keys}
        materialize(con, store, [view], until)  # once more: nothing changes
        assert before == {json.dumps(k): store.events.read(definition(view), json.dumps(list(k), ensure_ascii=False, separators=(",", ":")), until) for k in keys}
        table, x = con.execute('select *, row_number() over () as n from "events things"').fetchall(), len(view.columns)
        news = [r for r in table if r[3] > until]
        for r in chance.sample(news, len(news)) * 2:  # in any order, each twice
            store.push_event("things", dict(zip("ab", r)), r[2], r[3], r[4:4 + x], f"e{r[-1]}")
        compare(until + later * HOUR)
        materialize(con, store, [view], until + later * HOUR)  # what was pushed makes way
        compare(until + later * HOUR), compare(until + (later + 2) * HOUR if len([r for r in table if r[3] > until + later * HOUR]) == 0 else until + later * HOUR)
    law()


def test_online_is_offline_in_a_file(con, tmp_path):
    n = iter(range(10_000))
    online_is_offline(con, lambda: OnlineStore(tmp_path / f"{next(n)}.db"), 30)


@pytest.fixture
def dynamo(monkeypatch):
    from moto import mock_aws
    for k, v in dict(AWS_ACCESS_KEY_ID="test", AWS_SECRET_ACCESS_KEY="test", AWS_DEFAULT_REGION="us-east-1").items(): monkeypatch.setenv(k, v)
    with mock_aws(): yield iter(f"dynamodb://t{i}" for i in range(10_000))


def test_online_is_offline_in_dynamodb(con, dynamo): online_is_offline(con, lambda: OnlineStore(next(dynamo), create=True), 10)


def many(con, n=4000, **shape):
    rng = random.Random(7)
    return view_of(con, [(rng.randrange(20), "u", h := rng.randrange(100) * HOUR, h + rng.randrange(5) * HOUR, 1.0, rng.choice("ab"), 1) for _ in range(n)], **shape)


def content(store):
    db = store.events.db
    return [db.execute(f"select * from {t} order by 1, 2, 3, 4, 5, 6" if t == "events" else f"select * from {t}").fetchall() for t in ("events", "views")]


KILLED = """
import sys
from slml_nb.online import Event, OnlineStore
view, store = {view}, OnlineStore(sys.argv[1])
def events():
    for i in range(30_000):
        if i == {at}: print("now", flush=True); import time; time.sleep(30)
        yield f'["{{i % 50}}"]', Event(i, i, (1.0,), str(i))
print(store.events.replace(view, events(), 30_000, 30_000))
"""
SMALL = {"name": "v", "keys": {"k": "VARCHAR"}, "inclusive": False, "ttl": 0, "fresh": 0, "lags": 1, "horizon": 40_000, "arrivals": False,
         "features": [{"name": "n", "aggregate": "count", "value": None, "nth": 0, "width": 40_000, "type": "BIGINT"}, {"name": "s", "aggregate": "sum", "value": 0, "nth": 0, "width": 40_000, "type": "DOUBLE"}]}


def test_killed_in_the_middle_and_run_again(tmp_path):
    old = OnlineStore(tmp_path / "killed.db")
    old.events.replace(SMALL, [('["1"]', Event(5, 5, (2.0,), "old"))], 10, 10)
    before, code = content(old), lambda at: KILLED.format(view=repr(SMALL), at=at)
    for at in (1, 15_000, 29_999):
        p = subprocess.Popen([sys.executable, "-c", code(at), str(tmp_path / "killed.db")], stdout=subprocess.PIPE, text=True)
        assert p.stdout.readline() == "now\n"
        assert content(old) == before and old.look("v", {"k": "1"}, 20)["values"]["n"] == 1  # read while it is written: the state before
        p.send_signal(signal.SIGKILL), p.wait()
        assert content(old) == before
    for name in ("killed.db", "whole.db"): subprocess.run([sys.executable, "-c", code(-1), str(tmp_path / name)], check=True, stdout=subprocess.DEVNULL)
    assert content(old) == content(OnlineStore(tmp_path / "whole.db")) and len(content(old)[0]) == 30_000


def test_dynamodb_killed_in_the_middle_and_run_again(con, dynamo, monkeypatch):
    view, places = many(con, 600, known="make_timestamp(k)", texts={"n": "count(*) over 9 hours", "x": "x"}), [next(dynamo), next(dynamo)]
    send, n = DynamoEvents._send, iter(range(1000))
    def dies(self, requests):
        if next(n) == 1: raise KeyboardInterrupt
        return send(self, requests)
    killed, whole = (OnlineStore(p, create=True) for p in places)
    monkeypatch.setattr(DynamoEvents, "_send", dies)
    with pytest.raises(KeyboardInterrupt): materialize(con, killed, [view], 90 * HOUR)
    assert killed.events.views() == {}  # nobody is told of half a view
    monkeypatch.setattr(DynamoEvents, "_send", send)
    for store in (killed, whole): materialize(con, store, [view], 90 * HOUR)
    items = lambda s: sorted((json.dumps(i, sort_keys=True) for i in s.events.client.scan(TableName=s.events.table)["Items"]))
    assert items(killed) == items(whole)
    assert materialize(con, whole, [view], 90 * HOUR)[0]["written"] == 0  # all of it arrived before: nothing is sent again
    assert 0 < materialize(con, whole, [view], 91 * HOUR)[0]["written"] < 60


def test_dynamodb_sends_again_what_was_not_processed(dynamo, monkeypatch):
    store = OnlineStore(next(dynamo), create=True)
    client, real, calls = store.events.client, store.events.client.batch_write_item, []
    def half(RequestItems):
        (table, requests), = RequestItems.items()
        calls.append(len(requests))
        real(RequestItems={table: requests[:len(requests) // 2 or 1]})
        return {"UnprocessedItems": {table: requests[len(requests) // 2 or 1:]} if len(requests) > 1 else {}}
    monkeypatch.setattr(client, "batch_write_item", half), monkeypatch.setattr(time, "sleep", lambda s: None)
    store.events.replace(SMALL, [('["1"]', Event(i, i, (1.0,), str(i))) for i in range(60)], 60, 60)
    assert store.look("v", {"k": "1"}, 61)["values"] == {"n": 60, "s": 60.0} and len(calls) > 3
    monkeypatch.setattr(client, "batch_write_item", lambda RequestItems: {"UnprocessedItems": RequestItems})
    with pytest.raises(SlmlError, match="unprocessed 10 times.*on-demand"): store.events.replace(SMALL, [('["1"]', Event(99, 99, (1.0,), "x"))], 100, 100)


def test_dynamodb_keeps_the_newer_one(dynamo):
    store = OnlineStore(next(dynamo), create=True)
    put = lambda h, until: store.events._put_latest(SMALL, '["1"]', [Event(h, h, (1.0,), "x")], until)
    assert [put(5, 50), put(4, 40), put(5, 50), put(6, 60)] == [True, False, True, True]
    with pytest.raises(SlmlError, match="create=True"): OnlineStore("dynamodb://nowhere").look("v", {})


def test_readers_see_one_state_or_the_other(tmp_path):
    store, wrong, over = OnlineStore(tmp_path / "o.db"), [], threading.Event()
    store.events.replace(SMALL, [('["1"]', Event(1, 1, (1.0,), "0"))], 1, 1)
    def reads():
        mine = OnlineStore(tmp_path / "o.db")
        while not over.is_set():
            v = mine.look("v", {"k": "1"}, 30_000)["values"]
            if v["n"] not in (1, 100, 200) or v["s"] != v["n"]: wrong.append(v)
    threads = [threading.Thread(target=reads) for _ in range(3)]
    for t in threads: t.start()
    for until in range(2, 22): store.events.replace(SMALL, [('["1"]', Event(i, i, (1.0,), str(i))) for i in range(100 * (1 + until % 2))], until, until)
    over.set()
    for t in threads: t.join()
    assert not wrong


def test_many_writers_push_at_once(tmp_path):
    store = OnlineStore(tmp_path / "o.db")
    store.events.replace(SMALL, [], 0, 0)
    def pushes(part):
        mine = OnlineStore(tmp_path / "o.db")
        for i in range(40): mine.push_event("v", {"k": "1"}, 1 + i, 1 + i, [1.0], f"{part}-{i}")
    threads = [threading.Thread(target=pushes, args=[p]) for p in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert store.look("v", {"k": "1"}, 100)["values"] == {"n": 160, "s": 160.0}


def test_any_number_of_threads_gives_the_same_bytes(tmp_path):
    files = []
    for threads in (1, 2, 4):
        con = connect("1GB", threads)
        con.execute("create table things as select (hash(i) % 5)::BIGINT as a, 'u' as b, (hash(i, 1) % 3000)::BIGINT * 60000000 as h, h + (hash(i, 2) % 100)::BIGINT * 60000000 as k, "
                    "(hash(i, 3) % 100000)::DOUBLE / 1000 as x, 's' || hash(i, 4) % 9 as s, (hash(i, 5) % 1000)::BIGINT as i from range(30000) t(i)")
        for known in ("", "make_timestamp(k)"):
            view = View("things", "thing", {"a": "a"}, {"a": "BIGINT"}, "things", "make_timestamp(h)", [read_feature(n, t, "") for n, t in TEXTS.items()], known=known)
            make_events(con, bind(con, view, "from things"), "from things")
            rows = "select i as id, (hash(i) % 7)::BIGINT as a, make_timestamp((hash(i, 9) % 3000)::BIGINT * 60000000) as moment from range(3000) t(i)"
            out = tmp_path / f"{threads}{bool(known)}.parquet"
            to_parquet(con, historical_features(con, rows, [view], "moment").sql_query(), out)
            files.append((bool(known), out.read_bytes()))
    assert len(set(files)) == 2


def test_a_moment_with_a_zone_is_the_same_moment(con):
    view = view_of(con, [(1, "u", 10 * HOUR, 10 * HOUR, 1.0, "a", 1)])
    ask = lambda m: historical_features(con, f"select 1 as a, 'u' as b, {m} as moment", [view], "moment").fetchall()[0][3:]
    assert ask("timestamptz '1970-01-01 12:30+02'")[0] == ask("timestamp '1970-01-01 10:30'")[0] == 1
    assert ask("timestamptz '1970-01-01 11:30+02'")[0] == ask("timestamp '1970-01-01 09:30'")[0] == 0


def test_push_goes_through_the_views_own_sql(con, tmp_path):
    spec = {"rides": {"entity": "driver", "source": "rides", "keys": {"driver": "who"}, "time": "pickup", "known": "pickup + minutes * INTERVAL 1 MINUTE", "zone": "America/New_York", "where": "fare > 0",
                      "features": {"fares": "sum(round(fare * 1.1, 2)) over 1 day", "area": "upper(zone)"}}}
    con.execute("create or replace table rides as select 7 as who, timestamp '2024-05-01 08:00' as pickup, 5 as minutes, 10.0 as fare, 'bronx' as zone where false")
    view = bind(con, read_views({"driver": {"driver": "BIGINT"}}, spec)[0], "from rides")
    make_events(con, view, "from rides")
    store = OnlineStore(tmp_path / "o.db")
    materialize(con, store, [view])
    assert push(store, view, {"who": 7, "pickup": "2024-05-01T08:00", "minutes": 5, "fare": 10.0, "zone": "bronx"})
    assert not push(store, view, {"who": 7, "pickup": "2024-05-01T08:00", "minutes": 5, "fare": -1, "zone": "bronx"})
    at = lambda m: store.look("rides", {"driver": 7}, m)["values"]
    assert at("2024-05-01T12:05:00") == {"fares": None, "area": None} and at("2024-05-01T12:05:00.000001") == {"fares": 11.0, "area": "BRONX"}


def test_a_store_that_is_none(tmp_path):
    (tmp_path / "text.db").write_text("no database " * 100)
    with pytest.raises(SlmlError, match="is it a SQLite file"): OnlineStore(tmp_path / "text.db")
    with pytest.raises(SlmlError, match="no kind of online store"): OnlineStore("redis://x")


def test_a_service_needs_neither_duckdb_nor_pandas(tmp_path):
    store = OnlineStore(tmp_path / "o.db")
    store.events.replace(SMALL, [('["1"]', Event(5, 5, (2.0,), "old"))], 10, 10)
    code = f"import sys; from slml_nb.online import OnlineStore; print(OnlineStore({str(tmp_path / 'o.db')!r}).fill({{'k': 1}}, 20)); print(sorted({{'duckdb', 'pandas', 'boto3', 'numpy'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "{'n': 1, 's': 2.0, 'k': 1}\n[]\n"


def test_as_a_stage(project):
    lines = [f"2024-05-{1 + i // 24:02} {i % 24:02}:00,{'AB'[i % 2]},{i},{i % 7}" for i in range(240)]
    project.write("data.csv", "at,shop,sold,staff\n" + "\n".join(lines) + "\n")
    views = {"sales": {"entity": "shop", "source": "clean", "time": "at", "delay": "1 hour", "features": {"sold_6h": "sum(sold) over 6 hours", "sold_last": "sold"}}}
    connect().execute(f"copy (select 'A' as shop, timestamp '2024-05-01' + i * interval 1 day as day, i as staff_plan from range(9) t(i)) to '{project.folder}/plan_1.parquet'")
    views["plans"] = {"entity": "shop", "source": "plans", "time": "day", "inclusive": True, "features": {"planned": "staff_plan"}}
    sets = {"project": "shops", "frame": {"target": "sold", "task": "regression", "metric": "mae", "time": "at", "known_later": []}, "ingest": {"sources": ["data.csv"]},
            "feature_store": {"entities": {"shop": {"shop": "VARCHAR"}}, "views": views, "online": "online.db", "sources": {"plans": "plan_*.parquet"}}}
    project.write("params/shops.yaml", json.dumps(sets))
    code, done = project.run("params/shops.yaml", "--to", "feature_store")
    assert code == 0, done
    history, = (project.folder / "runs/.store").rglob("history.parquet")
    got = connect().execute("select sold_6h, sold_last from read_parquet(?) order by row_id", [str(history)]).fetchall()
    assert got[:4] == [(None, None), (None, None), (0.0, 0), (1.0, 1)] and got[100] == (98 + 96 + 94, 98)
    assert (project.folder / "online.db").exists()
    connect().execute(f"copy (select 'B' as shop, timestamp '2024-05-01' as day, 7 as staff_plan) to '{project.folder}/plan_2.parquet'")
    code, done = project.run("params/shops.yaml", "--to", "feature_store")  # a file came: it is seen
    planned = [connect().execute("select planned from read_parquet(?) order by row_id", [str(h)]).fetchall()[:2] for h in sorted((project.folder / "runs/.store").rglob("history.parquet"), key=os.path.getmtime)]
    assert code == 0 and planned == [[(0,), (None,)], [(0,), (7,)]]
    del views["sales"]["delay"]
    project.write("params/leak.yaml", json.dumps({**sets, "project": "leak"}))
    code, out, err = project.slml("run", "params/leak.yaml", "--to", "feature_store")
    assert code and "'sold' is only known some time after the event" in out + err


def test_a_service_asks_the_store_for_what_a_request_leaves_out(project, monkeypatch):
    rng, level, lines = random.Random(3), {"A": 20.0, "B": 60.0}, []
    for i in range(600):
        shop = "AB"[i % 2]
        level[shop] += rng.gauss(0, 4)  # what a shop sells is what it sold an hour ago, and a little more or less
        lines.append(f"2024-05-{1 + i // 48:02} {i // 2 % 24:02}:00,{shop},{level[shop]:.1f},{rng.randrange(5)}")
    project.write("data.csv", "at,shop,sold,staff\n" + "\n".join(lines) + "\n")
    views = {"sales": {"entity": "shop", "source": "clean", "time": "at", "known": "\"at\" + INTERVAL 30 MINUTE", "features": {"sold_6h": "avg(sold) over 6 hours", "sold_last": "sold"}}}
    sets = {"project": "shops", "frame": {"target": "sold", "task": "regression", "metric": "mae", "time": "at", "known_later": []}, "ingest": {"sources": ["data.csv"]},
            "feature_store": {"entities": {"shop": {"shop": "VARCHAR"}}, "views": views, "online": "online.db"}, "features": {"ablation": False, "drop": ["shop"]}, "baseline": {"rule_leaves": 0}}
    project.write("params/shops.yaml", json.dumps(sets))
    code, out, err = project.slml("run", "params/shops.yaml", "--to", "package")
    assert code in (0, 3), out + err
    from slml_nb.package import load_package
    from slml_nb.serve import answer, lambda_handler
    folder, store = next((project.folder / "runs/.store").rglob("manifest.json")).parent, str(project.folder / "online.db")
    alone, asking = load_package(folder), load_package(folder, store)
    fields = {f["name"]: f for f in json.loads((folder / "signature.json").read_text())["inputs"]}
    assert "view 'sales' by shop" in fields["sold_last"]["missing"] and not fields["sold_last"]["required"] and not fields["shop"]["required"]
    for shop, staff in (("A", 2), ("B", 4)):
        bare = {"shop": shop, "at": "2024-05-13T12:30:00", "staff": staff}
        known = OnlineStore(store).look("sales", bare, bare["at"])["values"]
        assert known["sold_last"] is not None
        full = alone.predict([{**bare, **known}])
        assert asking.predict([bare]) == full == asking.predict([{**bare, **known}]) != alone.predict([bare])
        assert asking.predict([{**bare, "sold_last": 0.0}]) == alone.predict([{**bare, **known, "sold_last": 0.0}])  # what the caller says is believed
    assert asking.predict([{**bare, "shop": "C"}]) == alone.predict([{**bare, "shop": "C"}])  # a key without a past is unknown, not an error
    monkeypatch.setenv("SLML_PACKAGE", str(folder)), monkeypatch.setenv("SLML_ONLINE", store)
    assert lambda_handler()(bare) == full[0]
    def broken(*args): raise SlmlError("the online store says: disk I/O error", store, "look at the disk")
    monkeypatch.setattr("slml_nb.online.OnlineStore.fill", broken)
    status, text, _ = answer(load_package(folder, store), json.dumps(bare).encode())
    assert status == 503 and "disk I/O error" in text
    with pytest.raises(SlmlError, match="no such online store"): load_package(folder, store + "x")
    OnlineStore(project.folder / "other.db").events.replace(SMALL, [], 0, 0)
    with pytest.raises(SlmlError, match="there is no view 'sales'"): load_package(folder, str(project.folder / "other.db"))
