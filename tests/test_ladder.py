"""The ladder: a run stops where the requirements are met, goes on when asked, and says 'a rule is enough' where a rule made the data."""
import json, random

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from tiny import HEAD, answer, notebook, start, states, use_case

LADDER = "stage.save('ladder', {'enough': 'linear' if depth < 10 else '', 'why': 'it is simple'})\nstage.done()"
JUDGE = "stage.save('verdict', {'tried': stage.has('network')})\nstage.con\nstage.done()"


def stages(**more):
    return {"dig": notebook("dig", "", "ore", "depth: int = 3", HEAD.format(stage="dig") + "stage.save('ore', {'kg': depth})\nstage.done()"),
            "simple": notebook("simple", "ore", "ladder", "depth: int = 3", HEAD.format(stage="simple") + LADDER),
            "dear": notebook("dear", "ore", "network", "epochs: int = 1", HEAD.format(stage="dear") + "stage.save('network', {'w': 1})\nstage.done()", climbs="ladder"),
            "judge": notebook("judge", "ore", "verdict", "n: int = 1", HEAD.format(stage="judge") + JUDGE, uses="network"), **more}


def go(project, **options): return answer(start(project, **options))


def tried(project, record): return json.loads(next((project.folder / record["folder"] / "judge").resolve().glob("made.json")).read_text())


def test_a_run_stops_where_it_is_enough(project):
    use_case(project, stages())
    record = go(project)
    assert record["state"] == "done", [s.get("error") for s in record["stages"].values()]
    assert (states(record)["dear"], states(record)["judge"]) == ("skipped", "made")
    assert record["stages"]["dear"]["why"] == "not needed: it is simple; --climb goes on"
    again = go(project)                                                   # the same command: the same decision, nothing made
    assert (states(again)["dear"], states(again)["judge"]) == ("skipped", "reused")
    plan = {s["stage"]: s["state"] for s in go(project, dry_run=True)["plan"]}
    assert (plan["dear"], plan["judge"]) == ("skipped", "reused")
    deeper = go(project, overrides={"simple.depth": "20"})                # not enough any more: the next rung is made, and the verdict anew
    assert (states(deeper)["dear"], states(deeper)["judge"]) == ("made", "made")
    assert states(go(project))["judge"] == "reused"                       # and back


@pytest.mark.parametrize("asked", ["climb", "to", "needed", "failed"])
def test_a_run_goes_on_when_asked(project, asked):
    more = {"show": notebook("show", "network", "picture", "n: int = 1", HEAD.format(stage="show") + "stage.save('picture', {})\nstage.done()")} if asked == "needed" else {}
    if asked == "failed": more = {"simple": notebook("simple", "ore", "ladder", "depth: int = 3", HEAD.format(stage="simple") + "1 / 0")}   # nobody can say that it is not needed
    use_case(project, stages(**more), **({"climb": "on"} if asked == "climb" else {}))
    record = go(project, **({"stop": "dear"} if asked == "to" else {}))
    assert states(record)["dear"] == "made"


def test_a_sweep_leaves_nothing_out(project, monkeypatch):
    from slml_nb.sweep import sweep
    use_case(project, stages(), matrix="{dig.depth: [1, 2]}")
    monkeypatch.chdir(project.folder)
    record = sweep("params/mine.yaml")
    assert record["stages"]["dear"]["count"] == {"made": 2}


