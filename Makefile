# make setup   the environment alone
# make demo    train, prune and evaluate on real images
# make test    lint and the test suite, in ten minutes on two cores
# make test-long   its longest tests, of every recipe and detector; CI runs both
# make docs    these pages and the API reference, as a site in site/
#
# PYTHON=python3.12 chooses the interpreter, VENV=DIR the environment.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test test-long runtimes others docs lint clean

setup: $(STAMP)

# opencv-python needs a desktop's libraries (libGL and others), which a server or a
# container may lack; the headless build of the same version needs none of them.
$(STAMP): requirements.txt requirements-demo.txt requirements-dev.txt setup.py
	@$(PYTHON) -c "import sys; ok = (3, 10) <= sys.version_info < (3, 13); \
	  ok or sys.exit('error: Python 3.10 to 3.12 is needed, this is ' + sys.version \
	  + '; choose another with make PYTHON=python3.12')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	@echo "installing: 2 to 5 minutes and 7 GB, most of it torch"
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	@$(BIN)/python -c "import cv2" 2>/dev/null || { \
	  version=$$($(BIN)/python -m pip show opencv-python | sed -n 's/^Version: //p'); \
	  echo "opencv-python cannot load here: using opencv-python-headless $$version"; \
	  $(BIN)/python -m pip uninstall --quiet --yes opencv-python opencv-python-headless; \
	  $(BIN)/python -m pip install --quiet --no-deps "opencv-python-headless==$$version"; }
	@touch $@

demo: setup
	$(BIN)/python tools/nuclei_demo.py

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

# A process per core, up to four (2 GB each), each with one thread; one that dies ends
# the run, which would wait for it for ever. What runs exported files has processes of
# its own, beside the rest: near the thread pools of their runtimes a training has died.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 \
  --max-worker-restart 0 --dist loadfile --no-loadscope-reorder
RUNTIMES := tests/export tests/runtime tests/tools/test_export.py \
  tests/benchmarks/test_runtimes.py tests/run/test_demo.py tests/run/test_predictors.py

MARK := not long

test: lint
	$(MAKE) --jobs 2 runtimes others

test-long: setup
	$(MAKE) --jobs 2 MARK=long runtimes others

runtimes: setup
	$(PYTEST) -n 1 -m "$(MARK)" $(RUNTIMES)

others: setup
	$(PYTEST) -m "$(MARK)" $(RUNTIMES:%=--ignore=%)

# The variable silences the theme's note on MkDocs 2, which is not what we pin.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

clean:
	rm -rf build dist site *.egg-info .pytest_cache .ruff_cache .hypothesis
