"""Which sources exist, by import string, and what an adapter module offers.

Every adapter has

    Params      the section `ingest.KEY` of params.yaml; its field `source` is the name below
    DROP        raw.Drop: the files of the raw drop, their official addresses, licence and attribution

A source of fields has

    field(params, raw, out)     write `out`/field.zarr from the files in the folder `raw`; returns counts for ingest.json

A source of tables (its Params extend tables.TableParams) has

    partitions(params, raw)                 list of tables.Partition: which files feed which stretch of local time
    columns(params)                         name in the header -> Arrow type to read it as
    ALONGSIDE (may be absent)               names of files in the drop that `rows` looks up, beside the members
    rows(params, raw, member, table)        tables.Rows out of one block of a file, a vectorised pure function: time, platform, position,
                                            values in the lexicon's units, and what is wrong with which row

All that is common to tables (streaming, sentinels, zones, spans, duplicates, trips, quarantine, writing) is in tables.py and ingest.py.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

SOURCES = {
    "airdelhi": "pipeline.sources.airdelhi",
    "beijing": "pipeline.sources.beijing",
    "era5": "pipeline.sources.era5",
    "kolkata": "pipeline.sources.kolkata",
    "meshes": "pipeline.sources.meshes",
    "simulations": "pipeline.sources.simulations",
}


def load(name: object) -> ModuleType:
    """The adapter module of a source; an unknown name is an error that lists the known ones."""
    if name not in SOURCES:
        raise ValueError(f"unknown source {name!r}: pipeline/sources/__init__.py knows {', '.join(SOURCES)}")
    return import_module(SOURCES[str(name)])
