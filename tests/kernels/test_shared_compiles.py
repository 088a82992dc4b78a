"""The kernels between what ranks tell each other compile for GPUs that are not here, without spills."""

import inspect

from static_compile import TARGETS, Case, assert_no_spills

INTEGERS = {"latents", "row_offsets", "group_ends", "kept_latents", "kept_offsets", "step_index", "bad_step"}
SHORT = "bags rows offsets arrivals mask flags before state counts after equals upto own cut".split()


def case(module: str, function: str, target: str, num_warps: int, **constants) -> Case:
    import importlib

    name = f"saevlm_fast.kernels.{module}"
    arguments = inspect.signature(getattr(importlib.import_module(name), function).fn).parameters
    signature = {each: "i32" for each in arguments if each not in constants}
    for each in signature:
        if each.endswith("_ptr"):
            kind = each.removesuffix("_ptr")
            signature[each] = "*i64" if kind in INTEGERS else "*i32" if kind in SHORT else "*fp32"
    signature |= {"d_in": "i32:16"} if "d_in" in signature else {}
    return Case(name, function, target, signature, constants, num_warps)


def test_static_compile_without_spills() -> None:
    from saevlm_fast.kernels import shared_choice_triton as choice
    from saevlm_fast.kernels import shared_numbers_triton as numbers
    from saevlm_fast.kernels.gradient_norm_triton import DB_ROWS
    from saevlm_fast.kernels.segment_sum_triton import CHUNK
    from saevlm_fast.kernels.shared_rows_triton import tile
    from saevlm_fast.kernels.step_rows_triton import whole_row_block

    cases, d_in = [], 1024
    block_d, warps = whole_row_block(d_in, 4)
    known = {"BLOCK_D": block_d, "ACC": "tl.float32"}
    of_rows = known | {"PREFIXES": True, "STEP_K": tile(d_in)["STEP_K"]}
    of_numbers = known | {"FIRST": 0, "HAS_AUX": True, "CHUNK": CHUNK, "ROWS": DB_ROWS}
    of_numbers |= {"STEP": numbers.step_of(block_d, warps), "BLOCK": numbers.BLOCK}
    for target in TARGETS:
        narrow = tile(d_in)["num_warps"]
        cases.append(case("shared_rows_triton", "passed_kernel", target, narrow, CENTRE=True, **of_rows))
        cases.append(case("shared_numbers_triton", "numbers_kernel", target, warps, **of_numbers))
    cases.append(case("shared_rows_triton", "residual_kernel", "sm_90", warps, PREFIXES=True, **known))
    compared = {"BLOCK_N": 256, "BLOCK_K": choice.COMPARED // 256}
    cases += [case("shared_choice_triton", "keep_kernel", target, 4, **compared) for target in TARGETS]
    digits = {"BITS": choice.BITS, "BINS": choice.BINS, "BLOCK": choice.BLOCK}
    cases.append(case("shared_choice_triton", "offer_digit_kernel", "sm_90", 4, SHIFT=11, ROUND=1, **digits))
    cases.append(case("shared_choice_triton", "mask_kernel", "sm_90", 4, BLOCK=choice.BLOCK))
    rows = {"SHIFT": 20, "ROUND": 2, "BITS": 4, "BINS": 16, "BLOCK": 256}
    cases.append(case("shared_largest_triton", "row_digit_kernel", "sm_90", 4, **rows))
    assert_no_spills(cases)
