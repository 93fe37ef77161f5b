"""Policies as native code: what numba needs to compile a policy once, keep it on disk, and be called by address.

A policy is a `NamedTuple` of arrays with ordinary methods. Its methods, and the functions of modules that they call, are
made known to numba as they stand, without a word in the policy about it. The engine's loop is compiled once for all
policies: it calls them by the addresses of small functions ("entries"), as it would call a Python function by the address
that ctypes gives it, so a new policy costs the compilation of a few lines and not of the engine.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils, targetconfig
from numba.core.compiler import Flags
from numba.core.cpu import CPUTargetOptions
from numba.core.registry import cpu_target
from numba.extending import intrinsic, overload, overload_method

FAILED = -(1 << 62)
"""What an entry returns when the policy raised an exception."""

PARAMETERS = 4
"""Whole numbers that every entry takes after the address of its state."""

NUMBER = (1 << 31) - 1
"""All that an expert key or a pool can be: ``key & NUMBER`` tells the compiler that an index does not count from the end."""

UNUSED_SECONDS = 30 * 24 * 3600
"""Compiled code that was not used for so long is removed."""

_INT64 = ir.IntType(64)


# ---- policies made known to numba --------------------------------------------------------------------------------

not_compiled: set[type] = set()
"""Classes that numba was tried on in vain; a second try would take as long as the first."""

_INLINED = {"forceinline": True}

_known: set[Any] = set()
"""Functions and method names that numba was told about."""


@cache
def make_known(cls: type) -> str:
    """Tell numba about the methods of `cls` and every function they call; return a digest of all that decides the code.

    That is the text of every file that a function or a global name of theirs comes from, and the values of constants.
    """
    reached: dict[FunctionType, None] = {}
    methods = {name: method for name, method in inspect.getmembers(cls, inspect.isfunction) if name not in _OF_EVERY_TUPLE}
    parts = [repr(cls)]
    for method in methods.values():
        _reach(method, reached, parts)
    for name, method in methods.items():
        if name not in _known:
            _known.add(name)
            _know_method(name, method)
    for function in reached:
        if function not in methods.values() and function not in _known:
            _known.add(function)
            overload(function, strict=False, jit_options=_INLINED)(_always(_bare(function)))
    files = {function.__code__.co_filename for function in reached}
    parts += [_text(file) for file in sorted(files)]
    return hashlib.sha256("\n".join(sorted(parts)).encode()).hexdigest()


_OF_EVERY_TUPLE = {*dir(tuple), "_replace", "_asdict", "_make", "__new__"} - {"count", "index"}


def _reach(function: FunctionType, reached: dict[FunctionType, None], parts: list[str]) -> None:
    """Collect `function` and the functions that it calls, and in `parts` the constants and modules that they name."""
    if function in reached:
        return
    reached[function] = None
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    for number, value in enumerate([*cells, *(function.__defaults__ or ())]):
        _take_in(f"{function.__qualname__} {number}", value, reached, parts)
    for code in _codes(function.__code__):
        for name in code.co_names:
            if name in function.__globals__:
                _take_in(name, function.__globals__[name], reached, parts)


def _take_in(name: str, value: Any, reached: dict[FunctionType, None], parts: list[str]) -> None:
    """Collect what a function reads from outside itself."""
    value = getattr(value, "py_func", value)  # a function that its author had numba compile
    if isinstance(value, FunctionType):
        _reach(value, reached, parts)
    elif isinstance(value, ModuleType):
        files = [
            getattr(module, "__file__", None) or ""
            for known, module in sys.modules.copy().items()
            if known == value.__name__ or known.startswith(f"{value.__name__}.")
        ]
        installed = any("site-packages" in file for file in files)
        parts.append(value.__name__ if installed else "".join(map(_text, sorted(files))))
    elif isinstance(value, np.ndarray):
        parts.append(f"{name} {value.dtype} {value.tolist()}")
    elif isinstance(value, (int, float, str, bytes, tuple, bool, np.generic)):
        parts.append(f"{name} {value!r}")


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _text(file: str) -> str:
    path = Path(file)
    return f"{path}\n{path.read_text(errors='replace')}" if path.is_file() else file


def overloaded(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let compiled code call `function`, which is given types and returns the implementation for them."""
    overload(function, strict=False, jit_options=_INLINED)(function)
    return function


