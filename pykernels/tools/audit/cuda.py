"""Audits the CUDA kernels: every one in the cubins of csrc/cuda/*.cu, for each target that nvcc compiles them for.

No launch is recorded: threads come from __launch_bounds__, the arguments' names from the source. What a launch asks for
beyond that, and what may fail, the file declares in comments, each about a kernel or some of its instantiations
(`target` and `dtype` are arguments too; a reason goes on in comment lines that are indented further):

    // audit: forward where Storage=float: dynamic shared 2 * TILE * 4: two tiles of keys
    // audit: backward where target=sm_80 target=sm_90: allow spill: why that may be

A line that cannot be read, or of which nothing came, is a failure: "directive".
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import pathlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from . import ir
from .disassembly import sass_by_kernel, usage
from .measure import _OWN_SOURCE, CHECKS, Facts, Row, excuse, holds, measure
from .model import GPUS, KIB

ARCHITECTURES = {"sm_80": "sm_80", "sm_90": "sm_90a", "sm_100": "sm_100"}  # target → nvcc's name
FOLDER = pathlib.Path(__file__).parents[3] / "csrc" / "cuda"
FLAGS = ("-std=c++20", "-O3", "--expt-relaxed-constexpr", "-lineinfo", "-DTORCH_TARGET_VERSION=0x020a000000000000")
DTYPES = {"float": "float32", "c10::BFloat16": "bfloat16", "c10::Half": "float16"}
HALF = {"bfloat16": "bf16", "float16": "f16"}


def unavailable() -> str | None:
    """Why CUDA kernels cannot be audited here, or None."""
    if not FOLDER.is_dir():
        return "their sources are not beside this package: it is no checkout"
    if not any(FOLDER.glob("*.cu")):
        return "there are none"
    return None if shutil.which("nvcc") else "nvcc is not on PATH"


def sources(names: Iterable[str]) -> list[pathlib.Path]:
    """The files named after ops' own files: rnn.cu and rnn_backward.cu are pykernels/ops/rnn.py's."""
    stems = tuple(names)
    return [f for f in sorted(FOLDER.glob("*.cu")) if any(f.stem == s or f.stem.startswith(s + "_") for s in stems)]


# ------------------------------------------------------------------------------------------------ directives


@dataclass(frozen=True)
class Directive:
    line: int
    kernel: str
    where: dict[str, Any]
    shared: str  # an expression in the kernel's arguments; or …
    check: str
    reason: str

    def applies(self, row: Row) -> bool:
        return self.kernel == row.kernel and holds(row, self.where)


_DIRECTIVE = re.compile(
    r"(?P<kernel>\w+)(?: where (?P<where>\w+=[\w.:-]+(?: \w+=[\w.:-]+)*))?: "
    r"(?:allow (?P<check>[\w ]+)|dynamic shared (?P<shared>[\w +*/()-]+)): (?P<reason>\S.*)"
)


def directives(text: str) -> tuple[list[Directive], list[str]]:
    """(those of a file, what is wrong with others)."""
    found, wrong = [], []
    for match in re.finditer(r"^([ \t]*)//[ \t]*audit\b(.*(?:\n\1//[ \t]{2,}\S.*)*)", text, re.MULTILINE):
        line = text.count("\n", 0, match.start()) + 1
        words = " ".join(re.sub(r"\n[ \t]*//", " ", match[2]).split())
        read = _DIRECTIVE.fullmatch(words.removeprefix(": ")) if words.startswith(": ") else None
        if read is None:
            wrong.append(f"line {line}: expected 'audit: KERNEL [where NAME=VALUE …]: allow CHECK | dynamic shared "
                         f"BYTES: reason', got {'audit' + words!r}")  # fmt: skip
        elif read["check"] and read["check"] not in CHECKS:
            wrong.append(f"line {line}: check: expected one of {', '.join(CHECKS)}, got {read['check']!r}")
        else:
            where: dict[str, tuple] = {}
            for name, value in (pair.split("=") for pair in (read["where"] or "").split()):
                where[name] = (*where.get(name, ()), _value(value))
            found.append(
                Directive(line, read["kernel"], where, *(read[g] or "" for g in ("shared", "check", "reason")))
            )
    return found, wrong


def _value(text: str) -> Any:
    """A template argument: true, 64, float, …"""
    if text in ("true", "false"):
        return text == "true"
    return int(text) if re.fullmatch(r"-?\d+", text) else text.split("::")[-1]


# ------------------------------------------------------------------------------------------------ source


def parameters(text: str, kernel: str) -> list[str]:
    """Names of a kernel's template parameters."""
    found = re.search(rf"template\s*<([^;{{}}]*?)>\s*__global__[^;{{}}]*?\b{kernel}\s*\(", text)
    split = re.split(r",(?![^<]*>)", found[1]) if found else []
    return [re.findall(r"\w+", parameter.split("=")[0])[-1] for parameter in split]


