# make test | check | demo | fuzz | soak | clean.  Everything goes into virtual environments here; stamps make repeat runs quick.
PYTHON ?= python3
VENV := .venv
DEMO := .venv-demo
TORCH := $(shell sed -n 's/^ *"\(torch==[^"]*\)".*/\1/p' pyproject.toml)
BUILD := setup.py pyproject.toml $(wildcard csrc/* csrc/*/*)
SOURCES := $(shell find advrad_fast kernels -name '*.py' -o -name '*.pyi' -o -path 'advrad_fast/data/*' -type f)

.PHONY: test check demo fuzz soak clean

# pycuda is for the tests of the GPU's launch path; where it can't be built they are skipped.
test: $(VENV)/.stamp
	-$(VENV)/bin/python tests/gpu_emulation/install_pycuda.py
	$(VENV)/bin/python -m pytest -q

check: $(VENV)/.stamp
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/mypy kernels

# Hostile input, over 500,000 cases, and 100,000 frames in one process: docs/reliability.md.  Neither is quick.
fuzz: $(VENV)/.stamp
	$(VENV)/bin/python -m pytest -q -m slow tests/fuzz

soak: $(VENV)/.stamp
	$(VENV)/bin/python -m pytest -q -s -m slow tests/test_soak.py

# The torch-free runtime, installed as a user would, plus the demo's images.
demo: $(DEMO)/.stamp
	$(DEMO)/bin/advrad-fast demo --out demo-out

clean:
	rm -rf $(VENV) $(DEMO) build dist demo-out *.egg-info advrad_fast/_native*.so
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find advrad_fast kernels tests benchmarks -name __pycache__ -type d -exec rm -rf {} +

# torch comes first and alone, so that a failing download is not hidden in a long resolution.
$(VENV)/.stamp: $(BUILD)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q $(TORCH)
	$(VENV)/bin/python -m pip install -q -e '.[test]'
	touch $@

$(DEMO)/.stamp: $(BUILD) $(SOURCES)
	test -x $(DEMO)/bin/python || $(PYTHON) -m venv $(DEMO)
	$(DEMO)/bin/python -m pip install -q . elpv-dataset
	touch $@
