"""The log as a stream: throttled, half refused, answers lost, the stream gone, writers and readers killed; nothing acknowledged is lost, nothing counts twice."""
import contextlib, http.client, json, os, signal, socket, subprocess, sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from slml_nb.feedback import FeedbackLog, Learner, Shipper, Stream, collect, compact, open_traffic, read_joined, read_log
from slml_nb.traffic import Choice, Traffic, read_spec

KEYS = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}


def free_port():
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); return s.getsockname()[1]


def until(true, seconds=60):
    end = time.monotonic() + seconds
    while not (found := true()): assert time.monotonic() < end, "it did not come to pass"; time.sleep(0.02)
    return found


LOCKED = """import sys, threading
from moto.dynamodb.responses import DynamoHandler
from moto.server import main
one_at_a_time, unlocked = threading.Lock(), DynamoHandler.call_action
def locked(self):
    with one_at_a_time: return unlocked(self)
DynamoHandler.call_action = locked
main(sys.argv[1:])"""  # transactions of DynamoDB are whole; those of moto are not when two come at once


@contextlib.contextmanager
def moto_server(port=None):
    "moto in a process of its own; its address."
    port = port or free_port()
    p = subprocess.Popen([sys.executable, "-c", LOCKED, "-H", "127.0.0.1", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, **KEYS})
    def up():
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1): return True
    try: until(up); yield p, f"http://127.0.0.1:{port}"
    finally: p.kill(); p.wait()


@contextlib.contextmanager
def played_account():
    "The address of moto, and keys for it in the environment meanwhile."
    before = {k: os.environ.get(k) for k in KEYS}
    os.environ.update(KEYS)
    try:
        with moto_server() as (_, url): yield url
    finally:
        for k, v in before.items(): os.environ.pop(k) if v is None else os.environ.update({k: v})


@pytest.fixture(scope="module")
def aws():
    with played_account() as url: yield url


class Between(ThreadingHTTPServer):
    "Stands between a client and moto, and misbehaves: ok, throttle, half (every second record of PutRecords), lost (the answer), gone."
    daemon_threads = True

    def __init__(self, behind, mood="ok"):
        self.behind, self.mood, self.puts, self.told = behind.removeprefix("http://"), mood, [], 0
        super().__init__(("127.0.0.1", 0), Messenger)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def mood_now(self):
        self.told += 1
        return self.mood if isinstance(self.mood, str) else self.mood[self.told % len(self.mood)]

    def pass_on(self, target, body, headers):
        c = http.client.HTTPConnection(self.behind, timeout=30)
        c.request("POST", "/", body, {k: v for k, v in headers.items() if k.lower() not in ("content-length", "host")})
        reply = c.getresponse()
        try: return reply.status, reply.read()
        finally: c.close()


