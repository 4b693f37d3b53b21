"""The command line, typed as a user types it: help, exit codes, one clean message, a draft that runs."""
import csv, json, random, re, subprocess, sys

import pytest

COMMANDS = {"new", "run", "runs", "report", "serve", "predict", "doctor"}


def one_message(err):
    "One line for a person; never a traceback."
    assert "Traceback" not in err and err.startswith("slml: ") and len(err.strip().splitlines()) == 1, err
    return err


def test_help_lists_every_command_and_every_exit_code(project):
    code, out, err = project.slml("--help")
    assert code == 0 and not err
    for name in COMMANDS: assert re.search(rf"^    {name} ", out, re.M), name
    for number in ("0", "1", "2", "3", "130"): assert re.search(rf"^  {number} ", out, re.M), number
    for name in COMMANDS: assert project.slml(name, "--help")[0] == 0


def test_help_imports_nothing_heavy(project):
    "What makes it answer at once; how fast it is stands in bench/results.md."
    code = "import sys; from slml_nb.cli import main\ntry: main(['--help'])\nexcept SystemExit: print(sorted({m.split('.')[0] for m in sys.modules} & {'numpy', 'pandas', 'duckdb', 'yaml', 'papermill', 'nbformat', 'IPython'}))"
    r = subprocess.run([sys.executable, "-c", code], cwd=project.folder, env=project.environment(), capture_output=True, text=True)
    assert r.stdout.strip().endswith("[]"), r.stdout[-200:] + r.stderr


def test_help_of_run_shows_the_parameters_of_the_stages(project):
    code, out, _ = project.slml("run", "--help")
    assert code == 0 and "--workers" in out
    for words in ("quality:", "rules: list", "learning_rate: float", "target: str", "(required)"): assert words in out, words
    project.write("params/p.yaml", "project: p\nframe: {target: fare}\n")
    assert '* target: str = "fare"' in project.slml("run", "params/p.yaml", "--help")[1]


@pytest.mark.parametrize("argv, words", [
    ([], "usage"), (["rnu", "x"], "did you mean 'run'?"), (["run"], "PARAMS"), (["run", "params/nope.yaml"], "did you mean 'mine.yaml'?"),
    (["run", "params/mine.yaml", "-p", "epochs"], "-p stage.parameter=value"),
    (["run", "params/mine.yaml", "-p", "train.epocs=3"], "did you mean 'epochs'?"),
    (["run", "params/mine.yaml", "-p", "train.epochs=many"], "give a whole number"),
    (["run", "params/mine.yaml", "--to", "quailty"], "did you mean 'quality'?"),
    (["run", "params/mine.yaml", "--from", "nowhere"], "there is no stage 'nowhere'"),
    (["run", "params/unknown.yaml"], "unknown.yaml:3: quality has no parameter 'ruls': did you mean 'rules'?"),
    (["run", "params/typed.yaml"], "typed.yaml:2: ingest.limit is 'all'"), (["run", "params/lacks.yaml"], "frame.metric is missing"),
    (["report", "nope"], "there are no runs yet"), (["predict", "latest", "x.csv"], "there are no runs yet"), (["serve", "--port", "x"], "invalid int"),
])
def test_wrong_usage_is_one_message_and_runs_nothing(project, argv, words):
    frame = "frame: {target: y, metric: mae, time: '', known_later: []}\n"
    project.write("params/mine.yaml", frame + "ingest: {sources: [x.csv]}\n")
    project.write("params/unknown.yaml", frame + "ingest: {sources: [x.csv]}\nquality: {ruls: []}\n")
    project.write("params/typed.yaml", frame + "ingest: {sources: [x.csv], limit: all}\n")
    project.write("params/lacks.yaml", "frame: {target: y, time: '', known_later: []}\ningest: {sources: [x.csv]}\n")
    code, out, err = project.slml(*argv)
    assert code == 2
    assert words in (one_message(err) if argv else out)
    assert not list(project.folder.glob("runs/*/*"))


