# make demo: the whole job on a small drawn data set. make test: all tests. make faults: what can go wrong in training,
# at length. make fuzz: any bytes into the readers of files, SECONDS each. Each sets everything up first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin/python
READY := $(VENV)/.ready
DEMO := logs/demo
SECONDS ?= 600

.PHONY: demo test faults fuzz lint clean

demo: $(READY)
	$(BIN) tools/make_demo_data.py
	rm -rf $(DEMO)
	$(BIN) train.py --devkit VOCdevkit --train-sets Demo/train --val-sets Demo/val --classes VOCdevkit/Demo/classes.txt \
		--input-size 320 320 --epochs 11 --eval-every 4 --run-dir $(DEMO)
	$(BIN) eval.py --weights $(DEMO)/best.safetensors --sets Demo/test --out $(DEMO)/eval
	$(BIN) predict.py "VOCdevkit/Demo/JPEGImages/test_00*.jpg" --weights $(DEMO)/best.safetensors --out $(DEMO)/predictions
	@$(BIN) -c "import json; print('demo: mAP50 %.3f' % json.load(open('$(DEMO)/eval/metrics.json'))['coco']['AP50'], \
		'(curves $(DEMO)/curves.png, report $(DEMO)/eval, pictures with boxes $(DEMO)/predictions)')"

test: $(READY)
	$(BIN) -m ruff check .
	$(BIN) -m ruff format --check .
	$(BIN) -m pytest

faults: $(READY)
	$(BIN) tests/stress/faults.py

fuzz: $(READY)
	$(BIN) tests/stress/fuzz.py --seconds $(SECONDS)

# OpenCV's usual package needs libGL; where a machine has none, the one without windows takes its place
$(READY): requirements.txt requirements-export.txt requirements-dev.txt constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed')"
	test -x $(BIN) || $(PYTHON) -m venv $(VENV)
	$(BIN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt -c constraints.txt
	$(BIN) -c "import cv2" 2>/dev/null || { $(BIN) -m pip uninstall --quiet --yes opencv-python && \
		$(BIN) -m pip install --quiet --disable-pip-version-check opencv-python-headless -c constraints.txt; }
	touch $@

clean:
	rm -rf $(VENV) $(DEMO) VOCdevkit/Demo
