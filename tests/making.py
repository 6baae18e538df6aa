"""Records and layers with statistics that tell mistakes apart."""

from __future__ import annotations

import numpy as np

from bnport.layer import Layer, Layers
from bnport.record import FIELDS, BatchNorm


def telling(channels: int = 16, *, seed: int = 0, epsilon: float = 1e-5, dtype: str = "float32") -> BatchNorm:
    """Small variances among larger ones, gamma of both signs, mean != beta; no two arrays alike."""
    rng = np.random.default_rng(seed)
    return BatchNorm(
        gamma=(rng.normal(1, 0.3, channels) * rng.choice([-1, 1], channels)).astype(dtype),
        beta=rng.normal(0.2, 0.5, channels).astype(dtype),
        mean=rng.normal(-0.5, 1, channels).astype(dtype),
        variance=(10 ** rng.uniform(-6, 0, channels)).astype(dtype),
        epsilon=epsilon,
    )


def layer_of(record: BatchNorm, name: str = "bn", **more: object) -> Layer:
    """A Layer that holds `record`."""
    return Layer(
        name,
        channels=record.channels,
        epsilon=record.epsilon,
        load=lambda: {field: getattr(record, field) for field in FIELDS},
        **more,
    )


def layers_of(records: dict[str, BatchNorm], source: str = "made") -> Layers:
    """Layers that hold `records`."""
    return Layers((layer_of(record, name) for name, record in records.items()), source=source, format="made")
