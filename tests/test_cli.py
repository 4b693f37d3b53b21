"""The command line, typed as a user types it: help, exit codes, one clean message, a draft that runs."""
import csv, json, random, re, shutil, subprocess, sys, urllib.request
from pathlib import Path

import pytest

COMMANDS = {"new", "run", "runs", "report", "serve", "predict", "doctor"}


def one_message(err):
    "One line for a person; never a traceback."
    assert "Traceback" not in err and err.startswith("slml: ") and len(err.strip().splitlines()) == 1, err
    return err


def a_package():
    "The package of the sample that is shipped."
    from slml_nb.stage import made_in, sample_folder
    record = made_in(sample_folder())["package"]
    return f"{record['root']}/{record['file']}"


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


def broken(text, form):
    "A table of flats with lines that are none: (text, {place: what the reason says})."
    head, *rows = text.splitlines()
    if form == "csv": bad = {2: (rows[2].rpartition(",Ulm")[0] or "FL,1", "fields instead of"), 5: (rows[5].replace("FL-", 'FL-"', 1).replace('FL-"', '"FL-', 1), ""), 6: (head, "the header again")}
    else:
        names = ["Flat ID", "Living area", "Built", "Sold on", "City", "City_2"]
        rows = [json.dumps(dict(zip(names, r.split(",")))) for r in rows]
        bad = {0: (rows[0][:-9], "not JSON"), 4: ("17", "not a JSON object")}
    for place, (line, _) in sorted(bad.items()): rows.insert(place, line)
    return "\n".join([head, *rows] if form == "csv" else rows) + "\n", {place: why for place, (_, why) in bad.items()}


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_predict_leaves_a_broken_line_in_its_place(shop, form):
    "As many rows as the file has, also from a pipe; what is refused says why, and the others are answered as ever."
    text, bad = broken(flats(60), form)
    shop.write(f"broken.{form}", text)
    code, out, err = shop.slml("predict", "flats", f"broken.{form}")
    rows = list(csv.DictReader(out.splitlines()))
    assert code == 0 and len(rows) == 60 + len(bad) and f"{len(bad)} of {len(rows)} rows have no prediction" in err, err + out[-2000:]
    for place, row in enumerate(rows): assert (row["prediction"] == "") == (place in bad) and bad.get(place, "") in row["error"], (place, row)
    assert [r["Flat ID"] for r in rows if r["prediction"]] == [f"FL-{i:05}" for i in range(60)]
    piped = subprocess.run(shop.command("predict", "flats", "-"), cwd=shop.folder, env=shop.environment(), input=text, capture_output=True, text=True)
    assert (piped.returncode, piped.stdout, piped.stderr) == (code, out, err)


@pytest.mark.parametrize("form", ["csv", "csv.gz", "jsonl", "jsonl.gz", "json", "parquet"])
def test_predict_with_a_package_alone_keeps_every_row(project, form):
    "Each form of file, from a name and from a pipe, into a CSV and into Parquet: the same rows in the same order."
    import duckdb, gzip
    package = a_package()
    asked = json.loads(open(f"{package}/sample.json").read())["request"]
    requests = [{**asked, "hour": i % 24} for i in range(50)]
    if form == "parquet":
        bad = {3: "is missing"}
        (project.folder / "rows.json").write_text(json.dumps([{**r, "hour": None} if i in bad else r for i, r in enumerate(requests)]))
        duckdb.execute(f"copy (from read_json('{project.folder}/rows.json')) to '{project.folder}/rows.parquet' (format parquet)")
    else:
        plain = form.removesuffix(".gz")
        lines = [",".join(map(str, r.values())) if plain == "csv" else json.dumps(r) for r in requests]
        bad = {3: "line", 17: "line", 49: "line"} if plain != "json" else {7: "no object", 49: "no object"}
        for place in bad: lines[place] = {"csv": '"1,2', "jsonl": lines[place][:30], "json": "17"}[plain]
        if plain == "csv": lines = [",".join(asked), *lines]
        data = (f"[{', '.join(lines)}]" if plain == "json" else "\n".join(lines) + "\n").encode()
        project.write(f"rows.{form}", gzip.compress(data) if form.endswith("gz") else data)
    code, out, err = project.slml("predict", package, f"rows.{form}")
    rows = list(csv.DictReader(out.splitlines()))
    assert code == 0 and len(rows) == 50 and f"{len(bad)} of 50 rows have no prediction" in err, (err, out[:500])
    for place, row in enumerate(rows):
        assert bad.get(place, "") in row["error"] and (row["prediction"] == "") == (place in bad), (place, row)
        assert place in bad or int(row["hour"]) == place % 24, (place, row)
    with open(project.folder / f"rows.{form}", "rb") as f: piped = subprocess.run(project.command("predict", package, "-", "--out", "piped.parquet", "--json"), cwd=project.folder, env=project.environment(), stdin=f, capture_output=True)
    assert piped.returncode == 0 and json.loads(piped.stdout)["errors"] == len(bad), piped.stderr
    assert duckdb.sql(f"select prediction, error from '{project.folder}/piped.parquet'").fetchall() == [(float(r["prediction"]) if r["prediction"] else None, r["error"] or None) for r in rows]


