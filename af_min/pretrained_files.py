"""Files of weights, read one tensor at a time. Part of pretrained.py; read by the other pretrained_*.py.

A published checkpoint can be larger than memory has room for twice, and its numbers are often wider than we want them.
So a file is opened as a list of (name, dtype, shape, place), and a tensor's bytes are read when it is asked for, straight
into memory of its own: the peak is the target, and no page of a mapped file counts on top.

    safetensors    8 bytes length n, n bytes JSON {name: {dtype, shape, data_offsets}}, then the numbers
    .pt .pth .bin  torch.save's zip; the places come from torch.load on fake tensors, with weights_only=True, so that
                   nothing in a stranger's file is executed
"""
from __future__ import annotations

import json
import math
import re
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from .cli import UserError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
PART = 1 << 14                       # numbers read at a time: large buffers, freed between tensors that stay, leave holes in the heap


@dataclass(frozen=True)
class Entry:
    """One tensor of a file."""
    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int | None               # byte of the file at which its numbers begin; None: they are in `held`
    held: Tensor | None = None       # numbers that could not be left in the file (old or unusual layouts)

    def read(self, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor of its own; floating-point numbers are converted to `dtype`, PART of them at a time."""
        dtype = dtype if dtype is not None and self.dtype.is_floating_point else self.dtype
        if self.offset is None:
            return self.held.to(dtype, copy=True)
        tensor = torch.empty(math.prod(self.shape), dtype=dtype)
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            for part in tensor.split(PART):
                raw = torch.empty(len(part) * self.dtype.itemsize, dtype=torch.uint8)
                if file.readinto(memoryview(raw.numpy())) != len(raw):
                    raise UserError(f"{self.path}: truncated: a tensor of {self.shape} is cut off; copy or download the file again")
                part.copy_(raw.view(self.dtype))
        return tensor.reshape(self.shape)


def open_file(path: Path) -> dict[str, Entry]:
    """The tensors of one .safetensors, .pt, .pth or .bin file, by name. UserError if it is none of these, or damaged."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: {'a folder' if path.is_dir() else 'no such file'}; expected a file of weights")
    with open(path, "rb") as file:
        head = file.read(9)
    if head[:4] == b"PK\x03\x04" and not zipfile.is_zipfile(path):
        raise UserError(f"{path}: truncated: the end of torch.save's zip archive is missing; copy or download it again")
    pickled = head[:1] == b"\x80" and head[8:] != b"{"           # as torch's old layout begins; so may a length before JSON
    if head[:4] == b"PK\x03\x04" or pickled:
        return open_torch(path)
    if path.suffix == ".safetensors" or head[8:] == b"{":
        return open_safetensors(path)
    raise UserError(f"{path}: {f'begins with {head[:4]!r}' if head else 'empty'}; expected weights: a .safetensors file, or a "
                    ".pt, .pth or .bin file of torch.save")


def open_safetensors(path: Path) -> dict[str, Entry]:
    try:
        with safe_open(path, "np"):              # looks whether header and size fit together; "pt" would reserve memory for all of it
            pass
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error}); copy or download it again") from None
    with open(path, "rb") as file:
        length, = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    for kind in {tensor["dtype"] for tensor in header.values()} - set(DTYPES):
        raise UserError(f"{path}: holds numbers of type {kind}; expected {', '.join(DTYPES)} (quantised weights are not read)")
    return {name: Entry(path, DTYPES[tensor["dtype"]], tuple(tensor["shape"]), 8 + length + tensor["data_offsets"][0])
            for name, tensor in header.items()}


def open_torch(path: Path) -> dict[str, Entry]:
    """A file of torch.save: a state dict, or one inside {"model_state_dict" | "state_dict" | "model": ...}."""
    try:
        with FakeTensorMode():
            found = tensors_of(torch.load(path, map_location="cpu", weights_only=True))
        if any(offset_of(tensor) is None for tensor in found.values()):
            found = tensors_of(torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)))
    except Exception as error:  # torch raises many types here, one for each way a file can be broken
        what = re.search(r"Unsupported (?:global: GLOBAL \S+|operand \d+)", str(error))
        reason = what[0] if what else str(error).split("\n")[0].strip()[:150] or type(error).__name__
        raise UserError(f"{path}: torch.load (weights_only=True) cannot read it: {reason}; expected a complete file of "
                        "torch.save that holds tensors only") from None
    if not found:
        raise UserError(f"{path}: holds no tensors; expected a state dict, as torch.save(model.state_dict(), ...) writes it")
    return {name: Entry(path, tensor.dtype, tuple(tensor.shape), offset_of(tensor), tensor) for name, tensor in found.items()}


def tensors_of(content) -> dict[str, Tensor]:
    """The named tensors of a loaded object."""
    for key in ("model_state_dict", "state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    return {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, dict) else {}


def offset_of(tensor: Tensor) -> int | None:
    """Byte of its file at which the numbers of a fake tensor begin; None where they do not lie there one behind the other."""
    start = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    return start + tensor.storage_offset() * tensor.element_size() if start is not None and tensor.is_contiguous() else None


def seems(names: Iterable[str]) -> str:
    """What a file with these tensor names seems to be: the second half of many an error message."""
    names = set(names)
    for what, mark in (("a released Audio Flamingo checkpoint", "gated_cross_attn_layer"),
                       ("a CLAP checkpoint", "htsat"), ("the CNN14 of MS-CLAP 2022", "base.conv_block1"),
                       ("a CLAP checkpoint", "audio_encoder.base"),
                       ("an OPT language model", "decoder.embed_positions"),
                       ("a Llama or Qwen2 language model", "self_attn.q_proj"),
                       ("a run of this project", "representation.layers"),
                       ("a GPT-2 language model", "attn.c_attn"), ("a BERT or RoBERTa model", "attention.self.query")):
        if any(mark in name for name in names):
            return "it seems to be " + what
    return f"it holds {len(names)} tensors, such as {', '.join(sorted(names)[:3]) or 'none'}"


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def expand(table: dict[str, str], ours: Iterable[str]) -> dict[str, str]:
    """{our name: name in the file}: the table written out for those of our names that fit one of its rows. In a row {p} stands for
    the last part of a name (weight, bias, a statistic), any other letter for a number."""
    found = {}
    for mine, theirs in table.items():
        pattern = re.sub(r"\\{(\w)\\}", lambda m: rf"(?P<{m[1]}>{'[a-z_]+' if m[1] == 'p' else '[0-9]+'})", re.escape(mine))
        found |= {name: theirs.format(**match.groupdict()) for name in ours if (match := re.fullmatch(pattern, name))}
    return found


def read_table(entries: dict[str, Entry], table: dict[str, str], shapes: dict[str, tuple[int, ...]], where: str, wanted: str,
               dtype: torch.dtype | None = None, ignore: Callable[[str], bool] = lambda name: False) -> dict[str, Tensor]:
    """Our state dict {our name: tensor}, floating-point numbers as `dtype` (None: as the file has them).

    table   {our name: name in the file}, complete
    shapes  {our name: shape} of the model that takes them
    ignore  whether a name of the file is known and not wanted (a buffer, a duplicate)
    UserError, before a tensor is read, names the first that is missing, unexpected or misshapen, and what the file seems to be.
    """
    assert set(table) == set(shapes), f"key table and model differ: {sorted(set(table) ^ set(shapes))[:3]}"
    missing = [theirs for theirs in table.values() if theirs not in entries]
    unexpected = sorted(name for name in set(entries) - set(table.values()) if not ignore(name))
    for problem, found in (("is missing", missing), ("is unexpected", unexpected)):
        if found:
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            raise UserError(f"{where}: tensor {found[0]!r} {problem}{more}; expected {wanted}, but {seems(entries)}")
    for ours, theirs in table.items():
        if entries[theirs].shape != tuple(shapes[ours]):
            raise UserError(f"{where}: tensor {theirs!r} has shape {entries[theirs].shape}, expected {tuple(shapes[ours])} "
                            f"of {wanted}")
        if not entries[theirs].dtype.is_floating_point and "num_batches" not in theirs:
            raise UserError(f"{where}: tensor {theirs!r} holds {str(entries[theirs].dtype).removeprefix('torch.')}; expected "
                            "floating-point numbers (quantised weights are not read)")
    return {ours: entries[theirs].read(dtype) for ours, theirs in table.items()}


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules made inside hold parameters of no memory, to be filled by load_state_dict(assign=True). Buffers are real, as
    those that no file holds (position tables) are computed when a module is made."""
    register, normal = nn.Module.register_parameter, Tensor.normal_

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, None if parameter is None else nn.Parameter(parameter.to("meta"), parameter.requires_grad))

    def filled(tensor: Tensor, *args, **kwargs) -> Tensor:         # on meta torch would import its compiler first: 0.6 s and 0.1 GB
        return tensor if tensor.is_meta else normal(tensor, *args, **kwargs)

    nn.Module.register_parameter, Tensor.normal_ = register_on_meta, filled
    try:
        yield
    finally:
        nn.Module.register_parameter, Tensor.normal_ = register, normal
