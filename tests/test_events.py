"""Events: each once, whatever dies; timetables against a clock that is read minute by minute; S3's news as AWS documents it."""
import collections, datetime as dt, hashlib, json, os, signal, subprocess, sys, threading, time
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings, strategies as st

from slml_nb.core import SlmlError
from slml_nb.events import Cron, Ledger, Records, Schedule, Watcher, command_action, events_handler, once, predict_action, predict_records, run_action
from test_cascade import package

UTC = dt.timezone.utc
law = settings(max_examples=60, deadline=None, derandomize=True)


# -- timetables

def field(low, high):
    number = st.integers(low, high)
    part = st.one_of(st.just("*"), number.map(str), st.tuples(number, number).map(lambda t: f"{min(t)}-{max(t)}"), st.integers(1, 20).map(lambda n: f"*/{n}"),
                     st.tuples(number, number, st.integers(1, 9)).map(lambda t: f"{min(t[:2])}-{max(t[:2])}/{t[2]}"))
    return st.lists(part, min_size=1, max_size=2).map(",".join)


def numbers(text, low, high):
    "A field by hand."
    out = set()
    for part in text.split(","):
        span, _, step = part.partition("/")
        a, b = (low, high) if span == "*" else (int(span.split("-")[0]), int(span.split("-")[-1]))
        out |= {v for v in range(a, b + 1) if (v - a) % int(step or 1) == 0}
    return out


def by_the_clock(fields, zone, start, minutes):
    "Looks at every minute that really happens; times that the clock leaves out are looked at one by one."
    sets = [numbers(f, *span) for f, span in zip(fields, ((0, 59), (0, 23), (1, 31), (1, 12), (0, 7)))]
    days = {v % 7 for v in sets[4]}

    def fits(t):
        a, b = t.day in sets[2], t.isoweekday() % 7 in days
        either = not (fields[2].startswith("*") or fields[4].startswith("*"))
        return t.minute in sets[0] and t.hour in sets[1] and t.month in sets[3] and (a or b if either else a and b)
    out, every = set(), fields[1].startswith("*")
    for i in range(1, minutes + 1):
        t = start + dt.timedelta(minutes=i)
        local, before = t.astimezone(zone), (t - dt.timedelta(minutes=1)).astimezone(zone)
        if fits(local) and (every or not local.fold): out.add(t)
        jump = local.utcoffset() - before.utcoffset()
        for k in range(int(jump.total_seconds() // 60) if not every else 0):  # the missing minutes
            if fits(before.replace(tzinfo=None) + dt.timedelta(minutes=1 + k)): out.add(t + dt.timedelta(minutes=k))
    return sorted(m for m in out if m <= start + dt.timedelta(minutes=minutes))


@law
@given(st.tuples(field(0, 59), field(0, 23), field(1, 31), field(1, 12), field(0, 7)), st.sampled_from(["UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Asia/Kolkata"]),
       st.sampled_from([(2026, 3, 8, 3), (2026, 3, 28, 20), (2026, 4, 4, 10), (2026, 10, 24, 20), (2026, 10, 3, 12), (2026, 11, 1, 0), (2024, 2, 28, 12)]))
def test_a_timetable_fires_when_a_clock_says_so(fields, zone, start):
    start = dt.datetime(*start, tzinfo=UTC)
    try: cron = Cron(" ".join(fields), zone)
    except SlmlError as e: assert "never happens" in e.what; return
    assert list(cron.between(start, start + dt.timedelta(minutes=2000))) == by_the_clock(fields, ZoneInfo(zone), start, 2000)


@pytest.mark.parametrize("zone,start", [("Europe/Berlin", (2026, 3, 28, 20)), ("Europe/Berlin", (2026, 10, 24, 20)), ("America/New_York", (2026, 3, 8, 0)), ("America/New_York", (2026, 11, 1, 0)),
                                        ("Australia/Lord_Howe", (2026, 10, 3, 8)), ("Australia/Lord_Howe", (2026, 4, 4, 8)), ("Africa/Cairo", (2026, 4, 23, 15))])
def test_when_the_clock_jumps(zone, start):
    start = dt.datetime(*start, tzinfo=UTC)
    for text in ("*/10 * * * *", "*/15 0-4 * * *", "30 2 * * *", "0 2,3 * * *", "7-59/13 */2 * * *", "15,45 0,1,2,3 * * *"):
        assert list(Cron(text, zone).between(start, start + dt.timedelta(minutes=1200))) == by_the_clock(text.split(), ZoneInfo(zone), start, 1200), text


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 3000), min_size=1, max_size=8), st.sampled_from(["*/20 * * * *", "0 */7 * * *", "5 0 * * *"]))
def test_whenever_somebody_looks_every_moment_is_done_or_left_out_once(tmp_path_factory, waits, text):
    folder, start = tmp_path_factory.mktemp("s"), dt.datetime(2026, 1, 1, 0, 1, tzinfo=UTC)
    ledgers = [Ledger(folder / "events.db") for _ in "ab"]
    for missed in ("all", "latest"):
        done, left_out, now = [], 0, start
        tables = [Schedule(missed, Cron(text), folder / missed, lambda moment, beside: done.append(moment), ledger, missed=missed) for ledger in ledgers]
        for i, wait in enumerate([0, *waits]):
            now += dt.timedelta(minutes=wait)
            left_out += sum(t.step(now)["left_out"] for t in (tables if i % 2 else tables[::-1]))
        wanted = [f"{m:%Y-%m-%dT%H:%MZ}" for m in Cron(text).between(start, now)]
        assert len(done) == len(set(done)) and set(done) <= set(wanted) and len(done) + left_out == len(wanted)
        if missed == "all": assert done == wanted
        elif wanted: assert done[-1] == wanted[-1]
    for ledger in ledgers: ledger.close()


