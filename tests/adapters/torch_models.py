"""Models of torch holding given records, for the tests of the torch adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from bnport.record import BatchNorm

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


def norm_of(record: BatchNorm, absent=(), kind=torch.nn.BatchNorm1d, dtype=torch.float32, **more):
    """A torch BatchNorm with the record's numbers; `absent` as in the contract."""
    arguments = {"affine": "gamma" not in absent or "beta" not in absent}
    if "beta" in absent and "gamma" not in absent:
        arguments["bias"] = False
    norm = kind(record.channels, eps=record.epsilon, momentum=0.3, **arguments, **more).to(dtype)
    fill(norm, record)
    return norm


def fill(norm, record: BatchNorm) -> None:
    """Set a torch layer's numbers, through torch only."""
    with torch.no_grad():
        for theirs, array in (
            ("weight", record.gamma),
            ("bias", record.beta),
            ("running_mean", record.mean),
            ("running_var", record.variance),
        ):
            if getattr(norm, theirs, None) is not None:
                getattr(norm, theirs).copy_(torch.from_numpy(np.array(array)))
        if getattr(norm, "num_batches_tracked", None) is not None:
            norm.num_batches_tracked.fill_(7)


def chain(records, absent=(), dtype=torch.float32):
    """One record: the BatchNorm alone. Several: with linear layers between."""
    if len(records) == 1:
        return norm_of(records[0], absent, dtype=dtype).eval()
    torch.manual_seed(3)
    parts = []
    for before, record in zip([None, *records], records, strict=False):
        if before is not None:
            parts.append(torch.nn.Linear(before.channels, record.channels))
        parts.append(norm_of(record, absent, dtype=dtype))
    return torch.nn.Sequential(*parts).to(dtype).eval()


def rebuilt_from(state, epsilon=1e-5):
    """The BatchNorm1d that a state dict of one belongs to, filled by load_state_dict."""
    norm = torch.nn.BatchNorm1d(
        state["running_mean"].numel(),
        eps=epsilon,
        affine="weight" in state,
        **({"bias": False} if "weight" in state and "bias" not in state else {}),
    ).to(state["running_mean"].dtype)
    norm.load_state_dict(state)
    return norm.eval()


def output(model, x, dtype=torch.float32) -> np.ndarray:
    """model(x) by torch, as float64."""
    with torch.no_grad():
        return model(torch.from_numpy(np.array(x)).to(dtype)).double().numpy()
