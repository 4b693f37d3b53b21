"""Target encoding and measured gain, from the tables of a run to the answer for one request."""
import datetime as dt, math

import pytest
from hypothesis import given, settings, strategies as st

from slml_nb.core import SlmlError
from slml_nb.features import Encoding, ablate, choose_features, encode_rows, feature_table, outcomes
from slml_nb.recipe import Feature, FeatureFunction, recheck, write_recipe
from slml_nb.sql import connect

PROBLEM = {"target": "late", "task": "regression", "unit": "minutes", "metric": "mae", "time": "left_at", "known_later": ["landed"], "ignore": ["secret"]}


def flights(con, n=3000, cut=(0.6, 0.8)):
    "Flights of 300 aeroplanes, each with a lateness of its own; `rows` and `splits` by time."
    con.execute(f"""create or replace temp table rows as select i as row_id, 'a' as source, timestamp '2024-01-01' + to_minutes(i * 7) as left_at, 'N' || (i * 7919) % 300 as tail,
        (i * 31) % 4 as gate, case when i % 11 = 0 then null else 'C' || i % 5 end as carrier, ((i * 7919) % 300) / 10.0 + (i * 104729 % 997) / 200.0 as late, 1.0::DOUBLE as landed, 's' as secret from range({n}) t(i)""")
    con.execute(f"create or replace temp table splits as select row_id, case when row_id < {cut[0] * n} then 'train' when row_id < {cut[1] * n} then 'valid' else 'test' end as split from rows")


@pytest.fixture
def con():
    con = connect("500MB", threads=2)
    flights(con)
    return con


def build(con, folder, problem=PROBLEM, **options):
    chosen, notes, joins = choose_features(con, problem, options.pop("features", {}), **options)
    feature_table(con, chosen, problem)
    write_recipe(con, folder, problem, chosen, joins)
    return chosen, notes, FeatureFunction(folder)


def test_a_column_with_too_many_categories_is_encoded_and_serves(con, tmp_path):
    chosen, notes, serve = build(con, tmp_path, max_categories=50)
    assert "tail_target" in [f.name for f in chosen] and "tail" not in [f.name for f in chosen]
    assert any("'tail' has more than 50 distinct texts: encoded by the target, out of fold" in text for _, text in notes)
    assert recheck(con, tmp_path) == 100
    prior, s, n = con.execute("select (select avg(late) from rows join splits using (row_id) where split = 'train'), sum(late), count(*) from rows join splits using (row_id) where split = 'train' and tail = 'N7'").fetchall()[0]
    request = {"tail": "N7", "gate": 1, "left_at": "2024-02-01", "carrier": "C1"}
    assert math.isclose(serve.rows([request])["tail_target"][0], (s + 20 * prior) / (n + 20), rel_tol=1e-12)
    assert math.isclose(serve.rows([{**request, "tail": "never seen"}])["tail_target"][0], prior, rel_tol=1e-12)
    assert not {"landed", "secret", "late"} & {i["name"] for i in serve.inputs}


def test_two_columns_together_with_gaps(con, tmp_path):
    _, _, serve = build(con, tmp_path, encode={"carrier, gate": {"smoothing": 0, "folds": 3}})
    mean = con.execute("select avg(late) from rows join splits using (row_id) where split = 'train' and carrier = 'C2' and gate = 3").fetchall()[0][0]
    prior = con.execute("select avg(late) from rows join splits using (row_id) where split = 'train'").fetchall()[0][0]
    request = {"tail": "N7", "gate": 3, "left_at": "2024-02-01", "carrier": "C2"}
    assert math.isclose(serve.rows([request])["carrier_gate_target"][0], mean, rel_tol=1e-12)
    assert math.isclose(serve.rows([{k: v for k, v in request.items() if k != "carrier"}])["carrier_gate_target"][0], prior, rel_tol=1e-12)
    assert recheck(con, tmp_path) == 100


