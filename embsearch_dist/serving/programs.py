"""A served model as a program that runs without this package: ``torch.export``, AOTInductor, ONNX.

A program takes matrices whose first dimension is the batch, so that every server can put requests together:

* ``ids`` ``[B, N]`` int64: the fields with one id a row, in the order that ``model.json`` gives them;
* ``ids_FIELD`` and ``weights_FIELD`` ``[B, L]``: a list, filled up with ids of weight 0 (other ids have weight 1 where
  the field has no weights). Offsets of lists without padding would make a row's place depend on its neighbours;
* ``dense`` ``[B, n_dense]`` float32, standardised.

It gives ``logit`` and ``probability``, each ``[B]`` float32.
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from embsearch_dist.errors import UserError
from embsearch_dist.schema import Schema
from embsearch_dist.serving.tables import Bag, Ids, Padded

FORMATS = ("torch", "onnx", "aoti", "triton")
OUTPUTS = ("logit", "probability")
OPSET = 20
EXAMPLE_ROWS = 5
CODE_BYTES = 8 << 20  # of a program, beside its weights: more than any has taken
PROGRAM_ROWS = 1 << 16  # on which programs are compared with the model


@dataclass(frozen=True)
class Port:
    """An input of a program: its name, type, columns (-1: any number), and the field of a list."""

    name: str
    kind: str
    columns: int
    field: str = ""


def ports(schema: Schema, fields: Sequence[str]) -> list[Port]:
    """The inputs of a program of a model that looks at ``fields``."""
    own = [f for f in schema.fields if f.name in set(fields)]
    single = [f.name for f in own if not f.is_list]
    found = [Port("ids", "int64", len(single))] if single else []
    for f in own:
        if f.is_list:
            found += [Port(f"ids_{f.name}", "int64", -1, f.name), Port(f"weights_{f.name}", "float32", -1, f.name)]
    return found + ([Port("dense", "float32", len(schema.dense))] if schema.dense else [])


class Program(nn.Module):
    """A model with the inputs of :func:`ports`."""

    def __init__(self, model: Any, schema: Schema) -> None:
        super().__init__()
        self.model, self.ports, own = model, ports(schema, model.fields), set(model.fields)
        self.single = [f.name for f in schema.fields if f.name in own and not f.is_list]

    def inputs(self, ids: Ids) -> list[torch.Tensor]:
        """The matrices for some rows."""
        found: dict[str, torch.Tensor] = {"dense": ids.dense}
        if self.single:
            found["ids"] = torch.stack([ids.single[n] for n in self.single], 1)
        for port in self.ports:
            if port.field:
                bag = ids.lists[port.field]
                padded = bag.padded() if isinstance(bag, Bag) else bag
                found |= {f"ids_{port.field}": padded.ids, f"weights_{port.field}": padded.weights}
        return [found[p.name] for p in self.ports]

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = dict(zip((p.name for p in self.ports), inputs, strict=True))
        rows = inputs[0].shape[0]
        single = {name: found["ids"][:, k] for k, name in enumerate(self.single)}
        names = [p.field for p in self.ports if p.name.startswith("ids_")]
        lists = {name: Padded(found[f"ids_{name}"], found[f"weights_{name}"]) for name in names}
        dense = found["dense"] if "dense" in found else inputs[0].new_zeros(rows, 0, dtype=torch.float32)
        logit = self.model(Ids(single, lists, dense))
        return logit, torch.sigmoid(logit)


def exported(program: Program, ids: Ids) -> Any:
    """``torch.export`` with any number of rows and any lengths of lists.

    Raises:
        UserError: the model holds something that cannot be traced.
    """
    example = [_two_at_least(x, 2 if p.field else 1) for p, x in zip(program.ports, program.inputs(ids), strict=True)]
    rows = torch.export.Dim("batch")
    lengths = {p.field: torch.export.Dim(f"length{k}") for k, p in enumerate(program.ports) if p.field}
    shapes = tuple({0: rows, 1: lengths[p.field]} if p.field else {0: rows} for p in program.ports)
    with torch.no_grad(), _quiet():
        program(*example)  # what is kept from call to call must be made outside of the tracing
        try:
            return torch.export.export(program, tuple(example), dynamic_shapes=(shapes,), strict=False)
        except Exception as e:  # the tracer raises errors of many kinds
            raise UserError(f"this model cannot be traced by torch.export ({_line(e)}). {OTHERWISE}") from e


def _two_at_least(x: torch.Tensor, dims: int) -> torch.Tensor:
    """An example whose first ``dims`` sizes may be any: the tracer takes a size of 1 for one that never changes."""
    missing = [max(2 - size, 0) if d < dims else 0 for d, size in enumerate(x.shape)]
    return nn.functional.pad(x, [n for more in reversed(missing) for n in (0, more)])


OTHERWISE = "launch/predict.py and embsearch_dist.serve run it all the same: leave --format out"


def save_torch(traced: Any, path: Path) -> None:
    """A program that ``torch.export.load`` runs, with torch alone.

    Raises:
        UserError: the disk has no room for it.
    """
    _check_room(traced, path)
    with _quiet():
        torch.export.save(traced, str(path))


def save_aoti(traced: Any, path: Path) -> None:
    """A program compiled for this machine's kind of processor; needs a C++ compiler.

    Raises:
        UserError: it could not be compiled, or the disk has no room for it.
    """
    _check_room(traced, path)
    try:
        with _quiet():
            torch._inductor.aoti_compile_and_package(traced, package_path=str(path))
    except Exception as e:
        raise UserError(
            f"--format aoti: AOTInductor could not compile it ({_line(e)}). It needs a C++ compiler: g++, or what CXX "
            "names. Install one, or use --format torch or onnx"
        ) from e


def _check_room(traced: Any, path: Path) -> None:
    """torch's writer of archives ends the whole process where the disk is full, so that is asked before."""
    needed = sum(
        x.numel() * x.element_size()
        for x in (*traced.state_dict.values(), *traced.constants.values())
        if isinstance(x, torch.Tensor)
    )
    free = shutil.disk_usage(path.parent).free
    if free < needed + CODE_BYTES:
        raise UserError(
            f"--out: {path.name} takes up to {(needed + CODE_BYTES) / 1e6:,.0f} MB, the disk has {free / 1e6:,.1f} MB "
            "left. Make room, or give another --out"
        )
    try:
        with path.open("wb") as file:  # what is free may not be ours: a quota, a limit of the process
            os.posix_fallocate(file.fileno(), 0, needed + CODE_BYTES)
    except OSError as e:
        if e.errno in (errno.EOPNOTSUPP, errno.EINVAL):  # a file system that reserves nothing
            return
        raise UserError(
            f"--out: {path.name} takes up to {(needed + CODE_BYTES) / 1e6:,.0f} MB, which the system does not give "
            f"({e.strerror}). Make room, raise the limit, or give another --out"
        ) from e
    finally:
        path.unlink(missing_ok=True)