def test_a_year_away_is_quickly_over(tmp_path):
    s = Schedule("minute", Cron("* * * * *"), tmp_path, lambda moment, beside: None)
    s.step(dt.datetime(2026, 1, 1, tzinfo=UTC))
    told = s.step(dt.datetime(2026, 3, 1, tzinfo=UTC))
    assert (told["done"], told["left_out"], sum(s.ledger.counts().values())) == (1, 59 * 1440 - 1, 1001)


# -- folders

def test_two_watchers_share_the_work(tmp_path):
    (inbox := tmp_path / "in").mkdir()
    for i in range(40): (inbox / f"{i}.txt").write_text(f"{i}")
    worked = collections.Counter()

    def act(path, beside):
        worked[path.name, threading.get_ident()] += 1
        time.sleep(0.002)
        beside.write_text(path.read_text())
    def work(): told.append(Watcher(inbox, tmp_path / "out", act, Ledger(tmp_path / "e.db"), settle_s=0).step())
    told = []
    threads = [threading.Thread(target=work) for _ in range(3)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert sum(t["done"] for t in told) == 40 and len({name for name, _ in worked}) == 40 == sum(worked.values())
    assert sorted(p.read_text() for p in (tmp_path / "out").iterdir()) == sorted(map(str, range(40)))


def test_names_contents_and_what_is_left_alone(tmp_path):
    (inbox := tmp_path / "in").mkdir()
    (inbox / "sub").mkdir()
    for name in (".hidden", "a.csv.part", "b.tmp", "c~", "sub/.x.csv"): (inbox / name).write_text("x")
    (inbox / "empty.csv").touch()
    for name in ("a.csv", "copy of a.csv", "sub/a.csv", "Zürich *[1] {event}.csv", "a.txt"): (inbox / name).write_text("same")
    copy = lambda path, beside: beside.write_text(path.name) and None
    w = Watcher(inbox, tmp_path / "out", copy, pattern="**/*", settle_s=0)
    assert w.step()["done"] == 5 and w.step() == {"done": 0, "held": 5, "failed": 0, "superseded": 0, "waiting": 1}
    os.utime(inbox / "a.csv")  # touched
    (inbox / "a.txt").write_text("same")  # copied over itself
    assert w.step()["done"] == 0
    (inbox / "a.csv").write_text("new")
    assert w.step()["done"] == 1 and len(list((tmp_path / "out").glob("*.out"))) == 6
    (inbox / "a.csv").write_text("same")  # back to what it was: that was handled
    assert w.step()["done"] == 0


def test_one_bad_file_stops_no_other_and_is_given_up(tmp_path):
    (inbox := tmp_path / "in").mkdir()
    (inbox / "gone.csv").symlink_to(inbox / "nothing")
    tried = []

    def act(path, beside):
        if path.stem == "bad": tried.append(1); raise MemoryError("too large")
        beside.write_text("fine")
    for name in ("a", "bad", "c"): (inbox / f"{name}.csv").write_text(name)
    w = Watcher(inbox, tmp_path / "out", act, settle_s=0, tries=3, wait_s=0)
    assert [w.step()["failed"] for _ in range(5)] == [1, 1, 1, 0, 0] and len(tried) == 3
    assert w.ledger.counts() == {"done": 2, "failed": 1} and not list((tmp_path / "out").glob(".work*"))
    assert "too large" in w.ledger.happened(f"bad.csv@{hashlib.sha256(b'bad').hexdigest()}")["note"]
    assert w.ledger.again("bad.csv@*") == 1 and w.step()["failed"] == 1


def test_ctrl_c_gives_the_event_back(tmp_path):
    ledger = Ledger(tmp_path / "e.db")
    def stopped(what, beside): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): once(ledger, "k", tmp_path / "r", stopped)
    assert once(ledger, "k", tmp_path / "r", lambda what, beside: None, wait_s=0) == "done"