def test_a_class_of_two_is_the_share_of_the_second(con, tmp_path):
    con.execute("create or replace temp table rows as select * replace (case when late > 20 then 'yes' else 'no' end as late) from rows")
    problem = {**PROBLEM, "task": "classification", "metric": "roc_auc"}
    chosen, _, serve = build(con, tmp_path, problem, encode={"tail": {}})
    share = con.execute("select avg((late = 'yes')::INT) from rows join splits using (row_id) where split = 'train'").fetchall()[0][0]
    assert math.isclose(serve.rows([{"tail": "?", "gate": 3, "left_at": "2024-02-01"}])["tail_target"][0], share, rel_tol=1e-12)
    gains, measured_by = ablate(con, chosen, problem)
    assert measured_by == "log_loss" and next(r for r in gains if r["feature"] == "tail_target")["verdict"] == "helps"


@pytest.mark.parametrize("options", [{}, {"past_only": True}], ids=["out_of_fold", "past_only"])
def test_the_same_bits_on_any_number_of_threads(options):
    def encoded(threads):
        con = connect("500MB", threads=threads)
        flights(con, 20_000)
        encode_rows(con, PROBLEM, [Encoding(["tail"], **options)])
        assert con.sql("select current_setting('threads')").fetchall() == [(threads,)]
        return con.execute("select tail_target from rows order by row_id").fetchall(), con.execute('from "encoding 1"').fetchall()
    assert encoded(1) == encoded(3)


def test_twins_share_a_fold(con):
    con.execute("create or replace temp table rows as select * replace (0 as gate, 'C' as carrier, timestamp '2024-01-01' as left_at) from rows")
    encode_rows(con, PROBLEM, [Encoding(["tail"])])
    assert con.sql('select max(n) from (select count(distinct fold) as n from "encoding rows" group by k0)').fetchall() == [(1,)]


encoded_row = st.tuples(st.sampled_from(["a", "b", "c", None]), st.integers(0, 2), st.integers(0, 8), st.sampled_from(["train", "train", "valid", "test"]), st.floats(-1e9, 1e9) | st.none())


@pytest.mark.slow
@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(encoded_row, min_size=2, max_size=14), st.data(), st.booleans(), st.sampled_from(["regression", "classification"]))
def test_no_row_sees_its_own_target(rows, data, past_only, task):
    "Change one target: its own encoding stays, and where it was not trained on, everything stays."
    con = connect("300MB", threads=1)
    def run(rows):
        con.execute("create or replace temp table rows (row_id BIGINT, source VARCHAR, a VARCHAR, b BIGINT, left_at TIMESTAMP, late DOUBLE, landed DOUBLE, secret VARCHAR)")
        con.execute("create or replace temp table splits (row_id BIGINT, split VARCHAR)")
        for i, (a, b, hour, split, y) in enumerate(rows):
            con.execute("insert into rows values (?, 'f', ?, ?, ?, ?, 0, 'x')", [i, a, b, dt.datetime(2024, 1, 1, hour), y if task == "regression" or y is None else float(y > 0)])
            con.execute("insert into splits values (?, ?)", [i, split])
        measured = outcomes(con, {**PROBLEM, "task": task})[0]  # which classes there are is known to all
        features, _, _ = encode_rows(con, {**PROBLEM, "task": task}, [Encoding(["a", "b"], smoothing=1.5, folds=4, past_only=past_only)])
        values = con.execute(f"select {', '.join(f.sql for f in features)} from rows order by row_id").fetchall()
        assert all(v is not None for row in values for v in row)
        return values, con.execute('from "encoding 1"').fetchall(), measured
    i = data.draw(st.integers(0, len(rows) - 1))
    before, after = run(rows), run([*rows[:i], (*rows[i][:4], data.draw(st.floats(-1e9, 1e9))), *rows[i + 1:]])
    if rows[i][3] != "train": assert before == after
    elif before[2] == after[2]: assert before[0][i] == after[0][i]


@pytest.mark.parametrize("encode, says", [({"tial": {}}, "did you mean 'tail'?"), ({"landed": {}}, "not known yet"), ({"late": {}}, "it is what we predict"), ({"tail": {"fold": 2}}, "did you mean 'folds'?"),
                                          ({"tail": [1]}, "write encode:"), ({"tail": {"smoothing": -1}}, "smoothing: 0 or more")])