def test_debug_shows_where(project):
    assert "Traceback" in project.slml("report", "nope", SLML_DEBUG="1")[2]


def test_json_is_one_document(project):
    for argv in (["runs"], ["doctor"]): json.loads(project.slml(*argv, "--json")[1])
    project.write("a.csv", "km,price\n" + "\n".join(f"{i % 7},{3 + i % 7}.5" for i in range(40)))
    assert json.loads(project.slml("new", "a", "--data", "a.csv", "--target", "price", "--json")[1]) == {"params": "params/a.yaml"}
    plan = json.loads(project.slml("run", "params/a.yaml", "--dry-run", "--json")[1])["plan"]
    assert plan[0]["stage"] == "frame" and {p["state"] for p in plan} == {"made"}


@pytest.mark.parametrize("content, target, words", [
    (None, "y", "there is no file"), ("", "y", "empty"), ("a,b\n", "b", "no row"), ("a,b\n1,2\n3,4\n", "c", "there is no column 'c'"),
    ("a,b\n1,7\n2,7\n", "b", "constant"), ("a,b\n1,\n2,\n", "b", "empty in every row"), (b"PK\x03\x04 not a zip", "y", "damaged"),
    (b"\x00\x01\x02" * 99, "y", "not a text file"), (b"n\xe4me,y\n" + b"\xe4,1\n\xf6,2\n" * 50, "y", "UTF-8"),
])
def test_new_says_what_is_wrong_with_data(project, content, target, words):
    if content is not None: project.write("bad.csv", content)
    code, out, err = project.slml("new", "bad", "--data", "bad.csv", "--target", target)
    assert (code, out) == (2, "")
    assert words in one_message(err)
    assert not list(project.folder.glob("params/*"))


def test_new_never_overwrites(project):
    project.write("a.csv", "km,price\n" + "\n".join(f"{i % 7},{3 + i % 7}.5" for i in range(40)))
    assert project.slml("new", "a", "--data", "a.csv", "--target", "price")[0] == 0
    project.write("params/a.yaml", "mine: {}\n")
    assert project.slml("new", "a", "--data", "a.csv", "--target", "price")[0] == 2
    assert (project.folder / "params/a.yaml").read_text() == "mine: {}\n"
    assert project.slml("new", "a", "--data", "a.csv", "--target", "price", "--force")[0] == 0


# ---- three tables that nobody has cleaned, and one of three rows; what can be learned in each is known, since they are made here