def test_a_result_that_is_there_is_not_made_again(tmp_path):
    "The one before died between the rename and the note, or the ledger was lost."
    (tmp_path / "r").write_text("made")
    ledger = Ledger(tmp_path / "e.db")
    assert once(ledger, "k", tmp_path / "r", None) == "done" and (tmp_path / "r").read_text() == "made"
    assert ledger.happened("k")["state"] == "done"


def test_a_package_answers_a_file_and_records(tmp_path):
    folder = package(tmp_path / "p")
    (inbox := tmp_path / "in").mkdir()
    (inbox / "trips.csv").write_text("km\n9\n1\nfar\n")
    (inbox / "odd.csv").write_text("miles\n9\n")
    w = Watcher(inbox, tmp_path / "out", predict_action(folder), pattern="*.csv", settle_s=0, tries=1)
    assert {k: v for k, v in w.step().items() if v} == {"done": 1, "failed": 1}
    (made,) = (tmp_path / "out").glob("trips.*.csv")
    assert made.read_text().splitlines()[1].startswith("9,long,0.9,0.1,") and "far" in made.read_text()
    (tmp_path / "log.jsonl").write_text('{"km": 9}\n{"km": "far"}\n[1]\n{"km": 1}\n')
    assert Records(tmp_path / "log.jsonl", tmp_path / "said", predict_records(folder)).step()["records"] == 4
    (said,) = (tmp_path / "said").glob("log.*.jsonl")
    assert [json.loads(line)["prediction"] for line in said.read_text().splitlines()] == ["long", None, None, "short"]


@law
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans(), st.integers(1, 4)), min_size=1, max_size=12))
def test_every_record_is_in_one_batch_whoever_dies(tmp_path_factory, story):
    "Lines come, perhaps half of one; workers with batches of different size handle them, or die before or after the rename."
    folder, written, n = tmp_path_factory.mktemp("r"), "", 0
    log = folder / "log.jsonl"
    log.touch()
    act = lambda records, beside: beside.write_text(json.dumps(records)) and None
    for new, dies, most in story:
        written += "".join(f"{n + i}\n" for i in range(new)); n += new
        log.write_text(written + '{"half')
        worker = Records(log, folder / "out", act, Ledger(folder / "e.db"), most=most)
        if dies:
            start, known = worker._begin()
            if (end := worker._end(start)) > start and not known: worker.ledger.begin(f"log.jsonl@{start}", {"start": start, "end": end})
        else: worker.step()
        worker.ledger.close()
    last = Records(log, folder / "out", act, Ledger(folder / "e.db"), tries=100)
    while last.step()["done"]: pass
    last.ledger.close()
    assert [r for p in sorted((folder / "out").glob("log.*")) for r in json.loads(p.read_text())] == list(range(n))