class _Optional:
    """Methods that a policy may lack; in compiled code they then do nothing."""

    def on_miss(self, key: int, pool: int, now: int) -> None: ...

    def observe(self, seen: Any) -> None: ...

    def take(self, scores: Any, count: int) -> int:
        return count


def _know_method(name: str, example: FunctionType) -> None:
    """Let compiled code call ``policy.name(...)`` on any named tuple; a class that lacks the method has `example`."""

    def find(self: Any, *arguments: Any) -> Any:
        return _bare(getattr(self.instance_class, name, example))

    find.__signature__ = inspect.signature(example)  # type: ignore[attr-defined]
    overload_method(types.BaseNamedTuple, name, strict=False, jit_options=_INLINED)(find)


def _always(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments, **named: function


def _bare(function: Any) -> FunctionType:
    """Return `function` without its annotations, which numba would compare."""
    copy = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__qualname__ = function.__qualname__
    return copy


# ---- the disk cache ----------------------------------------------------------------------------------------------


@cache
def compiled(function: Callable[..., Any], of: str = "", checked: bool = False) -> Any:
    """Return `function` as a compiled function that is kept on disk; `of` is the digest of the policy it is compiled for.

    numba's own cache looks at the file of `function` only; here the folder is named by all that decides the code. In
    `checked` code, and in what it calls, a wrong index is an exception, as in Python.
    """
    folder = cache_folder() / hashlib.sha256(f"{_engine_digest()} {of}".encode()).hexdigest()[:24]
    if folder.is_dir():
        with suppress(OSError):  # another's, or removed just now: then only its age stays what it was
            os.utime(folder)
    else:
        _forget_unused()
    before = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str(folder)  # read when the decorator runs, and put back after it
    try:
        return njit(cache=True, boundscheck=checked)(function)
    finally:
        numba.config.CACHE_DIR = before


@cache
def cache_folder() -> Path:
    """Return the folder of compiled code: the user's cache folder, or a temporary one where that cannot be written."""
    named = os.environ.get("NUMBA_CACHE_DIR")
    if not named:
        from platformdirs import user_cache_dir  # a machine with a GPU may lack it

        named = user_cache_dir()
    wanted = Path(named) / "foregate"
    try:
        wanted.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=wanted).close()
    except OSError:
        return _temporary_folder()
    return wanted


@cache
def _forget_unused() -> None:
    """Remove compiled code that no run of the last month used: every change of a source leaves some behind."""
    for folder in cache_folder().iterdir():
        with suppress(OSError):  # another process may be doing the same
            if time.time() - folder.stat().st_mtime > UNUSED_SECONDS:
                shutil.rmtree(folder)


def _temporary_folder() -> Path:
    """Return a folder of this user's alone: what lies there is loaded and run."""
    user = os.getuid() if hasattr(os, "getuid") else 0
    folder = Path(tempfile.gettempdir()) / f"foregate-{user}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if status.st_mode & 0o77 or (hasattr(os, "getuid") and status.st_uid != user):
        return Path(tempfile.mkdtemp(prefix="foregate-"))
    return folder


@cache
def _engine_digest() -> str:
    """Return a digest of this package and of what it shares with policies; paths too, since numba looks at file times."""
    here = Path(__file__).parent
    sources = [*here.glob("*.py"), *(here.parents[1] / "policies").glob("*.py")]
    digest = hashlib.sha256(f"{numba.__version__} {np.__version__} {sys.version}".encode())
    for source in sorted(sources):
        digest.update(_text(str(source)).encode())
    return digest.hexdigest()


# ---- entries: functions of a policy that anybody can call by address ----------------------------------------------


