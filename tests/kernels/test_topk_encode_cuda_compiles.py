"""The kernels of the GPU's encoders that screen, compiled and not run: none spills."""

from static_compile import TARGETS, Case, assert_no_spills

SCREEN, LIST, CHOOSE, LARGEST, REDO, ROWS = (
    f"saevlm_fast.kernels.topk_encode_{name}_triton" for name in ("screen", "list", "choose", "largest", "redo", "rows")
)
FLOATS, HALVES, INTS, LONGS, SIZE = "*fp32", "*fp16", "*i32", "*i64", "i32:16"
BOUND = {"maxima_ptr": HALVES} | dict.fromkeys(("factors_ptr", "norm_ptr", "error_ptr", "inverse_ptr"), FLOATS)
POOL = {"value_ptr": FLOATS, "latent_ptr": INTS, "base_ptr": INTS, "count_ptr": INTS, "counters_ptr": LONGS}
POOL |= {"capacity": "i32"}


def product_cases(target: str, group: int) -> list[Case]:
    from saevlm_fast.kernels.topk_encode_screen_triton import tile_config

    capability = {"sm_80": (8, 0), "sm_90": (9, 0), "gfx942": (0, 0)}[target]
    cases = []
    tail = {"b_enc_ptr": FLOATS, "inverse_ptr": FLOATS, "maxima_ptr": HALVES}
    for tma, config in (tile_config(capability), (False, tile_config((0, 0) if target == "gfx942" else (8, 0))[1])):
        launch = {name: config[name] for name in ("num_warps", "num_stages")}
        blocks = {name: value for name, value in config.items() if name not in launch} | {"GROUP": group}
        sides = [config[f"BLOCK_{side}"] for side in "BSD"]
        if tma:
            described = {"x_desc": (sides[0], sides[2]), "W_desc": sides[1:], "pre_desc": sides[:2]}
            signature = {name: f"tensordesc<fp16[{a},{b}]>" for name, (a, b) in described.items()} | tail
            signature |= dict.fromkeys(("d_in", "d_sae", "n_groups"), SIZE) | {"n_rows": "i32"}
            cases.append(Case(SCREEN, "product_kernel", target, signature, blocks | {"PROGRAMS": 132}, **launch))
        else:
            signature = dict.fromkeys(("x_ptr", "W_ptr", "pre_ptr"), HALVES) | tail
            signature |= dict.fromkeys(("width_in", "d_sae", "width_sae", "n_groups"), SIZE) | {"n_rows": "i32"}
            cases.append(Case(SCREEN, "tile_product_kernel", target, signature, blocks, **launch))
    return cases


def list_case(target: str, group: int, n_groups: int, bounded: bool) -> Case:
    from saevlm_fast.kernels.topk_encode_list_triton import list_config

    signature = BOUND | {"pre_ptr": HALVES, "cut_ptr": FLOATS, "counters_ptr": LONGS, "k": "i32"}
    pointers = ("bound", "groups", "pool_row", "pool_latent", "base", "count", "failed")
    signature |= {f"{name}_ptr": INTS for name in pointers}
    signature |= dict.fromkeys(("n_groups", "d_sae", "width_sae"), SIZE) | {"most": "i32", "capacity": "i32"}
    blocks = list_config(n_groups, group, few=not bounded)
    warps = blocks.pop("num_warps")
    return Case(LIST, "list_kernel", target, signature, blocks | {"BOUNDED": bounded, "GROUP": group}, num_warps=warps)


def copy_cases(target: str) -> list[Case]:
    weights = {"W_ptr": FLOATS, "low_ptr": HALVES, "norm_ptr": FLOATS, "error_ptr": FLOATS, "d_in": SIZE, "width": SIZE}
    rows = dict.fromkeys(("x_ptr", "b_dec_ptr", "centred_ptr", "norm_ptr", "error_ptr", "inverse_ptr"), FLOATS)
    rows |= {"low_ptr": HALVES, "zeros_ptr": INTS, "stride_x": SIZE, "d_in": SIZE, "width": SIZE, "n_zeros": "i32"}
    factors = dict.fromkeys(("norm_ptr", "error_ptr", "b_enc_ptr", "factors_ptr"), FLOATS)
    factors |= {"d_sae": SIZE, "n_groups": SIZE, "gamma": "fp32"}
    dots = dict.fromkeys(("x_ptr", "W_ptr", "b_enc_ptr", "value_ptr"), FLOATS) | {"counters_ptr": LONGS}
    dots |= {"pool_row_ptr": INTS, "pool_latent_ptr": INTS, "capacity": "i32", "d_in": SIZE}
    return [
        Case(SCREEN, "low_weights_kernel", target, weights, {"BLOCK_D": 1024}),
        Case(SCREEN, "low_rows_kernel", target, rows, {"BLOCK_D": 1024}),
        Case(SCREEN, "group_factors_kernel", target, factors, {"GROUP": 64, "BLOCK_G": 16}),
        Case(LIST, "pool_dots_kernel", target, dots, {"BLOCK_P": 1, "BLOCK_D": 1024}, num_warps=1),
    ]