def test_a_run_that_outlives_its_watcher_is_not_started_again(tmp_path):
    code = """import sys; from pathlib import Path; from slml_nb.events import *
ledger = Ledger(sys.argv[1]); action = command_action([sys.executable, "-c", "print('up', flush=True); import time; time.sleep(60)"], ledger)
once(ledger, "k", Path(sys.argv[1]).with_name("r"), action)"""
    p = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "e.db")], start_new_session=True)
    try:
        until = time.time() + 60
        while not any(f.stat().st_size for f in tmp_path.glob(".work*/r")): assert time.time() < until; time.sleep(0.02)
        os.kill(p.pid, signal.SIGKILL); p.wait()
        other = Ledger(tmp_path / "e.db")
        assert other.begin("k") is None  # the program still runs
    finally: os.killpg(p.pid, signal.SIGKILL)
    until = time.time() + 60
    while not (hold := other.begin("k")): assert time.time() < until; time.sleep(0.02)
    assert hold.tries == 2


def test_a_run_is_what_slml_run_says(tmp_path):
    ledger = Ledger(tmp_path / "e.db")
    with pytest.raises(SlmlError, match="none.yaml"): run_action(tmp_path / "none.yaml", ledger)("x", tmp_path / "out.json")


CHILD = """import os, sys, time
from pathlib import Path
from slml_nb.events import Ledger, Watcher
home = Path(sys.argv[1])
def act(path, beside):
    beside.write_text(path.read_text()[:3]); time.sleep(0.003)
    beside.write_text(f"{path.read_text()} {os.getpid()} {time.time_ns()}")
watcher = Watcher(home / "in", home / "out", act, Ledger(home / "e.db"), settle_s=0, tries=10_000)
print("up", flush=True)
watcher.watch(0.01)"""


@pytest.mark.slow
def test_killed_again_and_again_each_file_is_handled_once(tmp_path):
    (inbox := tmp_path / "in").mkdir()
    total, first, seen = 150, {}, collections.Counter()
    for i in range(total): (inbox / f"{i}.txt").write_text(f"content {i}")

    def look():
        for p in (tmp_path / "out").glob("*.out"):
            text = p.read_text()
            assert first.setdefault(p.name, text) == text  # never made a second time
    def start():
        child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        child.stdout.readline()
        return child
    workers, kills = [start(), start()], 0
    until = time.time() + 100
    try:
        while len(first) < total:
            assert time.time() < until, (len(first), kills)
            victim = workers.pop(0)
            time.sleep(0.05 + 0.02 * (kills % 4))
            look()
            if kills < 8: victim.kill(); victim.wait(); victim.stdout.close(); kills += 1; victim = start()
            workers.append(victim)
        look()
    finally:
        for w in workers: w.kill(); w.wait(); w.stdout.close()
    assert kills >= 3 and len({t.split(" ")[2] for t in first.values()}) >= 3  # several processes had their part
    assert sorted(" ".join(t.split(" ")[:2]) for t in first.values()) == sorted(f"content {i}" for i in range(total))
    Watcher(inbox, tmp_path / "out", None, ledger := Ledger(tmp_path / "e.db"), settle_s=0).step()
    assert ledger.counts() == {"done": total} and not list((tmp_path / "out").glob(".work*"))


# -- S3

@pytest.fixture
def bucket(monkeypatch):
    import boto3
    from moto import mock_aws
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"): monkeypatch.setenv(name, "x")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with mock_aws():
        s3 = boto3.client("s3")
        s3.create_bucket(Bucket="trips")
        yield s3


def news(key, etag, message="", name="ObjectCreated:Put"):
    from urllib.parse import quote_plus
    event = {"Records": [{"eventVersion": "2.1", "eventSource": "aws:s3", "eventName": name, "s3": {"bucket": {"name": "trips"},
             "object": {"key": quote_plus(key), "size": 3, "eTag": etag.strip('"'), "sequencer": "0055AED6DCD90281E5"}}}]}
    return {"Records": [{"messageId": message, "eventSource": "aws:sqs", "body": json.dumps(event)}]} if message else event