def save_onnx(program: Program, traced: Any, path: Path) -> None:
    """A program for onnxruntime.

    Raises:
        UserError: packages are missing, or an operator has no form in ONNX.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError as e:
        raise UserError(f"--format onnx: {e.name} is missing. Install it: pip install 'embsearch_dist[export]'") from e
    names = [p.name for p in program.ports]
    try:
        with _quiet():
            made = torch.onnx.export(
                traced, dynamo=True, input_names=names, output_names=list(OUTPUTS), opset_version=OPSET, verbose=False
            )
        assert made is not None
        made.save(str(path))
        _name_dimensions(onnx, program, path)
        onnx.checker.check_model(str(path))
    except OSError as e:
        raise UserError(f"{path.name} cannot be written ({e.strerror or e}). Check disk and path") from e
    except Exception as e:
        raise UserError(f"--format onnx: this model has no form in ONNX ({_line(e)}). Use --format torch") from e


def _name_dimensions(onnx: Any, program: Program, path: Path) -> None:
    """Call the free dimensions ``batch`` and ``length_FIELD``, which the exporter has numbered."""
    model = onnx.load(str(path))
    names: dict[str, str] = {}
    for port, value in zip(program.ports, model.graph.input, strict=True):
        dims = value.type.tensor_type.shape.dim
        names[dims[0].dim_param] = "batch"
        if port.columns < 0:
            names[dims[1].dim_param] = f"length_{port.field}"
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in names:
                dim.dim_param = names[dim.dim_param]
    del model.graph.value_info[:]  # shapes within, by the old names; a runtime finds its own
    onnx.save(model, str(path))


class TorchRunner:
    """Runs a ``.pt2``: inputs in, logits out."""

    def __init__(self, path: Path) -> None:
        with _quiet():
            self.program = torch.export.load(str(path)).module()

    def __call__(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            return self.program(*inputs)[0]  # type: ignore[no-any-return]


class AotiRunner:
    """Runs a package of AOTInductor."""

    def __init__(self, path: Path) -> None:
        with _quiet():
            self.program = torch._inductor.aoti_load_package(str(path))

    def __call__(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            return self.program(*inputs)[0]


class OnnxRunner:
    """Runs an ONNX file with onnxruntime on the CPU."""

    def __init__(self, path: Path, threads: int = 0) -> None:
        """``threads``: of one call; 0: as many as torch uses.

        Raises:
            UserError: onnxruntime is missing.
        """
        try:
            import onnxruntime
        except ImportError as e:
            raise UserError("onnxruntime is missing. Install it: pip install 'embsearch_dist[export]'") from e
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.log_severity_level = 3
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as e:  # the package has error types of its own
            raise UserError(f"--format onnx: onnxruntime cannot run this model ({_line(e)}). Use --format torch") from e
        self.names = [x.name for x in self.session.get_inputs()]

    def __call__(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        feed = {name: x.numpy() for name, x in zip(self.names, inputs, strict=True)}
        return torch.from_numpy(self.session.run(["logit"], feed)[0])


RUNNERS: Mapping[str, tuple[str, Any]] = {
    "torch": ("model.pt2", TorchRunner),
    "aoti": ("model.aoti.pt2", AotiRunner),
    "onnx": ("model.onnx", OnnxRunner),
}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporters tell of themselves."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _line(e: BaseException) -> str:
    """The first lines of an error, on one line."""
    return f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