def choice_cases(target: str) -> list[Case]:
    topk = POOL | {"acts_ptr": FLOATS, "latents_ptr": LONGS, "k": "i32"}
    found = {"histogram_ptr": INTS, "found_ptr": INTS, "n": "i32"}
    bound = BOUND | found | {"n_rows": "i32", "n_groups": SIZE}
    digit = found | {"value_ptr": FLOATS, "z_ptr": FLOATS, "counters_ptr": LONGS, "capacity": "i32", "n_z": "i32"}
    count = POOL | {"z_ptr": FLOATS, "d_sae": SIZE, "n_rows": "i32"}
    count |= dict.fromkeys(("found_ptr", "above_ptr", "equal_ptr", "parts_ptr"), INTS)
    write = count | {"row_offsets_ptr": LONGS, "acts_ptr": FLOATS, "latents_ptr": LONGS, "n_places": "i32"}
    rows = {"ROWS": 8, "BLOCK": 64}
    digits = {"FIRST": False}
    bounds = digits | {"SHIFT": 15, "ROWS": 4, "BLOCK_G": 1024}
    ranked = {"RANKED": target != "gfx942", "BLOCK": 256}
    return [
        Case(CHOOSE, "topk_of_pool_kernel", target, topk, ranked, num_warps=1),
        Case(CHOOSE, "topk_of_pool_kernel", target, topk, {"RANKED": False, "BLOCK": 2048}, num_warps=8),
        Case(LARGEST, "bound_digit_kernel", target, bound, bounds, num_warps=8),
        Case(LARGEST, "digit_kernel", target, digit, digits | {"SHIFT": 7, "BITS": 8, "BLOCK": 1024}),
        Case(LARGEST, "digit_kernel", target, digit, digits | {"SHIFT": 0, "BITS": 7, "BLOCK": 1024}),
        Case(LARGEST, "count_kernel", target, count, rows, num_warps=2),
        Case(LARGEST, "write_kernel", target, write, rows | {"PARTS": 256}, num_warps=2),
    ]


def redo_cases(target: str) -> list[Case]:
    product = dict.fromkeys(("x_ptr", "W_ptr", "b_enc_ptr", "z_ptr"), FLOATS)
    product |= {"failed_ptr": INTS, "counters_ptr": LONGS}
    product |= {"capacity": "i32", "n_rows": "i32", "d_in": SIZE, "d_sae": SIZE}
    blocks = {"BATCH": True, "BLOCK_B": 32, "BLOCK_S": 128, "BLOCK_D": 16}
    codes = {"z_ptr": FLOATS, "acts_ptr": FLOATS, "latents_ptr": LONGS, "k": "i32"}
    topk = codes | {"failed_ptr": INTS, "counters_ptr": LONGS, "capacity": "i32", "n_rows": "i32", "d_sae": SIZE}
    return [
        Case(REDO, "redo_product_kernel", target, product, blocks, num_stages=3),
        Case(REDO, "redo_topk_kernel", target, topk, {"BLOCK": 2048}, num_warps=8),
        Case(ROWS, "topk_of_rows_kernel", target, codes | {"width": SIZE}, {"BLOCK": 1024}, num_warps=8),
    ]


def test_static_compile_without_spills():
    cases = []
    for target in TARGETS:
        cases += product_cases(target, 64) + product_cases(target, 16)
        cases += [list_case(target, 64, 1024, bounded=False), list_case(target, 64, 1024, bounded=True)]
        cases += [list_case(target, 64, 128, bounded=False), list_case(target, 16, 4096, bounded=False)]
        cases += copy_cases(target) + choice_cases(target) + redo_cases(target)
    assert_no_spills(cases)
