"""Compiled loops on the threads of torch's OpenMP, from first to last without Python.

Python would be asked for its lock by every thread at every call, which a busy Python thread makes milliseconds of; and
an interrupt that reached a callback would be lost (measured, docs/decisions.md).
"""

# mypy: ignore-errors
# Loops are in Numba's language, whose own compiler checks their types.

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

_BYTES, _I32, _I64 = ir.IntType(8).as_pointer(), ir.IntType(32), ir.IntType(64)


@intrinsic
def _fork(typing_context: Any, loop: Any, openmp: Any, bounds: Any, failed: Any, arguments: Any) -> Any:
    """GOMP_parallel(member, (openmp, bounds, failed, arguments), number of ranges): a member of the team takes its
    range, and where the team is smaller than asked for every so many-th after it. failed[0] = 1 if one has raised."""
    types_of_loop = (*arguments.types, types.int64, types.int64)
    signature = loop.get_call_type(typing_context, types_of_loop, {})
    dispatcher = loop.dispatcher

    def code(context: Any, builder: Any, own: Any, values: Any) -> Any:
        shared = cgutils.pack_struct(builder, values[1:])
        compiled = dispatcher.get_compile_result(signature)
        address = compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name)
        of_loop = context.call_conv.get_function_type(signature.return_type, signature.args)

        member = ir.Function(builder.module, ir.FunctionType(ir.VoidType(), [_BYTES]), builder.module.get_unique_name())
        member.linkage = "internal"
        inside = ir.IRBuilder(member.append_basic_block())
        openmp_3, bounds_P1, failed_1, given = cgutils.unpack_tuple(
            inside, inside.load(inside.bitcast(member.args[0], shared.type.as_pointer())), 4
        )
        ask = [
            inside.inttoptr(address_, ir.FunctionType(_I32, []).as_pointer())
            for address_ in cgutils.unpack_tuple(inside, openmp_3, 3)[1:]
        ]
        number, size = (inside.sext(inside.call(question, []), _I64) for question in ask)
        array_of_bounds = context.make_array(bounds)(context, inside, bounds_P1)
        n_ranges = inside.sub(array_of_bounds.nitems, _I64(1))
        with cgutils.for_range_slice(inside, number, n_ranges, size, intp=_I64) as (part, _):
            ends = [inside.load(inside.gep(array_of_bounds.data, [inside.add(part, _I64(i))])) for i in (0, 1)]
            each = [*cgutils.unpack_tuple(inside, given, len(arguments.types)), *ends]
            # In this way Numba knows that the code holds an address, and never keeps it on disk.
            function = inside.bitcast(context.add_dynamic_addr(inside, address, "loop"), of_loop.as_pointer())
            status, _ = context.call_conv.call_function(inside, function, signature.return_type, signature.args, each)
            with inside.if_then(status.is_error):
                inside.store(_I64(1), context.make_array(failed)(context, inside, failed_1).data)
        inside.ret_void()

        parallel = ir.FunctionType(ir.VoidType(), [member.type, _BYTES, _I32, _I32])
        fork = builder.inttoptr(builder.extract_value(values[1], 0), parallel.as_pointer())
        team = builder.sub(context.make_array(bounds)(context, builder, values[2]).nitems, _I64(1))
        where = builder.bitcast(cgutils.alloca_once_value(builder, shared), _BYTES)
        builder.call(fork, [member, where, builder.trunc(team, _I32), _I32(0)])
        return context.get_dummy_value()

    return types.none(loop, openmp, bounds, failed, arguments), code


@njit(nogil=True)
def on_team(loop: Any, openmp: Any, bounds: Any, failed: Any, arguments: Any) -> None:
    """loop(*arguments, start, stop) of every range, by a team of as many threads. openmp: addresses of GOMP_parallel,
    omp_get_thread_num and omp_get_num_threads."""
    _fork(loop, openmp, bounds, failed, arguments)
