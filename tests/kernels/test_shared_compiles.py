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
    from saevlm_fast.kernels.gradient_norm_triton import DB_ROWS, NORM_STEP
    from saevlm_fast.kernels.segment_sum_triton import CHUNK
    from saevlm_fast.kernels.shared_rows_triton import tile
    from saevlm_fast.kernels.step_rows_triton import MAX_WIDTH, whole_row_block

    cases = []
    for d_in, prefixes, targets in ((1024, True, TARGETS), (MAX_WIDTH, False, ("sm_90",))):
        wide = tile(d_in) | {"PREFIXES": prefixes, "ACC": "tl.float32"}
        step, warps = wide.pop("STEP_K"), wide.pop("num_warps")
        for target in targets:
            cases.append(case("shared_rows_triton", "parts_kernel", target, warps, STEP_K=step, **wide))
            cases.append(case("shared_rows_triton", "passed_kernel", target, warps, STEP_K=step, CENTRE=True, **wide))
            cases.append(case("shared_rows_triton", "residual_kernel", target, min(2 * warps, 16), **wide))
        block_d, warps = whole_row_block(d_in, 4)
        known = {"BLOCK_D": block_d, "ACC": "tl.float32", "HAS_AUX": True, "STEP": numbers.step_of(block_d, warps)}
        of_numbers = {"FIRST": 0, "CHUNK": CHUNK, "BLOCK_P": NORM_STEP, "ROWS": DB_ROWS, "BLOCK": numbers.BLOCK}
        cases += [case("shared_numbers_triton", "numbers_kernel", t, warps, **known, **of_numbers) for t in targets]
    compared = {"BLOCK_N": 256, "BLOCK_K": choice.COMPARED // 256}
    cases += [case("shared_choice_triton", "keep_kernel", target, 4, **compared) for target in TARGETS]
    digits = {"BITS": choice.BITS, "BINS": choice.BINS, "BLOCK": choice.BLOCK}
    cases.append(case("shared_choice_triton", "offer_digit_kernel", "sm_90", 4, SHIFT=11, ROUND=1, **digits))
    cases.append(case("shared_choice_triton", "mask_kernel", "sm_90", 4, BLOCK=choice.BLOCK))
    rows = {"SHIFT": 20, "ROUND": 2, "BITS": 4, "BINS": 16, "BLOCK": 256}
    cases.append(case("shared_largest_triton", "row_digit_kernel", "sm_90", 4, **rows))
    assert_no_spills(cases)
