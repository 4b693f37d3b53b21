"""S3 all the way: memory that does not grow with the artifact, a part that breaks, a network that goes away, credentials that expire, a million names, copies that several processes share."""
import contextlib, hashlib, http.server, importlib.util, json, os, random, re, subprocess, sys, threading, time
from pathlib import Path

import pytest

import slml_nb.store as stores
from slml_nb.core import SlmlError, sha256_file
from slml_nb.store import S3Store, abort_uploads, broken_uploads, open_store, put_folder
from test_store_faults import Handler, Proxy, made_folder, moto, proxy, quick, start, trouble  # noqa: F401

pytestmark = pytest.mark.slow

root = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("bench_store", root / "bench" / "store.py")
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)


def served(handler, port=0):
    "A server of this process; its address and how to end it."
    server = bench.Server(("127.0.0.1", port), handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    return server, "http://127.0.0.1:%d" % server.server_port


@pytest.fixture
def keys(monkeypatch):
    for k, v in dict(AWS_ACCESS_KEY_ID="test", AWS_SECRET_ACCESS_KEY="test", AWS_DEFAULT_REGION="us-east-1").items(): monkeypatch.setenv(k, v)


@pytest.fixture
def plain(tmp_path, keys):
    "A server that keeps what it gets in files."
    place = tmp_path / "served"
    place.mkdir()
    server, url = served(type("Kept", (bench.Plain,), {"place": str(place), "objects": {}, "parts": {}}))
    yield url
    server.shutdown(), server.server_close()


def random_file(path, size, seed=0):
    with open(path, "wb") as f:
        rng = random.Random(seed)
        for first in range(0, size, 1 << 20): f.write(rng.randbytes(min(1 << 20, size - first)))
    return path


# ---- large things

@pytest.mark.parametrize("size", [0, 1, 999, 1000, 1001, 2000, 2999, 3000, 3001, 34_567])
def test_any_size_comes_back(plain, tmp_path, monkeypatch, size):
    "Around each border of a part and a piece, and with many of both."
    monkeypatch.setattr(stores, "PART", 1000), monkeypatch.setattr(stores, "PIECE", 1500)
    s, file = S3Store("s3://rows/sizes", plain, tmp_path / "cache"), random_file(tmp_path / "f", size, size)
    s.put("k", file)
    data = file.read_bytes()
    assert s.put_if_absent("new", file) and s.get("new") == data == s.get("k")
    assert s.local("k", hashlib.sha256(data).hexdigest()).read_bytes() == data == s.local("k").read_bytes()
    with s.open("k") as f: assert b"".join(iter(lambda: f.read(700), b"")) == data


CHILD = """
import sys
from pathlib import Path
import slml_nb.store as stores
way, url, file, place = sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])
s = stores.S3Store("s3://rows/memory", url, place / "cache")
if way == "put": s.put("big", file)
if way == "if absent": assert s.put_if_absent(f"other{file.name}", file)
if way == "folder":
    (place / "m").mkdir()
    for i in range(2): (place / f"m/{i}").hardlink_to(file)
    (place / "m/made.json").write_text("{}")
    assert stores.put_folder(s, f"p/{file.name}", place / "m")
if way == "local": s.local("big")
if way == "open":
    with s.open("big") as f:
        while f.read(1 << 20): pass
print([l.split()[1] for l in open("/proc/self/status") if l.startswith("VmHWM")][0])
"""


def test_memory_does_not_grow_with_the_artifact(plain, tmp_path):
    "Each way of a child of its own, with a file of 40 MB and one of 160 MB: both take the same, well below 200 MB."
    peak = {}
    for size in (40, 160):
        file = random_file(tmp_path / f"{size}", size << 20)
        for way in ("put", "if absent", "folder", "local", "open"):
            (place := tmp_path / f"{way}{size}").mkdir()
            done = subprocess.run([sys.executable, "-c", CHILD, way, plain, file, place], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(root)})
            assert done.returncode == 0, done.stderr
            peak[way, size] = int(done.stdout) / 1024
    assert max(peak.values()) < 150, peak
    assert all(peak[way, 160] < peak[way, 40] + 25 for way, _ in peak), peak


