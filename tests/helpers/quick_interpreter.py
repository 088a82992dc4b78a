"""Triton's interpreter, quicker: what it looks up anew at every call of a @triton.jit function is looked up once.

And right where it is not. What is compared as a scalar and spread over a block is a number there, which Triton 3.9
refuses as a mask: it stays a mask. Bounds of loops are arrays of one element in Triton 3.6, which NumPy 2.4 does not
take. The bits of bfloat16 are multiplied as integers.
"""

import importlib.util
import inspect
import sys
from types import ModuleType

import numpy as np


def quicken_interpreter() -> None:
    """Mends it, and makes it quicker, before anything imports Triton."""
    assert "triton.language" not in sys.modules, "before anything is replaced in it"
    if importlib.util.find_spec("triton") is None:
        return
    from triton.runtime import interpreter

    _keep_booleans(interpreter)
    _take_one_element(interpreter)
    _read_bfloat16(interpreter)
    _look_up_once(interpreter)


def _look_up_once(interpreter: ModuleType) -> None:
    """It searches triton.language for what it has to replace, a third of its time, and builds its table of dtypes anew.

    What it replaces, and with what, stays its own. These are private functions: a Triton that has others is left as it
    is, and only slower.
    """
    tl = interpreter.tl
    try:
        packages = tl, tl.core, tl.math, tl.tensor, tl.core.tensor_descriptor_base
        search, patch, of_numpy = interpreter._patch_builtin, interpreter._patch_attr, interpreter._get_np_dtype
        parameters = list(inspect.signature(patch).parameters)
    except AttributeError:
        return
    if parameters[:4] != ["obj", "name", "member", "builder"]:
        return
    builtins = {package: [n for n in dir(package) if tl.core.is_builtin(getattr(package, n))] for package in packages}
    known = {}

    def look_up(package, builder, *scope):
        if package not in builtins:
            search(package, builder, *scope)
            return
        for name in builtins[package]:
            member = getattr(package, name)
            if tl.core.is_builtin(member):
                patch(package, name, member, builder, *scope)

    def np_dtype(dtype):
        element = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
        if isinstance(element, tl.pointer_type):
            return of_numpy(element)
        if element not in known:
            known[element] = of_numpy(element)
        return known[element]

    interpreter._patch_builtin, interpreter._get_np_dtype = look_up, np_dtype


def _keep_booleans(interpreter: ModuleType) -> None:
    """Comparisons keep the type of what they compare in the interpreter's handles, and a spread one takes it on."""
    builder = interpreter.InterpreterBuilder
    splat = builder.create_splat

    def create_splat(self, ret_ty, arg):
        found = splat(self, ret_ty, arg)
        return interpreter.TensorHandle(found.data.astype(bool), arg.dtype) if arg.data.dtype == bool else found

    builder.create_splat = create_splat


def _take_one_element(interpreter: ModuleType) -> None:
    """Scalars are arrays [1] in the interpreter, and `int` takes only those [] since NumPy 2.4."""
    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_lang_tensor


def _read_bfloat16(interpreter: ModuleType) -> None:
    """Its arrays hold bfloat16 as the upper half of a float32; a product of them is that of these float32."""
    builder = interpreter.InterpreterBuilder
    dot = builder.create_dot

    def float32(handle):
        if not handle.dtype.is_bf16():
            return handle
        values = (handle.data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(values, interpreter.tl.float32)

    builder.create_dot = lambda self, a, b, d, *how: dot(self, float32(a), float32(b), d, *how)
