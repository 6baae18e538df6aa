"""The pytest plugin: `bnport_golden` records BatchNorm layers in one environment and compares them in another.

    def test_torch_side(bnport_golden):             # where PyTorch is installed
        bnport_golden.record(torch_model(), "resnet50")

    def test_keras_side(bnport_golden):             # where Keras is; PyTorch need not be
        bnport_golden.compare(ported_model(), "resnet50")

`pytest --bnport-update` writes what `record` is given to bnport_golden/resnet50.safetensors beside the test file: commit
it. Without the option, `record` and `compare` both hold the model against that file.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

FOLDER = "bnport_golden"
_written = pytest.StashKey[list[str]]()


class Golden:
    """The golden records of one test file."""

    def __init__(self, folder: str, *, update: bool, written: list[str]) -> None:
        self.folder, self.update, self._written = folder, update, written

    def path(self, name: str) -> str:
        """Where the record called `name` is kept."""
        if not name or name != os.path.basename(name) or name.startswith("."):
            raise ValueError(f"a golden record's name is a plain file name without its suffix, not {name!r}")
        return os.path.join(self.folder, f"{name}.safetensors")

    def record(self, model: Any, name: str, *, epsilon: float | None = None, **options: Any) -> None:
        """With --bnport-update, save the model's layers; otherwise fail unless they are still the same functions.

        epsilon: of a model that does not store it; options: for its format's reader.
        """
        __tracebackhide__ = True
        path = self.path(name)
        if not self.update:
            from bnport.testing import assert_equivalent  # here: every pytest run of every project loads this module

            self._exists(path)
            assert_equivalent(path, model, target_epsilon=epsilon, target_options=options)
            return
        from bnport.convert import save_records

        os.makedirs(self.folder, exist_ok=True)
        report = save_records(model, path, epsilon=epsilon, force=True, options=options)
        assert report.ok, str(report)
        self._written.append(path)

    def compare(self, model: Any, name: str, **options: Any) -> None:
        """Fail unless the model's layers are the same functions as those recorded; options as for assert_equivalent."""
        __tracebackhide__ = True
        from bnport.testing import assert_equivalent

        path = self.path(name)
        self._exists(path)
        assert_equivalent(path, model, **options)

    def _exists(self, path: str) -> None:
        __tracebackhide__ = True
        if not os.path.exists(path):
            pytest.fail(
                f"no golden record {os.path.relpath(path)}: run pytest --bnport-update where the original model is, and"
                " commit the file",
                pytrace=False,
            )


def pytest_addoption(parser: pytest.Parser) -> None:
    """--bnport-update."""
    group = parser.getgroup("bnport")
    group.addoption("--bnport-update", action="store_true", help="write the golden BatchNorm records anew")


def pytest_configure(config: pytest.Config) -> None:
    """A list of the files that this run writes."""
    config.stash[_written] = []


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Say which golden records were written: nobody should commit them unseen."""
    written: list[str] = config.stash[_written]
    for path in dict.fromkeys(written):
        terminalreporter.write_line(f"bnport: wrote {os.path.relpath(path)}")


@pytest.fixture
def bnport_golden(request: pytest.FixtureRequest) -> Golden:
    """Golden BatchNorm records beside this test file; see bnport.pytest_plugin."""
    folder = os.path.join(os.path.dirname(str(request.path)), FOLDER)
    update = bool(request.config.getoption("--bnport-update"))
    return Golden(folder, update=update, written=request.config.stash[_written])