def test_an_object_is_answered_once_however_often_the_news_comes(tmp_path, bucket):
    handler = events_handler(package(tmp_path / "p"), str(tmp_path / "out"), ".csv", bucket)
    said = lambda told: {k: v for k, v in told.items() if v}
    put = lambda key, text: bucket.put_object(Bucket="trips", Key=key, Body=text)["ETag"]
    tag = put("in/my trips (1).csv", "km\n9\n")
    assert [said(handler(news("in/my trips (1).csv", tag, m))) for m in ("", "m1", "")] == [{"done": 1}, {"held": 1}, {"held": 1}]
    newer = put("in/my trips (1).csv", "km\n1\n")  # the news of the old content comes late: that one was answered
    assert [said(handler(news("in/my trips (1).csv", t))) for t in (tag, newer, newer)] == [{"held": 1}, {"done": 1}, {"held": 1}]
    assert sorted(p.read_text().splitlines()[1][:7] for p in (tmp_path / "out").glob("my trips*")) == ["1,short", "9,long,"]
    old, new = put("in/b.csv", "km\n2\n"), put("in/b.csv", "km\n3\n")
    assert [said(handler(news("in/b.csv", t))) for t in (new, old)] == [{"done": 1}, {"superseded": 1}]  # in the wrong order
    bucket.delete_object(Bucket="trips", Key="in/b.csv")
    assert said(handler(news("in/b.csv", '"other"'))) == {"superseded": 1}
    assert [said(handler(news(*n))) for n in (("in/", "x"), ("in/a.txt", "x"), ("in/b.csv", "x", "", "ObjectRemoved:Delete"))] == [{"ignored": 1}, {"ignored": 1}, {}]


def test_what_fails_is_sent_again_and_the_rest_is_not(tmp_path, bucket):
    handler = events_handler(package(tmp_path / "p"), str(tmp_path / "out"), ".csv", bucket)
    good, bad = (bucket.put_object(Bucket="trips", Key=k, Body=b)["ETag"] for k, b in (("good.csv", "km\n9\n"), ("bad.csv", "miles\n9\n")))
    both = {"Records": news("good.csv", good, "m1")["Records"] + news("bad.csv", bad, "m2")["Records"]}
    told = handler(both)
    assert (told["done"], told["failed"], told["batchItemFailures"]) == (1, 1, [{"itemIdentifier": "m2"}]) and "km" in told["why"][0]
    with pytest.raises(SlmlError, match="1 objects failed"): handler(news("bad.csv", bad))


def test_results_in_s3_never_start_the_function_again(tmp_path, bucket):
    handler = events_handler(package(tmp_path / "p"), "s3://trips/answers", ".csv", bucket)
    tag = bucket.put_object(Bucket="trips", Key="in/a.csv", Body="km\n9\n")["ETag"]
    assert [handler(news("in/a.csv", tag))["done"] for _ in "ab"] == [1, 0]
    (made,) = [o["Key"] for o in bucket.list_objects_v2(Bucket="trips", Prefix="answers/a.")["Contents"]]
    assert handler(news(made, "x"))["ignored"] == 1


def test_json_lines_are_answered_in_their_place_and_parquet_is_told_what_to_do(tmp_path, bucket):
    import gzip
    handler = events_handler(package(tmp_path / "p"), str(tmp_path / "out"), "", bucket)
    put = lambda key, body: news(key, bucket.put_object(Bucket="trips", Key=key, Body=body)["ETag"])
    said = lambda event: {k: v for k, v in handler(event).items() if v}
    lines = b'{"km": 9}\n{"km": \n\n{"km": "far"}\n{"km": 1}\n'
    events = [put("in/a.jsonl", lines), put("in/b.json.gz", gzip.compress(b'[{"km": 9}, {"km": 1}]')), put("in/c.PARQUET", b"PAR1"), put("in/d.csv.gz", gzip.compress(b"km\n9\n"))]
    assert [said(e) for e in events] == [{"done": 1}, {"done": 1}, {"refused": 1}, {"done": 1}]
    assert [said(e) for e in events] == [{"held": 1}] * 4
    (a,), (b,), (c,), (d,) = ([p.read_text() for p in (tmp_path / "out").glob(f"{n}*")] for n in "abcd")
    a = [json.loads(l) for l in a.splitlines()]
    assert [(l.get("km"), l["prediction"], bool(l.get("error"))) for l in a] == [(9, "long", False), (None, None, True), ("far", None, True), (1, "short", False)]
    assert "line 2 is not JSON" in a[1]["error"] and [json.loads(l)["prediction"] for l in b.splitlines()] == ["long", "short"] and "9,long" in d
    assert "in/c.PARQUET" in c and "slml predict RUN FILE.parquet" in c and "*.jsonl" in c
    assert [said(put(f"in/{n}", b"x")) for n in ("_SUCCESS", ".hidden.csv", "half.csv.part")] == [{"ignored": 1}] * 3
    nothing = put("in/e.jsonl", b"{\n{\n")
    with pytest.raises(SlmlError, match="1 objects failed"): handler(nothing)  # sent again, then in the queue of what failed


