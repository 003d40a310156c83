"""Importing `sinks` is light, has no effect on anything, and gives exactly the public names."""

import json
import re
import statistics
import subprocess
import sys
import tomllib

import pytest

import sinks
from tests.law.tree import ROOT, SOURCE, modules

HEAVY = ["accelerate", "gguf", "matplotlib", "numpy", "pandas", "rich", "safetensors", "torch", "transformers"]

FOR_TESTS_ONLY = ["beartype", "hypothesis", "importlinter", "pytest"]


def fresh(program: str, *arguments: str) -> str:
    """What `program` prints in a fresh process; it must print nothing on standard error."""
    result = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert not result.stderr, result.stderr
    return result.stdout


def test_importing_sinks_imports_nothing_heavy():
    program = f"import sinks, sys; print([name for name in {HEAVY} if name in sys.modules])"
    assert fresh(program) == "[]\n"


def test_importing_sinks_takes_less_than_three_tenths_of_a_second():
    program = "import time; start = time.perf_counter(); import sinks; print(time.perf_counter() - start)"
    assert statistics.median(float(fresh(program)) for _ in range(5)) < 0.3


@pytest.mark.parametrize("name", sinks.__all__)
def test_every_public_name_is_there(name: str):
    assert getattr(sinks, name) is not None
    assert name in dir(sinks)


def test_the_public_list_is_sorted_and_complete():
    assert sinks.__all__ == sorted(sinks.__all__)
    lazy: dict[str, str] = vars(sinks)["_HOMES"]
    assert {*lazy, "__version__"} == {*sinks.__all__}
    for_type_checkers = re.findall(r"^    from (\S+) import (.+)$", (SOURCE / "__init__.py").read_text(), re.MULTILINE)
    told = {name.strip(): home for home, names in for_type_checkers for name in names.split(",") if home != "sinks"}
    assert told == lazy, "what a type checker is told differs from what is imported"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'Sink'"):
        _ = getattr(sinks, "Sink")  # noqa: B009 (a type checker would object, rightly, to the other spelling)


def test_one_version_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert sinks.__version__ == project["version"]
    assert f"## [{sinks.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_importing_any_module_has_no_effect():
    """Each module alone, in a process that already has what `sinks` stands on; the tools of tests are not needed."""
    report = json.loads(fresh(EFFECTS, json.dumps(modules()), json.dumps(FOR_TESTS_ONLY)).splitlines()[-1])
    assert not report, "\n".join(f"importing {module} changes {what}" for module, what in report)


EFFECTS = '''
import importlib, json, logging, os, random, signal, sys, threading, warnings

names, for_tests_only = map(json.loads, sys.argv[1:])

def state():
    """Everything global that an import could plausibly touch."""
    import torch, transformers
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    return {
        "the environment": dict(os.environ),
        "the working folder": os.getcwd(),
        "sys.path": list(sys.path),
        "warning filters": list(warnings.filters),
        "logging": (logging.root.level, len(logging.root.handlers), transformers.logging.get_verbosity()),
        "signal handlers": signal.getsignal(signal.SIGINT),
        "threads": threading.active_count(),
        "random numbers": (random.getstate(), torch.get_rng_state().tolist()),
        "torch": (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(),
                  torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()),
        "transformers' attention functions": (sorted(ALL_ATTENTION_FUNCTIONS), sorted(ALL_MASK_ATTENTION_FUNCTIONS)),
        "CUDA": torch.cuda.is_initialized(),
        "what users need to install": [name for name in for_tests_only if name in sys.modules],
    }

for name in names:  # once, for what they import from elsewhere: those packages may have effects of their own
    importlib.import_module(name)
report = [("sinks", "what users need to install")] if state()["what users need to install"] else []
before = state()
for name in names:  # and once alone
    for loaded in [loaded for loaded in sys.modules if loaded.partition(".")[0] == "sinks"]:
        del sys.modules[loaded]
    importlib.import_module(name)
    after = state()
    report += [(name, what) for what in after if after[what] != before[what]]
    before = after
print(json.dumps(report))
'''
