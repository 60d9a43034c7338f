# `make demo` and `make test` do all the set-up they need; nothing has to be installed by hand.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: setup demo test drills check bench lock clean

setup: $(READY)

# Exact versions and hashes from the lock file; the package itself is installed editable. Compiled now, as where
# Python may not write bytecode (PYTHONDONTWRITEBYTECODE, usual in containers) each process compiled all of it again.
$(READY): requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==0.13.8
	$(BIN)/uv pip install --python $(BIN)/python --compile-bytecode --require-hashes --requirement requirements.lock
	$(BIN)/uv pip install --python $(BIN)/python --no-deps --no-build-isolation --editable .
	$(BIN)/python -m compileall -q data_pipeline pretrain launch tests
	touch $@

demo: $(READY)
	$(BIN)/pretrain demo

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests --ignore tests/drills --numprocesses 2 --dist loadfile --durations 10

# The long ones: runs killed in every phase, storage and networks that fail, every byte of a shard damaged. In the order of
# their names: by default files of few tests come last, which here are the longest.
drills: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/drills --numprocesses 2 --dist loadfile --no-loadscope-reorder \
	    --durations 10

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python -m tests.benchmarks

# After a change of pyproject.toml's ranges.
lock: $(READY)
	$(BIN)/uv pip compile --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	    --extra dev pyproject.toml --output-file requirements.lock

clean:
	rm -rf .venv runs build *.egg-info
