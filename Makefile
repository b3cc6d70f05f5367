# The interpreter that .venv is made from: `make venv PYTHON=python3.12`.
PYTHON ?= python3
BIN := .venv/bin

# The one rule about versions: on Python 3.11, where constraints.txt was made, exactly those versions are installed;
# on any later Python the newest ones within the ranges of setup.py.
CONSTRAIN = $$($(BIN)/python -c 'import sys; print("-c constraints.txt" if sys.version_info[:2] == (3, 11) else "")')
INSTALL = $(BIN)/python -m pip install -qq --disable-pip-version-check $(CONSTRAIN)

PARITY_TESTS := $(wildcard tests/parity/test_*.py)
SLOW_TESTS := $(shell grep -ls 'mark\.slow' tests/test_*.py)

.PHONY: help venv browser demo test test-slow test-all test-parity lint bench dist
.DEFAULT_GOAL := help

help:
	@echo 'make venv         .venv with what make test needs (made first by all the others)'
	@echo 'make demo         the whole chain on 8x8 digits: teacher, student, 32 steps down to 1, pictures; minutes on a CPU'
	@echo 'make test         the tests, under ten minutes on two cores'
	@echo 'make test-slow    the slow tests alone; installs jax2onnx, Gradio and libtpu first'
	@echo 'make test-all     both'
	@echo 'make test-parity  the tests that compare with PyTorch; installs it first'
	@echo 'make lint         ruff'
	@echo 'make dist         dist/ with sdist and wheel, and the command of that wheel, tried away from this clone'
	@echo 'make bench        time of sampling and of a train step, beside PyTorch; installs it first'

venv: .venv/installed

.venv/installed: setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo 'guided_distill needs Python 3.11 or later; $(PYTHON) is not: name another, as in make venv PYTHON=python3.12'; exit 1; }
	@echo 'Installing into .venv: a minute or two, and 1.3 GB'
	@$(PYTHON) -m venv .venv
	@$(INSTALL) -e '.[test]'
	@touch $@

.venv/parity: .venv/installed
	@echo 'Installing PyTorch, diffusers and transformers into .venv'
	@$(INSTALL) -e '.[test,eval,parity]'
	@$(INSTALL) --no-deps torch-fidelity clip-anytorch
	@touch $@

# What is tested slowly: the converter to ONNX, the page, and the TPU's compiler, which has a directory of its own: among
# the other packages it makes every JAX program on a machine without a TPU complain.
.venv/extras: .venv/installed
	@echo 'Installing jax2onnx, onnxruntime, Gradio and libtpu into .venv'
	@$(INSTALL) -e '.[test,onnx,demo]'
	@$(INSTALL) --no-deps --upgrade --target .venv/tpu 'libtpu>=0.0.42'
	@touch $@

# What the slow tests of the report look through.
browser:
	@test -x /usr/bin/chromium -a -x /usr/bin/chromedriver || { \
	  echo 'the slow tests need a browser: apt-get install chromium chromium-driver'; exit 1; }

demo: venv
	$(BIN)/python -m guided_distill.main --config=configs/digits.py --workdir=runs/digits

test: venv
	$(BIN)/python -m pytest -q -n auto --dist loadfile -m 'not slow'

ifeq ($(SLOW_TESTS),)
test-slow:
	@echo 'no test is marked slow'
else
test-slow: .venv/extras browser
	$(BIN)/python -m pytest -q -n auto --dist loadfile -m slow $(SLOW_TESTS)
endif

test-all: browser test test-slow

ifeq ($(PARITY_TESTS),)
test-parity:
	@echo 'tests/parity holds no test yet'
else
test-parity: .venv/parity
	$(BIN)/python -m pytest -q -n auto --dist loadfile $(PARITY_TESTS)
endif

lint: venv
	$(BIN)/ruff check .

bench: .venv/parity
	$(BIN)/python -m benchmarks.sampling
	$(BIN)/python -m benchmarks.train_step

# The wheel in an environment that knows nothing of this clone, with the packages of .venv in place of a download: the
# path leads to them, and not to the clone, which only the .pth file of .venv would add.
PACKAGES = $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')

dist: venv
	@rm -rf build dist
	$(BIN)/python -m build --quiet
	@$(BIN)/python -m venv --without-pip build/elsewhere
	@$(BIN)/python -m pip --python build/elsewhere install -qq --disable-pip-version-check --no-deps dist/*.whl
	packages=$(PACKAGES) && cd build/elsewhere && PYTHONPATH=$$packages bin/guided-distill --config=digits --dry_run