def entry(implementation: Callable[..., Any]) -> Any:
    """Return a function for compiled code that gives the address of `implementation`, compiled for one type of state.

    `implementation` takes a state and four whole numbers and returns one; at the address stands a C function that takes the
    address at which `store` put the state. It returns `FAILED` where `implementation` raises an exception.
    """

    @intrinsic
    def address(typing_context: Any, state: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            state_type = signature.args[0]
            callee = ir.FunctionType(_INT64, [_INT64] * (1 + PARAMETERS))
            function = ir.Function(builder.module, callee, name=f"foregate.{implementation.__name__}")
            function.linkage = "internal"
            inside = ir.IRBuilder(function.append_basic_block())
            pointer = inside.inttoptr(function.args[0], context.get_value_type(state_type).as_pointer())
            value = _without_owners(context, inside, state_type, inside.load(pointer))
            inner = types.int64(state_type, *[types.int64] * PARAMETERS)
            flags = Flags()
            flags.nrt = True
            flags.boundscheck = targetconfig.ConfigStack().top().boundscheck
            subroutine = context.compile_subroutine(inside, implementation, inner, flags=flags)
            # Inlined, so that all the array owners that are not there cost nothing.
            status, result = context.call_conv.call_function(
                inside,
                context.declare_function(builder.module, subroutine.fndesc),
                inner.return_type,
                inner.args,
                [value, *function.args[1:]],
                attrs=("alwaysinline",),
            )
            inside.ret(inside.select(status.is_error, ir.Constant(_INT64, FAILED), result))
            return builder.ptrtoint(function, _INT64)

        return types.int64(state), generate

    return address


@intrinsic
def store(typing_context: Any, address: Any, state: Any) -> Any:
    """Put `state`, a tuple of arrays and numbers, at `address`; whoever calls an entry keeps the arrays alive."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.store(arguments[1], builder.inttoptr(arguments[0], arguments[1].type.as_pointer()))
        return context.get_dummy_value()

    return types.void(types.int64, state), generate


@intrinsic
def size_of(typing_context: Any, state: Any) -> Any:
    """Return the bytes that `store` writes."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return ir.Constant(_INT64, context.get_abi_sizeof(context.get_value_type(signature.args[0])))

    return types.int64(state), generate


@intrinsic
def call(typing_context: Any, address: Any, state: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """Call the entry at `address` with the state at the address `state`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        callee = ir.FunctionType(_INT64, [_INT64] * (1 + PARAMETERS)).as_pointer()
        return builder.call(builder.inttoptr(arguments[0], callee), arguments[1:])

    return types.int64(*[types.int64] * (2 + PARAMETERS)), generate


@njit(forceinline=True)
def keep(state: Any, memory: Any, size: Any) -> Any:
    """Put `state` at the address `memory`, if the `size` bytes there are enough; return whether they are."""
    if size < size_of(state):
        return False
    store(memory, state)
    return True


def bind(entries: Callable[..., Any], cls: type, state: Any, table: Any) -> Any:
    """Compile `entries` of a policy `cls`, let it write their addresses into `table`, and return the memory of `state`.

    That memory holds addresses of the state's arrays: the caller keeps both alive for as long as the entries are called.
    Raises ValueError for a state that is too large, and whatever numba raises for what it cannot compile.
    """
    memory = np.zeros(2048, np.int64)
    # Of this project's own policies the conformance suite makes sure that they stay within their arrays.
    function = compiled(entries, make_known(cls), checked=not cls.__module__.startswith("policies."))
    if not function(state, memory.ctypes.data, memory.nbytes, table):
        raise ValueError("a policy has more arrays than there is room for")
    return memory


def run_entry(address: Any, state: Any) -> Any:
    """Call an entry that needs no numbers."""
    return call(address, state, 0, 0, 0, 0)


def _without_owners(context: Any, builder: Any, kind: Any, value: Any) -> Any:
    """Return `value` with arrays that count no references: counting would cost more than most policies."""
    if isinstance(kind, types.Array):
        array = context.make_array(kind)(context, builder, value)
        array.meminfo = cgutils.get_null_value(array.meminfo.type)
        array.parent = cgutils.get_null_value(array.parent.type)
        return array._getvalue()
    if isinstance(kind, types.BaseTuple):
        parts = zip(kind, cgutils.unpack_tuple(builder, value), strict=True)
        return context.make_tuple(builder, kind, [_without_owners(context, builder, *part) for part in parts])
    return value


def _inherit_checks(finalize: Callable[..., None]) -> Callable[..., None]:
    """Let what a compiled function calls be checked for wrong indices if it is itself; numba inherits other options so."""

    def inherit(self: Any, flags: Any, options: Any) -> None:
        caller = targetconfig.ConfigStack.top_or_none()
        if caller is not None and caller.boundscheck:
            flags.boundscheck = True
        finalize(self, flags, options)

    return inherit


CPUTargetOptions.finalize = _inherit_checks(CPUTargetOptions.finalize)

# numba asks for attributes in the order in which it learned of them: fields of named tuples first, then methods of ours, so
# that a field may be called like another policy's method.
cpu_target.typing_context.refresh()
for _name, _method in inspect.getmembers(_Optional, inspect.isfunction):
    _known.add(_name)
    _know_method(_name, _method)
