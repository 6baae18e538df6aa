"""PyTorch under contract: every kind of file that torch writes, and live objects, with torch as the oracle."""

from __future__ import annotations

import io

import safetensors.torch
import torch

from tests.adapters.contract import FileContract, LiveContract
from tests.adapters.torch_models import DTYPES, chain, output, rebuilt_from

OPTIONAL = (("gamma", "beta"), ("beta",))


class _StateDict(FileContract):
    adapter = "torch"
    suffix = ".pth"
    holds_epsilon = False
    optional = OPTIONAL

    def save(self, model, path):
        torch.save(model.state_dict(), path)

    def load(self, path):
        return torch.load(path, weights_only=True)

    def build(self, records, path, absent=()):
        self.save(chain(records, absent, DTYPES[self.dtype]), path)

    def others(self, path):
        return {n: t.float().numpy().tobytes() for n, t in self.load(path).items() if n[0] in "13" or "tracked" in n}

    def run(self, path, x):
        return output(rebuilt_from(self.load(path)), x, DTYPES[self.dtype])


class TestStateDictInAZip(_StateDict):
    adapter = "torch"


class TestStateDictInALegacyStream(_StateDict):
    adapter = "torch"

    def save(self, model, path):
        torch.save(model.state_dict(), path, _use_new_zipfile_serialization=False)


class TestFloat64(_StateDict):
    adapter = "torch"
    dtype = "float64"


class TestFloat16(_StateDict):
    adapter = "torch"
    dtype = "float16"
    output_dtype = "float16"


class TestBfloat16(_StateDict):
    adapter = "torch"
    dtype = "bfloat16"
    output_dtype = "bfloat16"


class TestSafetensors(_StateDict):
    adapter = "torch"
    suffix = ".safetensors"

    def save(self, model, path):
        safetensors.torch.save_file(model.state_dict(), path)

    def load(self, path):
        return safetensors.torch.load_file(path)

    def in_build_order(self, layers):  # safetensors sorts by dtype, then by name
        return sorted(layers.values(), key=lambda layer: layer.name)


class TestWholeModuleInAZip(FileContract):
    adapter = "torch"
    suffix = ".pt"
    optional = OPTIONAL
    zipped = True

    def build(self, records, path, absent=()):
        torch.save(chain(records, absent), path, _use_new_zipfile_serialization=self.zipped)

    def run(self, path, x):
        return output(torch.load(path, weights_only=False).eval(), x)


class TestWholeModuleInALegacyStream(TestWholeModuleInAZip):
    adapter = "torch"
    zipped = False


class TestScripted(FileContract):
    adapter = "torch"
    suffix = ".pt"
    optional = OPTIONAL

    def build(self, records, path, absent=()):
        torch.jit.script(chain(records, absent)).save(path)

    def run(self, path, x):
        return output(torch.jit.load(path).eval(), x)


class TestTraced(TestScripted):
    adapter = "torch"

    def build(self, records, path, absent=()):
        example = torch.zeros(2, records[0].channels)
        torch.jit.trace(chain(records, absent), example).save(path)


class TestExported(FileContract):
    adapter = "torch"
    suffix = ".pt2"
    optional = OPTIONAL
    mutants = 40

    def build(self, records, path, absent=()):
        example = torch.zeros(10, records[0].channels)  # as many rows as there are probes
        torch.export.save(torch.export.export(chain(records, absent), (example,)), path)

    def run(self, path, x):
        return output(torch.export.load(path).module(), x)


class _Live(LiveContract):
    def weights(self, model):
        state = model if isinstance(model, dict) else model.state_dict()
        return {name: value.numpy().tobytes() for name, value in state.items()}


class TestLiveModule(_Live):
    adapter = "torch"
    optional = OPTIONAL

    def build(self, records, absent=()):
        return chain(records, absent)

    def run(self, model, x):
        return output(model, x)


class TestLiveModuleInFloat64(TestLiveModule):
    adapter = "torch"
    dtype = "float64"

    def build(self, records, absent=()):
        return chain(records, absent, torch.float64)

    def run(self, model, x):
        return output(model, x, torch.float64)


class TestLiveStateDict(_Live):
    adapter = "torch"
    holds_epsilon = False
    optional = OPTIONAL

    def build(self, records, absent=()):
        return chain(records, absent).state_dict()

    def run(self, model, x):
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        return output(rebuilt_from(torch.load(buffer, weights_only=True)), x)
