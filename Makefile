# make demo     train, evaluate and predict on a small generated dataset (about 6 minutes on two cores)
# make test     ruff and all tests, in WORKERS processes
# make stress   long versions of the stress tests; random files for SECONDS per file reader
# make clean    delete the virtual environment and the demo
# Every target except clean first installs the dependencies into .venv.
PYTHON ?= python3
WORKERS ?= 2
SECONDS ?= 600
VENV := .venv
BIN := $(VENV)/bin/python
PIP_INSTALL := $(BIN) -m pip install --disable-pip-version-check -c constraints.txt
# Whole test files go to the workers, so that the fixtures of a file are made once; tests/conftest.py sorts the files.
PYTEST := $(BIN) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
READY := $(VENV)/.ready
DEMO := logs/demo

.PHONY: demo test stress clean

demo: $(READY)
	$(BIN) tools/make_demo_data.py
	rm -rf $(DEMO)
	$(BIN) train.py --devkit VOCdevkit --train-sets Demo/train --val-sets Demo/val --classes VOCdevkit/Demo/classes.txt \
		--input-size 320 320 --epochs 11 --eval-every 4 --run-dir $(DEMO)
	$(BIN) eval.py --weights $(DEMO)/best.safetensors --sets Demo/test --out $(DEMO)/eval
	$(BIN) predict.py "VOCdevkit/Demo/JPEGImages/test_00*.jpg" --weights $(DEMO)/best.safetensors --out $(DEMO)/predictions
	@$(BIN) -c "import json; print('demo: mAP50 %.3f' % json.load(open('$(DEMO)/eval/metrics.json'))['coco']['AP50'], \
		'(curves: $(DEMO)/curves.png, report: $(DEMO)/eval, annotated images: $(DEMO)/predictions)')"

test: $(READY)
	$(BIN) -m ruff check .
	$(BIN) -m ruff format --check .
	$(PYTEST)

stress: $(READY)
	$(PYTEST) tests/stress --long --seconds-per-reader $(SECONDS) --durations 0

# opencv-python needs libGL; on a machine without it, the headless package replaces it.
$(READY): requirements.txt requirements-export.txt requirements-dev.txt constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is required')"
	@echo "Installing the dependencies into $(VENV); the first time takes several minutes"
	test -x $(BIN) || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) -r requirements-dev.txt
	$(BIN) -c "import cv2" 2>/dev/null || { $(BIN) -m pip uninstall --yes opencv-python && \
		$(PIP_INSTALL) opencv-python-headless; }
	@touch $@

clean:
	rm -rf $(VENV) $(DEMO) VOCdevkit/Demo