def test_only_the_broken_part_is_sent_again(proxy, quick, tmp_path, monkeypatch):
    "Up: one part is refused three times. Down: one piece breaks off, and the rest of it is asked for."
    line, file, asked = proxy(), random_file(tmp_path / "f", 70 << 20), []
    s, plain, lock = S3Store("s3://rows/parts", line.url, tmp_path / "cache"), Handler.pass_on, threading.Lock()
    def pass_on(self, body):
        number = (re.search(r"partNumber=(\d+)", self.path) or [0, ""])[1] or self.headers.get("Range", "")
        with lock: asked.append((self.command, number))
        if asked.count(("PUT", "2")) < 4 and (self.command, number) == ("PUT", "2"): return 503, [], trouble("SlowDown")
        status, headers, answer = plain(self, body)
        if number == f"bytes={32 << 20}-{(64 << 20) - 1}": self.close_after = 5 << 20
        return status, headers, answer
    def say(self, status, headers, body, cut=False, plain=Handler.say):
        if getattr(self, "close_after", 0):
            whole, body, self.close_connection = len(body), body[:self.close_after], True
            self.close_after = 0
            self.send_response_only(status)
            for k, v in headers:
                if k.lower() not in ("content-length", "connection", "transfer-encoding"): self.send_header(k, v)
            self.send_header("Content-Length", str(whole)), self.end_headers(), self.wfile.write(body), self.wfile.flush()
        else: plain(self, status, headers, body, cut)
    monkeypatch.setattr(Handler, "pass_on", pass_on), monkeypatch.setattr(Handler, "say", say)
    s.put("big", file)
    assert sorted(n for c, n in asked if c == "PUT") == ["1", "2", "2", "2", "2", "3", "4", "5"]
    asked.clear()
    assert sha256_file(s.local("big", sha256_file(file))) == sha256_file(file)
    ranges = [n for c, n in asked if c == "GET" and n]
    assert len(ranges) == 4 and any(re.fullmatch(rf"bytes=(\d+)-{(64 << 20) - 1}", n) and int(n[6:].split("-")[0]) > 36 << 20 for n in ranges), ranges


def test_what_cannot_be_finished_is_taken_away(moto, proxy, quick, tmp_path, monkeypatch):
    line, file, plain = proxy(), random_file(tmp_path / "f", 40 << 20), Handler.pass_on
    monkeypatch.setattr(Handler, "pass_on", lambda self, body: (503, [], trouble("SlowDown")) if "partNumber=3" in self.path else plain(self, body))
    s = S3Store("s3://rows/unfinished", line.url, tmp_path / "cache")
    for call in (s.put, s.put_if_absent):
        with pytest.raises(SlmlError, match="SlowDown.*the same command goes on, later"): call("big", file)
    assert broken_uploads(s, age=-10) == [] and s.list() == []


def test_killed_in_the_middle_of_an_upload(moto, proxy, tmp_path, monkeypatch):
    "kill -9 leaves parts; they are found, told by whose prefix they are, and taken away. The same put then works."
    line, file, held, dead = proxy(), random_file(tmp_path / "f", 40 << 20), threading.Event(), threading.Event()
    plain = Handler.pass_on
    def pass_on(self, body):
        if "partNumber" not in self.path and "uploadId" in self.path and not dead.is_set(): return 503, [], trouble("SlowDown")  # it cannot finish
        answer = plain(self, body)
        if "partNumber" in self.path: held.set()
        return answer
    monkeypatch.setattr(Handler, "pass_on", pass_on)
    code = "import sys; from pathlib import Path; from slml_nb.store import S3Store; S3Store('s3://rows/killed', sys.argv[1]).put('big', Path(sys.argv[2]))"
    p = start(code, line.url, file)
    assert held.wait(30)
    p.kill(), p.wait(), dead.set()
    s = S3Store("s3://rows/killed", line.url, tmp_path / "cache")
    assert s.list() == []
    found = broken_uploads(s, age=-10)
    assert [u["key"] for u in found] == ["big"] and found[0]["bytes"] > 0
    assert broken_uploads(S3Store("s3://rows/else", line.url), age=-10) == []
    abort_uploads(s, found)
    assert broken_uploads(s, age=-10) == []
    s.put("big", file)
    assert sha256_file(s.local("big")) == sha256_file(file)


