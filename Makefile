# Both first commands set up all they need: `make quickstart` and `make test`.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python

.PHONY: quickstart test test-all parity lint bench lock clean

quickstart: $(VENV)/.run  ## train a tiny model from scratch and see what it learned: 3 to 5 minutes
	$(RUN) -m itjax.main --config=configs/quickstart.py

test: $(VENV)/.dev lint  ## everything CI runs
	$(RUN) -m pytest -n 2 --dist loadfile -m "not slow"

test-all: $(VENV)/.dev lint  ## the slow tests too
	$(RUN) -m pytest -n 2 --dist loadfile

parity: $(VENV)/.dev  ## every family against transformers and PEFT on CPU, with many configs drawn at random: 10 minutes
	$(RUN) -m pytest -n 2 --dist loadfile tests/parity

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: $(VENV)/.dev  ## benchmarks of this machine, printed and kept under benchmarks/results
	$(RUN) -m benchmarks.run --suite cpu
	$(RUN) -m benchmarks.run --suite data

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; $(PYTHON) is older. Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: pyproject.toml | $(VENV)/bin/python
	$(RUN) -m pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	$(RUN) -m pip install --quiet --disable-pip-version-check -e '.[dev,parity,plan]'
	touch $@ $(VENV)/.run

lock: $(VENV)/.dev  ## versions that developers agree on: requirements-dev.lock
	$(RUN) -m pip freeze --exclude-editable > requirements-dev.lock

clean:
	rm -rf $(VENV) build dist *.egg-info
