"""One vocabulary: short names, CF standard names, stored units and physical limits. Every source maps its own names to these."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Variable:
    name: str
    long_name: str
    unit: str  # stored unit, UDUNITS spelling
    standard_name: str | None  # CF table 93; None where CF has no name (dimensionless simulations)
    fail: tuple[float | None, float | None]  # outside: physically impossible or outside the sensor's range (QARTOD 4)
    suspect: tuple[float | None, float | None]  # outside: rare (QARTOD 3)
    share: bool = False  # one of several classes: 1 where it holds and 0 elsewhere, so that a mean is a probability


_PARTICLES = "mass_concentration_of_{}_ambient_aerosol_particles_in_air"

VARIABLES = {
    v.name: v
    for v in (
        # Small negative concentrations are instrument noise and stay; declared codes are masked by the source before this.
        Variable("pm1", "PM1", "ug m-3", _PARTICLES.format("pm1"), (-20, 1500), (-5, 900)),
        Variable("pm2p5", "PM2.5", "ug m-3", _PARTICLES.format("pm2p5"), (-20, 1500), (-5, 900)),
        Variable("pm10", "PM10", "ug m-3", _PARTICLES.format("pm10"), (-20, 2500), (-5, 1500)),
        Variable("so2", "SO2", "ug m-3", "mass_concentration_of_sulfur_dioxide_in_air", (-20, 1000), (-5, 500)),
        Variable("no2", "NO2", "ug m-3", "mass_concentration_of_nitrogen_dioxide_in_air", (-20, 800), (-5, 400)),
        Variable("co", "CO", "ug m-3", "mass_concentration_of_carbon_monoxide_in_air", (-200, 30000), (-50, 15000)),
        Variable("o3", "O3", "ug m-3", "mass_concentration_of_ozone_in_air", (-20, 800), (-5, 500)),
        Variable("t2m", "2 m temperature", "K", "air_temperature", (180, 335), (220, 325)),
        Variable("d2m", "2 m dew point", "K", "dew_point_temperature", (180, 325), (210, 308)),
        Variable("rh", "relative humidity", "1", "relative_humidity", (0, 1.1), (0.02, 1.0)),
        Variable("u10", "10 m eastward wind", "m s-1", "eastward_wind", (-100, 100), (-40, 40)),
        Variable("v10", "10 m northward wind", "m s-1", "northward_wind", (-100, 100), (-40, 40)),
        Variable("sp", "surface pressure", "Pa", "surface_air_pressure", (30000, 110000), (45000, 107000)),
        Variable("msl", "mean sea level pressure", "Pa", "air_pressure_at_mean_sea_level", (85000, 110000), (92000, 107000)),
        Variable("blh", "boundary layer height", "m", "atmosphere_boundary_layer_thickness", (0, 10000), (0, 6000)),
        Variable("tcc", "total cloud cover", "1", "cloud_area_fraction", (-0.001, 1.001), (0, 1)),
        Variable("tp", "precipitation", "m", "lwe_thickness_of_precipitation_amount", (-1e-6, 0.5), (0, 0.15)),
        Variable("ssr", "net solar radiation", "W m-2", "surface_net_downward_shortwave_flux", (-1, 1500), (0, 1250)),
        Variable("vorticity", "vorticity", "1", None, (None, None), (None, None)),
        Variable("curve_x", "first coordinate of a curve", "1", None, (None, None), (None, None)),
        Variable("curve_y", "second coordinate of a curve", "1", None, (None, None), (None, None)),
        Variable("velocity", "velocity", "1", None, (None, None), (None, None)),
        Variable("velocity_x", "velocity along x", "1", None, (None, None), (None, None)),
        Variable("velocity_y", "velocity along y", "1", None, (None, None), (None, None)),
        Variable("vertical_velocity", "vertical velocity", "1", None, (None, None), (None, None)),
        Variable("pressure", "pressure", "1", None, (None, None), (None, None)),
        Variable("temperature_excess", "temperature above that at the start", "1", None, (None, None), (None, None)),
        Variable("height", "height of the surface above its mean", "1", None, (None, None), (None, None)),
        Variable("signal", "random signal", "1", None, (None, None), (None, None)),
        *(Variable(name, f"{name} (share)", "1", None, (0, 1), (0, 1), share=True) for name in ("susceptible", "infected", "recovered")),
    )
}


def lookup(name: str) -> Variable:
    if name not in VARIABLES:
        raise ValueError(f"unknown variable {name!r}: the lexicon (pipeline/lexicon.py) knows {', '.join(VARIABLES)}")
    return VARIABLES[name]