def flats(n=900):
    "Regression: currency and thousands separators, units, dates in words, an empty and a doubled column, an id, a constant."
    r, rows = random.Random(1), ["Flat ID,Living area,Built,Sold on,City,City,Country,,Asking price"]
    for i in range(n):
        area, city = r.randint(20, 180), r.choice(["Ulm", "Köln", "Bad Tölz"])
        price = area * {"Ulm": 3000, "Köln": 5200, "Bad Tölz": 4100}[city] + 20000 + r.gauss(0, 9000)
        month = ["Jan", "Feb", "Mar", "Apr", "May", "Jun"][i * 6 // n]
        rows.append(f'FL-{i:05},{area} m²,{r.randint(1900, 2020)},{1 + i % 28} {month} 2024,{city},{city.upper()},DE,,"€{price:,.0f}"')
    return "\n".join(rows) + "\n"


def churn(n=900):
    "Two classes, one rare: semicolons, decimal commas, yes and no, missing values in three spellings."
    r, rows = random.Random(2), ["Customer No;Monthly fee;Calls per week;Plan;Left?"]
    for i in range(n):
        fee, calls, plan = r.uniform(5, 90), r.choice([*range(8), "NA", "-"]), r.choice(["basic", "gold", ""])
        odds = -4.5 + 0.07 * fee + (0 if calls in ("NA", "-") else 0.25 * calls) - (2 if plan == "gold" else 0)
        rows.append(f"{100000 + i};{fee:.2f};{calls};{plan};{'yes' if r.random() < 1 / (1 + 2.718281828 ** -odds) else 'no'}".replace(".", ","))
    return "\n".join(rows) + "\n"


def noise(n=600):
    "Three classes that nothing tells apart: the right verdict is that no model is worth having."
    r = random.Random(3)
    return "a,b,kind\n" + "".join(f"{r.random():.3f},{r.choice('xyz')},{r.choice(['red', 'green', 'blue'])}\n" for _ in range(n))


def draft_and_run(project, name, content, target, *argv):
    project.write(f"{name}.csv", content)
    code, out, err = project.slml("new", name, "--data", f"{name}.csv", "--target", target)
    assert code == 0, err
    return project.run(f"params/{name}.yaml", *argv)


def test_flats_end_in_a_model_that_is_worth_having(shop):
    code, r = draft_and_run(shop, "flats", flats(), "asking price")
    assert (code, r["state"], r["verdict"]["met"]) == (0, "done", True), r.get("error") or r["verdict"]["sentence"]
    text = (shop.folder / "params/flats.yaml").read_text()
    for words in ("target: Asking price", "task: regression", 'unit: "€"', "time: Sold on", "- Flat ID", "- Country"): assert words in text, words
    errors = {c["name"]: c["mae"] for c in r["verdict"]["candidates"]}
    assert errors["linear"] < 60_000 < errors["rule"]  # prices spread over 900,000
    assert r["verdict"]["candidate"] != "linear" and errors[r["verdict"]["candidate"]] < 0.9 * errors["linear"]  # a price is area times city, which no weighted sum can say
    assert (shop.folder / r["report"]).is_file()


def test_the_same_again_is_reused(shop):
    code, r = shop.run("params/flats.yaml")
    assert code == 0 and {s["state"] for s in r["stages"].values()} == {"reused"}


def test_plain_output_is_a_line_a_stage_then_the_verdict(shop):
    code, out, err = shop.slml("run", "params/flats.yaml")
    lines = out.strip().splitlines()
    assert code == 0 and not err and "\x1b" not in out
    assert sum("reused" in l for l in lines) == 12
    assert lines[-1].startswith("report: runs/flats/") and lines[-1].endswith("report.html")


def test_predict_answers_the_rows_of_a_file(shop):
    code, out, err = shop.slml("predict", "flats", "flats.csv", "--out", "answers.csv", "--json")
    doc = json.loads(out)
    assert code == 0 and (doc["rows"], doc["errors"], doc["rejects"]) == (900, 0, 0), err
    with open(shop.folder / "answers.csv", newline="") as f: rows = list(csv.DictReader(f))
    off = [abs(float(r["prediction"]) - float(r["Asking price"])) for r in rows]
    assert sum(off) / 900 < 60_000  # the units of the file were read as they were in training
    shop.write("one.csv", "City,City,Living area,Built,Sold on\nUlm,ULM,100 m²,1990,3 Jun 2024\n")  # one flat, without its price
    code, out, err = shop.slml("predict", "flats", "one.csv")
    assert code == 0 and 250_000 < float(list(csv.DictReader(out.splitlines()))[0]["prediction"]) < 400_000, out + err


def test_churn_is_two_classes(shop):
    code, r = draft_and_run(shop, "churn", churn(), "left?", "--to", "evaluate")
    assert r["state"] == "done", r.get("error")
    assert r["verdict"]["task"] == "classification" and r["verdict"]["met"] and code == 0, r["verdict"]["sentence"]


def test_noise_ends_in_no_model(shop):
    code, r = draft_and_run(shop, "noise", noise(), "kind", "--to", "evaluate")
    assert (code, r["state"], r["verdict"]["met"], r["verdict"]["candidate"]) == (3, "done", False, None), r.get("error") or r["verdict"]["sentence"]


def test_three_rows_end_in_a_verdict_or_a_sentence(shop):
    code, r = draft_and_run(shop, "three", "km,price\n1,10\n2,20\n3,31\n", "price")
    assert code == 3 and r["state"] == "done" and not r["verdict"]["met"], r.get("error")
