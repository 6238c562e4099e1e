"""Data folders for tests: `put(name, rows)` writes a file of the kind its name says."""

import csv
import gzip
import json

import pyarrow
import pyarrow.parquet as parquet
import pytest


@pytest.fixture
def put(tmp_path):
    """Writes rows (or, to .json, anything) under the test's own folder; returns the path."""

    def put(name, rows):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".parquet"):
            parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        elif name.endswith(".json"):
            path.write_text(json.dumps(rows))
        elif name.endswith(".csv"):
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)
        else:
            data = "".join(json.dumps(row) + "\n" for row in rows).encode()
            path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return path

    return put