# -- the function in the account: template, zip, exactly once

@pytest.fixture(scope="module")
def aws():
    from test_kinesis import played_account
    with played_account() as url: yield url


@pytest.fixture(scope="module")
def function(aws, tmp_path_factory):
    "The function's zip, unpacked where nothing else can be imported but what Lambda's Python has: boto3."
    import boto3, zipfile
    from pathlib import Path
    from slml_nb.deploy import write_zip
    from slml_nb.events import events_files
    home = tmp_path_factory.mktemp("function")
    zipfile.ZipFile(write_zip(events_files(package(home / "p")), home / "events.zip")["file"]).extractall(home / "task")
    site = Path(boto3.__file__).parent.parent
    (home / "runtime").mkdir()
    for name in ("boto3", "botocore", "s3transfer", "jmespath", "dateutil", "urllib3", "six.py"): (home / "runtime" / name).symlink_to(site / name)
    boto3.client("dynamodb", endpoint_url=aws).create_table(TableName="happened", BillingMode="PAY_PER_REQUEST", KeySchema=[{"AttributeName": "event", "KeyType": "HASH"}], AttributeDefinitions=[{"AttributeName": "event", "AttributeType": "S"}])
    return home


@pytest.fixture
def files(aws, function, request):
    "A bucket of its own, versioned: what is written twice can be counted."
    import boto3
    s3, name = boto3.client("s3", endpoint_url=aws), "b" + hashlib.sha1(request.node.name.encode()).hexdigest()[:12]
    s3.create_bucket(Bucket=name)
    s3.put_bucket_versioning(Bucket=name, VersioningConfiguration={"Status": "Enabled"})

    class Files:
        bucket, client = name, s3

        def put(self, key, text):
            "A new object; the message that brings the news."
            tag = s3.put_object(Bucket=name, Key=key, Body=text)["ETag"].strip('"')
            body = {"source": "aws.s3", "detail-type": "Object Created", "detail": {"bucket": {"name": name}, "object": {"key": key, "etag": tag, "sequencer": "1"}}}
            return {"Records": [{"messageId": f"m {key}", "eventSource": "aws:sqs", "body": json.dumps(body)}]}

        def look(self): return {"Records": [{"messageId": "look", "eventSource": "aws:sqs", "body": json.dumps({"look": f"s3://{name}/in/"})}]}

        def answers(self):
            "Every version of every answer."
            found = s3.list_object_versions(Bucket=name, Prefix="answers/")
            return [(v["Key"], v["VersionId"]) for v in found.get("Versions", [])]

        def start(self, *events, wait_for=None, before=""):
            "An instance of the function, in a process of its own; it handles the events one after the other."
            code = f"""import json, os, sys, time; sys.path[:0] = [{str(function / 'task')!r}, {str(function / 'runtime')!r}]
{before}
import app; print('up', flush=True)
while sys.argv[2] and not os.path.exists(sys.argv[2]): time.sleep(0.001)
class Context:
    def get_remaining_time_in_millis(self): return 30_000
print(json.dumps([app.handler(e, Context()) for e in json.loads(sys.argv[1])])); print(json.dumps(sorted(set(sys.modules) & {{'duckdb', 'pandas', 'sklearn', 'slml_nb.run', 'slml_nb.deploy'}})))"""
            env = {"PATH": os.environ["PATH"], "AWS_ENDPOINT_URL": aws, "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1",
                   "SLML_OUT": f"s3://{name}/answers", "SLML_SUFFIX": ".csv", "SLML_LEDGER": "happened"}
            return subprocess.Popen([sys.executable, "-I", "-S", "-c", code, json.dumps(events), str(wait_for or "")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)

        def said(self, process):
            out, err = process.communicate(timeout=60)
            assert process.returncode == 0, err
            lines = [l for l in out.splitlines() if l != "up"]
            assert json.loads(lines[1]) == []  # nothing heavy was loaded
            return [{k: v for k, v in told.items() if v and k not in ("batchItemFailures", "why")} for told in json.loads(lines[0])]
    return Files()


@pytest.mark.slow
def test_the_template_passes_the_linter_and_the_linter_looks(tmp_path):
    from slml_nb.events import events_template
    from test_deploy import lint
    code, said = lint(tmp_path, {"events": events_template(), "large": events_template(memory_mb=3008, seconds=900, suffix=".parquet")})
    assert code == 0, said
    wrong = events_template()
    wrong["Resources"]["Takes"]["Properties"]["FunctionResponseTypes"] = ["ReportFailures"]
    assert lint(tmp_path, {"wrong": wrong})[0] != 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Tried to parse")
def test_a_new_object_comes_to_the_function_through_what_the_template_makes(tmp_path, monkeypatch):
    "Change sets, the rule, the queue, the table, by moto; its CloudFormation leaves out the bucket's notifications, which are set by hand here."
    import boto3
    from moto import mock_aws
    from slml_nb.deploy import execute, made_by, stack_now
    from slml_nb import events
    from slml_nb.events import TableLedger, deploy_events, events_template
    def alone(**size): (t := events_template(**size))["Resources"].pop("Takes"); return t  # moto would start docker; here the test takes the messages
    monkeypatch.setattr(events, "events_template", alone)
    for name, value in {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "eu-central-1"}.items(): monkeypatch.setenv(name, value)
    with mock_aws():
        client, s3, sqs = (boto3.client(s) for s in ("cloudformation", "s3", "sqs"))
        folder = package(tmp_path / "p")
        for _ in "ab":  # first the bucket for the code, then the function
            proposed = deploy_events(folder, "files", out=tmp_path, given={"Every": "rate(15 minutes)"})
            assert stack_now(client, proposed["stack"]) is None
            execute(client, s3, proposed["stack"], proposed["changeset"])
        made = made_by(client, "files")
        assert stack_now(client, "files")["parameters"]["Every"] == "rate(15 minutes)"
        s3.put_bucket_notification_configuration(Bucket=made["Inbox"], NotificationConfiguration={"EventBridgeConfiguration": {}})
        s3.put_object(Bucket=made["Inbox"], Key="in/my trips (1).csv", Body="km\n9\n")
        came = [m for _ in range(3) for m in sqs.receive_message(QueueUrl=made["Queue"], MaxNumberOfMessages=10).get("Messages", [])]
        assert came
        handler = events_handler(folder, f"s3://{made['Inbox']}/answers", ".csv", s3, TableLedger(made["Happened"]))
        told = [handler({"Records": [{"messageId": m["MessageId"], "eventSource": "aws:sqs", "body": m["Body"]}]}) for m in came]
        assert sum(t["done"] for t in told) == 1 and not any(t["failed"] for t in told)
        (answer,) = s3.list_objects_v2(Bucket=made["Inbox"], Prefix="answers/")["Contents"]
        assert b"9,long" in s3.get_object(Bucket=made["Inbox"], Key=answer["Key"])["Body"].read()
        targets = {t["Arn"] for r in ("News", "Look") for t in boto3.client("events").list_targets_by_rule(Rule=made[r])["Targets"]}
        assert len(targets) == 1 and made["Queue"].rpartition("/")[2] in targets.pop()


@pytest.mark.slow
def test_json_lines_and_parquet_by_the_zip(tmp_path, files):
    "What is packaged reads JSON lines, and knows what to say of Parquet."
    news = [files.put("in/a.jsonl", '{"km": 9}\n{"km": 1}\n'), files.put("in/b.parquet", "PAR1")]
    assert files.said(files.start(*news, *news, before="os.environ.pop('SLML_SUFFIX')")) == [{"done": 1}, {"refused": 1}, {"held": 1}, {"held": 1}]
    made = {k.rpartition(".")[2]: files.client.get_object(Bucket=files.bucket, Key=k)["Body"].read().decode() for k, _ in files.answers() if "/." not in k}
    assert [json.loads(l)["prediction"] for l in made["jsonl"].splitlines()] == ["long", "short"] and "slml predict" in made["txt"] and len(files.answers()) == 2


@pytest.mark.slow
def test_the_same_news_twice_and_by_two_at_once(tmp_path, files):
    "The function as its zip has it: one answer, written once."
    news = files.put("in/a.csv", "km\n9\n")
    assert files.said(files.start(news, news)) == [{"done": 1}, {"held": 1}] and len(files.answers()) == 1
    big = [files.put(f"in/big {i}.csv", "km\n" + "9\n" * 4000) for i in range(3)]
    both = [files.start(*big, *big, wait_for=tmp_path / "go") for _ in "ab"]
    for p in both: assert p.stdout.readline() == "up\n"
    (tmp_path / "go").touch()
    told = [t for p in both for t in files.said(p)]
    assert sum(t.get("done", 0) for t in told) == 3 and len(files.answers()) == 4
    assert len(told) == 12 and all(t in ({"done": 1}, {"held": 1}, {"failed": 1}) for t in told)  # failed: the other one has it, and the queue sends it again
    assert files.said(files.start(*big)) == [{"held": 1}] * 3


@pytest.mark.slow
def test_a_function_that_is_killed_and_news_that_were_lost(tmp_path, files, aws):
    "Killed in the middle: nobody may begin before its time is over, then the next one does; what nobody heard of is found by the timetable."
    from slml_nb.events import TableLedger
    import boto3
    news = files.put("in/a.csv", "km\n9\n")
    dying = files.start(news, before="import slml_nb.package as p\ndef stuck(*a): print('stuck', flush=True); time.sleep(60)\np.predict_table = stuck")
    assert [dying.stdout.readline() for _ in "ab"] == ["up\n", "stuck\n"]
    dying.kill(); dying.communicate()
    assert files.said(files.start(news)) == [{"failed": 1}] and files.answers() == []  # the message stays in the queue
    db = boto3.client("dynamodb", endpoint_url=aws)
    key = f"s3://{files.bucket}/in/a.csv@" + hashlib.md5(b"km\n9\n").hexdigest()
    item = db.get_item(TableName="happened", Key={"event": {"S": key}})["Item"]
    assert 60 < float(item["until"]["N"]) - time.time() < 95 and item["state"]["S"] == "claimed"  # 30 s that it had, and a minute
    db.update_item(TableName="happened", Key={"event": {"S": key}}, UpdateExpression="SET #u = :z", ExpressionAttributeNames={"#u": "until"}, ExpressionAttributeValues={":z": {"N": "0"}})
    files.put("in/lost.csv", "km\n1\n"); files.put("in/bad.csv", "miles\n1\n"); files.put("in/a.txt", "km\n1\n"); files.put("answers/in/x.csv", "km\n1\n")
    assert files.said(files.start(files.look(), files.look(), news)) == [{"done": 2, "failed": 1}, {"failed": 1}, {"held": 1}]
    assert sorted(k.split(".")[0] for k, _ in files.answers()) == ["answers/a", "answers/in/x", "answers/lost"]
    (made,) = [k for k, _ in files.answers() if k.startswith("answers/lost")]
    files.client.delete_object(Bucket=files.bucket, Key=made)  # somebody takes the answer away: it is not made again
    assert files.said(files.start(files.look())) == [{"held": 1, "failed": 1}]
    assert TableLedger("happened", db).begin(key)[1] == "done"


def test_the_plan_from_the_command_line(tmp_path, capsys):
    "`slml deploy PACKAGE --to events --plan` needs no account."
    from slml_nb.cli import main
    assert main(["deploy", str(package(tmp_path / "p")), "--to", "events", "--plan", "--rps", "0.01"]) == 0
    said = capsys.readouterr().out
    assert "AWS::SQS::Queue" in said and "dynamodb:UpdateItem" in said and "a month at 0.01" in said
