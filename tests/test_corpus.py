"""Awkward inputs, made by code: each ends in rows plus rejects, of which none is lost, or in one clear error that names the file and the way out.
What is expected comes from thought, or from Python's own csv and json."""
import bz2, csv, datetime as dt, decimal, gzip, io, itertools, json, lzma, os, random, resource, struct, subprocess, sys, zipfile
from collections import Counter

import pytest

from slml_nb.core import SlmlError
from slml_nb.ingest import How, Rows, read_table, rejects_table
from slml_nb.sql import connect

SOUND = "id,km,paid\n" + "".join(f"{i},{i}.5,{'card' if i % 2 else 'cash'}\n" for i in range(40))


def taken(sources, folder, memory="400MB", **options):
    "Read sources; the table, its rows, its rejects. Every record of every file is in one of them."
    con = connect(memory=memory)
    table = read_table(con, "", [str(s) for s in ([sources] if not isinstance(sources, list) else sources)], folder / "work", **options)
    Rows(con, table.query, len(table.columns), table.files).write_parquet(folder / "raw.parquet")
    rows = con.execute("select * from read_parquet(?) order by row_id", [str(folder / "raw.parquet")]).fetchall()
    rejects = rejects_table(con, {"": table}).fetchall()
    assert sum(f.rows_in for f in table.files) == len(rows) + len(rejects)
    assert {f.name: len(f.rejects) for f in table.files if len(f.rejects)} == Counter(r[0] for r in rejects)
    assert all(line > 0 and reason for _, line, reason, _ in rejects), rejects
    return table, rows, rejects


def put(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def python_rows(text, **options): return list(csv.reader(io.StringIO(text, newline=""), **options))[1:]


def zipped(files, password=False):
    "A zip; with the mark of a password in its headers, if asked."
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        for name, text in files.items(): z.writestr(name, text)
    data = bytearray(out.getvalue())
    if password:
        for mark, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)): data[data.find(mark) + at] |= 1
    return bytes(data)


