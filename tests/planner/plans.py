"""Layouts and constants that the planner's tests share."""

from dataclasses import fields, replace
from functools import cache

from deepv3.config.compose import compose
from deepv3.config.schema import Config, ModelConfig
from deepv3.planner.calibration import Calibration, Value
from deepv3.planner.hardware import DEVICES, FABRICS, Cluster
from deepv3.planner.layout import Layout
from deepv3.planner.simulate import Simulator

REPORT = Calibration()


@cache
def config(*overrides: str, precision: str = "fp8") -> Config:
    """A composed configuration in the precision asked for; FP8 is what the report trained in."""
    cfg = compose(list(overrides) or ["+config=v3_671b", "cluster=h800_2048"])
    cfg.precision.name = precision
    return cfg


@cache
def model(preset: str) -> ModelConfig:
    """The architecture of a preset."""
    return compose([f"+config={preset}"]).model


def v3(**changes) -> Layout:
    """The report's layout: 2048 H800, PP16 x EP64, DualPipe, FP8, 15,360 sequences of 4096."""
    return replace(Layout.of(config()), **changes)


@cache
def v3_simulator() -> Simulator:
    """One simulator for all tests, so that its step is made once."""
    return Simulator(v3(), REPORT)


def on(device: str, count: int, **changes) -> Layout:
    """A layout of V3 on other machines, 1F1B and without CUDA graphs unless said otherwise."""
    row = DEVICES[device]
    base = v3(cluster=Cluster(row, count, min(row.domain, count), FABRICS["mpft"]), schedule="1f1b", moment_bytes=4)
    return replace(base, **{"cuda_graph": False} | changes)


def constants(**values: float) -> Calibration:
    """The report's constants with some replaced."""
    return REPORT.changed({name: Value(value, value, value, "test") for name, value in values.items()}, "test")


def faster(device: str, name: str, factor: float = 2.0):
    """A device with one of its numbers multiplied."""
    row = DEVICES[device]
    assert name in {f.name for f in fields(row)}
    return replace(row, **{name: getattr(row, name) * factor})