@pytest.mark.parametrize("what", ["file", "folder"])
def test_ctrl_c_in_the_middle_of_an_upload(moto, proxy, tmp_path, monkeypatch, what):
    "It ends soon, although the server would be asked again for minutes, and its parts are taken away."
    line, held, plain = proxy(), threading.Event(), Handler.pass_on
    (tmp_path / "m").mkdir(), (tmp_path / "m/made.json").write_text("{}")
    random_file(tmp_path / "m/f", 40 << 20)
    def pass_on(self, body):
        if "partNumber=2" not in self.path: return plain(self, body)
        held.set()
        return 503, [], trouble("SlowDown")
    monkeypatch.setattr(Handler, "pass_on", pass_on)
    code = "import sys; from pathlib import Path; from slml_nb.store import S3Store, put_folder; from botocore.retries import standard\n" \
           "standard.ExponentialBackoff.delay_amount = lambda self, context: 0.01\n" \
           "s, m = S3Store(f's3://rows/ctrl-{sys.argv[3]}', sys.argv[1]), Path(sys.argv[2]); s.put('small', 'x')\n" \
           "s.put('big', m / 'f') if sys.argv[3] == 'file' else put_folder(s, 'p/k', m)"
    p = start(code, line.url, tmp_path / "m", what)
    assert held.wait(30)
    time.sleep(0.3)
    p.send_signal(2)
    assert p.wait(timeout=50) != 0
    s = S3Store(f"s3://rows/ctrl-{what}", line.url, tmp_path / "cache")
    assert broken_uploads(s, age=-10) == [] and s.list() == ["small"]


def test_two_large_ones_at_once(proxy, tmp_path):
    "Of several who put a large file at the same time one wins, and no parts are left."
    url, files, got, together = proxy().url, [random_file(tmp_path / f"{i}", 20 << 20, i) for i in range(3)], {}, threading.Barrier(3)
    s = [S3Store("s3://rows/large-two", url, tmp_path / "cache") for _ in files]
    def put(i):
        together.wait()
        got[i] = s[i].put_if_absent("big", files[i])
    threads = [threading.Thread(target=put, args=(i,)) for i in range(3)]
    for t in threads: t.start()
    for t in threads: t.join()
    winner, = [i for i, first in got.items() if first]
    with s[0].open("big") as f: assert hashlib.file_digest(f, "sha256").hexdigest() == sha256_file(files[winner])
    assert broken_uploads(s[0], age=-10) == []


# ---- the network, the credentials

class Line:
    "A proxy that can be taken away and put back at the same port."

    def __init__(self, upstream): self.upstream, self.proxy = upstream, Proxy(upstream)

    def cut(self):
        "No server, and no connection that was open."
        self.proxy.shutdown(), self.proxy.server_close()
        for link in self.proxy.links:
            with contextlib.suppress(OSError): link.shutdown(2)

    def mend(self): self.proxy = Proxy(self.upstream, port=self.proxy.server_port)


