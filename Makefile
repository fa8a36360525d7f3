# Two commands for a newcomer: `make demo` and `make test`. Both set everything up in .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DOCS_VENV ?= .venv-docs
ENGINES ?= .engines
OUT ?= gpu-results
RUNS ?= 1000000

.PHONY: demo test test-all test-report test-engines lint docs fuzz gpu clean
.PHONY: bench bench-criteria bench-comparison bench-refit bench-merging bench-factoring bench-substitution bench-recovery bench-instruction bench-regression bench-streaming bench-ranks bench-scale bench-wide bench-planning bench-evaluating

demo: $(VENV)/.ready
	$(BIN)/moekern demo

# A process more than there are cores, since tests wait too: for the disk, for a kill; eight at most.
WORKERS ?= $(shell $(PYTHON) -c 'import os; print(min(8, 1 + len(os.sched_getaffinity(0))))')

test: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadgroup --benchmark-disable $(PYTEST_FLAGS)

# As test, with what is marked `whole`: every combination of parameters, every family, dear tests. Hours on 2 cores.
test-all: PYTEST_FLAGS = --whole
test-all: test

# The page of `report` in headless Chromium, where there is one (Debian, Ubuntu: apt-get install chromium).
test-report: $(VENV)/.ready
	$(BIN)/python -m pytest -q --whole tests/report tests/cli/test_report.py

# Pruned checkpoints in vLLM, llama.cpp, compressed-tensors and llm-compressor, which go to the folder ENGINES= (10 GB).
# What cannot be installed is named, and its tests skip.
test-engines: $(VENV)/.ready
	tests/engines/setup.sh $(ENGINES) $(BIN)/python
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/engines --engines $(ENGINES)

lint: $(VENV)/.ready
	$(BIN)/ruff check moekern tests bench docs/site.py setup.py
	$(BIN)/ruff format --check moekern tests bench docs/site.py setup.py
	$(BIN)/mypy

# The site of README.md, docs/ and the library's docstrings, in site/; pages load nothing from elsewhere, and
# the search works where they are served: python -m http.server -d site. No warning is let through. The set-up is the
# extra `docs` alone, in a folder of its own, since sources are read and nothing is built.
docs: $(DOCS_VENV)/.ready
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict

bench: $(VENV)/.ready
	$(BIN)/python -m bench.kernels
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.measuring

# Every criterion on the model that ships, three seeds: about twenty minutes. Lines go to OUT=, and are gone on with there.
bench-criteria: $(VENV)/.ready
	mkdir -p $(OUT)
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.criteria --out $(OUT)/criteria.jsonl

# Every way to shrink the model that ships by its experts, on one ruler, three draws of text: an hour and a half.
# Lines go to OUT=, and are gone on with there.
bench-comparison: $(VENV)/.ready
	mkdir -p $(OUT)
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.comparison --demo --out $(OUT)/comparison.jsonl

# What merging experts costs beside dropping them, on the model that ships, three draws of text. Lines go to OUT=.
bench-merging: $(VENV)/.ready
	mkdir -p $(OUT)
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.merging --out $(OUT)/merging.jsonl

# Experts as products of low rank and sparse rows, on the model that ships, three draws of text. Lines go to OUT=.
bench-factoring: $(VENV)/.ready
	mkdir -p $(OUT)
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.factoring --out $(OUT)/factoring.jsonl

# What fitting the experts that stay is worth on the model that ships, three draws of text: half an hour. Lines go to OUT=.
bench-refit: $(VENV)/.ready
	mkdir -p $(OUT)
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.refit --out $(OUT)/refit.jsonl

# What constants in the place of dropped experts are worth on the model that ships, three draws of text: some minutes.
bench-substitution: $(VENV)/.ready
	mkdir -p $(OUT)
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.substitution --out $(OUT)/substitution.jsonl

# What training brings a pruned model back, by what trains; an hour.
bench-recovery: $(VENV)/.ready
	mkdir -p $(OUT)
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.recovery --out $(OUT)/recovery.jsonl

# Tasks without examples, with some, and after training, of the whole model and of pruned ones; an hour.
bench-instruction: $(VENV)/.ready
	mkdir -p $(OUT)
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.instruction --rate 1e-3 --seeds 0 1 2 --out $(OUT)/instruction.jsonl

# Times against the last saved run of this machine, in .benchmarks/, and saves this one.
bench-regression: $(VENV)/.ready
	$(BIN)/python -m pytest -q tests/benchmark/test_run.py -k speed --benchmark-enable --benchmark-autosave --benchmark-compare

# Writes up to 10 GB beside the temporary files and removes them: prune and layer reads against other roads, and at 1T scale.
bench-streaming: $(VENV)/.ready
	$(BIN)/python -m bench.streaming scale
	$(BIN)/python -m bench.streaming dense
	$(BIN)/python -m bench.reading
	$(BIN)/python -m bench.filling

# calibrate in one process and in two, on two cores.
bench-ranks: $(VENV)/.ready
	$(BIN)/python -m bench.ranks

# evaluate with one plan and with eight; writes 2.6 GB beside the temporary files and removes them.
bench-evaluating: $(VENV)/.ready
	$(BIN)/python -m bench.evaluating

# All of calibration's machinery on a 1T model of holes, in 8 GB: ten minutes.
bench-scale: $(VENV)/.ready
	$(BIN)/python -m bench.scale

# calibrate and evaluate on 2M tokens of hidden size 7168 in 8 GB: half an hour, up to 110 GB in the temporary folder.
bench-wide: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.wide

# The command plan on the statistics of a 1T model, every criterion of the routed tier.
bench-planning: $(VENV)/.ready
	$(BIN)/python -m bench.planning

# Mutated headers against the parser and the safetensors library; needs Python 3.11 to 3.13 for atheris.
fuzz: $(VENV)/.ready
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[fuzz]'
	$(BIN)/python -m tests.helpers.fuzz_header -runs=$(RUNS)

# On a machine with CUDA: no network, no build isolation, the Python that is active. Records go to the folder OUT=.
gpu:
	$(PYTHON) setup.py build_ext --inplace
	mkdir -p $(OUT)
	$(PYTHON) -m pytest -q -m gpu tests/kernels
	$(PYTHON) -m bench.kernels --out $(OUT)/kernels.jsonl
	$(PYTHON) -m pytest -q -m gpu tests/model/test_pinned.py tests/model/test_filling.py

$(VENV)/.ready: pyproject.toml constraints.txt setup.py CMakeLists.txt $(wildcard csrc/*.* csrc/*/*.*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "moekern: Python 3.10 or newer is needed, $(PYTHON) is $$($(PYTHON) -V 2>&1 | tail -n 1); try make PYTHON=python3.12"; exit 1; }
	@c++ --version >/dev/null 2>&1 || g++ --version >/dev/null 2>&1 || clang++ --version >/dev/null 2>&1 \
		|| { echo "moekern: a C++17 compiler is needed (Debian, Ubuntu: apt-get install g++)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

$(DOCS_VENV)/.ready: pyproject.toml constraints.txt
	test -x $(DOCS_VENV)/bin/python || $(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt \
		$$(sed -n 's/^docs = \[\(.*\)\].*/\1/p' pyproject.toml | tr -d '",')
	touch $@

clean:
	rm -rf $(VENV) $(DOCS_VENV) site build *.egg-info moekern/_C*.so