def functions(text: str) -> dict[str, str]:
    """Name → bodies of the functions so called."""
    text = re.sub(r"//.*|/\*.*?\*/", "", text)
    found: dict[str, str] = {}
    for match in re.finditer(r"\b(\w+)\s*\((?:[^(){};]|\([^()]*\))*\)\s*(?:const\s*)?\{", text):
        if match[1] not in ("if", "constexpr", "for", "while", "switch"):
            end = depth = 0
            for end in range(match.end() - 1, len(text)):
                depth += {"{": 1, "}": -1}.get(text[end], 0)
                if not depth:
                    break
            found[match[1]] = found.get(match[1], "") + text[match.end() : end]
    return found


def asks_for_tensor_cores(bodies: dict[str, str], kernel: str) -> bool:
    """Whether a kernel, or something that it calls, is written with matrix instructions."""
    seen, todo = set(), [kernel]
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo += set(re.findall(r"\w+", bodies.get(name, ""))) & bodies.keys()
    return any(re.search(r"\bw?g?mma\.|tcgen05\.mma", bodies.get(name, "")) for name in seen)


def _with_headers(file: pathlib.Path) -> dict[str, str]:
    """The file and the headers beside it that it needs, by name."""
    texts: dict[str, str] = {}
    todo = [file.name]
    while todo:
        name = todo.pop()
        path = file.parent / name if name == file.name else FOLDER / name
        if name not in texts and path.exists():
            texts[name] = path.read_text()
            todo += re.findall(r'^#include "(\S+)"', texts[name], re.MULTILINE)
    return texts


# ------------------------------------------------------------------------------------------------ rows


def inspect_file(file: pathlib.Path, target: str) -> tuple[list[Row], set[int]]:
    """(a row for each kernel of a file, lines of the directives that did something)."""
    from triton.runtime.cache import get_cache_manager

    texts, gpu = _with_headers(file), GPUS[target]
    blank = Row(file.stem, "", target, gpu.name, "", {}, [file.name], shared_limit=gpu.shared)
    key = f"{target} {FLAGS} {nvcc_version()} {sorted(texts.items())}"
    cache = get_cache_manager(hashlib.sha256(key.encode()).hexdigest())
    judged = get_cache_manager(hashlib.sha256(f"{key} {_OWN_SOURCE}".encode()).hexdigest())
    if stored := judged.get_file("audit.json"):
        known = json.loads(pathlib.Path(stored).read_text())
        for row in known["rows"]:
            row["failures"], row["excused"] = (
                [tuple(entry) for entry in row[name]] for name in ("failures", "excused")
            )
        return [Row(**row) for row in known["rows"]], set(known["used"])
    stored = [cache.get_file(f"kernels.{kind}") for kind in ("cubin", "ptx")]
    if not all(stored):
        try:
            made = _compile(file, ARCHITECTURES[target])
        except subprocess.CalledProcessError as error:
            return [dataclasses.replace(blank, failures=[("compile", error.stderr.strip()[-2000:])])], set()
        stored = [cache.put(made[kind], f"kernels.{kind}") for kind in ("cubin", "ptx")]
    cubin, ptx = (pathlib.Path(path).read_bytes() for path in stored)
    rows, used = _rows(cubin, ptx.decode(), texts, file.name, blank)
    judged.put(json.dumps(dict(rows=[dataclasses.asdict(row) for row in rows], used=sorted(used))), "audit.json", False)
    return rows, used


@functools.cache
def nvcc_version() -> str:
    """As nvcc says it: 13.0.88."""
    said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"V(\d+\.\d+\.\d+)", said)[1]