@pytest.mark.parametrize("patience", [60, 0.2])
def test_a_network_that_goes_away(moto, tmp_path, monkeypatch, patience):
    "Longer than botocore asks again, in the middle of work: what has patience goes on, what has none says what to do and works later."
    from botocore.retries import standard
    monkeypatch.setattr(standard.ExponentialBackoff, "delay_amount", lambda self, context: 0.002)
    monkeypatch.setenv("SLML_S3_PATIENCE", str(patience))
    monkeypatch.setattr(random, "random", lambda: 0.05)
    line, file = Line(moto), random_file(tmp_path / "f", 20 << 20)
    s = S3Store(f"s3://rows/away{patience}", line.proxy.url, tmp_path / "cache")
    s.put("k", "1"), s.put("big", file)
    line.cut()
    calls = [lambda: s.get("k"), lambda: s.list(), lambda: s.put_if_absent("new", file), lambda: sha256_file(s.local("big"))]
    if patience < 1:
        for call in calls[:3]:
            with pytest.raises(SlmlError, match="the same command (then )?goes on"): call()
    back = threading.Timer(2, line.mend)
    back.start()
    if patience < 1: back.join()
    assert [call() for call in calls] == [b"1", ["big", "k"], True, sha256_file(file)]
    back.join()
    line.cut()


def test_an_address_where_nobody_ever_answered(quick, keys, tmp_path, monkeypatch):
    "No hope: it is reported without waiting."
    monkeypatch.setenv("SLML_S3_PATIENCE", "100000")
    with pytest.raises(SlmlError, match="check the network"): S3Store("s3://rows/x", "http://127.0.0.1:9", tmp_path).get("k")


class Guard:
    "What a server says to credentials: those in `expired` are refused as S3 does."

    def __init__(self, monkeypatch):
        self.expired, self.seen, plain = set(), [], Handler.pass_on
        def pass_on(handler, body):
            who = re.search(r"Credential=([^/]+)/", handler.headers.get("Authorization", ""))[1]
            self.seen.append(who)
            if who in self.expired: return 400, [("Content-Type", "application/xml")], b"" if handler.command == "HEAD" else trouble("ExpiredToken")
            return plain(handler, body)
        monkeypatch.setattr(Handler, "pass_on", pass_on)


def only(monkeypatch, tmp_path, **env):
    "No credentials but these."
    for k in [k for k in os.environ if k.startswith("AWS_")]: monkeypatch.delenv(k)
    for k, v in {"AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": str(tmp_path / "none"), "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "credentials"), **env}.items(): monkeypatch.setenv(k, v)


def test_credentials_of_a_role_are_renewed(moto, proxy, tmp_path, monkeypatch):
    "As a job has them: from an address of its container, for a short while each."
    given, guard = [], Guard(monkeypatch)
    class Role(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_): pass
        def do_GET(self):
            given.append(f"ROLE{len(given)}")
            guard.expired.update(given[:-1])
            until = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 60))  # so soon that botocore asks again at once
            body = json.dumps({"AccessKeyId": given[-1], "SecretAccessKey": "s", "Token": "t", "Expiration": until}).encode()
            self.send_response(200), self.send_header("Content-Length", str(len(body))), self.end_headers(), self.wfile.write(body)
    role, address = served(Role)
    only(monkeypatch, tmp_path, AWS_CONTAINER_CREDENTIALS_FULL_URI=f"{address}/role")
    s = S3Store("s3://rows/role", proxy().url, tmp_path / "cache")
    for i in range(4): s.put(f"{i}", "x")
    assert s.list() == ["0", "1", "2", "3"] and len(given) > 2 and not guard.expired & {guard.seen[-1]}
    role.shutdown(), role.server_close()


def test_credentials_of_a_file_are_read_again(moto, proxy, quick, tmp_path, monkeypatch):
    "They expire while a run works; whoever logs in again writes new ones to the file, and the run goes on. Until then it says what to do."
    only(monkeypatch, tmp_path)
    def log_in(name): (tmp_path / "credentials").write_text(f"[default]\naws_access_key_id={name}\naws_secret_access_key=s\naws_session_token=t\n")
    guard, file = Guard(monkeypatch), random_file(tmp_path / "f", 40 << 20)
    log_in("ONE")
    s = S3Store("s3://rows/file", proxy().url, tmp_path / "cache")
    s.put("k", "1")
    guard.expired.add("ONE")
    for call in (lambda: s.get("k"), lambda: s.list(), lambda: s.put("big", file), lambda: s.exists("k")):
        with pytest.raises(SlmlError, match="expired: log in again.*the same command then goes on"): call()
    log_in("TWO")
    s.put("big", file)
    assert s.exists("k") and s.get("k") == b"1" and sha256_file(s.local("big")) == sha256_file(file)
    guard.expired.add("TWO"), log_in("THREE")
    assert s.exists("k") and guard.seen[-1] == "THREE"  # a HEAD, too, whose answer has no words
    assert broken_uploads(s, age=-10) == []


