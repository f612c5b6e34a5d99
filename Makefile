PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
DEMO ?= demo
# Tests run in this many processes. The tests of a file stay in one process, because they share
# fixtures. Files come in the order of their names, not by how many tests they have.
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

# Measure the figures of benchmarks/README.md. Needs an idle machine. TABLE=FILE names a
# NAS-Bench-201 table, which one row needs.
bench: $(VENV)/.installed
	@git log -1 --format='commit %h'
	$(BIN)/python benchmarks/search_s1.py --rounds 3
	$(BIN)/python benchmarks/search_s2.py --rounds 3 $(if $(TABLE),--table $(TABLE))
	$(BIN)/python benchmarks/loader.py
	$(BIN)/python benchmarks/retrain.py
	$(BIN)/python benchmarks/kernels.py

# Compare every primitive with float64, on the CPU or with DEVICE=cuda on a GPU. Takes minutes; see
# docs/conformance.md.
conformance: $(VENV)/.installed
	$(BIN)/python benchmarks/conformance.py --device $(or $(DEVICE),cpu)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(PARALLEL)

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m slow -n $(WORKERS) --dist loadfile

# Run the tests that need a CUDA device. They skip without one.
test-gpu: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -rs -m cuda

# Inject every fault that tests/test_fault_*.py know, and print a table of the outcomes.
test-faults: $(VENV)/.installed-dev
	EVNAS_FAULTS=full $(BIN)/python -m pytest -s -m "slow or not slow" tests/test_fault_*.py

# Run the fast tests with the oldest versions that requirements*.txt allow, in their own
# environment. Needs Python 3.10 or 3.11, because some of these versions were never built for newer
# ones.
test-floors: $(VENV)-floors/.installed
	$(VENV)-floors/bin/python -m pytest $(PARALLEL)

# Print which lines the fast tests do not run. Lines that run in other processes or in slow tests
# count as not run.
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