def _compile(file: pathlib.Path, architecture: str) -> dict[str, bytes]:
    include = pathlib.Path(torch.__path__[0]) / "include"
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / f"{file.stem}.cubin"
        command = ["nvcc", *FLAGS, f"-I{FOLDER}", f"-I{include}", "-cubin", f"-arch={architecture}", "-keep"]
        command += ["-keep-dir", folder, str(file), "-o", str(out)]
        subprocess.run(command, capture_output=True, text=True, check=True)
        return dict(cubin=out.read_bytes(), ptx=out.with_suffix(".ptx").read_bytes())


def _rows(cubin: bytes, ptx: str, texts: dict[str, str], file: str, blank: Row) -> tuple[list[Row], set[int]]:
    gpu, text = GPUS[blank.target], texts[file]
    bodies = functions("\n".join(texts.values()))
    declared, _ = directives(text)
    entries = dict(re.findall(r"\.entry (\w+)\((.*?)(?=\.entry |\Z)", ptx, re.DOTALL))
    on_launch = re.findall(r"\.extern \.shared .* (\w+)\[\]", ptx)
    needs, listings = usage(cubin), sass_by_kernel(cubin, file)
    rows, used = [], set()
    for mangled, name in zip(entries, _demangle(entries)):
        body, needed = entries[mangled], needs[mangled]
        kernel, arguments = _template(name)
        names = parameters("\n".join(texts.values()), kernel)
        settings = dict(zip(names, arguments)) if len(names) == len(arguments) else dict(enumerate(arguments))
        dtype = next((DTYPES[argument] for argument in _arguments(name) if argument in DTYPES), "")
        row = dataclasses.replace(blank, kernel=kernel, dtype=dtype, settings=settings)
        threads = re.search(r"\.maxntid (\d+)(?:, (\d+))?(?:, (\d+))?", body)
        if threads is None:
            row.failures = [("compile", "no __launch_bounds__: the number of threads is not known")]
            rows.append(row)
            continue
        warps = -(-functools.reduce(lambda a, b: a * int(b or 1), threads.groups(), 1) // 32)
        systems = 0 if blank.target == "sm_80" else KIB  # of a kernel that has any
        shared = max(needed.shared - systems, 0)
        row.shared_known = not any(re.search(rf"\b{symbol}\b", body) for symbol in on_launch)
        for directive in declared:
            if directive.shared and directive.applies(row):
                size = {"float32": 4}.get(dtype, 2)
                shared += int(eval(directive.shared, {"__builtins__": {}}, {"size": size, **settings}))
                row.shared_known = True
                used.add(directive.line)
        tensor = [ir.Dot(HALF[dtype], "", 0, None)] if dtype in HALF and asks_for_tensor_cores(bodies, kernel) else []
        shapes = ir.tcgen05_shapes(body)
        facts = Facts(tensor, 0, None, warps, needed.registers, needed.stack, shared, 0, shapes)
        row = dataclasses.replace(row, **measure(listings[mangled], facts, gpu, None))
        for directive in declared:
            if directive.check and excuse(row, directive.kernel, directive.check, directive.reason, directive.where):
                used.add(directive.line)
        rows.append(row)
    return rows, used


def _demangle(names: Iterable[str]) -> list[str]:
    return subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True).stdout.splitlines()


def _arguments(name: str) -> list[str]:
    """Template arguments of void (anonymous namespace)::kernel<float, 4>(float const*)."""
    inside, depth, parts = name.split("(anonymous namespace)::")[1], 0, [""]
    for letter in inside[inside.index("<") + 1 :] if re.match(r"\w+<", inside) else "":
        depth += {"<": 1, "(": 1, ">": -1, ")": -1}.get(letter, 0)
        if depth < 0:
            break
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return [re.sub(r"^\(\w+\)", "", part.strip()) for part in parts if part]


def _template(name: str) -> tuple[str, list[Any]]:
    """(kernel, its template arguments)."""
    return re.match(r"\w+", name.split("(anonymous namespace)::")[1])[0], [_value(a) for a in _arguments(name)]


def complaints(file: pathlib.Path, used: set[int] | None) -> list[str]:
    """What is wrong with a file's directives; used: lines of those that did something, if all targets were tried."""
    declared, wrong = directives(file.read_text())
    idle = [directive for directive in declared if used is not None and directive.line not in used]
    return wrong + [f"line {d.line}: nothing came of it: no such kernel, or nothing to allow" for d in idle]