# name: (file, content, rows, rejects, values of some columns or None)
READ = {
    "sound": ("a.csv", SOUND, 40, 0, {"id": list(range(40))}),
    "cut in the middle of a line": ("a.csv", SOUND[:-9], 39, 1, None),
    "cut within a quote": ("a.csv", SOUND + '40,1.5,"car', 40, 1, None),
    "no line end at the end": ("a.csv", SOUND.rstrip("\n"), 40, 0, None),
    "null bytes in a line": ("a.csv", SOUND.encode() + b"40,\x00\x00,card\n", 40, 1, None),
    "a run of null bytes at the end": ("a.csv", SOUND.encode() + b"\x00" * 30, 40, 1, None),
    "only a mark and a header and a row": ("a.csv", "\ufeffa,b\n1,2\n", 1, 0, {"a": [1], "b": [2]}),
    "utf-16": ("a.csv", "a,é\n1,ü\n2,ö\n".encode("utf-16"), 2, 0, {"é": ["ü", "ö"]}),
    "utf-16 big end first": ("a.csv", b"\xfe\xff" + "a,b\n1,ü\n".encode("utf-16-be"), 1, 0, {"b": ["ü"]}),
    "utf-32": ("a.csv", "a,b\n1,ü\n".encode("utf-32"), 1, 0, {"b": ["ü"]}),
    "a few latin-1 lines": ("a.csv", SOUND.encode() * 6 + b"1,1.5,K\xf6ln\n", 240, 6, None),
    "ragged": ("a.csv", SOUND + "1,2\n1,2,3,4\n1\n", 40, 3, None),
    "old Mac line ends": ("a.csv", "a,b\r1,2\r3,4\r", 2, 0, {"b": [2, 4]}),
    "DOS line ends": ("a.csv", "a,b\r\n1,2\r\n3,4\r\n", 2, 0, {"b": [2, 4]}),
    "mixed line ends": ("a.csv", "a,b\n1,2\r\n3,4\n5,6\r\n", 3, 0, {"b": [2, 4, 6]}),
    "a stray carriage return": ("a.csv", SOUND + "4\r0,1.5,card\n", 40, 1, None),
    "blank lines": ("a.csv", "a,b\n\n1,2\n\n\n3,4\n\n", 2, 0, {"a": [1, 3]}),
    "a quote that is never closed": ("a.csv", SOUND + '40,"1.5,card\n41,1.5,cash\n', 41, 1, None),
    "quotes within fields": ("a.csv", 'a,b\n5" pipe,1\n"say ""hi""",2\n', 2, 0, {"a": ['5" pipe', 'say "hi"']}),
    "quotes over lines": ("a.csv", (text := 'a,b\n"one\ntwo",1\n"three\r\nfour, five",2\n'), 2, 0, {"a": [r[0] for r in python_rows(text)]}),
    "text after a closing quote": ("a.csv", SOUND + '"1"x,2,3\n', 40, 1, None),
    "names twice": ("a.csv", "a,a,A\n1,2,3\n", 1, 0, {"a": [1], "a_2": [2], "A_3": [3]}),
    "names of reserved words": ("a.csv", "select,from,order by,source\n1,2,3,4\n", 1, 0, {"select": [1], "order by": [3], "source_2": [4]}),
    "a name with a line end": ("a.csv", '"a\nb",c\n1,2\n', 1, 0, {"a b": [1]}),
    "a name with a quote": ("a.csv", '"a""b",c\n1,2\n', 1, 0, {'a"b': [1]}),
    "names of emoji": ("a.csv", "🚕,💶\n1,2\n", 1, 0, {"🚕": [1]}),
    "no name": ("a.csv", "a,,c\n1,2,3\n", 1, 0, {"column_2": [2]}),
    "a delimiter at the end of each row": ("a.csv", "a,b\n1,2,\n3,4,\n", 2, 0, {"b": [2, 4]}),
    "a delimiter at the end of each line": ("a.csv", "a,b,\n1,2,\n3,4,\n", 2, 0, {"b": [2, 4]}),
    "semicolons and decimal commas": ("a.csv", "a;b\n1,5;x\n2,25;y\n", 2, 0, {"a": [1.5, 2.25]}),
    "tabs": ("a.tsv", "a\tb\n1\tx,y\n", 1, 0, {"b": ["x,y"]}),
    "bars": ("a.psv", "a|b\n1|x\n", 1, 0, {"b": ["x"]}),
    "fixed width": ("a.txt", "id   name\n1    Smith\n2    Jones\n", 2, 0, {"id name": ["1    Smith", "2    Jones"]}),
    "one column": ("a.csv", "n\n1\n2\n", 2, 0, {"n": [1, 2]}),
    "the header again": ("a.csv", SOUND + SOUND, 80, 1, {"id": [*range(40), *range(40)]}),
    "a line of totals": ("a.csv", SOUND + f"Total,{sum(i + .5 for i in range(40))},\n", 40, 1, {"id": list(range(40))}),
    "a line of totals of its own form": ("a.csv", SOUND + "Total: 40 rows\n", 40, 1, {"id": list(range(40))}),
    "units below the header": ("a.csv", "a,b\n(km),(s)\n" + "1,2\n" * 200, 201, 0, {"a": [None] + [1] * 200}),
    "zip with two files": ("a.zip", zipped({"x.csv": "a\n1\n", "y.csv": "a\n2\n"}), 2, 0, {"a": [1, 2]}),
    "gz": ("a.csv.gz", gzip.compress(SOUND.encode()), 40, 0, None),
    "gz of two members": ("a.csv.gz", gzip.compress(b"a,b\n1,2\n") + gzip.compress(b"3,4\n"), 2, 0, {"a": [1, 3]}),
    "bz2": ("a.csv.bz2", bz2.compress(SOUND.encode()), 40, 0, None),
    "xz called gz": ("a.csv.gz", lzma.compress(SOUND.encode()), 40, 0, None),
    "gz without its ending": ("a.csv", gzip.compress(SOUND.encode()), 40, 0, None),
    "JSON lines with changing keys": ("a.jsonl", '{"a": 1}\n{"b": "x"}\n{"a": 2, "c": null}\n', 3, 0, {"a": [1, None, 2], "b": [None, "x", None]}),
    "JSON array": ("a.json", '[{"a": 1}, {"a": 2}]', 2, 0, {"a": [1, 2]}),
    "nested JSON": ("a.jsonl", '{"u": {"age": 3, "tags": [1, 2]}}\n{"u": {"age": 4}}\n', 2, 0, {"u.age": [3, 4], "u.tags": ["[1,2]", None]}),
    "JSON with NaN": ("a.jsonl", '{"a": 1.5}\n' * 99 + '{"a": NaN}\n{"a": -Infinity}\n', 101, 0, {"a": [1.5] * 99 + [None, None]}),
    "JSON with big whole numbers": ("a.jsonl", '{"a": 123456789012345678901234567890}\n' * 2, 2, 0, {"a": ["123456789012345678901234567890"] * 2}),
    "JSON, broken and cut lines": ("a.jsonl", '{"a": 1}\n{"a": \n[1]\n7\n{"a": 2}\n{"a"', 2, 4, {"a": [1, 2]}),
    "JSON nested too deeply": ("a.jsonl", '{"a": 1}\n{"a": ' + "[" * 100_000 + "\n", 1, 1, None),
    "JSON with a mark": ("a.jsonl", '\ufeff{"a": 1}\n{"a": 2}\n', 2, 0, {"a": [1, 2]}),
    "JSON with a zero character": ("a.jsonl", '{"a": "x\\u0000y"}\n{"a": "z"}\n', 2, 0, None),
    "beyond 64 bits": ("a.csv", "a\n9223372036854775807\n-9223372036854775808\n", 2, 0, {"a": [2**63 - 1, -2**63]}),
    "beyond 64 bits by one": ("a.csv", "a\n9223372036854775808\n18446744073709551616\n", 2, 0, {"a": ["9223372036854775808", "18446744073709551616"]}),
    "1e400": ("a.csv", "a\n" + "1.5\n" * 99 + "1e400\n", 100, 0, {"a": [1.5] * 99 + [None]}),
    "minus zero": ("a.csv", "a,b\n-0,-0.0\n1,1.5\n", 2, 0, {"a": [0, 1], "b": [0.0, 1.5]}),
    "hex": ("a.csv", "a\n0x1F\n0xff\n", 2, 0, {"a": ["0x1F", "0xff"]}),
    "per cent": ("a.csv", "a\n15%\n7.5%\n", 2, 0, {"a": [15.0, 7.5]}),
    "thousands, English": ("a.csv", 'a\n"1,234.50"\n"12,345,678.00"\n', 2, 0, {"a": [1234.5, 12345678.0]}),
    "thousands, Indian": ("a.csv", 'a\n"12,34,567.50"\n"1,00,000"\n', 2, 0, {"a": [1234567.5, 100000.0]}),
    "thousands, German": ("a.csv", "a;b\n1.234,50;x\n1.234.567,00;y\n", 2, 0, {"a": [1234.5, 1234567.0]}),
    "thousands, Swiss": ("a.csv", "a;b\n1'234.50;x\n1'234'567.00;y\n", 2, 0, {"a": [1234.5, 1234567.0]}),
    "thousands, French": ("a.csv", "a;b\n1\u202f234,50;x\n1\u00a0234\u00a0567,00;y\n", 2, 0, {"a": [1234.5, 1234567.0]}),
    "euros": ("a.csv", 'a\n€12\n"€1,200.50"\n', 2, 0, {"a": [12.0, 1200.5]}),
    "words for missing": ("a.csv", "a,b\nNaN ,1\n?,2\n null,3\n7,4\n", 4, 0, {"a": [None, None, None, 7]}),
    "blanks around": ("a.csv", "a , b\n 1 ,x  \n2\t, y\n", 2, 0, {"a": [1, 2], "b": ["x", "y"]}),
    "ids of a spreadsheet": ("a.csv", 'a,b\n="00123",00123\n="00124",00124\n', 2, 0, {"a": ["00123", "00124"], "b": ["00123", "00124"]}),
    "ids rounded by a spreadsheet": ("a.csv", "a\n1.23E+15\n1230000000000001\n", 2, 0, {"a": ["1.23E+15", "1230000000000001"]}),
    "codes made dates": ("a.csv", "a\nMARCH1\n1-Mar\nSEPT2\n", 3, 0, {"a": ["MARCH1", "1-Mar", "SEPT2"]}),
    "year 0 and 9999": ("a.csv", "a\n" + "9999-12-31\n" * 99 + "0000-01-01\n", 100, 0, {"a": [dt.date(9999, 12, 31)] * 99 + [None]}),
    "time zones": ("a.csv", "a\n2024-01-01T10:00:00+05:30\n2024-01-01T10:00:00-0800\n2024-01-01T10:00:00Z\n", 3, 0,
                   {"a": [dt.datetime.fromisoformat(t).astimezone(dt.timezone.utc).replace(tzinfo=None) for t in ("2024-01-01T10:00:00+05:30", "2024-01-01T10:00:00-08:00", "2024-01-01T10:00:00+00:00")]}),
    "a leap second and 24:00": ("a.csv", "a\n2016-12-31 23:59:60\n2016-12-31 24:00:00\n2016-12-31 23:59:59\n", 3, 0, {"a": [dt.datetime(2017, 1, 1), dt.datetime(2017, 1, 1), dt.datetime(2016, 12, 31, 23, 59, 59)]}),
    "a day that is none": ("a.csv", "a\n" + "2024-02-29\n" * 99 + "2023-02-29\n", 100, 0, {"a": [dt.date(2024, 2, 29)] * 99 + [None]}),
    "day first, told by one": ("a.csv", "a\n01/02/2024\n13/02/2024\n", 2, 0, {"a": [dt.date(2024, 2, 1), dt.date(2024, 2, 13)]}),
    "month first, told by one": ("a.csv", "a\n01/02/2024\n02/13/2024\n", 2, 0, {"a": [dt.date(2024, 1, 2), dt.date(2024, 2, 13)]}),
    "day or month first, nobody knows": ("a.csv", "a\n01/02/2024\n03/04/2024\n", 2, 0, {"a": ["01/02/2024", "03/04/2024"]}),
    "day first and month first": ("a.csv", "a\n25/12/2024\n12/25/2024\n01/02/2024\n", 3, 0, {"a": ["25/12/2024", "12/25/2024", "01/02/2024"]}),
    "three formats in a column": ("a.csv", "a\n2024-02-25\n25/02/2024\n25 Feb 2024\n", 3, 0, {"a": [dt.date(2024, 2, 25)] * 3}),
    "days in one number": ("a.csv", "day\n20240131\n20240229\n20231231\n", 3, 0, {"day": [dt.date(2024, 1, 31), dt.date(2024, 2, 29), dt.date(2023, 12, 31)]}),
    "seconds since 1970": ("a.csv", "created_at\n1700000000\n1600000000\n", 2, 0, {"created_at": [dt.datetime.fromtimestamp(t, dt.timezone.utc).replace(tzinfo=None) for t in (1700000000, 1600000000)]}),
    "such seconds in another column": ("a.csv", "views\n1700000000\n1600000000\n", 2, 0, {"views": [1700000000, 1600000000]}),
    "truths": ("a.csv", "a,b,c,d,e\nyes,Y,t,TRUE,N\nno,N,f,false,N\n", 2, 0, {"a": ["yes", "no"], "b": ["Y", "N"], "c": ["t", "f"], "d": [True, False], "e": ["N", "N"]}),
}