class Messenger(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_message(self, *args): pass

    def do_POST(self):
        body, target = self.rfile.read(int(self.headers["Content-Length"])), self.headers.get("X-Amz-Target", "")
        put = target.endswith(".PutRecords")
        mood = self.server.mood_now() if put else "ok"
        if put: self.server.puts.append(len(json.loads(body)["Records"]))
        if mood == "gone": self.connection.close(); self.close_connection = True; return
        if mood == "throttle": return self.say(400, json.dumps({"__type": "ProvisionedThroughputExceededException", "message": "slow down"}).encode())
        if mood == "half": return self.say(*self.half(target, json.loads(body)))
        status, said = self.server.pass_on(target, body, self.headers)
        if mood == "lost": self.connection.close(); self.close_connection = True; return
        self.say(status, said)

    def half(self, target, asked):
        "Only every second record gets through."
        records = asked["Records"]
        taken = records[1::2]
        status, said = self.server.pass_on(target, json.dumps({**asked, "Records": taken}).encode(), self.headers) if taken else (200, b'{"Records": []}')
        assert status == 200, said
        told = iter(json.loads(said)["Records"])
        refused = {"ErrorCode": "ProvisionedThroughputExceededException", "ErrorMessage": "slow down"}
        answers = [next(told) if i % 2 else refused for i in range(len(records))]
        return 200, json.dumps({"FailedRecordCount": len(records) - len(taken), "Records": answers}).encode()

    def say(self, status, body):
        self.send_response(status)
        self.send_header("Content-Type", "application/x-amz-json-1.1")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def between(aws):
    server = Between(aws)
    yield server
    server.shutdown(); server.server_close()


def stream_of(url, name, shards=2):
    import boto3
    client = boto3.client("kinesis", endpoint_url=url)
    client.create_stream(StreamName=name, ShardCount=shards)
    return client


def spec_in(folder, name, url, **more):
    return read_spec({"name": "cab", "policy": "thompson", "variants": ["old", "new"], "state": str(folder / "state.db"), "log": str(folder / "log"),
                      "stream": f"kinesis://{name}", "endpoint_url": url, "refresh_s": 0.2, **more})


def elsewhere(spec, folder, url): return {**spec, "log": str(folder), "endpoint_url": url}  # as another machine reads it
def lines(table): return sorted(map(str, table.to_pylist()))
def put_records(client, name):
    "Everything that is in a stream, repetitions too."
    out = []
    for shard in client.list_shards(StreamName=name)["Shards"]:
        at = client.get_shard_iterator(StreamName=name, ShardId=shard["ShardId"], ShardIteratorType="TRIM_HORIZON")["ShardIterator"]
        while at and (page := client.get_records(ShardIterator=at))["Records"]: out += page["Records"]; at = page.get("NextShardIterator")
    return out


def test_a_stream_in_every_mood(tmp_path, aws, between):
    "While the stream throttles, refuses half, loses its answers or is gone, all is answered at once; afterwards all of it is there, once."
    client = stream_of(aws, "moods")
    spec = spec_in(tmp_path, "moods", between.url)
    between.mood = ["throttle", "half", "gone", "lost", "half"]
    traffic, log = open_traffic(spec)
    for i in range(600):
        choice = traffic.choose({}, f"ride {i}")
        log.prediction(choice, {"km": i}, {"prediction": i})
        if i % 3 == 0: assert log.answer(json.dumps({"id": choice.id, "reward": 1}).encode())[0] == 202
        time.sleep(0.001)
    until(lambda: log.shipper and log.shipper.again > 0 and log.shipper.sent > 0)
    between.mood = "ok"
    until(lambda: log.shipper.status()["waiting_bytes"] == 0 and not log.shipper.failures)
    assert max(between.puts) <= 500 and log.status()["stream"]["problem"] == ""
    log.close(); traffic.close()
    there = elsewhere(spec, tmp_path / "there", aws)
    told = collect(there)
    assert told["lines"] > 800 and read_log(there["log"]).num_rows == 800  # some came twice
    assert lines(read_log(there["log"])) == lines(read_log(spec["log"]))
    records = put_records(client, "moods")
    assert len(records) > 800 and {r["PartitionKey"] for r in records} == {f"ride {i}" for i in range(600)}
    shard_of = {}
    for shard in client.list_shards(StreamName="moods")["Shards"]:
        at = client.get_shard_iterator(StreamName="moods", ShardId=shard["ShardId"], ShardIteratorType="TRIM_HORIZON")["ShardIterator"]
        for r in client.get_records(ShardIterator=at)["Records"]: shard_of.setdefault(json.loads(r["Data"])["id"], set()).add(shard["ShardId"])
    assert {len(s) for s in shard_of.values()} == {1} and len(set.union(*shard_of.values())) == 2  # a prediction and its feedback in one shard


def test_a_stream_that_is_gone_for_a_while(tmp_path, aws, between):
    "Segments grow, nothing is compacted away, and all of it drains when the stream is back; then only Parquet remains, or nothing where `keep` is false."
    stream_of(aws, "gone")
    for keep in (True, False):
        spec = spec_in(tmp_path / str(keep), "gone", between.url, keep=keep, wait_s=0.5)
        between.mood = "gone"
        traffic, log = open_traffic(spec)
        for i in range(300): log.prediction(traffic.choose({}, f"{keep} {i}"), {}, {"prediction": i})
        log.segment.renew(older_than_s=0)
        until(lambda: log.shipper and log.shipper.failures > 1)
        assert log.status()["stream"]["waiting_bytes"] > 0 and "onnection" in log.status()["stream"]["problem"]
        assert (compact(spec["log"], 0)["unsent"], read_log(spec["log"]).num_rows) == (1, 300)
        between.mood = "ok"
        until(lambda: log.shipper.status()["waiting_bytes"] == 0)
        if not keep: until(lambda: read_log(spec["log"]).num_rows == 0)
        log.close(); traffic.close()
        if keep: assert compact(spec["log"], 0)["rows"] == 300
        assert read_log(spec["log"]).num_rows == (300 if keep else 0)
    collect(there := elsewhere(spec, tmp_path / "there", aws))
    assert read_log(there["log"]).num_rows == 600


WORKER = """import sys, json
from slml_nb.feedback import open_traffic
traffic, log = open_traffic(json.loads(sys.argv[1]))
for i in range(int(sys.argv[3])):
    choice = traffic.choose({}, f"{sys.argv[2]}-{i}")
    log.prediction(choice, {"km": i}, 1.0); log.feedback(choice.id, 1.0); print(choice.id, flush=True)
log.close(); traffic.close()"""


@pytest.mark.slow
def test_writers_that_are_killed(tmp_path, aws, between):
    "Three workers share a folder and a moody stream and are killed one after the other, the one who sends first; a fourth ends as it should. Whatever was acknowledged is in the stream, and counts once."
    stream_of(aws, "killed", 3)
    spec, between.mood = spec_in(tmp_path, "killed", between.url), ["half", "ok", "lost", "ok", "throttle"]
    def start(who, n): return subprocess.Popen([sys.executable, "-c", WORKER, json.dumps(spec), who, str(n)], stdout=open(tmp_path / f"told {who}", "w"), env={**os.environ, **KEYS})
    workers = [start(f"{i}", 100_000) for i in range(3)]
    for w in workers: time.sleep(1.0); w.send_signal(signal.SIGKILL); w.wait()
    assert between.puts  # they were sending when they died
    between.mood = "ok"
    last = start("last", 5)
    assert last.wait(60) == 0
    told = {t for f in tmp_path.glob("told *") for t in f.read_text().splitlines()[:-1]}
    stream = Stream(spec["stream"], aws)
    until(lambda: Shipper(spec["log"], stream).step())
    collect(there := elsewhere(spec, tmp_path / "there", aws))
    joined = read_joined(there)
    rewarded = {i for i, r in zip(joined["id"].to_pylist(), joined["reward"].to_pylist()) if r == 1.0}
    assert told <= rewarded and len(told) > 30
    assert lines(read_log(there["log"])) == lines(read_log(spec["log"])) and max(joined["said"].to_pylist()) == 1
    assert max(between.puts) <= 500


def test_a_worker_that_is_told_to_end_sends_the_rest(tmp_path, aws):
    "The disk of a container goes with it: closing the log brings what is left into the stream."
    stream_of(aws, "ends")
    spec = spec_in(tmp_path, "ends", aws)
    subprocess.run([sys.executable, "-c", WORKER, json.dumps(spec), "w", "200"], check=True, stdout=subprocess.DEVNULL, env={**os.environ, **KEYS})
    collect(there := elsewhere(spec, tmp_path / "there", aws))
    assert read_log(there["log"]).num_rows == 400


@pytest.mark.slow
def test_shards_that_are_split_and_merged(tmp_path, aws):
    "Old shards are read to their end and new ones from their beginning, whenever somebody looks. (moto moves the records of a shard that is split; Amazon leaves them there: either way each counts once.)"
    client, spec = stream_of(aws, "shards", 1), spec_in(tmp_path, "shards", aws)
    log, there = FeedbackLog.open(spec, background=False), elsewhere(spec, tmp_path / "there", aws)
    ships, shard = Shipper(spec["log"], Stream(spec["stream"], aws)), lambda: [s for s in client.list_shards(StreamName="shards")["Shards"] if "EndingSequenceNumber" not in s["SequenceNumberRange"]]
    for round_, change in enumerate(("split", "look", "merge", "look", "")):
        for i in range(100): log.feedback(f"{round_} {i}", 1.0)
        assert ships.step()
        if change == "look": collect(there, most=30)
        elif change == "split": client.split_shard(StreamName="shards", ShardToSplit=shard()[0]["ShardId"], NewStartingHashKey=str(2**127))
        elif change: client.merge_shards(StreamName="shards", ShardToMerge=shard()[0]["ShardId"], AdjacentShardToMerge=shard()[1]["ShardId"])
    assert collect(there)["shards"] == len(client.list_shards(StreamName="shards")["Shards"]) >= 4
    assert sorted(read_log(there["log"])["id"].to_pylist()) == sorted(f"{r} {i}" for r in range(5) for i in range(100))
    assert collect(there)["lines"] == 0
    log.close()


@pytest.mark.slow
def test_a_reader_that_is_killed(tmp_path, aws):
    "Killed at any moment, a reader goes on where it was: its files say how far they go."
    stream_of(aws, "reader")
    spec = spec_in(tmp_path, "reader", aws)
    log, there = FeedbackLog.open(spec, background=False), elsewhere(spec, tmp_path / "there", aws)
    for i in range(2000): log._put({"k": "f", "id": f"{i}", "t": 0.0, "w": 1.0})
    assert Shipper(spec["log"], Stream(spec["stream"], aws)).step()
    code = """import json, os, sys, threading, random; from slml_nb.feedback import collect, Stream; import pyarrow.parquet, boto3
spec = json.loads(sys.argv[1]); Stream(spec["stream"], spec["endpoint_url"])
threading.Timer(random.random() * 0.25, os._exit, [9]).start(); collect(spec, most=100); os._exit(0)"""
    died = [subprocess.run([sys.executable, "-c", code, json.dumps(there)], capture_output=True).returncode for _ in range(5)]
    assert 9 in died
    collect(there)
    assert sorted(read_log(there["log"])["id"].to_pylist(), key=int) == [f"{i}" for i in range(2000)]
    log.close()


def test_firehose_writes_lines_to_s3(tmp_path, aws):
    "The same lines, for those who read them from S3."
    import boto3
    s3, hose = boto3.client("s3", endpoint_url=aws), boto3.client("firehose", endpoint_url=aws)
    s3.create_bucket(Bucket="rides")
    hose.create_delivery_stream(DeliveryStreamName="rides", ExtendedS3DestinationConfiguration={"RoleARN": "arn:aws:iam::123456789012:role/x", "BucketARN": "arn:aws:s3:::rides"})
    log = FeedbackLog(tmp_path / "log", spec={})
    for i in range(1200): log._put({"k": "f", "id": f"{i}", "t": 0.0, "w": 1.0})
    assert Shipper(tmp_path / "log", Stream("firehose://rides", aws)).step()
    objects = [s3.get_object(Bucket="rides", Key=o["Key"])["Body"].read() for o in s3.list_objects_v2(Bucket="rides")["Contents"]]
    assert sorted((json.loads(l)["id"] for o in objects for l in o.splitlines()), key=int) == [f"{i}" for i in range(1200)]
    log.close()


def test_a_stream_that_is_not_there(tmp_path, aws):
    "Made later, it gets all from the beginning; the reason stands in the status meanwhile."
    spec = spec_in(tmp_path, "later", aws)
    log = FeedbackLog.open(spec, background=False)
    for i in range(10): log.feedback(f"{i}", 1.0)
    ships = Shipper(spec["log"], Stream(spec["stream"], aws))
    assert not ships.step() and "ResourceNotFoundException" in ships.status()["problem"]
    stream_of(aws, "later")
    assert ships.step() and collect(elsewhere(spec, tmp_path / "there", aws))["lines"] == 10
    log.close()


def test_from_the_command_line(tmp_path, aws, capsys):
    "`slml serve --log kinesis://…` keeps the folder of the spec; `slml traffic --collect` reads the stream."
    from slml_nb.cli import _variants, main
    stream_of(aws, "typed")
    spec = {k: v for k, v in spec_in(tmp_path, "typed", aws).items() if k != "stream"}
    (tmp_path / "cab.json").write_text(json.dumps(spec))
    traffic, log = _variants(str(tmp_path / "cab.json"), {f"cab.{v}": tmp_path for v in spec["variants"]}, "kinesis://typed")
    assert (log.spec["stream"], str(log.folder)) == ("kinesis://typed", str(tmp_path / "log"))
    log.feedback("ride 1", 1.0)
    log.close(); traffic.close()
    (tmp_path / "far.json").write_text(json.dumps({**spec, "log": str(tmp_path / "far"), "stream": "kinesis://typed"}))
    assert main(["traffic", str(tmp_path / "far.json"), "--collect"]) == 0
    assert "1 lines" in capsys.readouterr().err and read_log(tmp_path / "far").num_rows == 1


@pytest.mark.slow
def test_a_server_that_is_told_to_end_sends_the_rest(tmp_path, aws, between):
    "`slml serve --log kinesis://…`: predictions and feedback over HTTP while the stream is gone, then SIGTERM, and the stream is back: it gets all of it."
    from test_cascade import package
    stream_of(aws, "served")
    folder, port = package(tmp_path / "p"), free_port()
    between.mood, spec = "gone", {k: v for k, v in spec_in(tmp_path, "served", between.url).items() if k != "stream"}
    (tmp_path / "cab.json").write_text(json.dumps({**spec, "variants": {"old": str(folder), "new": str(folder)}}))
    code = "import sys; from slml_nb.cli import main; sys.exit(main())"
    server = subprocess.Popen([sys.executable, "-c", code, "serve", "--traffic", str(tmp_path / "cab.json"), "--log", "kinesis://served", "--port", str(port), "--workers", "1"], cwd=tmp_path, env={**os.environ, **KEYS})

    def ask(path, body):
        c = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        try:
            c.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            reply = c.getresponse()
            return reply.status, reply.getheader("X-Prediction-Id"), reply.read()
        except OSError: return None
        finally: c.close()
    try:
        until(lambda: (said := ask("/cab/predict", {"km": 9})) and said[0] == 200)
        for i in range(50):
            status, id, text = ask("/cab/predict", {"km": i % 20 + 1})
            assert (status, ask("/cab/feedback", {"id": id, "reward": 1})[0]) == (200, 202), text
        until(lambda: len(between.puts) > 5)  # by now it waits for seconds between two attempts
        between.mood = "ok"
        server.terminate()
        assert server.wait(30) is not None
    finally: server.kill(); server.wait()
    collect(there := elsewhere({**spec, "stream": "kinesis://served"}, tmp_path / "there", aws))
    joined = read_joined(there)
    assert joined.num_rows >= 51 and sum(r == 1.0 for r in joined["reward"].to_pylist()) == 50
