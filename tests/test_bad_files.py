"""Bad input through `slml run`: one message with what, where and the way out; exit code 1; what is finished stays and is reused; nothing half-written."""
import json, random

import pytest

ROWS = "day,km,paid,fare\n" + "".join(f"2023-01-{1 + i % 28:02d},{i % 9 + 0.5},{'card' if i % 3 else 'cash'},{3 + 2 * (i % 9)}.5\n" for i in range(120))


def trips(project, ingest=""):
    "A parameter set for trips.csv."
    project.write("params/trips.yaml", "project: trips\nframe: {target: fare, metric: mae, time: '', known_later: []}\n"
                  f"ingest:\n  sources: [trips.csv]\n{ingest}")


def ends(project, stage, words, *argv):
    "`slml run` stops at `stage` with one message that holds `words`; frame is kept."
    code, out, err = project.slml("run", "params/trips.yaml", *argv)
    said = out + err
    assert code == 1 and "Traceback" not in said, said
    for w in words: assert w in err, f"{w!r} is not in: {err}"
    record = json.loads(max(project.folder.glob("runs/trips/*/run.json"), key=lambda p: p.stat().st_mtime_ns).read_text())
    states = {s: x["state"] for s, x in record["stages"].items()}
    assert states[stage] == "failed" and states["frame"] in ("made", "reused"), states
    assert not project.left_behind(), project.left_behind()
    return states


@pytest.mark.parametrize("content, ingest, words", [
    (None, "", ["trips.csv", "did you mean 'trips_2023.csv'?"]),
    (b"", "", ["trips.csv", "empty"]),
    (b"day,km,paid,fare\n", "", ["trips.csv", "no row"]),
    (ROWS.encode(), "  delimiter: '|'\n", ["trips.csv", "delimiter"]),
    (random.Random(0).randbytes(4000), "", ["trips.csv"]),
    (ROWS.replace("card", "kört").encode("cp1252"), "", ["trips.csv", "UTF-8", "encoding"]),
], ids=["missing", "empty", "header only", "wrong delimiter", "random bytes", "another encoding"])
def test_bad_file(project, content, ingest, words):
    trips(project, ingest)
    project.write("trips.csv" if content is not None else "trips_2023.csv", content if content is not None else ROWS)
    ends(project, "ingest", words, "--to", "quality")


def test_the_way_out_works_and_frame_is_reused(project):
    trips(project)
    project.write("trips.csv", ROWS.replace("card", "kört").encode("cp1252"))
    ends(project, "ingest", ["encoding"], "--to", "quality")
    code, run = project.run("params/trips.yaml", "--to", "quality", "-p", "ingest.encoding=cp1252")
    assert code == 0 and {s: run["stages"][s]["state"] for s in ("frame", "ingest", "quality")} == {"frame": "reused", "ingest": "made", "quality": "made"}


def test_a_few_broken_lines_stop_nothing_and_are_kept(project):
    trips(project)
    project.write("trips.csv", ROWS.encode() + b"2023-01-05,1.5\n2023-01-06,\xff\xfe,card,3.5\n")
    code, run = project.run("params/trips.yaml", "--to", "ingest")
    assert code == 0
    said = run["stages"]["ingest"]["metrics"]
    assert (said["rows_in"], said["rows_out"], said["rejects"]) == (122, 120, 2)


@pytest.mark.parametrize("target, rows, words", [
    ("fair", ROWS, ["fair", "did you mean 'fare'?"]),
    ("fare", "km,fare\n" + "".join(f"{i},\n" for i in range(50)), ["fare", "empty"]),
    ("fare", "km,fare\n" + "".join(f"{i},7\n" for i in range(50)), ["fare", "constant"]),
], ids=["absent", "all null", "constant"])
def test_bad_target(project, target, rows, words):
    trips(project)
    project.write("trips.csv", rows)
    ends(project, "explore", words, "--to", "explore", "-p", f"frame.target={target}")