# ---- the rule that nobody wrote down


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.integers(0, 10_000), st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.booleans(), st.booleans())
def test_whatever_if_made_the_data_is_found(seed, middle, spread, text, classes):
    "One if, on a number of any size or on a text, among columns that tell nothing; the rule says of every row what the if said."
    from slml_nb.baseline import found_rule
    from slml_nb.model import answering_connection, evaluate_rule
    r = np.random.default_rng(seed)
    columns = {"x": middle + spread * r.normal(size=200), "noise": r.normal(size=200), "town": np.array(["Bonn", "Köln", "it's", None], object)[r.integers(0, 4, 200)]}
    yes = np.array([t == "it's" for t in columns["town"]]) if text else columns["x"] <= np.sort(columns["x"])[r.integers(20, 180)]
    names = ["no", "yes"] if classes else []
    rule = found_rule(columns, yes.astype(float) if classes else np.where(yes, 7.25, -3.0), {"x": "numeric", "noise": "numeric", "town": "categorical"}, "log_loss" if classes else "mae", names)
    said = evaluate_rule(answering_connection(), rule, columns, 200, ["town"])
    assert said == [("yes" if v else "no") if classes else (7.25 if v else -3) for v in yes], rule


@settings(max_examples=40, derandomize=True, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.5, 1.5), st.integers(5, 300))
def test_no_run_stops_on_a_hope(seed, limit, n):
    "Where a run may stop, the validation rows meet the requirement with room to spare, and there are enough of them."
    from slml_nb.baseline import enough
    r = np.random.default_rng(seed)
    y = r.normal(size=n)
    says = {"rule": np.zeros(n), "linear": y + r.normal(size=n), "trees": y + r.normal(size=n) * .9}
    found = enough({"task": "regression", "metric": "mae", "unit": "", "requirements": [{"name": "mae", "op": "<=", "limit": limit, "unit": ""}]}, y, says, None, n_boot=50)
    off = {c: abs(y - p).mean() for c, p in says.items()}
    if found["enough"]: assert n >= 30 and off[found["enough"]] < found["at_worst"][found["enough"]]["mae"] <= limit
    elif n >= 30: assert all(found["at_worst"][c]["mae"] > limit for c in says)


RULES = {"regression": lambda kg, zone: 4.9 if kg <= 5 else 29.0 if zone == "island" else 12.5, "classification": lambda kg, zone: "heavy" if kg > 20 and zone != "home" else "light"}


@pytest.mark.slow
@pytest.mark.parametrize("task,given", [("classification", ""), ("regression", "CASE WHEN kg <= 5 THEN 4.9 WHEN zone = 'island' THEN 29.0 ELSE 12.5 END")])
def test_data_made_by_an_if(project, task, given):
    "From a CSV to the verdict: a rule is enough, whether somebody knew it or not, and no network is trained."
    draw = random.Random(1)
    rows = [(round(draw.uniform(.1, 30), 1), draw.choice(["home", "abroad", "island"]), draw.randint(0, 1)) for _ in range(900)]
    project.write("parcels.csv", "kg,zone,urgent,fee\n" + "".join(f"{kg},{zone},{urgent},{RULES[task](kg, zone)}\n" for kg, zone, urgent in rows))
    limits = "at_most: {mae: 0.5}" if task == "regression" else "at_least: {accuracy: 0.9}"
    project.write("params/parcels.yaml", f"""
project: parcels
frame: {{decision: what to charge, target: fee, task: {task}, metric: {'mae' if task == 'regression' else 'accuracy'}, unit: '', time: '', known_later: [], {limits}}}
ingest: {{sources: [parcels.csv]}}
quality: {{duplicates: keep}}
sample: {{by: hash}}
baseline: {{rule: "{given}"}}
evaluate: {{n_boot: 100, requests: 60}}
stages: {{explore: false, package: false, serve: false, report: false}}
""")
    record = go(project, params="params/parcels.yaml")
    assert record["state"] == "done" and states(record)["train"] == "skipped"
    verdict = json.loads(next((project.folder / "runs").rglob("verdict.json")).read_text())
    assert verdict["sentence"].startswith("A rule is enough: "), verdict["sentence"]
    assert verdict["candidate"] == ("rule" if given else "found_rule") and "Nothing dearer was trained" in verdict["sentence"]
    if task == "classification": assert 'WHEN "kg" <= 20' in verdict["sentence"]
