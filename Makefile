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

# Sources that are compiled once per instruction set of isa.def, with its flags, and chosen at run time.
# isa_list: what the argument makes of each line of it, for the compiler's target.
isa_list = $(shell $(CC) -E -P -x c -D'DG_ISA(name,float_code,products,flags,usable)=$(1)' runtime/cpu/isa.def)
isa_flags = $(shell $(CC) -E -P -x c -D'DG_ISA(name,float_code,products,flags,usable)=name flags' runtime/cpu/isa.def | sed -n 's/^$(1) "\(.*\)"/\1/p')
PER_ISA     := $(wildcard runtime/cpu/simd_*.c)
ISAS        := $(call isa_list,name)
PRODUCTS    := $(filter-out runtime/cpu/gemm_head.c,$(wildcard runtime/cpu/gemm_*.c))
ISA_OBJECTS := $(foreach isa,$(sort $(call isa_list,float_code)),$(PER_ISA:%.c=%.$(isa).o)) \
               $(patsubst %,runtime/cpu/gemm_%.o,$(call isa_list,products.name))
define ISA_RULES
$(BUILD)/%.$(1).o: %.c
	@mkdir -p $$(@D)
	$$(CC) $$(ALL) -DISA=$(1) $(2) -MMD -MP -c $$< -o $$@
$(BUILD)/asan/%.$(1).o: %.c
	@mkdir -p $$(@D)
	$$(CC) $$(ALL) -DISA=$(1) $(2) $$(SANITIZE) -MMD -MP -c $$< -o $$@
endef
$(foreach isa,$(ISAS),$(eval $(call ISA_RULES,$(isa),$(call isa_flags,$(isa)))))

SOURCES  = $(filter-out $(PER_ISA) $(PRODUCTS),$(wildcard quants/*.c runtime/*.c runtime/cpu/*.c))
OBJECTS  = $(SOURCES:%.c=$(BUILD)/%.o) $(ISA_OBJECTS:%=$(BUILD)/%)
CHECKED  = $(SOURCES:%.c=$(BUILD)/asan/%.o) $(ISA_OBJECTS:%=$(BUILD)/asan/%)
C_TESTS  = $(patsubst tests/c/%.c,$(BUILD)/asan/tests/%,$(wildcard tests/c/*.c))

.DEFAULT_GOAL := all
.PHONY: native $(shell sed -n 's/^\([a-z-]*\):.*\#\#.*/\1/p' $(MAKEFILE_LIST))

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

# Tests of the operations elsewhere: $(call elsewhere,folder,compiler,flags,what runs a program,tests). The tests themselves
# at -O1: gcc 12 for Arm stops with an internal error above it.
elsewhere = set -e; $(MAKE) --no-print-directory BUILD=$(1) CC='$(2)' CFLAGS='$(3)' $(1)/libdgemma.a; \
	for t in $(5); do $(2) $(ALL) $(3) -O1 -Itests/c tests/c/$$t.c $(1)/libdgemma.a -lm -o $(1)/$$t; $(4) $(1)/$$t; done

test-neon: ## the operations on 64-bit Arm, emulated (packages gcc-aarch64-linux-gnu, qemu-user)
	@$(call elsewhere,$(BUILD)/neon,aarch64-linux-gnu-gcc,-O2 -static,qemu-aarch64 -cpu max,ops gemm)

test-emulated: ## products of the x86 sets that this processor may lack, emulated (package libsimde-dev)
	@$(call elsewhere,$(BUILD)/emulated,$(CC) -DDG_EMULATE,-O1 -Wno-psabi,,gemm)

test-python: all ## the Python tests alone
	$(BIN)/python -m pytest -m "not oracle"

test-oracle: all ## compare logits and canvases with transformers, live (installs torch)
	$(PIP) --editable '.[test,oracle]'
	$(BIN)/python -m pytest -m oracle

# The figures of the README that dg-bench makes; their JSON stays under tests/bench, where a slower commit shows.
BENCH_CACHE ?= $(HOME)/.cache/dgemma
BENCH = $(BIN)/dg-bench --shape 26b-a4b --cache $(BENCH_CACHE)
bench: all ## time the real shapes with random weights: 6 layers and all 30 (20 GB of disk, a quarter of an hour)
	$(BENCH) --layers 6 --canvases 2 --json tests/bench/26b-a4b-6-layers.json
	$(BENCH) --canvases 2 --json tests/bench/26b-a4b-30-layers.json

bench-ram: all ## what RAM budgets of 4, 8 and 12 GB make of a step, beside a plain map; writes a file of 16.8 GB to the cache
	$(BIN)/python tests/measure_ram.py --cache $(BENCH_CACHE)

bench-convert: all ## how fast dg-convert is and how much memory it takes, on 2 GiB in the real shapes
	$(BIN)/python tests/measure_convert.py

bench-quality: all ## the README's quality tables: every type and setting of the bundled checkpoint, into tests/bench
	$(BIN)/python tests/measure_quality.py

bench-types: all ## types, sizes, fidelity and solved Sudokus of every --type, with and without calibration
	$(BIN)/python tests/measure_types.py
	$(BIN)/python tests/measure_types.py --random

lint: all ## ruff over the Python code, mypy over the package
	$(BIN)/ruff check .
	$(BIN)/mypy

# ---- the library and the Python extension ----
lib: $(BUILD)/libdgemma.a ## the C library alone

$(BUILD)/libdgemma.a: $(OBJECTS)
	@rm -f $@
	ar rcs $@ $^

$(BUILD)/%.o: %.c
	@mkdir -p $(@D)
	$(CC) $(ALL) -MMD -MP -c $< -o $@

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
