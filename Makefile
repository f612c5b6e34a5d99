PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
DEMO ?= demo
# Number of processes that run the tests. All tests of a file run in one process, because they share
# fixtures. Test files start in the order of their names. (By default, pytest-xdist would start the
# files with the most tests first.)
WORKERS ?= 2
PARALLEL = -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: demo bench conformance test test-slow test-gpu test-faults test-floors coverage lint clean

# Search on the embedded digits, retrain the found cell, and test it.
demo: $(VENV)/.installed
	rm -rf $(DEMO)
	$(BIN)/python train_search.py --dataset digits --dir $(DEMO) --run_name search \
		--epochs 5 --pop_size 8 --tsize 3 --init_channels 8 --layers 3 --baselines 8
	$(BIN)/python train.py --dataset digits --dir $(DEMO)/search --save digits \
		--init_channels 16 --layers 4 --epochs 14 --batch_size 64 --cutout --cutout_length 2
	$(BIN)/python test_cifar.py --dataset digits --dir $(DEMO)/search/eval-digits-*
	@echo "The search, its report and the found cell: $(DEMO)/search; the retrained network: $(DEMO)/search/eval-digits-*"

# Measure the figures of benchmarks/README.md. This needs an idle machine. One figure needs a
# NAS-Bench-201 table, which you name with TABLE=FILE.
bench: $(VENV)/.installed
	@git log -1 --format='commit %h'
	$(BIN)/python benchmarks/search_s1.py --rounds 3
	$(BIN)/python benchmarks/search_s2.py --rounds 3 $(if $(TABLE),--table $(TABLE))
	$(BIN)/python benchmarks/loader.py
	$(BIN)/python benchmarks/retrain.py
	$(BIN)/python benchmarks/kernels.py

# Compare every convolution, pool and BatchNorm with float64. This takes minutes on the CPU. With
# DEVICE=cuda it runs on a GPU. See docs/conformance.md.
conformance: $(VENV)/.installed
	$(BIN)/python benchmarks/conformance.py --device $(or $(DEVICE),cpu)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(PARALLEL)

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m slow -n $(WORKERS) --dist loadfile

# Run the tests that need a CUDA device. Without a CUDA device these tests are skipped.
test-gpu: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -rs -m cuda

# Inject all faults of tests/test_fault_*.py, and print a table of the outcomes.
test-faults: $(VENV)/.installed-dev
	EVNAS_FAULTS=full $(BIN)/python -m pytest -s -m "slow or not slow" tests/test_fault_*.py

# Run the fast tests with the oldest versions that requirements*.txt allow, in a separate
# environment. This needs Python 3.10 or 3.11, because some of these versions do not exist for newer
# versions of Python.
test-floors: $(VENV)-floors/.installed
	$(VENV)-floors/bin/python -m pytest $(PARALLEL)

# Print the lines that the fast tests do not execute. Lines that are executed only in other processes
# or in slow tests are printed too.
coverage: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(PARALLEL) --cov-report=term-missing:skip-covered \
		$(addprefix --cov=,$(basename $(wildcard *.py)) support reporting nas201)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) $(VENV)-floors $(DEMO)

$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -r requirements.txt
	touch $@

$(VENV)/.installed-dev: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -r requirements-dev.txt
	touch $(VENV)/.installed $@

$(VENV)-floors/.installed: requirements.txt requirements-dev.txt
	rm -rf $(VENV)-floors
	$(PYTHON) -m venv $(VENV)-floors
	sed -n 's/>=/==/p' $^ > $(VENV)-floors/requirements.txt
	$(VENV)-floors/bin/python -m pip install -r $(VENV)-floors/requirements.txt
	touch $@
