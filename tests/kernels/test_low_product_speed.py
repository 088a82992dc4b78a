"""Whether low products pay: asked of the environment, of this process, of the cache, and measured at last."""

import json
import math
import multiprocessing
import os
import stat
import sys
import warnings

import pytest
import torch

from saevlm_fast.files import CACHE_VARIABLE
from saevlm_fast.kernels import low_product_speed
from saevlm_fast.kernels.low_product_speed import NEEDED, NEEDED_BY_AMX, VARIABLE, low_products_pay


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """A process that has decided nothing, on a machine without AMX, with an empty cache of its own."""
    monkeypatch.setattr(low_product_speed, "_decided", {})
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.delenv(VARIABLE, raising=False)


@pytest.fixture
def measured(monkeypatch):
    """A list of ratios that the next measurements find; each is taken from it once."""
    ratios = []
    monkeypatch.setattr(low_product_speed, "_measure", lambda: ratios.pop(0))
    return ratios


def forget(monkeypatch):
    """As another process would begin."""
    monkeypatch.setattr(low_product_speed, "_decided", {})


def cache_file(tmp_path):
    (file,) = (tmp_path / "cache" / "products").iterdir()
    return file


@pytest.mark.parametrize(("ratio", "pays"), [(0.2, False), (NEEDED - 0.01, False), (NEEDED, True), (16.0, True)])
def test_measured_once_and_kept(monkeypatch, measured, tmp_path, ratio, pays):
    measured[:] = [ratio]
    assert low_products_pay() is pays
    assert low_products_pay() is pays
    forget(monkeypatch)
    assert low_products_pay() is pays  # from the cache
    assert json.loads(cache_file(tmp_path).read_text())["float32_over_bfloat16"] == ratio


def test_a_process_keeps_to_its_first_answer(measured, tmp_path):
    """Whatever becomes of the cache in the middle of a run."""
    measured[:] = [3.0]
    assert low_products_pay()
    cache_file(tmp_path).write_text('{"float32_over_bfloat16": 0.5}')
    assert low_products_pay()


def test_amx_is_trusted_more(monkeypatch, measured):
    measured[:] = [(NEEDED + NEEDED_BY_AMX) / 2]
    assert not low_products_pay()
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert low_products_pay()


def test_no_mkldnn_no_measurement(monkeypatch, measured):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not low_products_pay()


@pytest.mark.parametrize("what", ["torch", "capability", "processor"])
def test_another_machine_is_measured_anew(monkeypatch, measured, what):
    measured[:] = [3.0, 0.5]
    assert low_products_pay()
    if what == "torch":
        monkeypatch.setattr(torch, "__version__", "9.9")
    elif what == "capability":
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX1024")
    else:
        monkeypatch.setattr(low_product_speed, "_processor", lambda: "another")
    assert not low_products_pay()
    assert not measured


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", "null", "\x00" * 40, "{}", '{"float32_over_bfloat16": null}', '{"float32_over_bfloat16": "3"}']
    + [f'{{"float32_over_bfloat16": {number}}}' for number in ("NaN", "Infinity", "0", "-3", "[3]", "1e999", "9" * 400)]
    + ["[" * 100_000],
)
def test_a_damaged_cache_is_measured_anew_and_mended(monkeypatch, measured, tmp_path, text):
    measured[:] = [0.5, 3.0]
    assert not low_products_pay()
    cache_file(tmp_path).write_text(text)
    forget(monkeypatch)
    assert low_products_pay()
    assert json.loads(cache_file(tmp_path).read_text())["float32_over_bfloat16"] == 3.0


def test_bytes_that_are_no_text(monkeypatch, measured, tmp_path):
    measured[:] = [0.5, 3.0]
    assert not low_products_pay()
    cache_file(tmp_path).write_bytes(b"\xff\xfe\xff")
    forget(monkeypatch)
    assert low_products_pay()


@pytest.mark.parametrize("kind", ["a file", "products a file", "entry a directory", "read-only", "no platformdirs"])
def test_without_a_cache_the_answer_is_the_processes_own(monkeypatch, measured, tmp_path, kind):
    measured[:] = [3.0]
    cache = tmp_path / "cache"
    if kind == "a file":
        cache.write_text("")
    elif kind == "products a file":
        cache.mkdir()
        (cache / "products").write_text("")
    elif kind == "entry a directory":
        (cache / "products" / f"{low_product_speed._machine()}.json").mkdir(parents=True)
    elif kind == "read-only":
        (cache / "products").mkdir(parents=True)
        (cache / "products").chmod(stat.S_IRUSR | stat.S_IXUSR)
    else:
        monkeypatch.delenv(CACHE_VARIABLE)
        monkeypatch.setitem(sys.modules, "platformdirs", None)
    assert low_products_pay()
    assert low_products_pay()


