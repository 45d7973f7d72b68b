"""The real ERA5 files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

from pipeline import fields
from pipeline.sources import era5
from tests.era5_files import section


def real(mirror: Path, out: Path, files: str, *variables: str, **more: Any) -> tuple[xr.Dataset, dict[str, Any]]:
    counts = era5.field(section(files=[files], variables=variables, **more), mirror / "era5", out)
    return fields.open_field(out).load(), counts


@pytest.mark.real
def test_real_grib_and_netcdf_are_one(mirror: Path, tmp_path: Path) -> None:
    before = sorted((mirror / "era5").iterdir())
    grib, _ = real(mirror, tmp_path / "grib", "era5-2mt-2019-03-uk.grib", "t2m")
    netcdf, _ = real(mirror, tmp_path / "netcdf", "era5_t2m_uk_2019-03.nc", "t2m")
    assert grib.drop_attrs(deep=False).identical(netcdf.drop_attrs(deep=False))
    assert dict(grib.sizes) == {"time": 744, "y": 33, "x": 49}
    assert float(grib["t2m"].min()) == pytest.approx(265.68, abs=0.01)
    assert float(grib["t2m"].max()) == pytest.approx(291.56, abs=0.01)
    assert grib["time"].values[-1] == np.datetime64("2019-03-31T23:00")
    assert sorted((mirror / "era5").iterdir()) == before


@pytest.mark.real
def test_real_mixed_versions(mirror: Path, tmp_path: Path) -> None:
    field, counts = real(mirror, tmp_path, "era5_delhi_blh_ssr_2025_cds_original_mixed_expver.nc", "blh", "ssr")
    assert counts["expver"] == {"0001": 1094, "0005": 264}
    assert field["time"].values[np.argmax(field["expver"].values == "0005")] == np.datetime64("2025-10-01T12:00")
    assert field["latitude"].values.tolist() == [28.2, 28.45, 28.7, 28.95]
    with xr.open_dataset(mirror / "era5" / "era5_delhi_blh_ssr_2025_cds_original_mixed_expver.nc") as source:
        joules = source["ssr"].isel(latitude=slice(None, None, -1)).values.astype("f8")
    np.testing.assert_allclose(field["ssr"], joules / 3600, rtol=1e-7)
    assert field["ssr"].attrs["units"] == "W m-2"
    assert field["ssr"].attrs["standard_name"] == "surface_net_downward_shortwave_flux"


@pytest.mark.real
def test_real_years_join(mirror: Path, tmp_path: Path) -> None:
    field, counts = real(mirror, tmp_path / "years", "era5_delhi_blh_ssr_*_cds_original*.nc", "blh")
    assert counts["frames"] == 1464 + 1460 + 1358
    assert counts["expver"] == {"0001": 4018, "0005": 264}
    joined, _ = real(mirror, tmp_path / "joined", "era5_delhi_blh_ssr_2019-2025_6h.nc", "blh")
    assert joined.sizes["time"] == 10126
    np.testing.assert_array_equal(field["blh"], joined["blh"].sel(time=field["time"]))


@pytest.mark.real
def test_real_legacy_packing(mirror: Path, tmp_path: Path) -> None:
    import netCDF4

    field, counts = real(mirror, tmp_path, "era5_t2m_bengaluru_2019-2021_legacy_cds.nc", "t2m")
    assert counts["frames"] == 535
    with netCDF4.Dataset(mirror / "era5" / "era5_t2m_bengaluru_2019-2021_legacy_cds.nc") as source:
        source.set_auto_maskandscale(False)
        packed = source["t2m"][:, ::-1].astype("f8") * source["t2m"].scale_factor + source["t2m"].add_offset
    np.testing.assert_array_equal(field["t2m"], packed.astype("f4"))
    assert field["time"].values[0] == np.datetime64("2019-01-01T05:00")


@pytest.mark.real
def test_real_scalar_version_and_cloud_fraction(mirror: Path, tmp_path: Path) -> None:
    field, _ = real(mirror, tmp_path, "era5_t2m_u10_v10_tcc_karnataka_2024-01-01T12_cds_original.nc", "t2m", "u10", "v10", "tcc")
    assert field["expver"].values.tolist() == ["0001"]
    assert field["tcc"].attrs["units"] == "1"
    assert 0 <= float(field["tcc"].min()) <= float(field["tcc"].max()) <= 1


@pytest.mark.real
@pytest.mark.parametrize(
    ("file", "variables"), [("eraint_uvz_monthly.nc", ["u10"]), ("era5_daily_surface_cancities_1990-1993.nc", ["t2m", "sp"])]
)
def test_real_files_of_other_products_are_refused(mirror: Path, tmp_path: Path, file: str, variables: list[str]) -> None:
    with pytest.raises(ValueError, match=f"no {', '.join(variables)} anywhere; found "):
        real(mirror, tmp_path, file, *variables)
