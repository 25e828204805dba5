# Two commands do everything on a fresh machine with Python 3.11+, Perl 5.10+ and make:
#   make demo    set up, start the daemon, run a Perl script through it, stop it
#   make test    set up, then ruff, mypy, pytest and the Perl tests

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
TYPING := .typing/cpanbridge

.PHONY: help demo test lint types pytest perl-test soak bench clean

help:
	@sed -n 's/^#  *\(make .*\)/\1/p' Makefile

# FILE reaches the shell as a variable, so that no character of a name has a meaning there.
demo: export DEMO_FILE = $(value FILE)
demo: $(VENV)/.installed
	@PATH="$(CURDIR)/$(BIN):$$PATH" sh examples/run-demo.sh "$$DEMO_FILE"

test: lint types pytest perl-test

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-test $(TYPING)
	$(BIN)/mypy -p cpanbridge.supervisor -p cpanbridge.workers
	MYPYPATH=bench:examples/modules $(BIN)/mypy tests bench examples/modules

# Compiled once for the hundreds of daemons that the tests start, and for all of pytest's processes,
# also where PYTHONDONTWRITEBYTECODE is set.
pytest: $(VENV)/.installed-test
	$(BIN)/python -m compileall -q supervisor workers tests/modules tests/helpers
	@PYTHONDONTWRITEBYTECODE= $(BIN)/pytest --collect-only -q >/dev/null || true
	$(BIN)/pytest -n 5 --dist worksteal

perl-test: $(VENV)/.installed
	cd perl && CPANBRIDGED="$(CURDIR)/$(BIN)/cpanbridged" prove -l -j 4 t

# Not part of the tests: what takes minutes (see tests/soak).
soak: $(VENV)/.installed-test
	$(BIN)/pytest -n 2 $(filter-out %/soak_reload.py,$(wildcard tests/soak/soak_*.py))
	$(BIN)/pytest -n 0 tests/soak/soak_reload.py

# Not part of the tests: figures of this machine (see bench/README.md).
bench: $(VENV)/.installed
	$(BIN)/python bench/peers.py

# The daemon alone, and with what the tests need. Renewed when pyproject.toml changes.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "needs Python 3.11 or newer; try make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[demo]'
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[test]'
	@touch $@

# Type checkers don't follow the editable install's import hook: links show them the packages.
$(TYPING):
	mkdir -p $@
	ln -sfn ../../supervisor $@/supervisor
	ln -sfn ../../workers $@/workers

clean:
	rm -rf $(VENV) .typing build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