@pytest.mark.parametrize("case", READ)
def test_ends_in_rows_and_rejects(case, tmp_path):
    name, content, n_rows, n_rejects, values = READ[case]
    table, rows, rejects = taken(put(tmp_path, name, content), tmp_path)
    assert (len(rows), len(rejects)) == (n_rows, n_rejects), (rows[:5], rejects)
    names = ["row_id", "source", *[c.name for c in table.columns]]
    for column, expected in (values or {}).items(): assert [r[names.index(column)] for r in rows] == expected, column


REFUSED = {
    "empty": ("a.csv", b"", ["a.csv", "empty"]),
    "only blanks": ("a.csv", b" \n\n", ["a.csv", "empty"]),
    "only a mark": ("a.csv", b"\xef\xbb\xbf", ["a.csv", "empty"]),
    "only a header": ("a.csv", b"a,b\n", ["a.csv", "no row"]),
    "random bytes": ("a.csv", random.Random(0).randbytes(5000), ["a.csv"]),
    "latin-1": ("a.csv", SOUND.replace("card", "kört").encode("latin-1"), ["a.csv", "UTF-8", "encoding"]),
    "utf-16 without a mark": ("a.csv", SOUND.encode("utf-16-le"), ["a.csv", "utf-16"]),
    "utf-16 cut": ("a.csv", SOUND.encode("utf-16")[:-1], ["a.csv", "utf-16"]),
    "a title above the header": ("a.csv", "Trips of 2024\n" + SOUND, ["a.csv", "skip: 1"]),
    "two headers of other width": ("a.csv", "trip,\n" + SOUND, ["a.csv"]),
    "gz cut in the middle": ("a.csv.gz", gzip.compress(SOUND.encode())[:-20], ["a.csv.gz", "damaged"]),
    "gz with a flipped byte": ("a.csv.gz", gzip.compress(SOUND.encode())[:40] + b"\xff\x00\xff" + gzip.compress(SOUND.encode())[43:], ["a.csv.gz", "damaged"]),
    "zip with a password": ("a.zip", zipped({"x.csv": "a\n1\n"}, password=True), ["a.zip", "password"]),
    "zip cut": ("a.zip", zipped({"x.csv": SOUND})[:-30], ["a.zip", "damaged"]),
    "zip of nothing": ("a.zip", zipped({}), ["a.zip", "empty"]),
    "an Excel workbook": ("a.xlsx", zipped({"xl/workbook.xml": "<x/>"}), ["a.xlsx", "CSV"]),
    "an old Excel workbook": ("a.csv", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + b"\x00" * 99, ["a.csv", "Excel"]),
    "a web page called csv": ("a.csv", b"\n <!DOCTYPE html><html><body>login</body></html>", ["a.csv", "web page"]),
    "XML": ("a.csv", b'<?xml version="1.0"?><rows/>', ["a.csv", "XML"]),
    "Feather": ("a.csv", b"ARROW1\x00\x00" + b"\x00" * 50, ["a.csv", "Feather"]),
    "ORC": ("a.csv", b"ORC" + b"\x01" * 50, ["a.csv", "ORC"]),
    "Avro": ("a.csv", b"Obj\x01" + b"\x01" * 50, ["a.csv", "Avro"]),
    "SQLite": ("a.csv", b"SQLite format 3\x00" + b"\x00" * 50, ["a.csv", "SQLite"]),
    "CSV called Parquet": ("a.parquet", SOUND, ["a.parquet", "not a Parquet"]),
    "Parquet of nothing": ("a.parquet", b"", ["a.parquet", "empty"]),
    "Parquet of two marks": ("a.parquet", b"PAR1PAR1", ["a.parquet", "not a sound Parquet"]),
    "JSON array cut": ("a.json", b'[{"a": 1}, {"a"', ["a.json", "array"]),
    "JSON that is no table": ("a.json", b"7\n8\n9\n", ["a.json"]),
    "a header longer than 2 MB": ("a.csv", b"a," + b"x" * 3_000_000 + b"\n1,2\n", ["a.csv", "2 MB"]),
    "a header of one field, rows of two": ("a.csv", "a\n" + "1,2\n" * 30, ["a.csv", "skip"]),
    "a header of two fields, rows of one": ("a.csv", "a,b\n" + "1\n" * 30, ["a.csv", "header"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_ends_in_one_clear_error(case, tmp_path):
    name, content, words = REFUSED[case]
    with pytest.raises(SlmlError) as e: taken(put(tmp_path, name, content), tmp_path)
    for w in words: assert w in str(e.value), str(e.value)
    assert e.value.fix


def test_places_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "circle.csv").symlink_to(tmp_path / "circle.csv")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "loop").symlink_to(tmp_path / "folder")
    for place, words in (("pipe", "pipe"), ("circle.csv", "circle"), ("folder", "holds no file"), ("none.csv", "no file")):
        with pytest.raises(SlmlError, match=words): taken(tmp_path / place, tmp_path)
    put(tmp_path, "folder/a.csv", SOUND), put(tmp_path, "folder/notes.xlsx", "x")
    table, rows, _ = taken(tmp_path / "folder", tmp_path)
    assert len(rows) == 40 and any("notes.xlsx" in text for _, text in table.notes)


def test_parquet_of_every_kind(tmp_path):
    import numpy as np, pyarrow as pa, pyarrow.parquet as pq
    n = 50
    kinds = pa.table({
        "list": [[1, 2]] * n, "struct": [{"a": 1}] * n, "map": pa.array([[("k", 1)]] * n, pa.map_(pa.string(), pa.int64())), "decimal": pa.array([decimal.Decimal("1.25")] * n, pa.decimal128(9, 2)),
        "huge": pa.array([2**64 - 1] * n, pa.uint64()), "small": pa.array([7] * n, pa.uint64()), "words": pa.array(["x", "y"] * (n // 2)).dictionary_encode(), "nothing": pa.nulls(n),
        "nan": [float("nan"), 1.5] * (n // 2), "zone": pa.array([dt.datetime(2024, 1, 1, 12)] * n, pa.timestamp("us", "Europe/Berlin")), "ns": pa.array([1] * n, pa.timestamp("ns")),
        "far": pa.array([253402300800000000 * 5] + [0] * (n - 1), pa.timestamp("us")), "blob": [b"\x00\xff"] * n, "clock": pa.array([dt.time(1, 2)] * n), "half": pa.array(np.ones(n, np.float16))})
    pq.write_table(kinds, tmp_path / "k.parquet", row_group_size=20)
    table, rows, _ = taken(tmp_path / "k.parquet", tmp_path)
    got = dict(zip(["row_id", "source", *[c.name for c in table.columns]], zip(*rows)))
    assert len(rows) == n and got["huge"][0] == str(2**64 - 1) and got["small"][0] == 7 and got["decimal"][0] == 1.25 and got["nan"][:2] == (None, 1.5)
    assert got["far"][:2] == (None, dt.datetime(1970, 1, 1)) and any("after year 9999" in t for _, t in table.notes)
    assert got["zone"][0] == dt.datetime(2024, 1, 1, 12)  # pyarrow takes naive times as UTC


def test_parquet_that_is_odd_or_broken(tmp_path):
    import pyarrow as pa, pyarrow.parquet as pq
    good = pa.table({"a": list(range(5000)), "b": [f"text {i * 7919 % 5000}" for i in range(5000)]})
    pq.write_table(pa.table({"t": pa.array([dt.datetime(2024, 1, 1)], pa.timestamp("ns"))}), tmp_path / "int96.parquet", use_deprecated_int96_timestamps=True)
    assert taken(tmp_path / "int96.parquet", mk(tmp_path / "1"))[1][0][2:] == (dt.datetime(2024, 1, 1),)
    writer = pq.ParquetWriter(tmp_path / "groups.parquet", good.schema)
    for part in (good.slice(0, 0), good.slice(0, 10), good.slice(0, 0)): writer.write_table(part)
    writer.close()
    assert len(taken(tmp_path / "groups.parquet", mk(tmp_path / "2"))[1]) == 10
    pq.write_table(good.slice(0, 0), tmp_path / "norows.parquet")
    pq.write_table(pa.table({}), tmp_path / "nocolumns.parquet")
    pq.write_table(good, tmp_path / "good.parquet", compression="none")
    data = bytearray((tmp_path / "good.parquet").read_bytes())
    put(tmp_path, "cut.parquet", bytes(data[:-100]))
    for i in range(4, len(data) // 2): data[i] = (data[i] * 31 + 7) % 256
    put(tmp_path, "corrupt.parquet", bytes(data))
    for i, (name, words) in enumerate({"norows": "no row", "nocolumns": "nocolumns", "cut": "cut.parquet", "corrupt": "corrupt.parquet"}.items()):
        with pytest.raises(SlmlError, match=words): taken(tmp_path / f"{name}.parquet", mk(tmp_path / f"e{i}"))


def mk(folder): folder.mkdir(parents=True); return folder


@pytest.mark.parametrize("width", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_thousands_of_columns(tmp_path, width):
    lines = [",".join(f"c{i}" for i in range(width))] + [",".join(str(i * k) for i in range(width)) for k in range(3)]
    table, rows, _ = taken(put(tmp_path, "wide.csv", "\n".join(lines)), tmp_path, memory="2GB")
    assert len(table.columns) == width and rows[2][2 + width - 1] == 2 * (width - 1)


def test_a_record_of_five_megabytes(tmp_path):
    table, rows, rejects = taken(put(tmp_path, "a.csv", SOUND + "1,2," + "x" * 5_000_000 + "\n41,1.5,card\n"), tmp_path)
    assert len(rows) == 41 and [(r[1], r[2]) for r in rejects] == [(42, "longer than 2 MB")] and len(rejects[0][3]) <= 500


def test_rejects_by_the_hundred_thousand_are_kept(tmp_path):
    text = "a,b\n" + "1,2\n3\n2,3\n" * 100_000
    table, rows, rejects = taken(put(tmp_path, "a.csv", text), tmp_path)
    assert (len(rows), len(rejects)) == (200_000, 100_000) and rejects[-1][1] == 300_000 and len(table.files[0].rejects.first) == 100


def test_mixed_encodings_between_files(tmp_path):
    put(tmp_path, "d/a.csv", "a,b\n1,ü\n"), put(tmp_path, "d/b.csv", "a,b\n2,ö\n".encode("utf-16"))
    assert [r[2:] for r in taken(tmp_path / "d", tmp_path)[1]] == [(1, "ü"), (2, "ö")]


def test_dates_are_told_apart_by_all_files_or_refused(tmp_path):
    put(tmp_path, "d/a.csv", "a\n01/02/2024\n"), put(tmp_path, "d/b.csv", "a\n13/02/2024\n")
    assert [r[2] for r in taken(tmp_path / "d", tmp_path)[1]] == [dt.date(2024, 2, 1), dt.date(2024, 2, 13)]
    put(tmp_path, "d/c.csv", "a\n02/14/2024\n")
    table, rows, _ = taken(tmp_path / "d", mk(tmp_path / "2"))
    assert [r[2] for r in rows] == ["01/02/2024", "13/02/2024", "02/14/2024"] and any("day first" in t and "month first" in t for _, t in table.notes)


def test_drift_is_reported_by_name(tmp_path):
    put(tmp_path, "d/1_jan.csv", "id,fare,tip\n1,2.5,1\n2,3.5,2\n"), put(tmp_path, "d/2_feb.csv", "id,fare_amount,tip,zone\n3,4.5,none,7\n4,5.5,much,8\n")
    table, rows, _ = taken(tmp_path / "d", tmp_path)
    said = "\n".join(t for _, t in table.notes)
    for words in ("'fare' of 1_jan.csv looks renamed: it is 'fare_amount' in 2_feb.csv", "1_jan.csv lacks 2 of 5 columns: fare_amount, zone", "2_feb.csv lacks 1 of 5 columns: fare", "'tip' differs between files: "):
        assert words in said, said
    assert len(rows) == 4


def test_folders_that_are_columns(tmp_path):
    for year, month in ((2023, "12"), (2024, "01")): put(tmp_path, f"d/year={year}/month={month}/x.csv", "a\n1\n")
    table, rows, _ = taken(tmp_path / "d", tmp_path)
    assert [r[2:] for r in rows] == [(1, 2023, 12), (1, 2024, 1)] and [r[1] for r in rows] == ["year=2023/month=12/x.csv", "year=2024/month=1/x.csv"]


@pytest.mark.slow
def test_a_line_of_two_gigabytes(tmp_path):
    place = tmp_path / "long.csv"
    with open(place, "wb") as f:
        f.write(SOUND.encode() + b"7,1.5,")
        block = b"x" * (1 << 24)
        for _ in range(128): f.write(block)
        f.write(b"\n41,1.5,card\n")
    code = ("import sys; from pathlib import Path; sys.path.insert(0, 'tests'); from test_corpus import taken; _, rows, rejects = taken(sys.argv[1], Path(sys.argv[2]));"
            "print(len(rows), [(r[1], r[2]) for r in rejects], [int(l.split()[1]) // 1024 for l in open('/proc/self/status') if l.startswith('VmHWM')][0])")  # ru_maxrss would count the parent before the exec
    out = subprocess.run([sys.executable, "-c", code, str(place), str(tmp_path)], capture_output=True, text=True)
    assert "41 [(42, 'longer than 2 MB')] " in out.stdout, out.stdout + out.stderr
    assert int(out.stdout.split()[-1]) < 700


# Only what is new: a table that grew file by file is the table of all files at once

RUNS = itertools.count()


def grown(folder, ledger, names, **options):
    "The rows, types and notes of a table after one more run."
    table, rows, _ = taken([folder / n for n in names], mk(folder / f"run{next(RUNS)}"), append=str(ledger), **options)
    return rows, [(c.name, c.type, c.reading, c.unparsed) for c in table.columns], [t for _, t in table.notes]


KINDS = [lambda r, i: str(r.randrange(100)), lambda r, i: f"{r.random():.3f}", lambda r, i: f"{1 + i % 12:02}/{1 + i % 28:02}/2024", lambda r, i: f"{13 + i % 10}/{1 + i % 12:02}/2024",
         lambda r, i: r.choice(["yes", "no", "NA", ""]), lambda r, i: r.choice(["x", "y 1"]), lambda r, i: f"2024-01-{1 + i % 28:02}", lambda r, i: f"€{i},000"]


@pytest.mark.parametrize("seed", range(12))
def test_grown_file_by_file_is_read_at_once(tmp_path, seed):
    r = random.Random(seed)
    names = [f"{m}.csv" for m in range(4)]
    likely = [r.choice(KINDS) for _ in range(3)]
    for n in names:
        kinds = [k if r.random() < .7 else r.choice(KINDS) for k in likely]
        put(tmp_path, n, "a,b,c\n" + "".join(",".join(f'"{k(r, i)}"' for k in kinds) + "\n" for i in range(r.randrange(1, 30))) + r.choice(["", "1,2\n"]))
    order = r.sample(names, 4)
    grown(tmp_path, tmp_path / "one.json", order[:1])
    grown(tmp_path, tmp_path / "one.json", order[1:3])
    rows, types, notes = grown(tmp_path, tmp_path / "one.json", order[3:])  # the others are no longer among the sources
    assert any("1 of 4 files are new" in n for n in notes) and any("3 files read before are no longer among the sources" in n for n in notes)
    whole, types_too, _ = grown(tmp_path, tmp_path / "two.json", r.sample(names, 4))
    assert (rows, types) == (whole, types_too)


def test_a_ledger_counts_each_content_once_and_tells_what_changed(tmp_path):
    put(tmp_path, "1.csv", "a\n1\n"), put(tmp_path, "2.csv", "a\n2\n")
    ledger = tmp_path / "l.json"
    first = grown(tmp_path, ledger, ["1.csv", "2.csv"])[0]
    kept = ledger.read_bytes()
    assert grown(tmp_path, ledger, ["1.csv", "2.csv"])[0] == first and ledger.read_bytes() == kept  # again: nothing changes
    put(tmp_path, "copy.csv", "a\n1\n")
    rows, _, notes = grown(tmp_path, ledger, ["2.csv", "copy.csv"])
    assert [r[2] for r in rows] == [1, 2] and any("copy.csv is, byte for byte, 1.csv, which was read before" in n for n in notes), notes
    put(tmp_path, "2.csv", "a\n2\n3\n"), (tmp_path / "1.csv").unlink()
    rows, _, notes = grown(tmp_path, ledger, ["2.csv"])
    assert [r[2] for r in rows] == [1, 2, 3] and any("2.csv has changed since it was read (1 rows then)" in n for n in notes)
    next((tmp_path / "l.parts").glob("*/rows.parquet")).write_bytes(b"PAR1")  # damaged: read again where the file is there, an error where it is not
    for damaged in (tmp_path / "l.parts").glob("*/rows.parquet"): damaged.write_bytes(b"PAR1")
    with pytest.raises(SlmlError, match="1.csv"): grown(tmp_path, ledger, ["2.csv"])
    put(tmp_path, "1.csv", "a\n1\n")
    assert [r[2] for r in grown(tmp_path, ledger, ["1.csv", "2.csv"])[0]] == [1, 2, 3]
    put(tmp_path, "x.json", "[]")
    with pytest.raises(SlmlError, match="no ledger"): grown(tmp_path, tmp_path / "x.json", ["1.csv"])


def test_incremental_reads_only_what_is_new(tmp_path, monkeypatch):
    import slml_nb.ingest as ingest
    monkeypatch.setenv("SLML_CACHE", str(tmp_path / "cache"))
    read, real = [], ingest.read_file
    monkeypatch.setattr(ingest, "read_file", lambda con, name, *a: read.append(name) or real(con, name, *a))
    put(tmp_path, "1.csv", "a,b\n1,x\n2,y\n7\n"), put(tmp_path, "2.csv", "a,b\n3.5,NA\n")
    one = taken([tmp_path / "1.csv"], mk(tmp_path / "r1"), incremental=True)[1:]
    both = taken([tmp_path / "1.csv", tmp_path / "2.csv"], mk(tmp_path / "r2"), incremental=True)[1:]
    assert read == ["1.csv", "2.csv"]
    assert both == taken([tmp_path / "1.csv", tmp_path / "2.csv"], mk(tmp_path / "r3"))[1:] and len(both[1]) == 1


def test_append_fallback_and_partitions_through_a_run(project):
    project.write("params/t.yaml", "project: t\nframe: {target: fare, metric: mae, time: '', known_later: []}\ningest:\n  sources: [d]\n  append: ledger.json\n  partition_by: [paid]\n"
                  "  tables: {zones: none.csv}\n  tables_fallback: {zones: z.csv}\n")
    project.write("z.csv", "zone,name\n1,x\n")
    month = lambda k: "km,paid,fare\n" + "".join(f"{i}.5,{'card' if i % 2 else 'cash'},{i + k}\n" for i in range(60))
    project.write("d/1.csv", month(1))
    assert project.run("params/t.yaml", "--to", "ingest")[1]["stages"]["ingest"]["metrics"]["rows_in"] == 60
    project.write("d/2.csv", month(2))
    code, run = project.run("params/t.yaml", "--to", "ingest")
    made = run["stages"]["ingest"]["metrics"]
    assert code == 0 and (made["rows_in"], made["rows_out"], made["partitions"]) == (120, 120, 2)
    place = sorted(project.folder.glob("runs/.store/*/*/*/tables"), key=lambda p: p.stat().st_mtime_ns)[-1]
    assert [p.name for p in sorted((place / "raw").iterdir())] == ["paid=card", "paid=cash"] and (place / "zones.parquet").exists()
    assert project.run("params/t.yaml", "--to", "ingest")[1]["stages"]["ingest"]["metrics"] == made
    assert project.run("params/t.yaml", "--to", "ingest")[1]["stages"]["ingest"]["state"] == "reused"
