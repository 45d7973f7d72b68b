"""The borders of the house: imports point down, and some libraries live in one file only."""

from __future__ import annotations

import pytest

from tests.imports import PACKAGES, imported_names, sources

ABOVE = {"models": {"pipeline", "flows"}, "pipeline": {"flows"}, "flows": set()}
# library -> the only files that may import it
HOMES = {
    "prefect": "flows/",
    "dvc": "nowhere: only its command line is used, in flows/dvc.py",
    "great_expectations": "pipeline/expectations.py",
    "lightning": "pipeline/training_loop.py",
    "titanlib": "pipeline/qc_spatial.py",
    "icechunk": "pipeline/publish.py",
}


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_down(package: str) -> None:
    offenders = {
        f"{path} imports {name}" for path in sources(package) for name in imported_names(path) if name.split(".")[0] in ABOVE[package]
    }
    assert not offenders


@pytest.mark.parametrize("library", HOMES)
def test_a_library_stays_in_its_home(library: str) -> None:
    users = [
        str(path) for package in PACKAGES for path in sources(package) if any(n.split(".")[0] == library for n in imported_names(path))
    ]
    assert all(user.startswith(HOMES[library]) for user in users), f"{library} belongs in {HOMES[library]}, found in {users}"


def test_models_open_no_file() -> None:
    offenders = [str(path) for path in sources("models") if imported_names(path) & {"pathlib", "io", "zarr", "xarray", "pandas", "pyarrow"}]
    assert not offenders


def test_the_dvc_command_line_is_called_in_one_file() -> None:
    users = [path for package in PACKAGES for path in sources(package) if "subprocess" in imported_names(path)]
    assert [str(path) for path in users if str(path) != "pipeline/receipt.py"] == ["flows/dvc.py"]