def test_a_processor_without_bfloat16_gets_no_page_of_warning(monkeypatch, recwarn):
    """As ARM's of before 2019: torch tells where in it the product failed, frame by frame."""
    product = torch.addmm

    def addmm(bias, *others, out):
        if bias.dtype == torch.bfloat16:
            warnings.warn("mkldnn_matmul failed, switching to BLAS gemm", UserWarning, stacklevel=2)
        return product(bias, *others, out=out)

    monkeypatch.setattr(torch, "addmm", addmm)
    assert low_product_speed._measure() > 0
    assert not list(recwarn)


def test_both_products_are_measured_as_they_are_used(monkeypatch):
    """Not in the precision that somebody has set: float32 would be found as fast as bfloat16."""
    seen = set()
    monkeypatch.setattr(low_product_speed, "_seconds", lambda _: seen.add(precision()) or 1.0)

    def precision():
        return torch.backends.mkldnn.matmul.fp32_precision

    torch.set_float32_matmul_precision("medium")
    try:
        assert low_product_speed._measure() == 1.0
        assert precision() == "bf16"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == {"ieee"}


def test_another_process_was_first(monkeypatch, tmp_path):
    """Both measure: the second goes by what the first has written meanwhile."""

    def measure():
        low_product_speed._write(low_product_speed._machine(), 0.5)
        return 3.0

    monkeypatch.setattr(low_product_speed, "_measure", measure)
    assert not low_products_pay()
    assert json.loads(cache_file(tmp_path).read_text())["float32_over_bfloat16"] == 0.5


def test_the_environment_decides(monkeypatch, measured):
    monkeypatch.setenv(VARIABLE, "1")
    assert low_products_pay()
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert low_products_pay()
    monkeypatch.setenv(VARIABLE, "0")
    assert not low_products_pay()
    monkeypatch.setenv(VARIABLE, "yes")
    with pytest.raises(ValueError, match="SAEVLM_FAST_SCREENING: 'yes' is neither 0 nor 1"):
        low_products_pay()


def test_the_least_times_count(monkeypatch):
    """A host that disturbs all but one product of either kind, bfloat16's first ones above all, changes nothing."""
    disturbed = {torch.float32: [1, 9, 1, 9, 9, 9, 9], torch.bfloat16: [9, 5, 4, 9, 9, 1, 9]}
    waits = {dtype: [1.0, *factors] for dtype, factors in disturbed.items()}  # the first call is not counted
    quiet = {torch.float32: 0.03, torch.bfloat16: 0.01}
    monkeypatch.setattr(low_product_speed, "_product", lambda dtype: dtype)
    monkeypatch.setattr(low_product_speed, "_seconds", lambda dtype: quiet[dtype] * waits[dtype].pop(0))
    assert low_product_speed._measure() == pytest.approx(3.0)


def test_an_emulated_product_is_not_waited_for_to_the_end(monkeypatch):
    asked = []
    monkeypatch.setattr(low_product_speed, "_product", lambda dtype: dtype)
    monkeypatch.setattr(
        low_product_speed, "_seconds", lambda dtype: asked.append(dtype) or (0.4 if dtype == torch.bfloat16 else 0.1)
    )
    assert low_product_speed._measure() == pytest.approx(0.25)
    assert len(asked) == 8


def test_a_real_measurement():
    """Any positive number: machines differ. Autocast has no say in it, and the number of threads is as it was."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
            assert 0 < low_product_speed._measure() < math.inf
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(n_threads)
    assert low_product_speed._processor()


def test_a_processor_without_cpuinfo(monkeypatch, tmp_path):
    monkeypatch.setattr(low_product_speed, "_CPUINFO", tmp_path / "none")
    assert low_product_speed._processor.__wrapped__()


def _ratio_of_a_process(answers):
    answers.put(low_product_speed._ratio())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_processes_agree(tmp_path, monkeypatch):
    """Several at once, the cache empty: whoever comes later goes by what is there."""
    monkeypatch.setattr(low_product_speed, "_SHAPE", (8, 8, 8))
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()

    def start():
        process = context.Process(target=_ratio_of_a_process, args=(answers,))
        process.start()
        return process

    for process in [start(), start()]:
        process.join(200)
    assert answers.get() > 0
    assert answers.get() > 0
    file = cache_file(tmp_path)  # one, and whole
    start().join(200)
    assert answers.get() == json.loads(file.read_text())["float32_over_bfloat16"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_goes_by_its_parents_answer(measured):
    measured[:] = [3.0]
    assert low_products_pay()
    child = os.fork()
    if child == 0:
        os._exit(0 if low_products_pay() else 1)
    assert os.waitpid(child, 0)[1] == 0