def test_credentials_of_the_environment(moto, proxy, quick, tmp_path, monkeypatch):
    "A process cannot be given others; the message says so, and the next one goes on."
    only(monkeypatch, tmp_path, AWS_ACCESS_KEY_ID="ONE", AWS_SECRET_ACCESS_KEY="s")
    guard, url = Guard(monkeypatch), proxy().url
    guard.expired.add("ONE")
    with pytest.raises(SlmlError, match="export new ones; the same command then goes on"): S3Store("s3://rows/env", url, tmp_path / "cache").put("k", "1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "TWO")
    S3Store("s3://rows/env", url, tmp_path / "cache").put("k", "1")


# ---- very many names

class Many(http.server.BaseHTTPRequestHandler):
    "A bucket of a great many objects, of which only the listing exists."
    protocol_version, count, pages = "HTTP/1.1", 0, 0

    def log_message(self, *_): pass

    def do_GET(self):
        type(self).pages += 1
        first = int((re.search(r"continuation-token=(\d+)", self.path) or [0, 0])[1])
        last = min(first + 1000, self.count)
        one = "<Contents><Key>base/{0:07}/rows</Key><LastModified>2026-11-21T00:00:00.000Z</LastModified><ETag>&quot;{0:032x}&quot;</ETag><Size>{0}</Size></Contents>"
        more = f"<IsTruncated>true</IsTruncated><NextContinuationToken>{last}</NextContinuationToken>" if last < self.count else "<IsTruncated>false</IsTruncated>"
        body = f"<ListBucketResult>{more}{''.join(one.format(i) for i in range(first, last))}</ListBucketResult>".encode()
        self.send_response(200), self.send_header("Content-Length", str(len(body))), self.end_headers(), self.wfile.write(body)


def test_a_listing_holds_one_page(keys, tmp_path):
    "Twelve pages take no more memory than two; nothing is asked for that nobody reads."
    import tracemalloc
    peak = {}
    for count in (2_000, 12_000):
        many = type("Some", (Many,), {"count": count, "pages": 0})
        server, url = served(many)
        s = S3Store("s3://rows/base", url, tmp_path)
        assert next(iter(s.names())) == "0000000/rows" and many.pages == 1
        tracemalloc.start()
        n = sum(1 for _ in s.names())
        peak[count] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert n == count and many.pages == 1 + count // 1000
        server.shutdown(), server.server_close()
    assert peak[12_000] < 1.3 * peak[2_000], peak


# ---- copies that processes share

TAKER = """
import hashlib, os, random, sys, time
from slml_nb.store import S3Store
s, mine = S3Store("s3://rows/copies", sys.argv[1], sys.argv[2]), []
rng = random.Random(int(sys.argv[3]))
print("ready", flush=True)
sys.stdin.readline()
data = {i: bytes([i]) * 300_000 for i in range(12)}
for _ in range(40):
    i = rng.randrange(12)
    mine.append((i, s.local(f"f/{i}", hashlib.sha256(data[i]).hexdigest())))
    for j, path in mine: assert path.stat().st_size == 300_000  # what it was given stays
    assert mine[-1][1].read_bytes() == data[i]
print("done", flush=True)
"""


def test_processes_share_a_cache_that_is_too_small(proxy, tmp_path, monkeypatch):
    "Four take copies from a cache that may hold three: none loses what it uses; when they have ended, the next one makes room."
    monkeypatch.setenv("SLML_CACHE_GB", "0.001")
    s = S3Store("s3://rows/copies", proxy().url, tmp_path / "cache")
    for i in range(12): s.put(f"f/{i}", bytes([i]) * 300_000)
    takers = [start(TAKER, s.endpoint_url, s.cache, i) for i in range(4)]
    for p in takers: p.stdout.readline()
    for p in takers: p.stdin.write("\n"), p.stdin.flush()
    assert [p.communicate(timeout=60)[0] for p in takers] == ["done\n"] * 4
    assert len(stores._copies(s.cache)) == 12  # all were in use
    takers[0] = start(TAKER.replace("range(40)", "range(0)"), s.endpoint_url, s.cache, 9)
    s.put("last", "x" * 1000)
    s.local("last", hashlib.sha256(b"x" * 1000).hexdigest())
    assert sum(size for _, size, _ in stores._copies(s.cache)) <= 1_000_000
    assert not list(s.cache.glob(".part-*")) and len(list((s.cache / ".users").iterdir())) == 1  # this process's own
    takers[0].kill(), takers[0].wait()


def test_who_is_killed_uses_nothing(proxy, tmp_path):
    url = proxy().url
    s = S3Store("s3://rows/user", url, tmp_path / "cache")
    s.put("k", "x")
    p = start("import sys; from slml_nb.store import S3Store; S3Store('s3://rows/user', *sys.argv[1:3]).local('k', sys.argv[3]); print('has it', flush=True); sys.stdin.readline()", url, s.cache, hashlib.sha256(b"x").hexdigest())
    assert p.stdout.readline() == "has it\n" and stores.evict(s.cache, 0) == []
    p.kill(), p.wait()
    assert len(stores.evict(s.cache, 0)) == 1


def test_a_full_disk_makes_room(proxy, tmp_path):
    "A cache on a disk of 3 MB: copies that nobody uses make way for the next."
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode: pytest.skip("no right to mount a small disk here")
    url = proxy().url
    s = S3Store("s3://rows/full", url, tmp_path / "other")
    for i in range(3): s.put(f"{i}", bytes([i]) * 1_200_000)
    (tmp_path / "disk").mkdir()
    code = """
import hashlib, os, subprocess, sys
from slml_nb.store import S3Store
take = lambda i: S3Store("s3://rows/full", sys.argv[1], "disk").local(str(i), hashlib.sha256(bytes([i]) * 1_200_000).hexdigest())
if len(sys.argv) > 2: sys.exit(take(int(sys.argv[2])).stat().st_size != 1_200_000)
for i in (0, 1, 2): print(subprocess.run([sys.executable, __file__, sys.argv[1], str(i)]).returncode)
"""
    (tmp_path / "code.py").write_text(code)
    r = subprocess.run(["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=3m none disk && "$@"', "sh", sys.executable, "code.py", url], cwd=tmp_path,
                       env={**os.environ, "PYTHONPATH": str(root), "SLML_CACHE_GB": "1"}, capture_output=True, text=True)
    assert r.stdout.split() == ["0", "0", "0"], r.stdout + r.stderr


def test_a_folder_without_files_comes_back_and_is_what_it_was(moto, tmp_path, monkeypatch):
    "A bucket knows nothing of it; the record does. One that has lost its files is not taken for it."
    from slml_nb.core import sha256_file
    from slml_nb.keep import Check, _hash_there
    s = S3Store("s3://rows/empty", "http://%s:%s" % moto, tmp_path / "cache")
    (tmp_path / "none").mkdir()
    empty = sha256_file(tmp_path / "none")
    assert list(s.local("tables", empty).iterdir()) == [] and list(s.local("tables", empty).iterdir()) == []
    with pytest.raises(SlmlError, match="there is no 'tables'"): s.local("tables", "0" * 64)
    monkeypatch.setattr("slml_nb.keep.open_store", lambda root: s)
    s.put("full/a.txt", b"1")
    check = Check(tmp_path, "")
    for name, sha in (("tables", empty), ("lost", "0" * 64), ("full", empty)): _hash_there(check, str(s), name, sha)
    assert [(p["path"].rpartition("/")[2], p["found"]) for p in check.problems] == [("lost", "there is no 'lost'"), ("full", sha256_file(s.local("full"))[:16])]
