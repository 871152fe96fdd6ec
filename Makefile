# The commands of the README. PYTHON chooses the interpreter, as in: make test PYTHON=python3.12
PYTHON ?= python3
BIN = .venv/bin
DEMO = --data data/demo --checkpoint-dir checkpoint/demo

.PHONY: demo test slow lint bench clean

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --requirement requirements.txt
	touch $@

demo: .venv/installed
	$(BIN)/python prepare.py demo
	$(BIN)/python train.py $(DEMO) --no-resume --minutes 1 --set DEFAULT.width=128 --set train.n_batch=4 --set train.n_cv_epoch=100
	$(BIN)/python valid.py $(DEMO) --dataset valid --output data/demo/predict --csv --iou --save
	$(BIN)/python valid.py $(DEMO) --dataset test --output data/demo/predict/test --csv --save

test: .venv/installed
	$(BIN)/python -m pytest -q

slow: .venv/installed
	$(BIN)/python -m pytest -q -m slow

.venv/compared: .venv/installed benchmarks/requirements.txt
	@missing=0; while read -r line; do case "$$line" in ""|\#*) ;; *) \
	    $(BIN)/pip install --quiet "$$line" || { missing=1; echo "not installed, its column stays empty: $$line"; } ;; esac; \
	done < benchmarks/requirements.txt; test $$missing = 1 || touch $@

bench: .venv/compared
	$(BIN)/python -m benchmarks $(BENCH)

lint: .venv/installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy *.py benchmarks

clean:
	rm -rf data/demo checkpoint/demo .pytest_cache .mypy_cache .ruff_cache
