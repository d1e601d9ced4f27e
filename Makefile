# lichen: the words that a developer types, and that CI runs.
PYTHON := .venv/bin/python
export PYTHONDONTWRITEBYTECODE := 1

.PHONY: help demo install test test-slow check format docs bench soak clean

help:
	@echo "make demo       install, fetch the default model, and stream one answer"
	@echo "make test       the fast tests"
	@echo "make test-slow  the proofs that take minutes"
	@echo "make check      lint, types, imports, size limits, generated docs"
	@echo "make docs       write the generated reference pages"
	@echo "make bench      lichen beside its peers on this machine"
	@echo "make soak       an hour of mixed load: what grows, what is left behind"
	@echo "make format     format the code"
	@echo "make clean      remove everything that was made here"

demo:
	@scripts/install.sh
	@$(PYTHON) scripts/demo.py

install:
	@scripts/install.sh dev

test: install
	$(PYTHON) -m pytest -m "not slow"

test-slow: install
	$(PYTHON) -m pytest -m slow --timeout 1200

check: install
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) scripts/typed_tree.py
	cd .build/tree && MYPYPATH=$(CURDIR)/.build/tree ../../$(PYTHON) -m mypy --config-file ../../pyproject.toml -p lichen
	MYPYPATH=$(CURDIR)/.build/tree $(PYTHON) -m mypy --explicit-package-bases tests scripts/demo.py scripts/typed_tree.py scripts/size_limits.py docs/generate.py bench
	cd .build/tree && ../../.venv/bin/lint-imports --config ../../pyproject.toml
	$(PYTHON) scripts/size_limits.py
	$(PYTHON) docs/generate.py --check

docs: install
	$(PYTHON) docs/generate.py

soak: install
	$(PYTHON) -m bench.soak

bench: install
	$(PYTHON) -m bench.serving

format: install
	$(PYTHON) -m ruff check --fix-only .
	$(PYTHON) -m ruff format .

clean:
	rm -rf .venv .venv-peers .build .mypy_cache .ruff_cache .pytest_cache .hypothesis
