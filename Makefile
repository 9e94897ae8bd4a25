# Each target does its own set-up, in a virtual environment of the chosen Python (3.11 or newer):
#   make test                      lint, types, demo, demo-full, pod-demo, venv, clean likewise
#   make test PYTHON=python3.12    with another Python, beside the first
#   make test ARGS='-k sheet'      with arguments for pytest, or for the demo
PYTHON ?= python3
ARGS ?=
# Processes that share the tests, whole files at a time so that what a file sets up is set up once.
WORKERS ?= 2

# "<version> <path>" of that Python. Where pyenv keeps several, a name like python3.12 answers only for the selected
# ones; so when it does not answer, ask again with all of them selected.
ask := -c 'import sys; print("%d.%d" % sys.version_info[:2], sys.executable)' 2>/dev/null
found := $(shell $(PYTHON) $(ask) || PYENV_VERSION="$$(pyenv versions --bare 2>/dev/null | paste -sd: -)" $(PYTHON) $(ask))
version := $(firstword $(found))
interpreter := $(wordlist 2,99,$(found))
venv := .venv-$(version)
bin := $(venv)/bin
stamp := $(venv)/.installed

.PHONY: test lint types demo demo-full pod-demo venv clean

test: $(stamp)
	$(bin)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

lint: $(stamp)
	$(bin)/ruff check varedit_jax data_pipelines experiments tests
	$(bin)/ruff format --check varedit_jax data_pipelines experiments tests

types: $(stamp)
	$(bin)/mypy

demo: $(stamp)
	$(bin)/python -m experiments.demo $(ARGS)

demo-full: $(stamp)
	$(bin)/python -m experiments.demo --full $(ARGS)

pod-demo: $(stamp)
	$(bin)/python -m experiments.pod_demo $(ARGS)

venv: $(stamp)

$(stamp): setup.cfg pyproject.toml constraints.txt
	$(if $(found),,$(error PYTHON=$(PYTHON) does not run; name a Python 3.11 or newer, as in make test PYTHON=python3.12))
	$(if $(filter 2.% 3.0 3.1 3.2 3.3 3.4 3.5 3.6 3.7 3.8 3.9 3.10,$(version)),$(error PYTHON=$(PYTHON) is Python $(version); \
		3.11 or newer is needed, as in make test PYTHON=python3.12))
	@echo "Installing pinned packages into $(venv), which takes a minute or more, by the network."
	$(interpreter) -m venv $(venv)
	$(bin)/pip install -qq --no-compile --disable-pip-version-check -c constraints.txt -e '.[test]'
	$(bin)/pip check
	touch $@

clean:
	rm -rf .venv-* .cache build dist *.egg-info