def test_what_cannot_be_encoded_says_so(con, encode, says):
    with pytest.raises(SlmlError, match=says.replace("?", r"\?")): choose_features(con, PROBLEM, {}, encode=encode)


def test_a_plan_without_validation_rows_measures_nothing(con):
    con.execute("create or replace temp table splits as select row_id, 'train' as split from rows")
    chosen, _, _ = choose_features(con, PROBLEM, {})
    feature_table(con, chosen, PROBLEM)
    assert ablate(con, chosen, PROBLEM) == ([], "3000 training rows and 0 validation rows are too few")


def test_the_gain_ignores_the_test_split(con):
    chosen, _, _ = choose_features(con, PROBLEM, {}, encode={"tail": {}})
    feature_table(con, chosen, PROBLEM)
    before = ablate(con, chosen, PROBLEM)
    con.execute("update features set target = -1e9, tail_target = 1e9, gate = null where split = 'test'")
    assert ablate(con, chosen, PROBLEM) == before
    con.execute("delete from features where split = 'test'")
    assert ablate(con, chosen, PROBLEM) == before


def test_odd_values_are_measured_too(con):
    "Gaps, constants, long tails, a category that only validation rows have."
    con.execute("""create or replace temp table features as select row_id, split, null::timestamp as moment, late as target, null::double as empty, 1.0::double as same,
        case when row_id % 3 = 0 then null else 10.0 ** (row_id % 300) end as wide, case when split = 'valid' then 'new' else carrier end as level from rows join splits using (row_id)""")
    gains, by = ablate(con, [Feature(n, n, k, [n]) for n, k in {"empty": "numeric", "same": "numeric", "wide": "numeric", "level": "categorical"}.items()], PROBLEM)
    assert by == "mae" and all(math.isfinite(r[k]) for r in gains for k in ("gain", "low", "high"))


maybe = lambda s: st.none() | s
moments = st.datetimes(min_value=dt.datetime(1990, 1, 1), max_value=dt.datetime(2050, 1, 1))
places = st.floats(-200, 200) | st.sampled_from([0.0, 90.0, -90.0, 180.0, -180.0, 1e300])
library_row = st.fixed_dictionaries({**{c: maybe(moments) for c in ("t", "a", "b")}, **{c: maybe(places) for c in ("lat1", "lon1", "lat2", "lon2", "lat", "lon", "degree", "x")},
                                     "s": maybe(st.text(alphabet="aZ9é \t\n!世", max_size=20)), "step": maybe(st.sampled_from([0.0, 0.5, 0.01, 3.0])), "low": st.just(-5.0), "high": st.just(5.0)})


def test_the_library_compiled_is_the_library_in_duckdb():
    "Every macro, on arbitrary rows: what a request computes in plain Python is what the training table holds, value by value."
    from slml_nb.library import ABOUT, with_library
    from slml_nb.recipe import compile_features
    from slml_nb.rowwise import RowFunction
    calls = {n: a["call"].replace("calendar", "'US'").replace("width", "step") for n, a in ABOUT.items() if n != "ratio"} | {"ratio": "ratio(x, step)"}
    sql = {n: with_library(c, (2010, 2030)) for n, c in calls.items()}
    kinds = {"t": "TIMESTAMP", "a": "TIMESTAMP", "b": "TIMESTAMP", "s": "VARCHAR", **dict.fromkeys(("lat1", "lon1", "lat2", "lon2", "lat", "lon", "degree", "x", "step", "low", "high"), "DOUBLE")}
    compiled, con = RowFunction(compile_features([{"name": n, "type": t} for n, t in kinds.items()], sql)), connect("300MB", threads=1)
    query = f"select {', '.join(sql[n] for n in compiled.features)} from (select {', '.join(f'?::{t} as {n}' for n, t in kinds.items())})"

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(library_row)
    def same(row):
        for name, ours, theirs in zip(compiled.features, compiled(row), con.execute(query, [row[n] for n in kinds]).fetchall()[0]):
            assert ours == theirs or (ours != ours and theirs != theirs) or (isinstance(ours, float) and math.isclose(ours, theirs, rel_tol=1e-14)), (name, ours, theirs)
    same()
