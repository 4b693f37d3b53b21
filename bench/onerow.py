"""One row of features: the compiled function beside the same SQL in DuckDB."""
import json, statistics, sys, time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))


def _microseconds(function, rows, count) -> dict:
    "Median, least and most of many calls."
    took = []
    for i in range(count + 50):
        start = time.perf_counter()
        function(rows[i % len(rows)])
        took.append(1e6 * (time.perf_counter() - start))
    took = took[50:]
    return {"median_us": round(statistics.median(took), 2), "min_us": round(min(took), 2), "max_us": round(max(took), 2)}


def in_duckdb(folder: Path, inputs: list):
    "features.sql over one row: planned once, and run for values that have been read."
    import duckdb
    from slml_nb.sql import ident
    con = duckdb.connect(config={"threads": 1})
    con.execute("set TimeZone = 'UTC'; pragma disable_optimizer")
    columns = ", ".join(f"?::{i['type']} AS {ident(i['name'])}" for i in inputs)
    con.execute(f"prepare one as with rows as (select {columns}) {(folder / 'features.sql').read_text()}")
    constant = lambda v, kind: f"NULL::{kind}" if v is None else "'" + str(v).replace("'", "''") + f"'::{kind}"
    return lambda values: con.execute("execute one(" + ", ".join(constant(values[i["name"]], i["type"]) for i in inputs) + ")").fetchall()[0]


def measure(
    recipe="",  # a recipe or a package; "": that of the built-in sample of flights
    count: int = 5000,  # calls
) -> dict:  # {way: median_us, min_us, max_us}
    "Microseconds for one row of features, and what they consist of."
    from slml_nb.recipe import FeatureFunction
    from slml_nb.stage import made_in, sample_folder
    if not recipe: recipe = (lambda made: Path(made["root"]) / made["file"])(made_in(sample_folder())["recipe"])
    function = FeatureFunction(recipe)
    requests = function.recipe["examples"]
    read, sql = [function.read(r) for r in requests], in_duckdb(Path(recipe), function.inputs)
    for values in read: assert function.compute(values) == sql(values), "the two do not agree"
    return {"features": len(function.names), "fields": len(function.inputs),
            "compiled, request read": _microseconds(lambda r: function.rows([r]), requests, count), "compiled": _microseconds(function.compute, read, count),
            "DuckDB, request read": _microseconds(lambda r: sql(function.read(r)), requests, max(count // 10, 200)), "DuckDB": _microseconds(sql, read, max(count // 10, 200))}


if __name__ == "__main__": print(json.dumps(measure(*sys.argv[1:2]), indent=1))
