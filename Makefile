# make demo: train, export, sample.   make test: every test but the slow ones; make test-all: every test, with Ray.   make test-scale: those of Ray and Triton.   make lint: what CI checks before.   make test-gpu: on an NVIDIA GPU.   make docs: the site, in out/site.
# make bench: the benchmarks in a quarter of an hour (the first time in half), into docs/ and README.md; in full, an hour and a half: make bench QUICK=
VENV ?= .venv
PYTHON ?= python3
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
PY = $(VENV)/bin/python

.PHONY: demo test test-slow test-scale test-all test-gpu lint docs bench clean

$(VENV)/.export: pyproject.toml constraints.txt
	@test -x $(PY) || { echo "making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing what training, export and sampling need (about a minute)"
	@$(PIP) --editable '.[export]'
	@touch $@

$(VENV)/.dev: $(VENV)/.export
	@echo "installing what the tests need"
	@$(PIP) --editable '.[dev]'
	@touch $@

# Ray is large, and needed by the tests of Ray alone: they skip without it.
$(VENV)/.ray: $(VENV)/.dev
	@echo "installing Ray (850 MB)"
	@$(PIP) --editable '.[ray]'
	@touch $@

# $(call timed,TITLE,COMMAND): run it, and note how long it took.
define timed
	@printf '\n== %s\n' '$(1)'; began=$$(date +%s); $(2) && printf '%4d s  %s\n' $$(( $$(date +%s) - began )) '$(1)' >> out/times.txt
endef

demo:
	@mkdir -p out && rm -f out/times.txt
	$(call timed,install,$(MAKE) --no-print-directory $(VENV)/.export)
	$(call timed,train on handwritten digits,$(PY) -m trainer.fit --data digits)
	$(call timed,export and prove,$(PY) -m export.build runs/digits --out out/digits)
	$(call timed,sample the digits,$(PY) -m runtime.sample out/digits --n 80 $(foreach d,0 1 2 3 4 5 6 7 8 9,--label $(d)) --columns 10 --width 640 --out out/digits.png)
	$(call timed,sample the shipped emoji,$(PY) -m runtime.sample bundles/emoji32 --n 54 $(foreach l,0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17,--label $(l)) --columns 9 --width 640 --out out/emoji.png)
	@printf '\nhow long each part took:\n' && cat out/times.txt
	@printf '\nlook at:\n  out/digits.png          ten columns, the digits 0 to 9 in order\n  out/emoji.png           one column per category, rows alternate between the two styles\n  out/digits/report.png   how far ONNX and PyTorch differ\n'

# A worker per core, each with one thread, so that they do not wait for each other. Bytecode is kept, since many tests start processes. A file's tests stay together: they share what it sets up. The order is that of tests/conftest.py.
PYTEST = PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

test: $(VENV)/.dev
	$(PYTEST) -m "not gpu and not slow"

test-slow: $(VENV)/.dev
	$(PYTEST) -m slow

# What needs Ray, or an unpacked Triton server, see docs/scale.md. Triton's client brings libraries of its own, which must not meet Ray's.
test-scale: $(VENV)/.ray
	$(PY) -m pytest -m slow -rs tests/runtime/generate/test_ray.py tests/serve/test_ray.py tests/test_kuberay.py
	PYTHONPATH=$(TRITON_CLIENT) $(PY) -m pytest -m slow -rs tests/export/test_triton.py

# With Ray from the start, so that no test of it is skipped.
test-all: $(VENV)/.ray test test-slow

test-gpu: $(VENV)/.dev
	$(PY) -m pytest -m gpu -rs tests/runtime/backends/nvidia/test_gpu.py

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(PY)
	$(VENV)/bin/lint-imports

$(VENV)/.docs: pyproject.toml constraints.txt
	@test -x $(PY) || { echo "making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing what the site needs"
	@$(PIP) --editable '.[docs]'
	@touch $@

# The site, in out/site: open out/site/index.html. Any warning is an error.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict
	@echo "open out/site/index.html; to search, serve it: $(PY) -m http.server --directory out/site"

# denoising-diffusion-pytorch requires torchvision to read a folder; what else it needs is in the extra.
$(VENV)/.bench: $(VENV)/.export
	@echo "installing the libraries to compare with"
	@$(PIP) --editable '.[bench]'
	@$(PIP) --no-deps denoising-diffusion-pytorch
	@touch $@

QUICK ?= --quick
bench: $(VENV)/.bench
	$(PY) benchmarks/same_work.py $(QUICK) --write
	$(PY) benchmarks/same_quality.py $(QUICK) --write
	$(PY) benchmarks/cold.py $(QUICK) --write
	$(PY) benchmarks/growth.py $(QUICK) --write

clean:
	rm -rf out build *.egg-info
