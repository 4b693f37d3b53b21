"""Explore on what notebooks cannot show quickly: odd tables end in a profile, drift is found whatever cuts the table, memory stays bounded."""
import json, subprocess, sys

import pytest
from hypothesis import given, settings, strategies as st

from slml_nb.explore import drift_table, duplicates, findings, ks_chance, look_closer, make_profile, rank_interval
from slml_nb.sql import connect


def closer(con, table, problem, **how):
    profile = make_profile(con, table, problem)
    return profile | look_closer(con, table, problem, profile, **how)


PROBLEM = dict(target="y", task="regression", time="", known_later=[], ignore=[])


@pytest.mark.parametrize("columns", [
    "i * 1.0 as y", "i % 7 as y, null::DOUBLE as nothing", "i % 7 as y, 'x' as same", "i % 7 as y, [i, 2] as pair, {'a': i} as part", "i % 7 as y, 'nan'::DOUBLE as a, 'inf'::DOUBLE as b",
    "i % 7 as y, date '2024-01-01' + (i % 90)::INTEGER as day, time '10:00' as clock", "i % 7 as y, i % 2 = 0 as even, repeat('word ', (i % 30)::INTEGER) as said",
    "i % 7 as y, i / 100.0 as latitude, i / 90.0 as longitude", "i % 7 as \"y\", i as \"say \"\"hi\"\"\", 'it''s' || i % 3 as \"%\""])
@pytest.mark.parametrize("rows", [1, 40, 400])
def test_odd_tables_end_in_a_profile(columns, rows):
    "Whatever the columns hold and however few rows there are, there is a profile, and it is plain JSON."
    con = connect("500MB", 1)
    con.execute(f"create table t as select i as row_id, 'f' || i % 2 as source, {columns} from range({rows + 1}) r(i)")
    profile = closer(con, "t", PROBLEM)
    assert json.loads(json.dumps(profile)) == profile
    assert all(level in ("info", "warn", "alarm") for level, _ in findings(profile))
    assert len(drift_table(con, profile["drift"]).fetchall()) == len(profile["drift"]["lines"])


def test_the_same_rows_give_the_same_profile_in_any_order_and_on_any_threads():
    seen = []
    for threads, order in ((1, "row_id"), (2, "hash(row_id)")):
        con = connect("500MB", threads)
        con.execute(f"""create table t as select * from (select i as row_id, 'f' || i // 40000 as source, hash(i) % 97 as y, hash(i + 1) % 1000 / 7.0 as a, 'v' || hash(i + 2) % 9 as b
            from range(80000) r(i)) order by {order}""")
        seen.append(json.dumps(closer(con, "t", PROBLEM)))
    assert seen[0] == seen[1]


def test_periods_of_a_column_find_what_was_planted():
    con = connect("500MB", 1)
    con.execute("""create table t as select i as row_id, 's' as source, timestamp '2024-01-01' + to_hours(i) as at, i % 5 as y,
        hash(i) % 100 + case when i >= 2184 then 30 else 0 end as moved, hash(i + 1) % 100 as stays, case when i < 2184 or i % 2 = 0 then 1.5 + i % 3 end as holes from range(4368) r(i)""")
    problem = PROBLEM | dict(time="at")
    found = {(l["column"], l["verdict"]) for l in closer(con, "t", problem)["drift"]["lines"] if l["verdict"]}
    assert found == {("moved", "drifts"), ("holes", "fills")}


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.integers(1, 400), st.floats(0.01, 0.99))
def test_ranks_lie_around_the_quantile(n, q):
    low, high = rank_interval(n, q)
    assert (low or 0) <= n * q + 1 and (high or n + 1) >= n * q
    assert ks_chance(0.1, n, n) >= ks_chance(0.2, n, n)


@settings(derandomize=True, deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from("ab")), min_size=1, max_size=30))
def test_repeated_rows_are_counted_as_pandas_counts_them(rows):
    import pandas as pd
    con, frame = connect("500MB", 1), pd.DataFrame(rows, columns=["a", "b"])
    con.register("t", frame)
    assert duplicates(con, "t", ["a", "b"], len(rows))["again"] == int(frame.duplicated().sum())


@pytest.mark.slow
def test_memory_does_not_grow_with_the_table(tmp_path):
    "Four times the rows, about the same peak: everything that sorts or compares works on the sample."
    program = """
import sys
from slml_nb.sql import connect, to_parquet
from slml_nb.explore import make_profile, look_closer
con = connect("1GB", 2)
con.execute(f"create view t as select * from read_parquet('{sys.argv[1]}')")
problem = dict(target="y", task="regression", time="", known_later=[], ignore=[])
profile = make_profile(con, "t", problem)
look_closer(con, "t", problem, profile)
print([int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmHWM')][0])  # ru_maxrss would count the parent before the exec
"""
    peaks = []
    for rows in (2_500_000, 10_000_000):
        con, path = connect("1GB", 2), tmp_path / f"{rows}.parquet"
        con.execute(f"copy (select i as row_id, 'f' || i * 4 // {rows} as source, hash(i) % 97 as y, hash(i + 1) / 1e19 as a, 'v' || hash(i + 2) % 100000 as b from range({rows}) r(i)) to '{path}' (format parquet)")
        con.close()
        peaks.append(int(subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True).stdout))
    assert peaks[1] < 1.3 * peaks[0], peaks
