# make demo, make test: each does all of its own set-up on a fresh machine, in .venv.
PYTHON ?= python3
BIN := .venv/bin
SECONDS_PER_CELL ?= 12
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test lint bench bench-calibration bench-formats clean

demo: .venv/installed
	$(BIN)/python -m examples.demo --seconds $(SECONDS_PER_CELL)

test: .venv/installed
	$(BIN)/python -m pytest

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: bench-calibration bench-formats

# Side by side with its peers, 100 and 500 images; fewer e.g. with BENCH_CALIBRATION="--images 100 --rounds 1".
bench-calibration: .venv/installed
	$(BIN)/python -m benchmarks.calibration --json build/bench-calibration/result.json $(BENCH_CALIBRATION)

# Every format of four models; fewer e.g. with BENCH_FORMATS="--models digits --to tflite:all".
bench-formats: .venv/installed
	$(BIN)/python -m benchmarks.formats --json build/bench-formats/result.json $(BENCH_FORMATS)

# torch first and pinned: it then takes a CPU build where one is at hand, and nothing pulls another.
.venv/installed: pyproject.toml setup.py constraints.txt calibration/_histogram.c
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist
