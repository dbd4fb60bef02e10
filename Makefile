# The one build recipe. `make help` lists what can be made.
PYTHON  ?= python3
VENV    ?= .venv
BUILD   ?= build
CC      ?= cc
CFLAGS  ?= -O3 -g1

BIN      = $(VENV)/bin
READY    = $(VENV)/.ready
PIP      = PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet
WARN     = -Wall -Wextra -Wshadow -Wpointer-arith -Wstrict-prototypes -Wmissing-prototypes -Wundef $(if $(CI),-Werror)
ALL      = -std=c11 -fPIC -ffp-contract=off -fvisibility=hidden -pthread -Iquants -Iruntime $(WARN) $(CFLAGS)
SANITIZE = -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer

SOURCES  = $(wildcard quants/*.c runtime/*.c runtime/cpu/*.c)
OBJECTS  = $(SOURCES:%.c=$(BUILD)/%.o)
CHECKED  = $(SOURCES:%.c=$(BUILD)/asan/%.o)
C_TESTS  = $(patsubst tests/c/%.c,$(BUILD)/asan/tests/%,$(wildcard tests/c/*.c))
X86     := $(shell $(CC) -dM -E - </dev/null | grep -c __x86_64__)

.DEFAULT_GOAL := all
.PHONY: all run test test-c test-python test-oracle lint lib native wheel clean help

all: $(READY) ## build everything into .venv (editable install)
	@$(MAKE) --no-print-directory native PYTHON=$(BIN)/python

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) --editable '.[test]'
	@touch $@

# ---- trying it ----
SUDOKU = tests/models/sudoku
run: all ## convert the bundled checkpoint and solve a Sudoku, showing the canvas as it settles
	$(BIN)/dg-convert $(SUDOKU) -o $(BUILD)/sudoku.gguf --type q8_0 --force
	$(BIN)/dg-run $(BUILD)/sudoku.gguf -f $(SUDOKU)/puzzle.txt --visual

# ---- proving it ----
test: test-c test-python ## the whole test suite: C under ASan and UBSan, then Python

test-c: $(C_TESTS) ## the C tests alone, under AddressSanitizer and UBSan
	@set -e; for t in $(C_TESTS); do $$t; done

test-python: all ## the Python tests alone
	$(BIN)/python -m pytest -m "not oracle"

test-oracle: all ## compare logits and canvases with transformers, live (installs torch)
	$(PIP) --editable '.[test,oracle]'
	$(BIN)/python -m pytest -m oracle

lint: all ## ruff over the Python code
	$(BIN)/ruff check .

# ---- the library and the Python extension ----
lib: $(BUILD)/libdgemma.a ## the C library alone

$(BUILD)/libdgemma.a: $(OBJECTS)
	@rm -f $@
	ar rcs $@ $^

$(BUILD)/%.o: %.c
	@mkdir -p $(@D)
	$(CC) $(ALL) -MMD -MP -c $< -o $@

# One file per instruction set, chosen at run time.
AVX2 = $(if $(filter-out 0,$(X86)),-mavx2 -mfma)
$(BUILD)/runtime/cpu/avx2.o $(BUILD)/asan/runtime/cpu/avx2.o: ALL += $(AVX2)

# The public header is the cdef. NATIVE is where the extension goes; setuptools names it.
NATIVE ?= runtime/dgemma/_native.abi3.so
native: $(NATIVE)

$(BUILD)/native.c: $(wildcard runtime/*.def quants/*.def) runtime/dg.h quants/formats.h
	@mkdir -p $(@D)
	$(CC) -E -P -DDG_CFFI -Iquants -Iruntime runtime/dg.h > $(BUILD)/native.cdef
	@echo '#include "dg.h"' > $(BUILD)/native.prelude
	$(PYTHON) -m cffi.gen_src read-sources dgemma._native $(BUILD)/native.cdef $(BUILD)/native.prelude $@ >/dev/null

PYTHON_INCLUDE ?= -I$(shell $(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))')
$(NATIVE): $(BUILD)/native.c $(BUILD)/libdgemma.a
	@mkdir -p $(@D)
	$(CC) $(ALL) -Wno-missing-field-initializers -Wno-missing-prototypes $(PYTHON_INCLUDE) -shared $< $(BUILD)/libdgemma.a -lm -o $@

$(BUILD)/asan/%.o: %.c
	@mkdir -p $(@D)
	$(CC) $(ALL) $(SANITIZE) -MMD -MP -c $< -o $@

.SECONDARY: $(CHECKED)
$(BUILD)/asan/tests/%: tests/c/%.c tests/c/check.h $(CHECKED)
	@mkdir -p $(@D)
	$(CC) $(ALL) $(SANITIZE) -Itests/c $< $(CHECKED) -lm -o $@

-include $(OBJECTS:.o=.d) $(CHECKED:.o=.d)

# ---- shipping it ----
wheel: $(READY) ## a wheel and a source archive in dist/
	$(BIN)/python -m build --outdir dist

clean: ## remove what was built
	rm -rf $(BUILD) dist $(NATIVE) *.egg-info

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | awk -F'\t' '{printf "make %-13s %s\n", $$1, $$2}'
