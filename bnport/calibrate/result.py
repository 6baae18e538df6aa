"""What a calibration did: old against new statistics per layer, what was left alone, and the way back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from bnport._lazy import np
from bnport.errors import InvalidValue, listed, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from bnport.record import Array

_VARIANCES = {False: "biased (divided by n)", True: "unbiased (divided by n - 1)"}


class LayerStatistics(NamedTuple):
    """One layer, before and after. Arrays are float64, shape (C,), as stored in the layer's own dtype.

    n:  how many numbers per channel the new statistics were taken from (samples times positions).
    """

    name: str
    n: int
    epsilon: float
    old_mean: Array
    old_variance: Array
    mean: Array
    variance: Array

    @property
    def channels(self) -> int:
        """C."""
        return int(self.mean.size)

    @property
    def shift(self) -> float:
        """max over channels of |mean - old mean| / sqrt(variance + epsilon)."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return float(np.max(np.abs(self.mean - self.old_mean) / np.sqrt(self.variance + self.epsilon)))

    @property
    def scales(self) -> tuple[float, float]:
        """Smallest and largest sqrt((variance + epsilon) / (old variance + epsilon)) over the channels; NaN if undefined."""
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.sqrt((self.variance + self.epsilon) / (self.old_variance + self.epsilon))
        return float(np.min(ratio)), float(np.max(ratio))


class Calibration:
    """The result of calibrate(). Printing it gives a table; `undo()` puts the old statistics back, bit for bit.

    method, unbiased: as asked for.
    layers:           LayerStatistics of every layer that was changed, in the model's order.
    left:             reason -> names of the BatchNorm layers that were not touched.
    samples, batches, rounds, seconds, resident, spilled: what it took; the last two in bytes of stored activations.
    """

    def __init__(
        self,
        *,
        model: str,
        data: str,
        method: str,
        unbiased: bool,
        layers: Iterable[LayerStatistics],
        left: dict[str, list[str]],
        notes: Iterable[str],
        figures: dict[str, int | float],
        undo: Callable[[], None],
    ) -> None:
        self.model, self.data, self.method, self.unbiased = model, data, method, unbiased
        self.layers = list(layers)
        self.left = {reason: list(names) for reason, names in left.items() if names}
        self.notes = list(notes)
        self.samples, self.batches = int(figures["samples"]), int(figures["batches"])
        self.rounds, self.seconds = int(figures["rounds"]), float(figures["seconds"])
        self.resident, self.spilled = int(figures.get("resident", 0)), int(figures.get("spilled", 0))
        self._undo: Callable[[], None] | None = undo

    def undo(self) -> None:
        """Put back every statistic that the calibration changed, bit for bit. InvalidValue the second time."""
        if self._undo is None:
            raise InvalidValue("this calibration has been undone already")
        self._undo()
        self._undo = None

    def __getitem__(self, name: str) -> LayerStatistics:
        """The layer called `name`; KeyError if it was not changed."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(name)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; statistics as lists, None where an old one is NaN or infinite, which JSON does not have."""
        from bnport.report import finite

        names = ("old_mean", "old_variance", "mean", "variance")
        return {
            "model": self.model,
            "data": self.data,
            "method": self.method,
            "variance": "unbiased" if self.unbiased else "biased",
            "samples": self.samples,
            "batches": self.batches,
            "rounds": self.rounds,
            "seconds": round(self.seconds, 3),
            "resident_bytes": self.resident,
            "spilled_bytes": self.spilled,
            "layers": [
                {
                    "name": layer.name,
                    "channels": layer.channels,
                    "numbers_per_channel": layer.n,
                    "largest_mean_shift": finite(layer.shift),
                    "std_ratio": [finite(value) for value in layer.scales],
                    **{name: [finite(value) for value in getattr(layer, name).tolist()] for name in names},
                }
                for layer in self.layers
            ],
            "left": self.left,
            "notes": self.notes,
        }

    def __str__(self) -> str:
        from bnport.report import number, table

        rows = [
            (
                layer.name, str(layer.channels), str(layer.n), number(layer.shift),
                " to ".join(dict.fromkeys(number(value) for value in layer.scales)),
            )
            for layer in self.layers
        ]  # fmt: skip
        header = ("layer", "channels", "n per channel", "mean moved (std)", "std times")
        parts = [table(header, rows, right=(1, 2, 3))] if rows else []
        parts += [f"left alone, {reason}: {listed(names, 12)}" for reason, names in self.left.items()]
        parts += [f"note: {printable(note, 600)}" for note in self.notes]
        passes = f", {self.rounds} rounds" if self.rounds > 1 else ""
        disk = f", {self.spilled / 1e9:.2f} GB through the disk" if self.spilled else ""
        parts.append(
            f"{printable(self.model)}: {len(self.layers)} layers, method {self.method}, variance"
            f" {_VARIANCES[self.unbiased]}, {self.samples} samples in {self.batches} batches{passes}{disk},"
            f" {self.seconds:.1f} s"
        )
        return "\n".join(parts)

    def __repr__(self) -> str:
        return f"<Calibration of {len(self.layers)} layers by {self.method}>"
