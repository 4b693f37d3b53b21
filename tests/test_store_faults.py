"""A store whose server answers 500 and 503, breaks off and dawdles; makers that are killed; clocks that are wrong. What is lost, and what is there twice: nothing."""
import collections, errno, hashlib, http.client, http.server, json, os, random, signal, socket, subprocess, sys, threading, time
from pathlib import Path

import pytest

from slml_nb.core import SlmlError, seal, sealed
from slml_nb.store import FolderStore, S3Store, folder_of, open_store, put_folder, writable

pytestmark = pytest.mark.slow

root = Path(__file__).resolve().parent.parent


# ---- a server in trouble: a proxy before moto

def trouble(code): return f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>please reduce your request rate</Message></Error>".encode()


class Proxy(http.server.ThreadingHTTPServer):
    "Passes requests on to an S3 server, except for a random share of them. Writes go one at a time: S3's conditions are atomic, the test server's are not."
    daemon_threads, request_queue_size = True, 128
    kinds = ("500 before", "500 after", "503", "no answer", "cut", "slow")

    def __init__(self, upstream, share=0.0, seed=0, kinds=kinds, port=0):
        super().__init__(("127.0.0.1", port), Handler)
        self.upstream, self.share, self.kinds, self.random = upstream, share, kinds, random.Random(seed)
        self.lock, self.writing, self.counts, self.gets = threading.Lock(), threading.Lock(), collections.Counter(), collections.Counter()
        self.url, self.links = "http://%s:%s" % self.server_address, []
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def fate(self):
        with self.lock:
            kind = self.random.choice(self.kinds) if self.random.random() < self.share else "well"
            self.counts[kind] += 1
            return kind

    def handle_error(self, *_): pass  # a client that hangs up is no news

    def process_request(self, request, client):
        self.links.append(request)
        super().process_request(request, client)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version, wbufsize = "HTTP/1.1", -1  # an answer leaves in one piece

    def log_message(self, *_): pass

    def handle_expect_100(self): return super().handle_expect_100() and not self.wfile.flush()

    def pass_on(self, body):
        "What the server behind says: status, headers, body."
        link = http.client.HTTPConnection(*self.server.upstream, timeout=30)
        try:
            link.request(self.command, self.path, body, {k: v for k, v in self.headers.items() if k.lower() != "expect"})
            answer = link.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally: link.close()

    def say(self, status, headers, body, cut=False):
        self.send_response_only(status)
        length = dict((k.lower(), v) for k, v in headers).get("content-length") if self.command == "HEAD" else str(len(body))
        for k, v in headers:
            if k.lower() not in ("content-length", "transfer-encoding", "connection"): self.send_header(k, v)
        self.send_header("Content-Length", length or "0")
        self.end_headers()
        if self.command != "HEAD": self.wfile.write(body[:len(body) // 2] if cut else body)
        self.wfile.flush()
        if cut: self.close_connection = True

    def do_any(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.command == "GET": self.server.gets[self.path] += 1
        fate = self.server.fate()
        if fate == "slow": time.sleep(0.1)
        if fate == "500 before": return self.say(500, [], trouble("InternalError"))
        if fate == "503": return self.say(503, [], trouble("SlowDown"))
        if self.command in ("PUT", "POST", "DELETE"):
            with self.server.writing: answer = self.pass_on(body)
        else: answer = self.pass_on(body)
        if fate == "500 after": return self.say(500, [], trouble("InternalError"))
        if fate == "no answer" or fate == "cut" and (len(answer[2]) < 2 or self.command == "HEAD"):
            self.close_connection = True
            return
        self.say(*answer, cut=fate == "cut")

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = do_any


@pytest.fixture(scope="module")
def moto():
    import boto3, logging
    from moto.server import ThreadedMotoServer
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    before = dict(os.environ)
    os.environ.update(AWS_ACCESS_KEY_ID="test", AWS_SECRET_ACCESS_KEY="test", AWS_DEFAULT_REGION="us-east-1")
    boto3.client("s3", endpoint_url="http://%s:%s" % server.get_host_and_port()).create_bucket(Bucket="rows")
    yield server.get_host_and_port()
    os.environ.clear(), os.environ.update(before)
    server.stop()


@pytest.fixture
def proxy(moto, request):
    made = []
    def start(**how): return made.append(Proxy(moto, **how)) or made[-1]
    yield start
    for p in made: p.shutdown(), p.server_close()


@pytest.fixture
def quick(monkeypatch):
    "Waiting between attempts is short here."
    from botocore.retries import standard
    monkeypatch.setenv("SLML_S3_PATIENCE", "0")
    monkeypatch.setattr(random, "random", lambda: 0.02)
    monkeypatch.setattr(standard.ExponentialBackoff, "delay_amount", lambda self, context: 0.002)


@pytest.fixture(params=["folder", "bucket"])
def store(request, tmp_path, proxy):
    "A store of each kind, with nothing wrong."
    if request.param == "folder": return FolderStore(tmp_path / "store")
    return S3Store(f"s3://rows/{tmp_path.name}", proxy().url, tmp_path / "cache")


def made_folder(place, **files):
    "A folder as a stage leaves it, with the hash of each file in made.json."
    for name, data in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(data)
    (place / "made.json").write_text(json.dumps(seal({"files": {n: hashlib.sha256(d).hexdigest() for n, d in files.items()}})))
    return place


def whole(store, key, endpoint=""):
    "The record of a folder, after every file that it names has been read and hashed."
    made, place = folder_of(store, key)
    there = open_store(place, endpoint)
    assert sealed(made)
    assert {n: hashlib.sha256(there.get(n)).hexdigest() for n in made["files"]} == made["files"]
    return made


# ---- right answers through a bad line

@pytest.mark.parametrize("seed", [1, 2])
def test_every_verb_through_a_bad_line(moto, proxy, quick, tmp_path, seed):
    line = proxy(share=0.3, seed=seed)
    s = S3Store(f"s3://rows/verbs{seed}", line.url, tmp_path / "cache")
    data = {f"d/{i:02}": random.Random(i).randbytes(1 + i * 997) for i in range(20)}
    for k, v in data.items(): s.put(k, v)
    assert s.list("d/") == sorted(data)
    assert {k: s.get(k) for k in data} == data
    assert [s.put_if_absent(k, b"never") for k in data] == [False] * 20
    assert [s.put_if_absent(f"new/{i}", str(i)) for i in range(20)] == [True] * 20  # also when the answer to the first attempt was lost
    assert [s.put_if_absent(f"new/{i}", str(i)) for i in range(20)] == [False] * 20  # and not because the content is the same
    assert [s.get(f"new/{i}") for i in range(20)] == [str(i).encode() for i in range(20)]
    assert [s.exists(k) for k in (*data, "d/none")] == [True] * 20 + [False]
    for k, v in list(data.items())[:8]: assert s.local(k, hashlib.sha256(v).hexdigest()).read_bytes() == v
    assert sorted(p.name for p in s.local("new").iterdir()) == sorted(str(i) for i in range(20))
    assert not list((tmp_path / "cache").glob(".part-*"))
    for i in range(5): s.delete(f"new/{i}")
    s.delete_folder("new")
    assert s.list() == sorted(data)
    assert all(line.counts[k] for k in Proxy.kinds), line.counts


def test_large_files_through_a_bad_line(proxy, quick, tmp_path):
    "In parts, by several threads, up and down."
    line, big = proxy(share=0.25, seed=3, kinds=("500 before", "500 after", "503", "no answer", "cut")), tmp_path / "big"
    big.write_bytes(random.Random(0).randbytes(1 << 20) * 40)
    s = S3Store("s3://rows/large", line.url, tmp_path / "cache")
    s.put("big", big)
    digest = hashlib.sha256(big.read_bytes()).hexdigest()
    assert hashlib.sha256(s.local("big", digest).read_bytes()).hexdigest() == digest
    assert s.list() == ["big"]


def test_folders_and_claims_through_a_bad_line(proxy, quick, tmp_path):
    line = proxy(share=0.3, seed=4)
    s = S3Store("s3://rows/folders", line.url, tmp_path / "cache")
    for i in range(8):
        with s.claim(f"p/{i}") as claim:  # granted, even when the answer was lost
            assert s.claim(f"p/{i}") is None and f"pid {os.getpid()}" in s.holder(f"p/{i}")
            assert put_folder(s, f"p/{i}", made_folder(tmp_path / f"a{i}", x=b"first" * 100, **{"deep/y": bytes([i])}))
            assert not put_folder(s, f"p/{i}", made_folder(tmp_path / f"b{i}", x=b"second"))
        assert not claim.lost and s.holder(f"p/{i}") == ""
        assert whole(s, f"p/{i}", line.url)["files"].keys() == {"x", "deep/y"}
    assert len(s.list()) == 8 * 3  # of the second ones nothing is left
    line.share = 0
    assert not [o for page in s._pages("") for o in page if o.endswith(".claim")]


def test_two_writers_of_one_folder_never_mix(proxy, tmp_path):
    "Both upload at the same time; one is kept whole, of the other nothing is left."
    url = proxy().url
    stores, start, got = [S3Store("s3://rows/two", url, tmp_path / "cache") for _ in range(6)], threading.Barrier(6), {}
    def write(i):
        place = made_folder(tmp_path / str(i), **{f"f{j}": f"{i} {j}".encode() for j in range(6)}, **{f"only{i}": b"x"})
        start.wait()
        got[i] = put_folder(stores[i], "p/k", place)
    threads = [threading.Thread(target=write, args=(i,)) for i in range(6)]
    for t in threads: t.start()
    for t in threads: t.join()
    winner, = [i for i, first in got.items() if first]
    assert whole(stores[0], "p/k", url)["files"].keys() == {*(f"f{j}" for j in range(6)), f"only{winner}"}
    assert len(stores[0].list()) == 8


# ---- errors that say what to do

@pytest.mark.parametrize("kind, words", [("503", "SlowDown"), ("500 before", "InternalError"), ("no answer", "ConnectionClosedError"), ("cut", "")])
def test_a_server_that_never_recovers(proxy, quick, tmp_path, kind, words):
    s = S3Store("s3://rows/never", proxy(share=1.0, kinds=(kind,)).url, tmp_path / "cache")
    for call in (lambda: s.put("k", "x"), lambda: s.get("k"), lambda: s.list(), lambda: s.exists("k"), lambda: s.put_if_absent("k", "x"), lambda: s.claim("k"),
                 lambda: s.put("k", Path(__file__)), lambda: s.local("k"), lambda: s.delete_folder("k"), lambda: put_folder(s, "p", made_folder(tmp_path / "m", x=b"x"))):
        with pytest.raises(SlmlError, match="s3://rows/never.*the same command goes on, later") as e: call()
        assert words in str(e.value) or "503" in str(e.value) or "500" in str(e.value)
    assert "later" in writable(s)
    assert not [p for p in (tmp_path / "cache").iterdir() if p.name not in (".lock", ".claims")]


def test_what_the_server_refuses(moto, proxy, tmp_path, monkeypatch):
    "Each refusal ends with the way out; a test server knows few of them, so the words of S3 are played."
    url = proxy().url
    for status, code, words in [(403, "AccessDenied", "s3:ListBucket"), (400, "ExpiredToken", "log in again"), (403, "RequestTimeTooSkewed", "the clock of this machine"),
                                (404, "NoSuchBucket", "make the bucket"), (403, "InvalidAccessKeyId", "get-caller-identity")]:
        with monkeypatch.context() as m:
            m.setattr(Handler, "pass_on", lambda self, body: (status, [("Content-Type", "application/xml")], b"" if self.command == "HEAD" else trouble(code)))
            s = S3Store("s3://rows/refused", url, tmp_path / "cache")
            assert code in writable(s) and words in writable(s)
            with pytest.raises(SlmlError, match=words): s.put("k", Path(__file__))
            with pytest.raises(SlmlError, match=words): s.list()
            if status == 403:
                with pytest.raises(SlmlError, match="403"): s.exists("k")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "export AWS_PROFILE" in writable(S3Store("s3://rows/refused", url, tmp_path / "cache"))


def test_a_server_without_conditions(proxy, tmp_path, monkeypatch):
    "Claims are granted to all, folders still never mix."
    plain = Handler.pass_on
    monkeypatch.setattr(Handler, "pass_on", lambda self, body: (501, [], trouble("NotImplemented")) if {"If-Match", "If-None-Match"} & set(self.headers) else plain(self, body))
    url = proxy().url
    s = S3Store("s3://rows/old", url, tmp_path / "cache")
    with s.claim("k"), s.claim("k"): pass
    assert put_folder(s, "k", made_folder(tmp_path / "a", x=b"1")) and not put_folder(s, "k", made_folder(tmp_path / "b", x=b"2"))
    assert whole(s, "k", url) and open_store(folder_of(s, "k")[1], url).get("x") == b"1"


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    "A disk that can only be read, a full one, and a file in the way."
    (tmp_path / "file").write_text("x")
    blocked = FolderStore(tmp_path / "file")
    assert "a file where a folder should be" in writable(blocked) and str(tmp_path / "file") in writable(blocked)
    for call in (lambda: blocked.claim("k"), lambda: blocked.put_if_absent("k", "x"), lambda: put_folder(blocked, "k", made_folder(tmp_path / "m", x=b"x"))):
        with pytest.raises(SlmlError, match="move it away"): call()
    s = FolderStore(tmp_path / "s")
    for number, words in [(errno.EROFS, "can only be read"), (errno.EACCES, "may not write"), (errno.ENOSPC, "the disk is full"), (errno.EDQUOT, "quota")]:
        def fail(*_, **__): raise OSError(number, os.strerror(number))
        with monkeypatch.context() as m:
            m.setattr(os, "fsync", fail)
            assert words in writable(s) and "set store:" in writable(s)
    assert writable(s) == "" and not list(s.root.rglob("*"))


@pytest.mark.parametrize("mount, words", [("-o size=200k", "the disk is full"), ("-o ro", "can only be read")])
def test_a_real_small_disk(tmp_path, mount, words):
    "A tmpfs of its own: the error is in words, and half a file is never left."
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode: pytest.skip("no right to mount a small disk here")
    code = """
import os, sys
from pathlib import Path
from slml_nb.core import SlmlError
from slml_nb.store import FolderStore, put_folder, writable
s, big = FolderStore("disk"), Path("big")
big.mkdir(); (big / "x").write_bytes(b"x" * 1_000_000); (big / "made.json").write_text("{}")
for call in (lambda: s.put("k", big / "x"), lambda: s.put_if_absent("k", big / "x"), lambda: put_folder(s, "k", big)):
    try: call(); print("no error")
    except SlmlError as e: print(e)
print("left", [str(p) for p in Path("disk").rglob("*") if p.is_file()], (big / "x").stat().st_size)
if sys.argv[1] == "ro":
    try: s.claim("k")
    except SlmlError as e: print(e)
    print(writable(s))
"""
    (tmp_path / "disk").mkdir()
    r = subprocess.run(["unshare", "-rm", "sh", "-c", f'mount -t tmpfs {mount} none disk && "$@"', "sh", sys.executable, "-c", code, mount[3:5]], cwd=tmp_path,
                       env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True)
    lines = r.stdout.splitlines()
    assert r.returncode == 0 and "left [] 1000000" in lines, r.stdout + r.stderr
    assert all(words in l and "set store:" in l for l in lines if not l.startswith("left")), r.stdout


# ---- several at once

WORKERS = """
import hashlib, json, os, random, sys, time, traceback
from pathlib import Path
from slml_nb.core import seal
from slml_nb.store import open_store, put_folder, folder_of
uri, url, work = sys.argv[1], sys.argv[2], Path(sys.argv[3])
if uri.startswith("s3://"):
    import boto3
    from botocore.retries import standard
    standard.ExponentialBackoff.delay_amount = lambda self, context: 0.01

def worker(me):
    store, keys, made = open_store(uri, url), [f"p/k{i}" for i in range(5)], []
    random.seed(me), random.shuffle(keys)
    todo = list(keys)
    while todo:
        key = todo.pop(0)
        if store.exists(f"{key}/made.json"): continue
        if not (claim := store.claim(key)):
            todo.append(key), time.sleep(0.02 + 0.1 * random.random())
            continue
        with claim:
            if store.exists(f"{key}/made.json"): continue
            place = work / f"{me}-{key[2:]}"
            place.mkdir()
            data = f"{me} made {key}".encode()
            (place / "x").write_bytes(data), (place / "who").write_text(str(me))
            (place / "made.json").write_text(json.dumps(seal({"by": me, "files": {"x": hashlib.sha256(data).hexdigest()}})))
            time.sleep(0.05)
            made.append([key, put_folder(store, key, place)])
    (work / f"{me}.json").write_text(json.dumps({"made": made, "seen": {k: folder_of(store, k)[0] for k in sorted(keys)}}))

for me in range(8):
    if not os.fork():
        try: worker(me)
        except BaseException: traceback.print_exc()
        finally: os._exit(0)
for _ in range(8): os.wait()
"""


def start(code, *argv):
    return subprocess.Popen([sys.executable, "-c", code, *map(str, argv)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(root)})


@pytest.mark.parametrize("where, share", [("folder", 0), ("bucket", 0.1)])
def test_eight_processes_share_the_work(proxy, tmp_path, where, share):
    line = proxy(share=share, seed=5)
    uri = str(tmp_path / "store") if where == "folder" else "s3://rows/eight"
    (tmp_path / "work").mkdir()
    assert start(WORKERS, uri, line.url, tmp_path / "work").wait(timeout=100) == 0
    found = [json.loads((tmp_path / f"work/{i}.json").read_text()) for i in range(8)]
    made = sorted(key for f in found for key, first in f["made"] if first)
    assert made == [f"p/k{i}" for i in range(5)]  # each once
    assert sum(len(f["made"]) for f in found) == 5  # and by nobody in vain
    assert all(f["seen"] == found[0]["seen"] for f in found)
    s = open_store(uri, line.url)
    for k in made: whole(s, k, line.url)
    assert len(s.list()) == 5 * 3 and all(s.holder(k) == "" for k in made)


def test_many_threads_and_one_key(store):
    "Of all who ask at once one gets it; handed on many times, never to two."
    inside, most, turns, lock = [], [], [], threading.Lock()
    rounds = 25 if isinstance(store, FolderStore) else 2
    def work():
        done = 0
        while done < rounds:
            if not (claim := store.claim("p/k")):
                time.sleep(0.001)
                continue
            with claim:
                with lock: inside.append(1), most.append(len(inside)), turns.append(1)
                time.sleep(0.0005)
                with lock: inside.pop()
            done += 1
    threads = [threading.Thread(target=work) for _ in range(8)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert max(most) == 1 and len(turns) == 8 * rounds and store.holder("p/k") == ""


def test_a_lock_file_that_was_removed_meanwhile(tmp_path, monkeypatch):
    "Between opening the file and locking it the holder gave back, and a third made and locked a new one: the old one counts for nothing."
    import fcntl, slml_nb.store
    plain, third = slml_nb.store._open_lock, []
    def open_lock(path):
        file = plain(path)
        if not third:
            os.unlink(path)
            third.append(plain(path))
            fcntl.flock(third[0], fcntl.LOCK_EX)
        return file
    monkeypatch.setattr(slml_nb.store, "_open_lock", open_lock)
    s = FolderStore(tmp_path)
    assert s.claim("p/k") is None
    os.close(third[0])
    assert s.claim("p/k")


def test_looking_never_hinders(tmp_path, monkeypatch):
    "Who asks for the holder locks for a moment, just when another claims; the claim is granted all the same."
    import fcntl, slml_nb.store
    plain, looked = slml_nb.store._flock, []
    def flock(file, how):
        if looked: return plain(file, how)
        looked.append(os.open(tmp_path / ".claims/p%2Fk", os.O_RDONLY))
        fcntl.flock(looked[0], fcntl.LOCK_SH)
        try: return plain(file, how)
        finally: os.close(looked[0])
    monkeypatch.setattr(slml_nb.store, "_flock", flock)
    with FolderStore(tmp_path).claim("p/k") as claim: assert claim and looked


def test_processes_fetch_the_same(proxy, tmp_path):
    "Three, into one cache, a file and a folder; all get it whole, it is fetched once, and nothing is left over."
    line = proxy()
    url = line.url
    s = S3Store("s3://rows/fetch", url, tmp_path / "cache")
    for i in range(5): s.put(f"f/{i}", bytes([i]) * 10000)
    files = {f"{i}": bytes([i]) * 10000 for i in range(5)}
    listing = json.dumps([[n, hashlib.sha256(d).hexdigest()] for n, d in sorted(files.items())], separators=(",", ":"))
    digest, one = hashlib.sha256(listing.encode()).hexdigest(), hashlib.sha256(files["3"]).hexdigest()
    code = "import sys; from slml_nb.store import S3Store; s = S3Store('s3://rows/fetch', sys.argv[1], sys.argv[2]); print('ready', flush=True); sys.stdin.readline()\n" \
           "for _ in range(3): assert len(list(s.local('f', sys.argv[3]).iterdir())) == 5 and len(s.local('f/3', sys.argv[4]).read_bytes()) == 10000"
    workers = [start(code, url, tmp_path / "cache", digest, one) for _ in range(3)]
    for w in workers: w.stdout.readline()
    for w in workers: w.stdin.write("\n"), w.stdin.flush()
    for w in workers: w.communicate(timeout=60)
    assert [w.returncode for w in workers] == [0] * 3
    assert line.gets["/rows/fetch/f/3"] <= 2  # for the folder and for itself, by one of the three
    assert {p.relative_to(tmp_path / "cache").as_posix() for p in (tmp_path / "cache").rglob("*") if p.is_file() and not p.name.startswith(".")} == {f"{digest}/f/{i}" for i in range(5)} | {f"{one}/3"}


# ---- makers that are killed, clocks that are wrong

HOLDER = """
import sys, time, datetime
days = {"yesterday": -1, "today": 0, "tomorrow": 1}[sys.argv[3]]
plain = time.time
time.time = lambda: plain() + 86400 * days
class Wrong(datetime.datetime):
    @classmethod
    def now(cls, tz=None): return super().now(tz) + datetime.timedelta(days)
    @classmethod
    def utcnow(cls): return super().utcnow() + datetime.timedelta(days)
datetime.datetime = Wrong
from slml_nb.store import S3Store, open_store
S3Store.beat = 0.5 if len(sys.argv) < 5 else float(sys.argv[4])
store = open_store(sys.argv[1], sys.argv[2])
while not (claim := store.claim("p/k")):
    print("no", flush=True)
    sys.stdin.readline()
print("got it", flush=True)
sys.stdin.readline()
print("lost" if claim.lost else "still mine", flush=True)
claim.release()
"""


def test_killed_outright(store, tmp_path):
    "kill -9 of the holder: a folder's claim is free at once, a bucket's when it is stale; before that nobody gets it."
    uri, url = str(store), getattr(store, "endpoint_url", "")
    p = start(HOLDER, uri, url, "today")
    assert p.stdout.readline() == "got it\n"
    assert store.claim("p/k") is None and f"pid {p.pid}," in store.holder("p/k")
    p.kill(), p.wait()
    if isinstance(store, S3Store): assert store.claim("p/k") is None  # it may be alive and only slow
    end = time.monotonic() + 30
    while not (claim := store.claim("p/k")) and time.monotonic() < end: time.sleep(0.2)
    assert claim and f"pid {os.getpid()}," in store.holder("p/k")
    claim.release()
    assert store.holder("p/k") == ""


def test_clocks_that_are_wrong(proxy):
    "By a day: who lives keeps the claim, longer than it takes to go stale, and gives it back; who is dead loses it."
    url, pairs = proxy().url, [("yesterday", "tomorrow"), ("today", "yesterday")]
    holders = [start(HOLDER, f"s3://rows/clock-{a}", url, a, 1) for a, _ in pairs]
    assert [p.stdout.readline() for p in holders] == ["got it\n"] * 2
    time.sleep(5.5)  # 4 beats and the second that a stamp may be off are 5 s
    others = [start(HOLDER, f"s3://rows/clock-{a}", url, b) for a, b in pairs]
    assert [p.stdout.readline() for p in others] == ["no\n"] * 2
    holders[1].kill(), holders[1].wait()
    assert holders[0].communicate("\n", timeout=30)[0] == "still mine\n"
    assert others[0].communicate("\n\n", timeout=30)[0] == "got it\nstill mine\n"
    answer, end = "no\n", time.monotonic() + 30
    while answer == "no\n" and time.monotonic() < end:
        time.sleep(0.3)
        others[1].stdin.write("\n"), others[1].stdin.flush()
        answer = others[1].stdout.readline()
    assert answer == "got it\n" and others[1].communicate("\n", timeout=30)[0] == "still mine\n"


def test_one_who_slept_too_long(proxy, tmp_path):
    "A holder is stopped (a closed laptop), another takes over; when the first wakes it knows that it has lost, and takes nothing from the other."
    url = proxy().url
    s = S3Store("s3://rows/slept", url, tmp_path)
    p = start(HOLDER, s.uri, url, "today")
    assert p.stdout.readline() == "got it\n"
    os.kill(p.pid, signal.SIGSTOP)
    end = time.monotonic() + 30
    while not (claim := s.claim("p/k")) and time.monotonic() < end: time.sleep(0.2)
    os.kill(p.pid, signal.SIGCONT)
    time.sleep(1.5)  # three beats
    assert p.communicate("\n", timeout=30)[0] == "lost\n"
    assert f"pid {os.getpid()}," in s.holder("p/k") and s.claim("p/k") is None
    claim.release()


# ---- bits that flip

def test_a_flipped_bit(proxy, tmp_path):
    "In the cache it is found and fetched again; in the bucket it is found and said; in the record the seal tells."
    url, rng = proxy().url, random.Random(6)
    s = S3Store("s3://rows/bits", url, tmp_path / "cache")
    put_folder(s, "p/k", made_folder(tmp_path / "m", x=rng.randbytes(5000)))
    made, place = folder_of(s, "p/k")
    there, digest = S3Store(place, url, tmp_path / "cache"), made["files"]["x"]
    good = there.local("x", digest).read_bytes()
    for _ in range(10):
        bad, i = bytearray(good), rng.randrange(5000)
        bad[i] ^= 1 << rng.randrange(8)
        there.local("x", digest).write_bytes(bad)
        assert there.local("x", digest).read_bytes() == good
    there.put("x", bytes(bad))
    assert there.local("x", digest).read_bytes() == good  # the cache has the right one
    with pytest.raises(SlmlError, match="its hash is .* delete it"): S3Store(place, url, tmp_path / "other").local("x", digest)
    assert not [p for p in (tmp_path / "other").iterdir() if not p.name in (".lock", ".claims")]
    text = s.get("p/k/made.json").decode()
    s.put("p/k/made.json", text.replace(digest[:8], digest[:7] + ("0" if digest[7] != "0" else "1")))
    assert not sealed(folder_of(s, "p/k")[0])