def test_predict_says_what_stood_in_a_cell(shop):
    "What a run could not read is named, and kept in its place; the rows beside it are answered as without it."
    head, *rows = flats(4).splitlines()
    built = lambda row: row.split(",")[2]
    rows[1], rows[2] = rows[1].replace(built(rows[1]), "long ago", 1), rows[2].replace(built(rows[2]), "-", 1)
    shop.write("cells.csv", "\n".join([head, *rows, "no row"]) + "\n")
    code, out, err = shop.slml("predict", "flats", "cells.csv")
    said = list(csv.DictReader(out.splitlines()))
    assert code == 0 and "3 of 5 rows have no prediction" in err, err + out
    assert [r["Built"] for r in said] == [built(rows[0]), "long ago", "", built(rows[3]), ""]
    for place, words in ((1, "field 'Built' is 'long ago': send a whole number"), (2, "field 'Built' is missing"), (4, "is no row")): assert words in said[place]["error"], said[place]
    assert [bool(r["prediction"]) for r in said] == [True, False, False, True, False]
    shop.write("sound.csv", "\n".join([head, rows[0], rows[3]]) + "\n")
    sound = list(csv.DictReader(shop.slml("predict", "flats", "sound.csv")[1].splitlines()))
    assert [float(r["prediction"]) for r in sound] == pytest.approx([float(said[i]["prediction"]) for i in (0, 3)], rel=1e-12)  # the first are answered row by row, these as a block


def test_predict_of_no_rows_is_a_table_without_rows(shop):
    package = a_package()
    for run, head in (("flats", flats(1).splitlines()[0]), (package, ",".join(json.loads(Path(package, "sample.json").read_text())["request"]))):
        shop.write("head.csv", head + "\n")
        code, out, err = shop.slml("predict", run, "head.csv")
        assert (code, out.count("\n")) == (0, 1) and out.strip().endswith(",prediction,error") and one_message(err) == "slml: no rows in head.csv\n", err + out
        for sent, words in ((b"", "standard input: it was empty"), (b"\x1f\x8bgarbage", "begins like gzip and cannot be unpacked")):
            piped = subprocess.run(shop.command("predict", run, "-"), cwd=shop.folder, env=shop.environment(), input=sent, capture_output=True)
            assert piped.returncode == 2 and words in one_message(piped.stderr.decode())


def test_predict_does_not_overwrite_what_it_reads(project):
    package = a_package()
    project.write("a.csv", "x\n1\n")
    (project.folder / "link.csv").symlink_to("a.csv")
    for file, out in (("a.csv", "a.csv"), ("link.csv", "a.csv"), ("./a.csv", str(project.folder / "link.csv")), ("*.csv", "a.csv")):
        code, _, err = project.slml("predict", package, file, "--out", out)
        assert code == 2 and "answers would overwrite it" in one_message(err) and "--out" in err
    assert (project.folder / "a.csv").read_text() == "x\n1\n" and (project.folder / "link.csv").is_symlink()


@pytest.mark.parametrize("argv", [["{p}"], ["{p}", "--replicas", "2"], ["one={p}", "two={p}"]])
def test_serve_tells_a_program_its_address_and_ends_in_silence(project, argv):
    package = a_package()
    server = subprocess.Popen(project.command("serve", *(a.format(p=package) for a in argv), "--port", "0", "--json"), cwd=project.folder, env=project.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        told = json.loads(server.stdout.readline())
        if "--replicas" not in argv: assert json.load(urllib.request.urlopen(told["address"] + "/ping", timeout=60))["status"] == "ok"  # the replicas are stopped while they begin
        server.terminate()
        out, err = server.communicate(timeout=60)
    finally: server.kill()
    assert told["packages"] == (["one", "two"] if len(argv) == 2 else ["package"]) and (server.returncode, out, err) == (0, "", "")


def test_serve_says_nothing_before_each_package_is_whole(project):
    shutil.copytree(a_package(), project.folder / "spoilt")
    (project.folder / "spoilt/card.md").write_text("another card")
    code, out, err = project.slml("serve", f"good={a_package()}", "bad=spoilt", "--port", "0")
    assert (code, out) == (2, "") and "'bad' cannot be served, card.md has been changed" in one_message(err)


def test_doctor_wants_a_folder_for_a_dockerfile(project):
    project.write("params/p.yaml", "project: p\nframe: {target: fare}\n")
    project.write("a.csv", "x\n")
    for argv, words in ((["--base", "some/image"], "slml doctor PARAMS --dockerfile FOLDER --base some/image"), (["params/p.yaml", "--dockerfile", "a.csv"], "a.csv is a file"), (["params/p.yaml", "--dockerfile", "a.csv/x"], "name a folder")):
        code, out, err = project.slml("doctor", *argv)
        assert (code, out) == (2, "") and words in one_message(err), err


def test_predict_without_a_single_answer_has_failed(project):
    package = a_package()
    project.write("none.jsonl", "{\n3\n")
    code, out, err = project.slml("predict", package, "none.jsonl")
    assert code == 1 and len(out.splitlines()) == 3 and "2 of 2 rows have no prediction" in one_message(err)
    assert "exit code is 0" in re.sub(r"\s+", " ", project.slml("predict", "--help")[1])


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
